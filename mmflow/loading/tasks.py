"""Batches of several tasks, each whole batch of one: whose turn it is follows from the weights and the step alone.

So all ranks take the same task's step together, as ZeRO-3 needs, and say nothing to each other about it.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from functools import cached_property
from itertools import accumulate

import numpy as np

from mmflow.dataset.reader import Reader
from mmflow.loading.apportion import Stage, apportion, timeline, to_shares
from mmflow.loading.batches import Batch
from mmflow.loading.loader import START, Loader
from mmflow.loading.plan import LoaderState


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
