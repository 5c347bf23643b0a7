"""Models over the shards of datasets: on the workers of a Ray cluster by Ray Data, or in this process without Ray.

A worker holds a model, on a GPU where it was given one, and works through whole shards. Reading and decoding go on
beside it. A job publishes what it makes of a shard as a whole and finds it on a rerun, so a killed worker repeats at
most the shard that it was at.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import groupby, islice
from operator import itemgetter
from time import perf_counter
from typing import TYPE_CHECKING, Annotated, Any, Protocol, TypeVar

from pydantic import Field

from mmflow.core.artifacts import content_hash
from mmflow.core.config import OPERATIONAL, Config
from mmflow.core.errors import MmflowError
from mmflow.core.progress import Report
from mmflow.dataset.format import ShardInfo
from mmflow.dataset.opened import open_dataset
from mmflow.inference.prepare import Looks, Prepared, Rows, prepare
from mmflow.models.package import read_package

if TYPE_CHECKING:
    from mmflow.models.package import LoadedModel

PREPARE_SECONDS = 600.0  # for the rows of one batch; then they are read once more, elsewhere
AHEAD = (2, 32)  # fewest and most batches that are prepared while one is computed
CALLS_PER_WORKER = 4  # a worker is handed a share of the shards at once: between calls it has nothing prepared

MOST_SHARDS_A_CALL = 16
TASKS_AHEAD = 64
# Ray's workers take longer to start than this process to do so much.
FEW_ROWS = 5_000
FEW_ITEMS = 16
KEPT = "finished shards are kept"

Wait = Callable[[], Prepared]
Item = TypeVar("Item")
Made = TypeVar("Made")


class Pool(Config):
    """The workers that models run on."""

    num_workers: Annotated[int | None, OPERATIONAL] = Field(None, ge=1)
    """Workers that hold the model; None: one for each GPU, or without GPUs as many as the cluster's cores allow."""
    cpus_per_worker: Annotated[int, OPERATIONAL] = Field(1, ge=1)
    """CPU cores that each worker computes with."""
    gpus_per_worker: Annotated[int | None, OPERATIONAL] = Field(None, ge=0, le=1)
    """None: a GPU for each worker where the cluster has any; 1 waits until it has."""


@dataclass(frozen=True)
class Done:
    """What was done."""

    rows: int = 0
    errors: int = 0  # rows without values
    first_error: str = ""
    seconds: float = 0.0  # of workers at work
    computing: float = 0.0  # of these, the seconds in which the model computed

    def __add__(self, other: Done) -> Done:
        return Done(
            self.rows + other.rows,
            self.errors + other.errors,
            self.first_error or other.first_error,
            self.seconds + other.seconds,
            self.computing + other.computing,
        )


class Work(ABC):
    """What is made of one shard."""

    def pieces(self) -> Iterator[tuple[Rows, Looks]]:
        """The rows to prepare, in order; none where the work reads for itself."""
        return iter(())

    def take(self, rows: Rows, prepared: Prepared) -> None:  # noqa: B027 — nothing is prepared without pieces
        """Compute what was prepared."""

    @abstractmethod
    def finish(self) -> Done:
        """Publish the shard's files."""


class Started(Protocol):
    """A job with its model on a worker's device."""

    def open(self, shard: ShardInfo, place: int) -> Work:
        """The work on a shard, given with its place among those of its split."""


@dataclass(frozen=True, kw_only=True)
class Model:
    """A package, or with `fresh_seed` a model like it whose weights were never trained."""

    package: str  # URI
    fresh_seed: int | None = None

    @cached_property
    def digest(self) -> str:
        """The identity under which its results are kept."""
        digest = read_package(self.package).digest
        return digest if self.fresh_seed is None else content_hash([digest, self.fresh_seed])

    def load(self) -> LoadedModel:
        """In evaluation mode, fp32, on the CPU."""
        from mmflow.models.model import build
        from mmflow.models.package import load_package

        loaded = load_package(read_package(self.package))
        if self.fresh_seed is None:
            return loaded
        vocabulary, classes = loaded.tokenizer.get_vocab_size(), len(loaded.classes)
        fresh = build("model", loaded.config, vocabulary, seed=self.fresh_seed, num_classes=classes)
        return replace(loaded, model=fresh.eval())


