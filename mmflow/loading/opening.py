"""A recipe's loader section to a loader: datasets opened, their order chosen, workers counted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer

from mmflow.core.errors import MissingArtifactError, MisuseError
from mmflow.dataset.cache import node_cache
from mmflow.dataset.opened import Dataset, open_dataset
from mmflow.dataset.reader import OPEN_SHARDS, Reader
from mmflow.loading.batches import Reading, ViewSettings
from mmflow.loading.config import AugmentConfig, LoaderConfig, WorkersConfig
from mmflow.loading.loader import START, Loader
from mmflow.loading.mixture import MixtureOrder, stages
from mmflow.loading.plan import Buckets, LoaderState, Order

# Of a sample of 1 to 2 megapixels three quarters of the time hold no lock of the interpreter (decoding, resampling): a
# fifth thread would wait for the four before it.
MAX_THREADS = 4

MOST_OPEN_SHARDS = 512  # file descriptors of a process: half of what many systems allow


def open_readers(config: LoaderConfig, dataset: Dataset) -> tuple[Reader, ...]:
    """A reader of the stage's own dataset, and of each that is mixed in.

    Raises MisuseError for a split that is not there, MissingArtifactError for a dataset that is not; both name the key.
    """
    cache = node_cache(config.cache)
    places = [("loader.split", dataset, config.split)]
    for number, each in enumerate(config.mixture.datasets if config.mixture is not None else ()):
        key = f"loader.mixture.datasets.{number}"
        places.append((f"{key}.split", open_mixed(f"{key}.uri", each.uri), each.split))
    for key, mixed, split in places:
        if split not in mixed.splits:
            raise MisuseError(f"{key}: {mixed.uri} has no split {split!r}; there are {', '.join(mixed.splits)}")
    return tuple(
        Reader(mixed, split, cache, frames=config.frames > 0, open_shards=_open_shards(config, mixed, split))
        for _, mixed, split in places
    )


def open_mixed(key: str, uri: str) -> Dataset:
    """The dataset of a mixture. Raises MissingArtifactError naming `key` where there is none."""
    try:
        return open_dataset(uri)
    except MissingArtifactError as error:
        raise MissingArtifactError(f"{key}: {error}") from error


def _open_shards(config: LoaderConfig, dataset: Dataset, split: str) -> int:
    """How many shards a batch and the one after it read from: two windows in each lane, as slots go by lanes. With
    fewer kept open, every batch would open all of them anew."""
    shards = dataset.shards(split)
    mean_samples = max(1, dataset.samples(split) // max(1, len(shards)))
    wanted = 2 * config.lanes * (-(-config.window // mean_samples) + 1)
    return max(OPEN_SHARDS, min(wanted, len(shards), MOST_OPEN_SHARDS))


def order_of(
    config: LoaderConfig, readers: Sequence[Reader], global_batch_size: int, seed: int
) -> Order | MixtureOrder:
    """The order of the readers' samples. Raises RecipeError where no samples are to be had."""
    samples = tuple(tuple(shard.samples for shard in reader.shards) for reader in readers)
    buckets = Buckets(config.bucket_batches, partial(_lengths, readers)) if config.bucket_batches > 1 else None
    if config.mixture is None:
        return Order(samples[0], global_batch_size, seed, config.window, config.lanes, buckets)
    return MixtureOrder(
        shard_samples=samples,
        stages=stages(config.mixture, [sum(each) for each in samples]),
        global_batch_size=global_batch_size,
        seed=seed,
        window=config.window,
        lanes=config.lanes,
        buckets=buckets,
    )


def steps_per_epoch(config: LoaderConfig, dataset: Dataset, global_batch_size: int) -> int:
    """Batches in an epoch of the stage's dataset, or of all that are mixed together. Raises as what it is made of."""
    return order_of(config, open_readers(config, dataset), global_batch_size, seed=0).steps_per_epoch


def open_loader(
    config: LoaderConfig,
    dataset: Dataset,
    tokenizer: Tokenizer,
    *,
    global_batch_size: int,
    image_pixels: int,
    max_tokens: int,
    seed: int,
    reads_text: bool = True,
    classes: tuple[str, ...] = (),
    stored_views: int = 0,
    readings: tuple[Reading, ...] = (),
    cores: int = 1,
    rank: int = 0,
    world_size: int = 1,
    device: torch.device | None = None,
    state: LoaderState = START,
) -> Loader:
    """A rank's loader of a stage's dataset. `cores` is what the rank has, `classes` what its targets are numbered by;
    a model that `reads_text` needs some of every sample. Of what is stored beside the samples there are `stored_views`;
    `readings` are those of other models that are shown the same batches.

    Rank 0 looks whether every shard is there, so that one that is gone is named now and not in the midst of an epoch:
    raises MissingArtifactError or CorruptArtifactError.
    """
    readers = open_readers(config, dataset)
    count = config.workers.count or cores
    if rank == 0:
        for reader in readers:
            reader.check()
    views = views_of(config, image_pixels=image_pixels, max_tokens=max_tokens, seed=seed)
    views = replace(views, reads_text=reads_text, classes=classes, stored_views=stored_views, readings=readings)
    return Loader(
        order_of(config, readers, global_batch_size, seed),
        readers,
        tokenizer,
        views,
        rank=rank,
        world_size=world_size,
        kind=config.workers.kind or ("threads" if count <= MAX_THREADS else "processes"),
        count=count,
        prefetch_batches=config.prefetch_batches,
        max_skipped=config.max_skipped,
        device=device,
        state=state,
    )


def views_of(config: LoaderConfig, *, image_pixels: int, max_tokens: int, seed: int) -> ViewSettings:
    """What makes the views that a recipe's loader shows."""
    return ViewSettings(
        seed=seed,
        image_pixels=image_pixels,
        max_tokens=max_tokens,
        augment=config.augment,
        language_weights=config.language_weights,
        frames=config.frames,
        text=config.text,
        truncation=config.truncation,
        label=config.label,
        on_corrupt=config.on_corrupt,
    )


def held_out_loader(config: LoaderConfig, split: str) -> LoaderConfig:
    """What examines a split as `config` trains on another: of the same dataset each sample once, and as it is."""
    changes = {
        "split": split,
        "mixture": None,
        "augment": AugmentConfig(),
        "bucket_batches": 1,
        "prefetch_batches": min(2, config.prefetch_batches),  # what lies ahead of the last is read for nothing
        # Threads start at once, processes would take seconds of each validation.
        "workers": WorkersConfig(kind="threads", count=config.workers.count),
    }
    return config.model_copy(update=changes)


def _lengths(readers: Sequence[Reader], dataset: int, shard: int, rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """Estimated tokens of samples, from the indexes; (n,) to (n,)."""
    return readers[dataset].lengths(shard)[rows].astype(np.int64)
