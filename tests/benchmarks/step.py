"""A training step: mmflow's loop with its engine, compared with open_clip's own loop and with the bare step.

All three train the same module on the same batches with the same optimizer, so that only what stands around forward,
backward and step differs. Batches are at hand: what a loader costs is measured elsewhere.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from tests.benchmarks.measure import CORES, ROOT, SHARE, call, rounds
from tests.benchmarks.table import Row, faster
from tests.benchmarks.training import engine_of, learner_of, random_batch

QUICKSTART = ROOT / "pipelines" / "quickstart.yaml"
WARM_STEPS, STEPS = 4, max(2, round(SHARE * 24))
NUM_BATCHES = 4  # gone through again and again
TOKENS = 12
LOG_EVERY = 10
OVERHEAD_SHARE = 0.97  # of the bare loop's rate: an overhead of 3%
PEERS = ()
VERSIONS = ("torch", "deepspeed", "open-clip-torch", "transformers")


def run() -> list[Row]:
    """Samples a second of the quickstart's teacher, fp32, one process on all cores."""
    programs = {name: partial(call, f"tests.benchmarks.step:{name}") for name in ("ours", "open_clip", "bare")}
    found = rounds({name: partial(_rate, program) for name, program in programs.items()})
    note = f"the quickstart's teacher and batch, fp32, one process, {CORES} threads"
    return [
        faster("training step", found["ours"], "open_clip's train_one_epoch", found["open_clip"], goal=1, note=note),
        faster("training step", found["ours"], "bare forward, backward, step", found["bare"], goal=OVERHEAD_SHARE,
               note=note),
    ]  # fmt: skip


def _rate(program: Callable[[], float]) -> float:
    return float(program())


# --- contestants, each called in a process of its own; each returns samples a second ----------------------------------


def ours() -> float:
    """`training.loop.TrainingLoop` with a DeepSpeed engine, of one rank."""
    import torch.distributed as dist

    from mmflow.loading.plan import LoaderState
    from mmflow.training.config import GuardsConfig, TrainingConfig
    from mmflow.training.guards import Guards
    from mmflow.training.journal import Journal
    from mmflow.training.loop import Due, TrainingLoop

    training = TrainingConfig.model_validate(_section()["training"])
    engine = engine_of(_learner(), training.model_copy(update={"precision": "fp32"}))
    clock = Clock(_batches())
    with tempfile.TemporaryDirectory() as directory:
        journal = Journal(Path(directory) / "journal.jsonl")
        loop = TrainingLoop(
            engine=engine,
            total_steps=WARM_STEPS + STEPS,
            log_every=LOG_EVERY,
            due=Due(every_steps=10_000, every_minutes=None),
            save=lambda *_: None,
            guards=Guards(GuardsConfig()),
            journal=journal,
            shard_name=lambda dataset, shard: "",
        )
        loop.run(iter(clock), first_step=0, state=LoaderState())
        seconds = clock.seconds()
        journal.close()
    dist.destroy_process_group()
    return training.global_batch_size * STEPS / seconds


def open_clip() -> float:
    """open_clip's loop over the same module, with the outputs of open_clip's models."""
    import argparse

    import torch

    _stand_in_for_torchvision()
    from open_clip.loss import ClipLoss
    from open_clip_train.train import train_one_epoch
    from torch import Tensor, nn

    from mmflow.training.config import TrainingConfig

    torch.set_num_threads(CORES)
    training = TrainingConfig.model_validate(_section()["training"])
    learner = _learner()

    class AsOpenClip(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.learner = learner
            self.logit_scale = learner.model.scale.logit_scale  # what the loop clamps

        def forward(self, pixels: Tensor, text: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
            batch = text.batch  # type: ignore[attr-defined]
            outputs = learner.outputs(learner.model, learner.config, batch, 1, learner.rows(batch))
            return {
                "image_features": outputs.image_embedding,
                "text_features": outputs.text_embedding,
                "logit_scale": outputs.scale.logit_scale.exp(),
            }

    class Text:
        """A batch that is already on the device to which the loop moves it."""

        def __init__(self, batch: Any) -> None:
            self.batch = batch

        def to(self, **_: Any) -> Text:
            return self

    class Loader:
        num_batches = WARM_STEPS + STEPS
        num_samples = num_batches * training.global_batch_size

        def __iter__(self) -> Iterator[tuple[Tensor, Text]]:
            return ((batch.pixels[:1].float(), Text(batch)) for batch in clock)

    clock = Clock(_batches())
    arguments = argparse.Namespace(
        device="cpu", precision="fp32", distill=False, accum_freq=1, skip_scheduler=True, horovod=False, wandb=False,
        grad_clip_norm=training.optimizer.gradient_clipping, log_every_n_steps=LOG_EVERY, world_size=1, rank=0,
        batch_size=training.global_batch_size, local_rank=0, distributed=False, log_local=False,
    )  # fmt: skip
    data = {"train": argparse.Namespace(set_epoch=lambda epoch: None, dataloader=Loader())}
    train_one_epoch(AsOpenClip(), data, ClipLoss(), 0, _adamw(learner, training), None, None, None, arguments)
    return training.global_batch_size * STEPS / clock.seconds()


def _stand_in_for_torchvision() -> None:
    """torchvision has no build for a CPU's torch; open_clip imports it for its towers and transforms alone, which are
    not used here, and ftfy for its tokenizer."""
    from unittest.mock import MagicMock

    from transformers.utils import is_torchvision_available

    is_torchvision_available()  # transformers caches the answer, and must not see the stand-in
    for module in ("torchvision", "torchvision.ops", "torchvision.ops.misc", "torchvision.transforms",
                   "torchvision.transforms.functional", "ftfy"):  # fmt: skip
        sys.modules[module] = MagicMock()


def bare() -> float:
    """Forward, backward, clipping and step, and nothing else."""
    import torch

    from mmflow.training.config import TrainingConfig

    torch.set_num_threads(CORES)
    training = TrainingConfig.model_validate(_section()["training"])
    learner = _learner()
    optimizer = _adamw(learner, training)
    clock = Clock(_batches())
    for batch in clock:
        loss, _ = learner(batch, 1)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learner.parameters(), training.optimizer.gradient_clipping)
        optimizer.step()
        optimizer.zero_grad()
    return training.global_batch_size * STEPS / clock.seconds()


class Clock:
    """The batches of all steps, and the time between the first one asked for after the warm-up and the end."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches = batches
        self.began = 0.0

    def __iter__(self) -> Iterator[Any]:
        for step in range(WARM_STEPS + STEPS):
            if step == WARM_STEPS:
                self.began = time.perf_counter()
            yield self.batches[step % NUM_BATCHES]

    def seconds(self) -> float:
        """Since the warm-up ended."""
        return time.perf_counter() - self.began


def _section() -> dict[str, Any]:
    section: dict[str, Any] = yaml.safe_load(QUICKSTART.read_text(encoding="utf-8"))["pretrain"]
    return section


def _learner() -> Any:
    import torch

    torch.set_num_threads(CORES)
    return learner_of(_section()["model"])


def _adamw(learner: Any, training: Any) -> Any:
    import torch

    from mmflow.training.engine import parameter_groups

    settings = training.optimizer
    groups = parameter_groups(learner, settings.learning_rate, settings.weight_decay)
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, settings.beta2))


def _batches() -> list[Any]:
    size, model = _section()["training"]["global_batch_size"], _section()["model"]
    return [
        random_batch(size, model["image_pixels"], TOKENS, model["vocabulary_size"], seed=seed)
        for seed in range(NUM_BATCHES)
    ]