@dataclass(frozen=True, kw_only=True)
class Job(ABC):
    """A model, and shards of a split to apply it to. Workers get a copy, so it is plain data."""

    model: Model
    dataset: str  # URI
    split: str
    shards: tuple[ShardInfo, ...]

    @abstractmethod
    def start(self, loaded: LoadedModel) -> Started:
        """Called once per worker, with the model on its device."""


def run(jobs: Sequence[Job], pool: Pool, progress: Report) -> Done:
    """Do all jobs' shards: on Ray's workers where it is initialised, and else in this process. Few rows are done here
    too, unless the pool names workers or the cluster has GPUs.

    Raises MmflowError for whatever fails on Ray, and in this process what the job raises.
    """
    calls = [(job, place) for job, doing in enumerate(jobs) for place in range(len(doing.shards))]
    total, done = sum(shard.samples for job in jobs for shard in job.shards), Done()
    if not calls:
        return done
    began = perf_counter()
    on_workers = on_ray() and (total > FEW_ROWS or pool.num_workers is not None or _gpus(pool) > 0)
    for part in _on_ray(jobs, calls, pool) if on_workers else _here(jobs, calls):
        done += part
        speed = f"{done.rows / (perf_counter() - began):,.0f} rows/s"
        share = f", the model computes {done.computing / done.seconds:.0%} of the time" if done.seconds else ""
        progress(done.rows, total, speed + share + (f", {done.errors:,} errors" if done.errors else ""))
    return done


def on_ray() -> bool:
    """Whether this process has a Ray that is initialised. It is not imported to find out."""
    ray = sys.modules.get("ray")
    return ray is not None and bool(ray.is_initialized())


def in_parallel(function: Callable[[Item], Made], items: Iterable[Item]) -> Iterator[Made]:
    """The function's values, in order: by Ray's tasks, a core each, where it is initialised and there are many items,
    and else here."""
    items = list(items)
    if not on_ray() or len(items) <= FEW_ITEMS:
        yield from map(function, items)
        return
    import ray

    from mmflow.dataset.build import failure

    task = ray.remote(function)
    for asked in ahead_of((task.remote(item) for item in items), TASKS_AHEAD):
        try:
            made = ray.get(asked)
        except ray.exceptions.RayError as error:
            raise failure(error, "a task", KEPT) from error
        yield made


def _here(jobs: Sequence[Job], calls: Sequence[tuple[int, int]]) -> Iterator[Done]:
    import torch

    with ThreadPoolExecutor(AHEAD[0], thread_name_prefix="mmflow-prepare") as threads:

        def submit(rows: Rows, looks: Looks) -> Wait:
            return threads.submit(prepare, rows, looks).result

        worker = Worker(jobs, "cuda" if torch.cuda.is_available() else "cpu", submit, AHEAD[0])
        yield from worker.shards(calls)


def _gpus(pool: Pool) -> int:
    """The GPUs that the workers share: 0 if they have none."""
    from mmflow.cluster.local import cluster_resources

    return int(cluster_resources("GPU")) if pool.gpus_per_worker is None else pool.gpus_per_worker


