"""Task `teacher_cache`: a teacher's embeddings of stored augmentations of every sample, as one .npy file per shard.

The dataset, the teacher and the views decide the cache's identity, so another teacher gets another cache.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer

from mmflow.core.artifacts import Stage, content_hash
from mmflow.core.errors import MmflowError, RecipeError
from mmflow.core.progress import Report
from mmflow.core.storage import exists, publish
from mmflow.dataset.cache import node_cache
from mmflow.dataset.format import ShardInfo
from mmflow.dataset.opened import open_dataset
from mmflow.dataset.reader import Reader
from mmflow.inference.runner import Done, Job, Model, Pool, Work, run
from mmflow.learning.cached_embeddings import DTYPES, KIND, checksum, file_uri, open_rows
from mmflow.learning.distillation import CacheConfig
from mmflow.loading.batches import ViewSettings, assemble, load_slots, normalise
from mmflow.loading.config import LoaderConfig
from mmflow.loading.opening import views_of
from mmflow.loading.plan import LoaderState, Slots
from mmflow.loading.tokens import special_tokens
from mmflow.models.package import LoadedModel, load_package, read_package
from mmflow.training.job import TeacherPackage, views_of_teacher

# Shapes: N samples of a shard, R rows of a batch, V stored views of each sample, E the width of the teacher's space.

BATCH_SIZE = 256  # rows embedded at a time
IDENTITY = ("seed", "image_pixels", "max_tokens", "language_weights", "frames", "text", "truncation", "stored_views")
"""The view settings that decide what is stored, beside the augmentation."""


@dataclass(frozen=True, kw_only=True)
class TeacherCache:
    """What is cached: the embeddings of one split by one teacher, (N, V, 2, E) per shard."""

    dataset: str  # URI
    split: str
    package: str
    loader: LoaderConfig
    views: ViewSettings  # those of the student's loader, at the teacher's size and in its tokens
    precision: str

    def shards(self) -> list[ShardInfo]:
        """Those with samples."""
        return [shard for shard in open_dataset(self.dataset).shards(self.split) if shard.samples]


@dataclass(frozen=True, kw_only=True)
class CacheJob(Job):
    """The missing files of a cache at a URI."""

    cache: TeacherCache
    uri: str

    def start(self, loaded: LoadedModel) -> _Teacher:
        """Training reads the same shards, through the same cache; all frames only where the student is shown clips."""
        cache, frames = node_cache(self.cache.loader.cache), self.cache.views.frames > 0
        return _Teacher(self, loaded, Reader(open_dataset(self.dataset), self.split, cache=cache, frames=frames))


@dataclass(frozen=True)
class _Teacher:
    job: CacheJob
    loaded: LoadedModel
    reader: Reader

    def open(self, shard: ShardInfo, place: int) -> Work:
        return _ShardOfCache(self, shard, place)


class _ShardOfCache(Work):
    """The embeddings of one shard, whose views the loader makes."""

    def __init__(self, teacher: _Teacher, shard: ShardInfo, place: int) -> None:
        self.teacher, self.shard, self.place = teacher, shard, place
        self.cache = teacher.job.cache

    def finish(self) -> Done:
        """Embed every sample and publish the file."""
        with publish(file_uri(self.teacher.job.uri, self.shard.name)) as stream:
            np.save(stream, self._rows(), allow_pickle=False)
        return Done(rows=self.shard.samples)

    def _rows(self) -> NDArray[Any]:
        """(N, V, 2, E). A sample that batches leave out is stored as zeros."""
        dtype, stored_dtype = DTYPES[self.cache.precision]
        num_samples, stored_views = self.shard.samples, self.cache.views.stored_views
        width = self.teacher.loaded.config.embedding_width or 0
        stored_NV2E = torch.zeros(num_samples, stored_views, 2, width, dtype=dtype)
        for view in range(stored_views):
            for first in range(0, num_samples, BATCH_SIZE):
                rows = np.arange(first, min(first + BATCH_SIZE, num_samples))
                kept, embeddings_2RE = self._embed(rows, view)
                stored_NV2E[torch.from_numpy(rows)[kept], view] = embeddings_2RE[:, kept].transpose(0, 1).to(dtype)
        bits = stored_NV2E.view(torch.uint16) if self.cache.precision == "bf16" else stored_NV2E
        return bits.numpy().astype(stored_dtype, copy=False)

    @torch.inference_mode()
    def _embed(self, rows: NDArray[np.int64], view: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Which of the rows (R,) are real, and their image and text embeddings (2, R, E) on the CPU."""
        loaded, views = self.teacher.loaded, self.cache.views
        zeros = np.zeros_like(rows)
        slots = Slots(
            dataset=zeros, shard=zeros + self.place, row=rows, epoch=zeros + view, real=np.ones(len(rows), bool)
        )
        side, frames = views.image_pixels, max(1, views.frames)
        pixels = np.empty((len(rows), frames, side, side, 3), np.uint8)
        loaded_rows = load_slots([self.teacher.reader], loaded.tokenizer, views, slots, pixels)
        pad_id = special_tokens(loaded.tokenizer).pad
        batch = assemble(loaded_rows, pixels, LoaderState(), views, pad_id)
        config, model = loaded.config, loaded.model
        device = next(model.parameters()).device
        moved = batch.map_tensors(lambda tensor: tensor.to(device))
        image = model.encode_image(normalise(moved.pixels, config.pixel_mean, config.pixel_std), moved.frame_mask)
        text = model.encode_text(moved.token_ids, moved.token_mask)
        return batch.real, torch.stack((model.embed_image(image), model.embed_text(text))).cpu()


