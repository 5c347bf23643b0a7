"""The teacher cache: a Ray Data job that embeds stored augmentations of every sample of a split, a file a shard.

A file appears whole under the name of its shard, so one that is there is done, and a killed job goes on with those
that are missing. What the cache is made of (dataset, teacher, views) is its identity: another teacher has another.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from mmflow.core.artifacts import Stage, content_hash
from mmflow.core.errors import MmflowError, RecipeError
from mmflow.core.progress import Report
from mmflow.core.storage import exists, publish
from mmflow.dataset.opened import open_dataset
from mmflow.learning.cached import DTYPES, KIND, checksum, file_uri, open_rows
from mmflow.learning.distillation.config import CacheConfig
from mmflow.loading.batches import ViewSettings
from mmflow.loading.config import LoaderConfig
from mmflow.loading.opening import views_of
from mmflow.models.package import load_package, read_package
from mmflow.training.job import TeacherPackage, views_of_teacher

# Shapes: N samples of a shard, V stored views of each, E the teacher's width of the shared space.

BATCH_SIZE = 256  # rows embedded at a time
OF_VIEWS = ("seed", "image_pixels", "max_tokens", "language_weights", "frames", "text", "truncation", "stored_views")


@dataclass(frozen=True, kw_only=True)
class CacheJob:
    """What is cached; plain data, so that it travels to other machines."""

    key: str  # the recipe's, for errors
    dataset: str  # URI
    split: str
    package: str  # URI of the teacher's
    loader: LoaderConfig
    views: ViewSettings  # those of the student's loader, in the teacher's size and words
    precision: str


def with_caches(
    packages: Sequence[TeacherPackage],
    *,
    key: str,
    cache: CacheConfig,
    dataset: str,
    loader: LoaderConfig,
    tokenizer: Tokenizer,
    max_tokens: int,
    seed: int,
    workspace: str,
    num_workers: int,
    cpus_per_worker: int,
    progress: Report,
) -> tuple[TeacherPackage, ...]:
    """The teachers with a cache for each dataset of a stage, built now where it is not there. Ray must be initialised.

    `tokenizer`, `max_tokens` and `seed` are the student's. Raises RecipeError for a teacher without embeddings.
    """
    datasets = [(dataset, loader.split)]
    datasets += [(each.uri, each.split) for each in (loader.mixture.datasets if loader.mixture else ())]
    found = []
    for each in packages:
        views = views_of(loader, image_pixels=0, max_tokens=max_tokens, seed=seed)
        views = views_of_teacher(views, read_package(each.package), tokenizer)
        uris = []
        for uri, split in datasets:
            job = CacheJob(
                key=key,
                dataset=uri,
                split=split,
                package=each.package,
                loader=loader,
                views=replace(views, stored_views=cache.augmentations),
                precision=cache.precision,
            )
            stage = cache_stage(job, num_workers=num_workers, cpus_per_worker=cpus_per_worker, progress=progress)
            uris.append(stage.run(workspace).uri)
        found.append(replace(each, caches=tuple(uris)))
    return tuple(found)


def cache_stage(job: CacheJob, *, num_workers: int, cpus_per_worker: int, progress: Report) -> Stage:
    """What builds the cache of a teacher's package for one split of a dataset; Ray must be initialised when it runs."""
    settings = {name: getattr(job.views, name) for name in OF_VIEWS} | {
        "augment": job.views.augment.model_dump(mode="json"),
        "split": job.split,
        "precision": job.precision,
    }
    inputs = {"dataset": open_dataset(job.dataset).fingerprint, "teacher": read_package(job.package).digest}
    build = partial(_write, job, num_workers, cpus_per_worker, progress)
    return Stage(name=KIND, kind=KIND, version=1, settings=settings, inputs=inputs, build=build)


def _write(job: CacheJob, num_workers: int, cpus_per_worker: int, progress: Report, uri: str) -> Mapping[str, Any]:
    teacher, data = read_package(job.package), open_dataset(job.dataset)
    model = load_package(teacher).model
    if model.scale is None or model.embedding_width is None:
        raise RecipeError(
            f"{job.key}: {job.package} gives no embeddings to store; leave cache out, or teach by another model"
        )
    shards = [shard for shard in data.shards(job.split) if shard.samples]
    missing = [number for number, shard in enumerate(shards) if not exists(file_uri(uri, shard.name))]
    done = len(shards) - len(missing)
    progress(done, len(shards), "shards")
    for _ in _embedded(job, uri, missing, num_workers, cpus_per_worker) if missing else ():
        done += 1
        progress(done, len(shards), "shards")
    shape = (job.views.stored_views, 2, model.embedding_width)
    files = []
    for shard in shards:
        rows = open_rows(file_uri(uri, shard.name))
        if rows.shape != (shard.samples, *shape):
            raise MmflowError(
                f"{file_uri(uri, shard.name)}: {rows.shape} for {shard.samples} samples; delete it and rerun"
            )
        files.append({"name": shard.name, "checksum": checksum(rows)})
    return {
        "fingerprint": content_hash([files, job.precision]),
        "dataset": data.fingerprint,
        "teacher": teacher.digest,
        "precision": job.precision,
        "width": model.embedding_width,
        "logit_scale": float(model.scale().logit_scale.detach()),
        "files": files,
    }