def _on_ray(jobs: Sequence[Job], calls: Sequence[tuple[int, int]], pool: Pool) -> Iterator[Done]:
    import ray

    from mmflow.cluster.local import cluster_resources
    from mmflow.dataset.build import failure

    cores, gpus = int(cluster_resources("CPU")), _gpus(pool)
    fitting = max(1, int(cluster_resources("GPU")) if gpus else cores // pool.cpus_per_worker)
    num_workers = min(pool.num_workers or fitting, len(calls))
    size = min(max(1, len(calls) // (num_workers * CALLS_PER_WORKER)), MOST_SHARDS_A_CALL)
    blocks = [{"calls": calls[first : first + size]} for first in range(0, len(calls), size)]
    ahead = min(max(AHEAD[0], 2 * cores // num_workers), AHEAD[1]) if gpus else AHEAD[0]
    work = ray.data.from_items(blocks, override_num_blocks=len(blocks)).map_batches(
        RayWorker,
        fn_constructor_args=(tuple(jobs), bool(gpus), ahead),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=num_workers),
        num_cpus=pool.cpus_per_worker,
        num_gpus=1 if gpus else None,
    )
    try:
        for row in work.iter_rows():
            yield Done(**row)
    except ray.exceptions.RayError as error:
        raise failure(error, "a worker", KEPT) from error


class RayWorker:
    """A Ray Data actor. Its rows are prepared by Ray's tasks: on a cluster with GPUs each takes a core, of any node;
    elsewhere the cores are the workers' own, and tasks use what these leave idle."""

    def __init__(self, jobs: Sequence[Job], accelerated: bool, ahead: int) -> None:
        import ray

        preparing = ray.remote(prepare).options(num_cpus=1 if accelerated else 0)

        def submit(rows: Rows, looks: Looks) -> Wait:
            first = preparing.remote(rows, looks)

            def wait() -> Prepared:
                for again in (False, True):
                    asked = preparing.remote(rows, looks) if again else first
                    try:
                        return ray.get(asked, timeout=PREPARE_SECONDS)
                    except ray.exceptions.GetTimeoutError:
                        ray.cancel(asked, force=True)
                    except ray.exceptions.RayTaskError as error:
                        raise (error.cause if isinstance(error.cause, MmflowError) else error) from None
                raise MmflowError(
                    f"{rows.dataset}: rows {rows.first:,} to {rows.stop - 1:,} of shard {rows.shard} of split "
                    f"{rows.split} could not be read in {PREPARE_SECONDS:.0f} s, twice; look at its storage"
                )

            return wait

        # An actor that was given no GPU still sees those of the others.
        self.worker = Worker(jobs, "cuda" if accelerated and ray.get_gpu_ids() else "cpu", submit, ahead)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Do a batch of {"calls"}; what was done, a row a shard."""
        calls = [(int(job), int(place)) for block in batch["calls"] for job, place in block]
        rows = [vars(done) for done in self.worker.shards(calls)]
        return {name: [row[name] for row in rows] for name in rows[0]}


class Worker:
    """Works through shards with one model at a time."""

    def __init__(self, jobs: Sequence[Job], device: str, submit: Callable[[Rows, Looks], Wait], ahead: int) -> None:
        self.jobs, self.device, self.submit, self.ahead = jobs, device, submit, ahead
        self._loaded, self._start = lru_cache(1)(self._load), lru_cache(1)(self._start_job)

    def shards(self, calls: Sequence[tuple[int, int]]) -> Iterator[Done]:
        """Do shards, (job, place among its shards), one after another; what was done of each."""
        for job, group in groupby(calls, key=itemgetter(0)):
            asked = self._asked(job, [place for _, place in group])
            began, computing = perf_counter(), 0.0
            for work, rows, wait in ahead_of(asked, self.ahead):
                if rows is not None:
                    prepared = wait()
                    started = perf_counter()
                    work.take(rows, prepared)
                    computing += perf_counter() - started
                else:
                    done, now = work.finish(), perf_counter()
                    yield done + Done(seconds=now - began, computing=computing)
                    began, computing = now, 0.0

    def _asked(self, number: int, places: Sequence[int]) -> Iterator[tuple[Work, Rows | None, Wait]]:
        """The pieces of shards, being prepared; each shard ends with one without rows."""
        job, started = self.jobs[number], self._start(number)
        of_split = [shard.name for shard in open_dataset(job.dataset).shards(job.split) if shard.samples]
        for place in places:
            shard = job.shards[place]
            work = started.open(shard, of_split.index(shard.name))
            for rows, looks in work.pieces():
                yield work, rows, self.submit(rows, looks)
            yield work, None, _nothing

    def _load(self, model: Model) -> LoadedModel:
        loaded = model.load()
        loaded.model.to(self.device)
        return loaded

    def _start_job(self, number: int) -> Started:
        return self.jobs[number].start(self._loaded(self.jobs[number].model))


def _nothing() -> Prepared:
    raise AssertionError("the end of a shard has no rows")


def ahead_of(items: Iterator[Item], count: int) -> Iterator[Item]:
    """The items, each after up to `count` more have been drawn."""
    drawn = deque(islice(items, count))
    for item in items:
        drawn.append(item)
        yield drawn.popleft()
    yield from drawn
