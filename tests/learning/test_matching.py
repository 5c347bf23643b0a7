"""Negatives are really negative and drawn as in the paper, and the loss is the paper's equation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mmflow.learning import pair_losses
from mmflow.learning.objectives.matching import Matching
from mmflow.learning.pair_losses import draw_negatives
from mmflow.learning.rows import uniform
from mmflow.models.encoders import Encoded
from tests.learning.tiny import TinyModel, all_real, alone, batch, gradients, outputs_of, rows_of, unit

WIDTH = 6


@given(
    rows=st.integers(1, 9),
    groups=st.integers(1, 9),
    scale=st.sampled_from([0.0, 5.0, 100.0]),
    strip_elements=st.sampled_from([1, 1 << 20]),
    seed=st.integers(0, 999),
)
def test_own_partner_padding_and_equals_are_never_drawn(
    rows: int, groups: int, scale: float, strip_elements: int, seed: int
) -> None:
    random = torch.Generator().manual_seed(seed)
    identities = torch.randint(0, groups, (rows, 2), generator=random) * torch.tensor([1, -1])
    real = torch.rand(rows, generator=random) < 0.8
    embeddings = unit(rows, WIDTH, seed), unit(rows, WIDTH, seed + 1)
    chance = uniform(seed, torch.arange(rows), 1)[:, 0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pair_losses, "STRIP_ELEMENTS", strip_elements)
        drawn = draw_negatives(*embeddings, torch.tensor([scale]), identities, identities, real, chance)
    for row, other in enumerate(drawn.tolist()):
        may_be = [
            candidate
            for candidate in range(rows)
            if real[candidate] and not (identities[row] == identities[candidate]).any()
        ]
        assert other in may_be if may_be else other == -1


@pytest.mark.parametrize("chance", [2.0**-24, 1 - 2.0**-24])
def test_extreme_random_numbers_draw_allowed_candidates(chance: float) -> None:
    """The last candidates, and the first, are barred: rounding must not fall on them."""
    rows = 300
    embeddings = unit(rows, WIDTH, 0), unit(rows, WIDTH, 1)
    identities = torch.arange(rows)[:, None]
    real = (torch.arange(rows) > 5) & (torch.arange(rows) < 290)
    drawn = draw_negatives(*embeddings, torch.tensor([30.0]), identities, identities, real, torch.full((rows,), chance))
    assert (real[drawn] & (drawn != torch.arange(rows))).all()


def test_likelier_partners_are_drawn_more_often() -> None:
    """By the softmax over those that may be: chi-squared over 4,000 draws."""
    candidates = unit(6, WIDTH, 1)
    image = unit(1, WIDTH, 0)
    draws = 4000
    drawn = draw_negatives(
        image.expand(draws, -1),
        candidates,
        torch.tensor([3.0]),
        torch.zeros(draws, 1, dtype=torch.int64),
        torch.tensor([[0], [1], [2], [3], [0], [5]]),
        torch.tensor([True, True, True, True, True, False]),
        uniform(7, torch.arange(draws), 1)[:, 0],
    )
    may_be = [1, 2, 3]
    probability = (3.0 * image @ candidates[may_be].T).softmax(1)[0]
    counts = torch.bincount(drawn, minlength=6)
    assert counts[[0, 4, 5]].sum() == 0
    chi_squared = ((counts[may_be] - draws * probability) ** 2 / (draws * probability)).sum()
    assert chi_squared < 18.4  # two degrees of freedom, one failure in ten thousand


def plain(model: TinyModel, arguments: dict[str, Any], wrong_text: list[int], wrong_image: list[int]) -> Tensor:
    """Equation 4, a pair at a time."""
    image = model.encode_image(arguments["pixels"])
    text = model.encode_text(arguments["token_ids"], arguments["token_mask"])
    rows = range(len(wrong_text))
    pairs = [(row, row, 1) for row in rows]
    pairs += [(row, wrong, 0) for row, wrong in zip(rows, wrong_text, strict=True) if wrong >= 0]
    pairs += [(wrong, row, 0) for row, wrong in zip(rows, wrong_image, strict=True) if wrong >= 0]
    losses = []
    for of_image, of_text, belongs in pairs:
        fused = model.fuse(
            Encoded(image.sequence_BTW[of_image][None], image.pooled_BW[of_image][None]),
            Encoded(*(tensor[of_text][None] for tensor in text[:3])),
        )
        losses.append(-model.matching_logits(fused).log_softmax(-1)[0, belongs])
    return torch.stack(losses).mean()


def test_loss_and_gradient_equal_the_paper_s_equation(monkeypatch: pytest.MonkeyPatch) -> None:
    model, arguments = TinyModel(), batch(4)
    wrong = torch.tensor([2, 0, -1, 1]), torch.tensor([3, -1, 0, 2])
    monkeypatch.setattr(Matching, "wrong_partners", lambda *_: wrong)
    loss = Matching().loss(outputs_of(model, arguments, all_real(4)))
    actual = gradients(loss, model)
    expected = plain(model, arguments, wrong[0].tolist(), wrong[1].tolist())
    torch.testing.assert_close(loss, expected, atol=1e-6, rtol=1e-5)
    for name, gradient in gradients(expected, model).items():
        torch.testing.assert_close(actual[name], gradient, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("negatives", ["hard", "uniform"])
def test_on_one_rank_the_pool_makes_no_difference(negatives: Any) -> None:
    outputs = [outputs_of(TinyModel(), batch(6), rows_of(torch.arange(6) != 2)) for _ in range(2)]
    of_batch, of_rank = Matching(negatives=negatives, pool="batch"), Matching(negatives=negatives, pool="rank")
    torch.testing.assert_close(of_batch.loss(outputs[0]), of_rank.loss(outputs[1]))


def test_rows_of_one_key_or_one_caption_are_no_partners() -> None:
    """All rows are one sample, or say the same: only the pairs themselves are left, and they are right."""
    model, arguments = TinyModel(), batch(5)
    same_key = arguments | {"keys": ("one",) * 5}
    same_caption = arguments | {name: arguments[name][:1].expand(5, -1) for name in ("token_ids", "token_mask")}
    for repeated in (same_key, same_caption):
        outputs = outputs_of(model, repeated, all_real(5))
        expected = -model.matching_logits(outputs.fused).log_softmax(-1)[:, 1].mean()
        torch.testing.assert_close(Matching().loss(outputs), expected)


def test_partners_differ_from_step_to_step_and_repeat_with_the_generator() -> None:
    model, arguments = TinyModel(), batch(8)
    drawn = [
        Matching().wrong_partners(outputs_of(model, arguments, all_real(8), seed=seed), alone, torch.ones(8).bool())
        for seed in (1, 1, 2)
    ]
    assert all(torch.equal(first, again) for first, again in zip(drawn[0], drawn[1], strict=True))
    assert not torch.equal(torch.stack(drawn[0]), torch.stack(drawn[2]))
