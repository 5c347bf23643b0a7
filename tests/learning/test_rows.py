"""The random number of a place does not depend on which rank draws it, and passes statistical tests."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from mmflow.learning.rows import draw_seed, text_hashes, uniform


@given(seed=st.integers(0, 2**32 - 1), first=st.integers(0, 2**31), rows=st.integers(1, 5), places=st.integers(1, 9))
def test_a_number_depends_on_seed_row_and_place_alone(seed: int, first: int, rows: int, places: int) -> None:
    numbers = torch.arange(first, first + rows)
    whole = uniform(seed, numbers, places + 3)
    for row in range(rows):
        assert torch.equal(uniform(seed, numbers[row : row + 1], places)[0], whole[row, :places])
    assert ((whole > 0) & (whole < 1)).all()


def test_numbers_are_spread_evenly_and_do_not_follow_their_neighbours() -> None:
    drawn = uniform(5, torch.arange(400), 500)
    counts = drawn.flatten().histc(bins=20, min=0, max=1)
    assert (counts / counts.sum() - 0.05).abs().max() < 0.003  # 200,000 draws: five deviations are 0.0024
    for drawn_here, drawn_there in (
        (drawn[:, 1:], drawn[:, :-1]),
        (drawn[1:], drawn[:-1]),
        (drawn, uniform(6, torch.arange(400), 500)),
    ):
        correlation = torch.corrcoef(torch.stack((drawn_here.flatten(), drawn_there.flatten())))[0, 1]
        assert correlation.abs() < 0.012  # five deviations of 200,000 pairs
    assert drawn.unique().numel() > 0.98 * drawn.numel()


def test_each_draw_has_another_seed_and_equal_generators_the_same() -> None:
    generator, equal_generator = torch.Generator().manual_seed(1), torch.Generator().manual_seed(1)
    seeds = [draw_seed(generator) for _ in range(50)]
    assert seeds == [draw_seed(equal_generator) for _ in range(50)]
    assert len(set(seeds)) == 50


def test_text_hashes_differ_between_texts_and_ignore_padding() -> None:
    ids = torch.tensor([[5, 6, 7], [5, 7, 6], [5, 6, 0], [6, 5, 0], [5, 0, 0]])
    mask = torch.tensor([[1, 1, 1], [1, 1, 1], [1, 1, 0], [1, 1, 0], [1, 0, 0]])
    hashes = text_hashes(ids, mask)
    assert hashes.unique().numel() == 5
    padded = torch.nn.functional.pad(ids, (0, 4), value=9), torch.nn.functional.pad(mask, (0, 4))
    assert torch.equal(text_hashes(*padded), hashes)
    random = torch.Generator().manual_seed(0)
    many = torch.randint(0, 30_000, (20_000, 12), generator=random)
    assert text_hashes(many, torch.ones_like(many)).unique().numel() == many.unique(dim=0).shape[0]
