"""What a model gives that losses compare, and who is heard in a loss."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mmflow.learning.outputs import Outputs
from mmflow.learning.rows import Gather, GlobalRows

# Shapes: B rows of this rank, N rows of all ranks, E a model's width of the shared space.

SIDES = ("image", "text")


class Space(NamedTuple):
    """Where a model puts the rows of a batch: embeddings of unit length, and what multiplies their cosines, (1,)."""

    image_BE: Tensor
    text_BE: Tensor
    logit_scale: Tensor


@dataclass(frozen=True)
class Given:
    """What a model makes of a batch, computed when the first loss asks."""

    outputs: Outputs | None  # None: its cached embeddings are all that is asked of it
    cached: Space | None = None

    @property
    def space(self) -> Space:
        """From the cache where there is one."""
        if self.cached is not None:
            return self.cached
        return Space(self.live.image_embedding, self.live.text_embedding, self.live.scale.logit_scale)

    @property
    def live(self) -> Outputs:
        """What it gives beside its cached embeddings."""
        assert self.outputs is not None, "a teacher is loaded where a loss asks for more than its cache"
        return self.outputs


@dataclass(frozen=True)
class Teaching:
    """One teacher's part in a loss."""

    share: float  # of all that are heard in it
    given: Given
    projections: nn.ModuleDict  # of the student's to this teacher's widths, where they differ
    hidden: Mapping[str, Sequence[tuple[Tensor, Tensor]]]  # by side: layers compared, the student's and the teacher's

    def projected(self, student: Space) -> Space:
        """The student's embeddings in this teacher's width, of unit length."""
        image_BE, text_BE = (
            nn.functional.normalize(self.projections[side](each) if side in self.projections else each, dim=-1)
            for side, each in zip(SIDES, student[:2], strict=True)
        )
        return Space(image_BE, text_BE, student.logit_scale)


@dataclass(frozen=True)
class Heard:
    """A batch as a loss compares it."""

    student: Given
    teachings: Sequence[Teaching]
    rows: GlobalRows
    gather: Gather

    @property
    def spaces(self) -> list[tuple[float, Space]]:
        """Each teacher's share and space."""
        return [(each.share, each.given.space) for each in self.teachings]

    @property
    def projected(self) -> list[Space]:
        """The student's space in each teacher's width."""
        return [each.projected(self.student.space) for each in self.teachings]


def scaled_products(rows_BE: Tensor, columns_NE: Tensor, logit_scale: Tensor | float, there: Tensor) -> Tensor:
    """(B, N) fp32 scaled products; columns that are not `there`, (N,) or (B, N), are the lowest finite number, so that
    softmax gives them nothing."""
    with torch.autocast(rows_BE.device.type, enabled=False):
        logits_BN = logit_scale * rows_BE.float() @ columns_NE.float().T
    return logits_BN.masked_fill(~there, torch.finfo(logits_BN.dtype).min)


def averaged(log_probabilities: Sequence[tuple[float, Tensor]]) -> Tensor:
    """The logarithm of the mean of several teachers' probabilities, each with its share: averaged after the softmax
    (MobileCLIP, arXiv 2311.17049, section 3.2), so that one that is sure is heard over one that is not."""
    return torch.stack([each + math.log(share) for share, each in log_probabilities]).logsumexp(0)


def divergence(student_BN: Tensor, teacher_BN: Tensor, there: Tensor) -> Tensor:
    """(B,) KL(teacher ‖ student) of rows of log-probabilities over the columns that are `there`."""
    return (teacher_BN.exp() * (teacher_BN - student_BN)).masked_fill(~there, 0.0).sum(-1)