def _embedded(job: CacheJob, uri: str, shards: Sequence[int], num_workers: int, cpus_per_worker: int) -> Iterator[Any]:
    """An item for each shard, by its ordinal, as soon as its file is there."""
    import ray

    num_actors = min(num_workers, len(shards))
    accelerated = ray.cluster_resources().get("GPU", 0) >= num_actors  # type: ignore[no-untyped-call]
    work = ray.data.from_items([{"shard": number} for number in shards], override_num_blocks=len(shards)).map_batches(
        CacheShards,
        fn_constructor_args=(uri, job),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=num_actors),
        num_cpus=cpus_per_worker,
        num_gpus=1 if accelerated else None,
    )
    yield from work.iter_rows()


class CacheShards:
    """A Ray Data actor: it loads the teacher once and embeds whole shards."""

    def __init__(self, uri: str, job: CacheJob) -> None:
        import ray

        from mmflow.dataset.cache import node_cache
        from mmflow.dataset.reader import Reader

        self.uri, self.views, self.precision = uri, job.views, job.precision
        self.loaded = load_package(read_package(job.package))
        # An actor that was given no accelerator sees those of the others.
        self.loaded.model.to("cuda" if ray.get_gpu_ids() else "cpu")
        self.reader = Reader(
            open_dataset(job.dataset), job.split, node_cache(job.loader.cache), frames=job.views.frames > 0
        )

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Embed the shards of a batch of {"shard"}, their ordinals, and hand the batch on."""
        for shard in batch["shard"].tolist():
            rows = self.rows(shard)
            with publish(file_uri(self.uri, self.reader.shards[shard].name)) as stream:
                np.save(stream, rows, allow_pickle=False)
        return batch

    def rows(self, shard: int) -> NDArray[Any]:
        """What is stored of a shard, (N, V, 2, E). A sample that is to be left out of batches is stored as zeros."""
        import torch

        real, stored = DTYPES[self.precision]
        num_samples = self.reader.shards[shard].samples
        width = self.loaded.config.embedding_width or 0
        found_NV2E = torch.zeros(num_samples, self.views.stored_views, 2, width, dtype=real)
        for view in range(self.views.stored_views):
            for first in range(0, num_samples, BATCH_SIZE):
                rows = np.arange(first, min(first + BATCH_SIZE, num_samples))
                kept, embeddings_2RE = self._embed(shard, rows, view)
                found_NV2E[torch.from_numpy(rows)[kept], view] = embeddings_2RE[:, kept].transpose(0, 1).to(real)
        bits = found_NV2E.view(torch.uint16) if self.precision == "bf16" else found_NV2E
        return bits.numpy().astype(stored, copy=False)

    def _embed(self, shard: int, rows: NDArray[np.int64], view: int) -> tuple[Any, Any]:
        """Which of some rows (R,) are real, and their image and text embeddings (2, R, E) on the CPU."""
        import torch

        from mmflow.loading.batches import assemble, load_slots, normalise
        from mmflow.loading.plan import LoaderState, Slots
        from mmflow.loading.tokens import special_tokens

        zeros = np.zeros_like(rows)
        slots = Slots(dataset=zeros, shard=zeros + shard, row=rows, epoch=zeros + view, real=np.ones(len(rows), bool))
        side, frames = self.views.image_pixels, max(1, self.views.frames)
        pixels = np.empty((len(rows), frames, side, side, 3), np.uint8)
        tokenizer, config, model = self.loaded.tokenizer, self.loaded.config, self.loaded.model
        part = load_slots([self.reader], tokenizer, self.views, slots, pixels)
        batch = assemble(
            [part], pixels, LoaderState(), clips=self.views.frames > 0, pad_id=special_tokens(tokenizer).pad
        )
        with torch.inference_mode():
            shown = batch.map_tensors(lambda each: each.to(next(model.parameters()).device))
            image = model.encode_image(normalise(shown.pixels, config.pixel_mean, config.pixel_std), shown.frame_mask)
            text = model.encode_text(shown.token_ids, shown.token_mask)
            return batch.real, torch.stack((model.embed_image(image), model.embed_text(text))).cpu()
