"""A model package over a dataset on Ray Data: one result file per shard.

A result is published whole under a name that its shard decides. Existing files are complete, so a restarted job only
writes the missing ones, and no row is written twice.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import IO, TYPE_CHECKING, Any

from mmflow.core.progress import Report
from mmflow.core.storage import exists, publish
from mmflow.dataset.cache import ShardCache
from mmflow.dataset.format import ShardInfo
from mmflow.dataset.opened import open_dataset
from mmflow.dataset.reader import Reader

if TYPE_CHECKING:
    from mmflow.models.package import LoadedModel

Write = Callable[[Reader, int, IO[bytes]], None]
"""Writes the result of one shard, given by its place in the reader's `shards`."""


@dataclass(frozen=True, kw_only=True)
class Task(ABC):
    """What a model is asked about every sample of a dataset. Actors get a copy, so it is plain data."""

    dataset: str  # URI
    package: str  # URI of the model's package

    @property
    def reads_frames(self) -> bool:
        """Whether it reads all frames of a clip, or only the first."""
        return True

    def cache(self) -> ShardCache | None:
        """Where an actor keeps the shards of a remote dataset; None: it reads them once, as they come."""
        return None

    @abstractmethod
    def file(self, uri: str, shard: ShardInfo) -> str:
        """The file that holds the result of a shard, in the artifact at `uri`."""

    @abstractmethod
    def start(self, loaded: LoadedModel) -> Write:
        """Called once per actor, with the model on its device."""


def shards_of(dataset: str, split: str | None = None) -> list[ShardInfo]:
    """The shards that have samples, of one split or of all."""
    data = open_dataset(dataset)
    splits = data.splits if split is None else (split,)
    return [shard for name in splits for shard in data.shards(name) if shard.samples]


def run(
    task: Task, uri: str, shards: Sequence[ShardInfo], *, num_workers: int, cpus_per_worker: int, progress: Report
) -> None:
    """Write the missing files of the shards into the artifact at `uri`. Ray must be initialised.

    Each actor gets a GPU where the cluster has one for each.
    """
    missing = [shard for shard in shards if not exists(task.file(uri, shard))]
    done = len(shards) - len(missing)
    progress(done, len(shards), "shards")
    if not missing:
        return
    import ray

    num_actors = min(num_workers, len(missing))
    accelerated = ray.cluster_resources().get("GPU", 0) >= num_actors  # type: ignore[no-untyped-call]
    work = ray.data.from_items(
        [{"shard": shard.name, "split": shard.split} for shard in missing], override_num_blocks=len(missing)
    ).map_batches(
        ShardWorker,
        fn_constructor_args=(task, uri),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=num_actors),
        num_cpus=cpus_per_worker,
        num_gpus=1 if accelerated else None,
    )
    for _ in work.iter_rows():
        done += 1
        progress(done, len(shards), "shards")


class ShardWorker:
    """A Ray Data actor: it loads the model once and writes the results of whole shards."""

    def __init__(self, task: Task, uri: str) -> None:
        import ray

        from mmflow.models.package import load_package, read_package

        self.task, self.uri = task, uri
        loaded = load_package(read_package(task.package))
        # An actor that was given no GPU still sees those of the others.
        loaded.model.to("cuda" if ray.is_initialized() and ray.get_gpu_ids() else "cpu")
        self.write = task.start(loaded)
        self.reader = lru_cache(
            partial(Reader, open_dataset(task.dataset), cache=task.cache(), frames=task.reads_frames)
        )

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Write the results of a batch of {"shard", "split"}, and hand the batch on."""
        for name, split in zip(batch["shard"], batch["split"], strict=True):
            reader = self.reader(str(split))
            place = next(place for place, shard in enumerate(reader.shards) if shard.name == name)
            with publish(self.task.file(self.uri, reader.shards[place])) as stream:
                self.write(reader, place, stream)
        return batch
