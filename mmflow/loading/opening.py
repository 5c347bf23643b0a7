"""A recipe's loader section to a loader: open the datasets, choose their order, count the workers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer

from mmflow.core.errors import MissingArtifactError, MisuseError
from mmflow.dataset.cache import node_cache
from mmflow.dataset.opened import Dataset, open_dataset
from mmflow.dataset.reader import OPEN_SHARDS, Reader
from mmflow.loading.batches import ViewSettings
from mmflow.loading.config import AugmentConfig, LoaderConfig, WorkersConfig
from mmflow.loading.loader import START, Loader
from mmflow.loading.mixture import MixtureOrder, shares_of
from mmflow.loading.plan import Buckets, LoaderState, Order

# Loading a sample of 1 to 2 megapixels spends three quarters of its time without the interpreter's lock (decoding,
# resampling), so a fifth thread would wait for the other four.
MAX_THREADS = 4

MOST_OPEN_SHARDS = 512  # file descriptors of a process: half of what many systems allow


def open_readers(config: LoaderConfig, dataset: Dataset) -> tuple[Reader, ...]:
    """A reader of the stage's own dataset, then one of each mixed dataset.

    Raises MisuseError for a missing split and MissingArtifactError for a missing dataset; both name the key.
    """
    cache = node_cache(config.cache)
    sources = [("loader.split", dataset, config.split)]
    for number, mixed in enumerate(config.mixture.datasets if config.mixture is not None else ()):
        key = f"loader.mixture.datasets.{number}"
        sources.append((f"{key}.split", open_mixed(f"{key}.uri", mixed.uri), mixed.split))
    for key, source, split in sources:
        if split not in source.splits:
            raise MisuseError(f"{key}: {source.uri} has no split {split!r}; it has {', '.join(source.splits)}")
    return tuple(
        Reader(source, split, cache, frames=config.frames > 0, open_shards=_open_shards(config, source, split))
        for _, source, split in sources
    )


def open_mixed(key: str, uri: str) -> Dataset:
    """A dataset of a mixture. Raises MissingArtifactError naming `key` if there is none."""
    try:
        return open_dataset(uri)
    except MissingArtifactError as error:
        raise MissingArtifactError(f"{key}: {error}") from error


def _open_shards(config: LoaderConfig, dataset: Dataset, split: str) -> int:
    """How many shards a batch and the next one read from: two windows in each lane, because slots go by lanes. With
    fewer kept open, every batch would open all of them again."""
    shards = dataset.shards(split)
    mean_samples = max(1, dataset.samples(split) // max(1, len(shards)))
    wanted = 2 * config.lanes * (-(-config.window // mean_samples) + 1)
    return max(OPEN_SHARDS, min(wanted, len(shards), MOST_OPEN_SHARDS))


def order_of(
    config: LoaderConfig, readers: Sequence[Reader], global_batch_size: int, seed: int
) -> Order | MixtureOrder:
    """The order of the readers' samples. Raises RecipeError if they have none."""

    def lengths(dataset: int, shard: int, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Estimated tokens of samples, from the indexes; (n,) to (n,)."""
        return readers[dataset].lengths(shard)[rows].astype(np.int64)

    samples = tuple(tuple(shard.samples for shard in reader.shards) for reader in readers)
    buckets = Buckets(config.bucket_batches, lengths) if config.bucket_batches > 1 else None
    common = (global_batch_size, seed, config.window, config.lanes, buckets)
    if config.mixture is None:
        return Order(samples[0], *common)
    return MixtureOrder(samples, shares_of(config.mixture, [sum(sizes) for sizes in samples]), *common)


def steps_per_epoch(config: LoaderConfig, dataset: Dataset, global_batch_size: int) -> int:
    """Batches in an epoch of the stage's dataset, or of all mixed datasets together. Raises as `open_readers`."""
    return order_of(config, open_readers(config, dataset), global_batch_size, seed=0).steps_per_epoch


def open_loader(
    config: LoaderConfig,
    dataset: Dataset,
    tokenizer: Tokenizer,
    *,
    global_batch_size: int,
    seed: int,
    cores: int = 1,
    rank: int = 0,
    world_size: int = 1,
    device: torch.device | None = None,
    state: LoaderState = START,
    **views: Any,
) -> Loader:
    """A rank's loader of a stage's dataset, on `cores` CPU cores. `views` are as in `views_of`.

    Rank 0 checks that every shard is there, to name a missing one now and not in the middle of an epoch: raises
    MissingArtifactError or CorruptArtifactError.
    """
    readers = open_readers(config, dataset)
    count = config.workers.count or cores
    if rank == 0:
        for reader in readers:
            reader.check()
    return Loader(
        order_of(config, readers, global_batch_size, seed),
        readers,
        tokenizer,
        views_of(config, seed=seed, **views),
        rank=rank,
        world_size=world_size,
        kind=config.workers.kind or ("threads" if count <= MAX_THREADS else "processes"),
        count=count,
        prefetch_batches=config.prefetch_batches,
        max_skipped=config.max_skipped,
        device=device,
        state=state,
    )


def views_of(config: LoaderConfig, **others: Any) -> ViewSettings:
    """The views of a recipe's loader. `others` are the fields of ViewSettings that the loader section does not have."""
    names = ("augment", "language_weights", "frames", "text", "truncation", "label", "on_corrupt")
    return ViewSettings(**{name: getattr(config, name) for name in names}, **others)


def held_out_loader(config: LoaderConfig, split: str) -> LoaderConfig:
    """The loader that evaluates a split while `config` trains on another: each sample once, without augmentation."""
    changes = {
        "split": split,
        "mixture": None,
        "augment": AugmentConfig(),
        "bucket_batches": 1,
        "prefetch_batches": min(2, config.prefetch_batches),  # what is prepared past the last batch is wasted
        # Threads start at once; processes would take seconds of each validation.
        "workers": WorkersConfig(kind="threads", count=config.workers.count),
    }
    return config.model_copy(update=changes)
