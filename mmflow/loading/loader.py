"""One rank's endless batches from any state on: the loader of one dataset or mixture, and the loader of several tasks.

A batch is a pure function of (datasets, settings, state), so only the state of a loader needs saving.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Sequence
from contextlib import ExitStack, closing
from dataclasses import KW_ONLY, dataclass, replace
from functools import cached_property, partial
from itertools import accumulate, count
from typing import Literal

import numpy as np
import torch
from tokenizers import Tokenizer

from mmflow.core.errors import TrainingError
from mmflow.dataset.reader import Reader
from mmflow.loading.batches import Batch, ViewSettings, assemble, load_slots
from mmflow.loading.mixture import MixtureOrder, apportion, timeline, to_shares
from mmflow.loading.plan import LoaderState, Order, Slots, rank_slice
from mmflow.loading.tokens import special_tokens
from mmflow.loading.workers import Task, on_device, start

TASKS_PER_WORKER = 4  # per batch: the last worker to finish is waited for at most a quarter of its share
MAX_TASK_ROWS = 32  # more would save nothing: a task costs less than a row

START = LoaderState()


@dataclass(eq=False)
class Loader:
    """The batches of one rank. Iterating prepares them ahead and advances `state`; close the iterator to end it.

    `count` threads or processes load them, and they come on `device`. Iterating raises CorruptArtifactError for a
    damaged sample, MissingArtifactError for a missing shard, and TrainingError when a worker process died or too many
    samples were skipped.
    """

    order: Order | MixtureOrder
    readers: Sequence[Reader]
    tokenizer: Tokenizer
    settings: ViewSettings
    _: KW_ONLY
    rank: int = 0
    world_size: int = 1
    kind: Literal["threads", "processes"] = "threads"
    count: int = 1
    prefetch_batches: int = 3
    max_skipped: int = 100
    device: torch.device | None = None
    state: LoaderState = START

    def __iter__(self) -> Generator[Batch, None, None]:
        skipped: set[str] = set()  # by sample: one that comes again counts once
        with closing(on_device(self._batches(), self.device or torch.device("cpu"))) as ready:
            for batch in ready:
                skipped.update(batch.skipped)
                if len(skipped) > self.max_skipped:
                    raise TrainingError(
                        f"loader.max_skipped: {len(skipped)} samples were skipped since the start, at most "
                        f"{self.max_skipped} may be; repair the dataset, or raise it; the last: {batch.skipped[-1]}"
                    )
                self.state = batch.state
                yield batch

    def _batches(self) -> Generator[Batch, None, None]:
        """The batches from `state` on, with `prefetch_batches` of them under way at once."""
        side, frames = self.settings.image_pixels, max(1, self.settings.frames)
        state, num_rows = self.state, len(self._slots(self.state))
        shape = (self.prefetch_batches, num_rows, frames, side, side, 3)
        load = partial(load_slots, self.readers, self.tokenizer, self.settings)
        pad_id = special_tokens(self.tokenizer).pad
        task_rows = max(1, min(MAX_TASK_ROWS, num_rows // (TASKS_PER_WORKER * self.count)))
        under_way: deque[LoaderState] = deque()  # where the batch after each begins
        with closing(start(self.kind, self.count, load, shape)) as workers:
            for number in count():
                for dataset, shard, first, last in self.order.read_ahead(state, self.rank, self.world_size):
                    self.readers[dataset].read_ahead(shard, first, last)
                slots = self._slots(state)
                place = f"epoch {state.epoch}, position {state.position}"
                for first in range(0, num_rows, task_rows):
                    workers.submit(Task(place, number % len(workers.ring), first, slots[first : first + task_rows]))
                state = self.order.after(state)
                under_way.append(state)
                if len(under_way) == len(workers.ring):
                    rows = [row for _ in range(0, num_rows, task_rows) for row in workers.result()]
                    pixels = workers.ring[(number + 1) % len(workers.ring)]  # the oldest
                    yield assemble(rows, pixels, under_way.popleft(), self.settings, pad_id)

    def _slots(self, state: LoaderState) -> Slots:
        return rank_slice(self.order.batch(state), self.rank, self.world_size)


class TaskLoader:
    """The batches of one rank, each from the loader of one task and with the task's number. Iterating advances `state`.

    The task of a step follows from the weights and the step alone, so all ranks take the same task's step together,
    which ZeRO-3 needs, without communication. Tasks take turns by Tijdeman's rule, like the datasets of a mixture:
    after any number of steps, each has had its share of them, to less than one step.
    """

    def __init__(self, loaders: Sequence[Loader], weights: Sequence[float], state: LoaderState = START) -> None:
        """`state` is START or of as many tasks. Raises RecipeError if it does not come from these weights."""
        self.state = state if state.tasks else LoaderState(drawn=(0,) * len(loaders), tasks=(START,) * len(loaders))
        self._segments = timeline({0: to_shares(weights)}, 1)
        self._loaders = tuple(loaders)
        self.turn(self.state)
        for loader, task_state in zip(loaders, self.state.tasks, strict=True):
            loader.state = task_state

    @cached_property
    def readers(self) -> tuple[Reader, ...]:
        """The readers of all tasks, in the order in which `Batch.places` numbers datasets."""
        return tuple(reader for loader in self._loaders for reader in loader.readers)

    def turn(self, state: LoaderState) -> int:
        """The number of the task whose batch begins at `state`. Raises RecipeError for a state of other weights."""
        drawn = apportion(self._segments, state.drawn, sum(state.drawn) + 1, key="tasks")
        return next(number for number, (now, then) in enumerate(zip(state.drawn, drawn, strict=True)) if then > now)

    def __iter__(self) -> Generator[Batch, None, None]:
        firsts = [0, *accumulate(len(loader.readers) for loader in self._loaders)]
        with ExitStack() as stack:
            sources = [stack.enter_context(closing(iter(loader))) for loader in self._loaders]
            while True:
                task = self.turn(self.state)
                batch = next(sources[task])
                assert batch.places is not None, "a loader fills the places of its rows"
                places = batch.places + np.array([firsts[task], 0, 0, 0])
                drawn, tasks = list(self.state.drawn), list(self.state.tasks)
                drawn[task] += 1
                tasks[task] = batch.state
                position = self.state.position + self._loaders[task].order.global_batch_size
                self.state = LoaderState(0, position, tuple(drawn), tuple(tasks))
                yield replace(batch, task=task, places=places, state=self.state)
