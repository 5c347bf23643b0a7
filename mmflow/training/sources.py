"""Where the batches of a training come from, and those of its validations."""

from __future__ import annotations

import torch
import torch.distributed as dist
from tokenizers import Tokenizer

from mmflow.dataset.opened import open_dataset
from mmflow.loading.batches import Reading
from mmflow.loading.config import LoaderConfig
from mmflow.loading.loader import START, Loader, TaskLoader
from mmflow.loading.opening import held_out_loader, open_loader
from mmflow.loading.plan import LoaderState
from mmflow.training.best import Best
from mmflow.training.job import TrainingJob
from mmflow.training.tasks import Task
from mmflow.training.validation import HeldOut, Validation


def open_source(
    job: TrainingJob,
    tokenizer: Tokenizer,
    device: torch.device,
    state: LoaderState,
    *,
    image_pixels: int,
    readings: tuple[Reading, ...] = (),
) -> Loader | TaskLoader:
    """This rank's batches from `state` on: pictures of `image_pixels`, texts also as the `readings` have them."""
    loaders = [
        _open(
            job,
            task,
            task.loader,
            tokenizer,
            device,
            global_batch_size=job.training.global_batch_size,
            image_pixels=image_pixels,
            stored_views=job.stored_views,
            readings=readings,
            state=state,
        )
        for task in job.tasks
    ]
    return TaskLoader(loaders, [each.weight for each in job.several], state) if job.several else loaders[0]


def open_validation(
    job: TrainingJob, tokenizer: Tokenizer, device: torch.device, total_steps: int
) -> Validation | None:
    """The validations of a training; None where the recipe asks for none."""
    config, kept = job.training.validation, job.training.checkpoints
    if config is None:
        return None
    step_size, micro = job.training.global_batch_size, job.training.micro_batch_size
    size = config.batch_size or min(step_size, micro * job.training.least_workers if micro else step_size)
    size = min(size, config.max_samples)  # what is beyond is padding
    held_out = [
        HeldOut(
            task=number,
            name=task.name,
            share=task.weight,
            objectives=task.objectives,
            loader=_open(
                job,
                task,
                held_out_loader(task.loader, config.split),
                tokenizer,
                device,
                global_batch_size=min(size, open_dataset(task.dataset or job.dataset).samples(config.split)),
                image_pixels=job.model.image_pixels,
            ),
        )
        for number, task in enumerate(job.tasks)
    ]
    best = Best(kept.best_metric, highest=kept.best_is_highest, least_gain=config.least_gain, patience=config.patience)
    return Validation(
        config,
        held_out,
        best,
        keeps_best=kept.keep_best > 0,
        averaged=job.training.ema_decay is not None,
        last_step=total_steps,
    )


def _open(
    job: TrainingJob,
    task: Task,
    config: LoaderConfig,
    tokenizer: Tokenizer,
    device: torch.device,
    *,
    global_batch_size: int,
    image_pixels: int,
    stored_views: int = 0,
    readings: tuple[Reading, ...] = (),
    state: LoaderState = START,
) -> Loader:
    return open_loader(
        config,
        open_dataset(task.dataset or job.dataset),
        tokenizer,
        global_batch_size=global_batch_size,
        image_pixels=image_pixels,
        max_tokens=job.model.max_tokens,
        seed=job.seed,
        reads_text=bool(job.model.text or job.model.decoder or job.teachers),
        classes=job.classes,
        stored_views=stored_views,
        readings=readings,
        cores=job.training.cpus_per_worker,
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        device=device,
        state=state,
    )
