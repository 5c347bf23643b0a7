"""A batch: what one rank's step is given, put together from rows that any number of workers have loaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mmflow.loading.load import Loaded
from mmflow.loading.plan import LoaderState
from mmflow.loading.tokens import pad

# Shapes: B rows of this rank, F frames of a clip, T tokens in the longest text, A in the longest answer, S the side of
# a picture in pixels.


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One rank's slice of a global batch. Rows whose `real` is False stand for nothing and must count nowhere."""

    keys: tuple[str, ...]
    pixels: Tensor  # (B, 3, S, S) uint8, channels last in memory; clips: (B, F, 3, S, S)
    frame_mask: Tensor | None = None  # (B, F) bool, of clips: False where a clip has fewer frames
    token_ids: Tensor  # (B, T) int64
    token_mask: Tensor  # (B, T) int64, 1 where real
    real: Tensor  # (B,) bool: False for padding, and for what was left out
    targets: Mapping[str, Tensor] = field(default_factory=dict)
    """`label` and `answer`: (B,) int64, the class's number or -1 where it is not known; `answer_ids` and `answer_mask`:
    (B, A) int64, the answer as tokens; `answer_scores`: (B, classes) fp32, what each would earn as the answer."""
    readings: tuple[tuple[Tensor, Tensor], ...] = ()  # token ids and mask as other models read the texts, (B, T) each
    places: NDArray[np.int64] | None = None  # (B, 4): dataset, shard, row and view, by which what is stored is found
    skipped: tuple[str, ...] = ()  # a line for each sample that was left out: which, and why
    task: int = 0  # the number of the task that it is of, where there are several
    state: LoaderState  # where the batch after this one begins

    def map_tensors(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """The batch with each of its tensors changed."""
        return replace(
            self,
            pixels=change(self.pixels),
            frame_mask=None if self.frame_mask is None else change(self.frame_mask),
            token_ids=change(self.token_ids),
            token_mask=change(self.token_mask),
            real=change(self.real),
            targets={name: change(target) for name, target in self.targets.items()},
            readings=tuple((change(ids), change(mask)) for ids, mask in self.readings),
        )


def assemble(
    parts: Sequence[Loaded],
    pixels_BFSS3: NDArray[np.uint8],
    state: LoaderState,
    *,
    clips: bool,
    pad_id: int,
    num_classes: int = 0,
    reading_pad_ids: Sequence[int] = (),
) -> Batch:
    """The batch of consecutive slots whose pixels lie in a buffer. The buffer is copied: it may be filled again."""
    token_ids, token_mask = pad([row for part in parts for row in part.tokens], pad_id)
    targets = {
        name: torch.tensor([number for part in parts for number in part.targets[name]]) for name in parts[0].targets
    }
    if parts[0].answers is not None:
        # A row of one token more, so that a batch in which nobody knows an answer has a width too.
        answers = pad([*(row for part in parts for row in part.answers or ()), [pad_id]], pad_id)
        targets["answer_scores"] = _dense([row for part in parts for row in part.scores], num_classes)
        targets |= {
            name: torch.from_numpy(array[:-1])
            for name, array in zip(("answer_ids", "answer_mask"), answers, strict=True)
        }
    pixels_BF3SS = torch.from_numpy(pixels_BFSS3).clone().permute(0, 1, 4, 2, 3)
    frames_B = torch.tensor([number for part in parts for number in part.frames])
    return Batch(
        keys=tuple(key for part in parts for key in part.keys),
        pixels=pixels_BF3SS if clips else pixels_BF3SS[:, 0],
        frame_mask=torch.arange(pixels_BFSS3.shape[1]) < frames_B[:, None] if clips else None,
        token_ids=torch.from_numpy(token_ids),
        token_mask=torch.from_numpy(token_mask),
        real=torch.tensor([each for part in parts for each in part.real]),
        targets=targets,
        readings=tuple(
            _tensors([row for part in parts for row in part.readings[number]], pad_of_reading)
            for number, pad_of_reading in enumerate(reading_pad_ids)
        ),
        places=np.array([place for part in parts for place in part.places], np.int64).reshape(-1, 4),
        skipped=tuple(line for part in parts for line in part.skipped),
        state=state,
    )


def _tensors(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    ids, mask = pad(rows, pad_id)
    return torch.from_numpy(ids), torch.from_numpy(mask)


def _dense(scores: Sequence[Mapping[int, float]], num_classes: int) -> Tensor:
    """(B, classes) fp32, 0 where a row has no score."""
    dense_BC = torch.zeros(len(scores), num_classes)
    for row, found in enumerate(scores):
        for number, score in found.items():
            dense_BC[row, number] = score
    return dense_BC


def pixels_tensor(views: Sequence[NDArray[np.uint8]]) -> Tensor:
    """(B, 3, height, width) uint8 whose memory is channels last, as the pictures are: no copy is made to turn them."""
    return torch.from_numpy(np.stack(views)).permute(0, 3, 1, 2)


def normalise(pixels: Tensor, mean: tuple[float, float, float], std: tuple[float, float, float]) -> Tensor:
    """uint8 pictures (…, 3, height, width) as float with the mean and deviation that the model was trained with."""
    # Whole lines of a picture, three values a pixel as they lie in memory: with a mean for each colour beside them, all
    # of a line is one operation of the processor's widest kind, where a colour at a time takes two and a half times as
    # long. In place: two copies of a batch in floats would be half of that again.
    lines = pixels.movedim(-3, -1).flatten(-2).float()
    width = pixels.shape[-1]
    shift = torch.tensor(mean, device=pixels.device).mul(255).repeat(width)
    scale = torch.tensor(std, device=pixels.device).mul(255).reciprocal().repeat(width)
    return lines.sub_(shift).mul_(scale).view(*pixels.shape[:-3], -1, width, 3).movedim(-1, -3)