def with_caches(
    packages: Sequence[TeacherPackage],
    *,
    cache: CacheConfig,
    dataset: str,
    loader: LoaderConfig,
    tokenizer: Tokenizer,
    max_tokens: int,
    seed: int,
    workspace: str,
    pool: Pool,
    progress: Report,
) -> tuple[TeacherPackage, ...]:
    """The teachers with a cache for each dataset of a stage; missing caches are built, on Ray where it is
    initialised.

    `tokenizer`, `max_tokens` and `seed` are the student's. Raises RecipeError for a teacher without embeddings.
    """
    datasets = [(dataset, loader.split)]
    datasets += [(mixed.uri, mixed.split) for mixed in (loader.mixture.datasets if loader.mixture else ())]
    student_views = views_of(loader, image_pixels=0, max_tokens=max_tokens, seed=seed)
    teachers = []
    for teacher in packages:
        views = views_of_teacher(student_views, read_package(teacher.package), tokenizer)
        uris = []
        for uri, split in datasets:
            task = TeacherCache(
                dataset=uri,
                split=split,
                package=teacher.package,
                loader=loader,
                views=replace(views, stored_views=cache.augmentations),
                precision=cache.precision,
            )
            stage = cache_stage(task, pool, progress)
            uris.append(stage.run(workspace).uri)
        teachers.append(replace(teacher, caches=tuple(uris)))
    return tuple(teachers)


def cache_stage(task: TeacherCache, pool: Pool, progress: Report) -> Stage:
    """The stage that builds a cache."""
    settings = {name: getattr(task.views, name) for name in IDENTITY} | {
        "augment": task.views.augment.model_dump(mode="json"),
        "split": task.split,
        "precision": task.precision,
    }
    inputs = {"dataset": open_dataset(task.dataset).fingerprint, "teacher": read_package(task.package).digest}
    build = partial(_build, task, pool, progress)
    return Stage(name=KIND, kind=KIND, version=1, settings=settings, inputs=inputs, build=build)


def _build(task: TeacherCache, pool: Pool, progress: Report, uri: str) -> Mapping[str, Any]:
    teacher = read_package(task.package)
    model = load_package(teacher).model
    if model.scale is None or model.embedding_width is None:
        raise RecipeError(
            f"distill.cache: {task.package} gives no embeddings to store; leave cache out, or use another teacher"
        )
    shards = task.shards()
    missing = tuple(shard for shard in shards if not exists(file_uri(uri, shard.name)))
    job = CacheJob(
        model=Model(package=task.package), dataset=task.dataset, split=task.split, shards=missing, cache=task, uri=uri
    )
    run([job], pool, progress)
    files = []
    for shard in shards:
        file = file_uri(uri, shard.name)
        rows = open_rows(file)
        if rows.shape != (shard.samples, task.views.stored_views, 2, model.embedding_width):
            raise MmflowError(f"{file}: {rows.shape} for {shard.samples} samples; delete it and rerun")
        files.append({"name": shard.name, "checksum": checksum(rows)})
    return {
        "fingerprint": content_hash([files, task.precision]),
        "dataset": open_dataset(task.dataset).fingerprint,
        "teacher": teacher.digest,
        "precision": task.precision,
        "width": model.embedding_width,
        "logit_scale": float(model.scale().logit_scale.detach()),
        "files": files,
    }
