"""A model that learns several tasks: which of them a batch is of decides by which objectives."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from mmflow.learning.learner import Learner, Parts
from mmflow.learning.micro_batches import MicroBatch
from mmflow.loading.batches import Batch


class TaskLearner(nn.Module):
    """Learners of one model, a batch for one of them. Every rank's batch is of the same task, or ZeRO-3 would wait for
    ever for modules that other ranks do not run."""

    def __init__(self, learners: Sequence[Learner]) -> None:
        super().__init__()
        self.model = learners[0].model
        self._learners = tuple(learners)  # no modules: each would name the model's parameters once more

    def of(self, batch: Batch) -> Learner:
        """The learner of a batch's task."""
        return self._learners[batch.task]

    def forward(
        self, batch: Batch, step: int, micro_batch: MicroBatch | None = None, *, examined: bool = False
    ) -> tuple[Tensor, Parts]:
        """As the learner of the batch's task has it."""
        return self.of(batch).forward(batch, step, micro_batch, examined=examined)
