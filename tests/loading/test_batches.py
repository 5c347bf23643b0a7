"""Batches: put together from parts, whatever the parts, and pixels as the model reads them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from mmflow.loading.batches import Loaded, assemble, normalise, pixels_tensor
from mmflow.loading.plan import LoaderState

AFTER = LoaderState(2, 6)
PAD = 9


def part(*numbers: int, frames: int = 1) -> Loaded:
    return Loaded(
        keys=[f"key-{number}" for number in numbers],
        tokens=[[1] * number for number in numbers],
        real=[number != 3 for number in numbers],
        frames=[min(number, frames) for number in numbers],
        targets={"label": [number - 2 for number in numbers]},
        answers=[[7] * (number - 1) for number in numbers],
        skipped=[f"key-{number} is gone" for number in numbers if number == 3],
    )


def pixels(rows: int, frames: int = 1) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (rows, frames, 4, 4, 3), np.uint8)


def test_a_batch_is_its_parts_one_after_another_padded_to_its_longest_text() -> None:
    buffer = pixels(4)
    batch = assemble([part(1, 3), part(2, 1)], buffer, AFTER, clips=False, pad_id=PAD)
    assert batch.keys == ("key-1", "key-3", "key-2", "key-1")
    assert batch.token_ids.tolist() == [[1, PAD, PAD], [1, 1, 1], [1, 1, PAD], [1, PAD, PAD]]
    assert batch.token_mask.tolist() == [[1, 0, 0], [1, 1, 1], [1, 1, 0], [1, 0, 0]]
    assert batch.real.tolist() == [True, False, True, True]
    assert batch.targets["label"].tolist() == [-1, 1, 0, -1]
    assert batch.targets["answer_ids"].tolist() == [[PAD, PAD], [7, 7], [7, PAD], [PAD, PAD]]
    assert batch.targets["answer_mask"].tolist() == [[0, 0], [1, 1], [1, 0], [0, 0]]
    assert (batch.skipped, batch.state) == (("key-3 is gone",), AFTER)
    assert (batch.pixels.shape, batch.pixels.dtype) == ((4, 3, 4, 4), torch.uint8)
    assert batch.pixels.is_contiguous(memory_format=torch.channels_last)
    assert batch.frame_mask is None
    assert batch.pixels[2, 1, 3, 0] == buffer[2, 0, 3, 0, 1]
    integers = (batch.token_ids, batch.token_mask, *(batch.targets[name] for name in ("label", "answer_ids")))
    assert {each.dtype for each in integers} == {torch.int64}
    assert batch.real.dtype == torch.bool


def test_scores_of_answers_are_spread_over_all_classes() -> None:
    parts = [replace(part(1, 2), scores=[{2: 1.0}, {0: 0.5, 1: 1.0}])]
    batch = assemble(parts, pixels(2), AFTER, clips=False, pad_id=PAD, num_classes=3)
    assert batch.targets["answer_scores"].tolist() == [[0, 0, 1], [0.5, 1, 0]]


def test_a_batch_keeps_its_pixels_when_the_buffer_is_filled_again() -> None:
    buffer = pixels(2)
    batch = assemble([part(1, 2)], buffer, AFTER, clips=False, pad_id=PAD)
    before = batch.pixels.clone()
    buffer[:] = 0
    assert torch.equal(batch.pixels, before)


def test_answers_that_nobody_knows_leave_a_width_to_read() -> None:
    batch = assemble([part(1, 1)], pixels(2), AFTER, clips=False, pad_id=PAD)
    assert batch.targets["answer_ids"].tolist() == [[PAD], [PAD]]
    assert batch.targets["answer_mask"].tolist() == [[0], [0]]


def test_clips_have_a_frame_axis_and_a_mask_of_the_frames_they_have() -> None:
    buffer = pixels(3, frames=2)
    batch = assemble([part(1, 2, 3, frames=2)], buffer, AFTER, clips=True, pad_id=PAD)
    assert batch.pixels.shape == (3, 2, 3, 4, 4)
    assert batch.frame_mask is not None
    assert batch.frame_mask.tolist() == [[True, False], [True, True], [True, True]]
    assert batch.pixels[1, 1, 2, 0, 3] == buffer[1, 1, 0, 3, 2]


def test_map_tensors_reaches_every_tensor() -> None:
    batch = assemble([part(1, 2, frames=2)], pixels(2, frames=2), AFTER, clips=True, pad_id=PAD)
    seen: list[torch.Tensor] = []
    changed = batch.map_tensors(lambda tensor: seen.append(tensor) or tensor.to("meta"))  # type: ignore[func-returns-value]
    tensors = [changed.pixels, changed.frame_mask, changed.token_ids, changed.token_mask, changed.real]
    assert all(each is not None and each.is_meta for each in [*tensors, *changed.targets.values()])
    assert len(seen) == 5 + len(batch.targets)
    assert (changed.keys, changed.state) == (batch.keys, batch.state)


def test_normalise_takes_mean_and_deviation_of_pixels_from_0_to_1() -> None:
    pictures = torch.randint(0, 256, (2, 3, 5, 4), dtype=torch.uint8)
    mean, std = (0.1, 0.5, 0.7), (0.2, 0.5, 0.9)
    expected = (pictures / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    torch.testing.assert_close(normalise(pictures, mean, std), expected, atol=1e-5, rtol=1e-5)
    clips = pictures[:, None]
    torch.testing.assert_close(normalise(clips, mean, std), expected[:, None], atol=1e-5, rtol=1e-5)


def test_pixels_tensor_turns_pictures_without_copying_order() -> None:
    views = [np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8) for seed in range(2)]
    tensor = pixels_tensor(views)
    assert tensor.shape == (2, 3, 4, 4)
    assert tensor[1, 2, 3, 0] == views[1][3, 0, 2]
