"""One rank's endless batches, from any state on: order, readers and workers put together.

A batch is a pure function of (datasets, settings, state), so nothing of a loader needs saving but its state.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from functools import cached_property, partial
from itertools import accumulate
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer

from mmflow.core.errors import CorruptArtifactError, TrainingError
from mmflow.dataset.reader import Reader
from mmflow.loading.batches import Batch, Loaded, ViewSettings, assemble, load_slots
from mmflow.loading.mixture import MixtureOrder, Stage, apportion, timeline, to_shares
from mmflow.loading.plan import LoaderState, Order, Slots, rank_slice
from mmflow.loading.tokens import special_tokens
from mmflow.loading.workers import Task, on_device, start

TASKS_PER_WORKER = 4  # of a batch: the last to finish waits for a quarter of a worker's share at most
MAX_TASK_ROWS = 32  # more would save nothing: a task costs less than a row

START = LoaderState()


class Loader:
    """The batches of one rank. Iterating prepares them ahead and moves `state` on; close the iterator to end it.

    `count` threads or processes load them, and they come on `device`. Iterating raises CorruptArtifactError for a
    sample that is not what was written, MissingArtifactError for a shard that is gone, and TrainingError for a worker
    process that died or too many samples left out.
    """

    def __init__(
        self,
        order: Order | MixtureOrder,
        readers: Sequence[Reader],
        tokenizer: Tokenizer,
        settings: ViewSettings,
        *,
        rank: int = 0,
        world_size: int = 1,
        kind: Literal["threads", "processes"] = "threads",
        count: int = 1,
        prefetch_batches: int = 3,
        max_skipped: int = 100,
        device: torch.device | None = None,
        state: LoaderState = START,
    ) -> None:
        self.order, self.readers = order, tuple(readers)
        self.state = state
        self._settings = settings
        self._load = partial(load_slots, self.readers, tokenizer, settings)
        self._pad_id = special_tokens(tokenizer).pad
        self._reading_pad_ids = [special_tokens(each.tokenizer).pad for each in settings.readings]
        self._rank, self._world_size = rank, world_size
        self._kind, self._count = kind, count
        self._prefetch_batches = prefetch_batches
        self._max_skipped = max_skipped
        self._device = device or torch.device("cpu")

    def batch(self, state: LoaderState) -> Batch:
        """The batch that begins at `state`, made here and now, on the CPU."""
        slots = self._slots(state)
        pixels = np.empty(self._shape(len(slots)), np.uint8)
        return self._assemble([self._load(slots, pixels)], pixels, self.order.after(state))

    def state_dict(self) -> dict[str, Any]:
        """Where the next batch begins, as JSON takes it: all that there is, whatever is prepared ahead."""
        return {"epoch": self.state.epoch, "position": self.state.position, "drawn": list(self.state.drawn)}

    def load_state_dict(self, fields: Mapping[str, Any]) -> None:
        """Have the next iteration begin where a `state_dict` was taken. Raises CorruptArtifactError."""
        try:
            drawn = tuple(int(each) for each in fields["drawn"])
            self.state = LoaderState(int(fields["epoch"]), int(fields["position"]), drawn)
        except (KeyError, TypeError, ValueError) as error:
            raise CorruptArtifactError(
                f"{fields!r}: not a loader's state; give what its state_dict returned"
            ) from error

    def __iter__(self) -> Generator[Batch, None, None]:
        skipped: set[str] = set()  # samples, not how often they came by
        with closing(on_device(self._batches(), self._device)) as ready:
            for batch in ready:
                skipped.update(batch.skipped)
                if len(skipped) > self._max_skipped:
                    raise TrainingError(
                        f"loader.max_skipped: {len(skipped)} samples were left out since the start, at most "
                        f"{self._max_skipped} may be; mend the dataset, or raise it; the last: {batch.skipped[-1]}"
                    )
                self.state = batch.state
                yield batch

    def _batches(self) -> Generator[Batch, None, None]:
        """The batches from `state` on, `prefetch_batches` of them under way at once."""
        state, rows = self.state, len(self._slots(self.state))
        task_rows = max(1, min(MAX_TASK_ROWS, rows // (TASKS_PER_WORKER * self._count)))
        num_buffers = self._prefetch_batches
        under_way: deque[LoaderState] = deque()  # where the batch after each begins
        number = 0
        with closing(start(self._kind, self._count, self._load, (num_buffers, *self._shape(rows)))) as workers:
            while True:
                while len(under_way) < num_buffers:
                    for dataset, shard, first, last in self.order.read_ahead(state, self._rank, self._world_size):
                        self.readers[dataset].read_ahead(shard, first, last)
                    slots = self._slots(state)
                    place = f"epoch {state.epoch}, position {state.position}"
                    buffer = (number + len(under_way)) % num_buffers
                    for first in range(0, rows, task_rows):
                        workers.submit(Task(place, buffer, first, _part(slots, first, first + task_rows)))
                    state = self.order.after(state)
                    under_way.append(state)
                parts = [workers.result() for _ in range(0, rows, task_rows)]
                yield self._assemble(parts, workers.ring[number % num_buffers], under_way.popleft())
                number += 1

    def _slots(self, state: LoaderState) -> Slots:
        return rank_slice(self.order.batch(state), self._rank, self._world_size)

    def _shape(self, rows: int) -> tuple[int, ...]:
        side = self._settings.image_pixels
        return rows, max(1, self._settings.frames), side, side, 3

    def _assemble(self, parts: Sequence[Loaded], pixels: NDArray[np.uint8], after: LoaderState) -> Batch:
        return assemble(
            parts,
            pixels,
            after,
            clips=self._settings.frames > 0,
            pad_id=self._pad_id,
            num_classes=len(self._settings.classes),
            reading_pad_ids=self._reading_pad_ids,
        )


def _part(slots: Slots, first: int, last: int) -> Slots:
    return Slots(
        dataset=slots.dataset[first:last],
        shard=slots.shard[first:last],
        row=slots.row[first:last],
        epoch=slots.epoch[first:last],
        real=slots.real[first:last],
    )


class TaskLoader:
    """The batches of one rank, each of a task's loader, with the task's number on it. Iterating moves `state` on.

    Turns go by Tijdeman's rule, as the samples of a mixture do: after any number of steps each task has had its share
    of them, to less than one step.
    """

    def __init__(self, loaders: Sequence[Loader], weights: Sequence[float], state: LoaderState = START) -> None:
        """`state` is one of a loader of as many tasks. Raises RecipeError where it is another's."""
        self.state = state if state.tasks else LoaderState(drawn=(0,) * len(loaders), tasks=(START,) * len(loaders))
        self._segments = timeline([Stage(0, to_shares(weights))], 1)
        self._loaders = tuple(loaders)
        self.turn(self.state)
        for loader, own in zip(loaders, self.state.tasks, strict=True):
            loader.state = own

    @cached_property
    def readers(self) -> tuple[Reader, ...]:
        """Of all tasks, numbered as `Batch.places` numbers datasets."""
        return tuple(reader for loader in self._loaders for reader in loader.readers)

    def turn(self, state: LoaderState) -> int:
        """The number of the task whose batch begins at `state`. Raises RecipeError where the weights say otherwise."""
        drawn = apportion(self._segments, state.drawn, sum(state.drawn) + 1, key="tasks")
        return next(number for number, (now, then) in enumerate(zip(state.drawn, drawn, strict=True)) if then > now)

    def __iter__(self) -> Generator[Batch, None, None]:
        firsts = [0, *accumulate(len(loader.readers) for loader in self._loaders)]
        with ExitStack() as stack:
            sources = [stack.enter_context(closing(iter(loader))) for loader in self._loaders]
            while True:
                task = self.turn(self.state)
                batch = next(sources[task])
                assert batch.places is not None, "a loader says where its rows lie"
                places = batch.places + np.array([firsts[task], 0, 0, 0])
                self.state = self._after(task, batch.state)
                yield replace(batch, task=task, places=places, state=self.state)

    def _after(self, task: int, own: LoaderState) -> LoaderState:
        """The state after a batch of a task, whose own loader then stands at `own`."""
        drawn, tasks = list(self.state.drawn), list(self.state.tasks)
        drawn[task] += 1
        tasks[task] = own
        position = self.state.position + self._loaders[task].order.global_batch_size
        return LoaderState(0, position, tuple(drawn), tuple(tasks))
