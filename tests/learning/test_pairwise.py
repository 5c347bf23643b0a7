"""The contrast of scores pair by pair equals a plain loop over the whole matrix, wherever its columns are scored."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mmflow.learning.objectives import ObjectivesConfig, check_objectives, total
from mmflow.learning.objectives.contrastive import Contrastive, pair_score_loss
from mmflow.learning.rows import GlobalRows
from mmflow.models.config import ModelConfig
from mmflow.models.model import build
from tests.learning.tiny import (
    SIDE,
    SPECIAL,
    TOKENS,
    VOCABULARY,
    TinyModel,
    all_real,
    alone,
    batch,
    outputs_of,
    rows_of,
)

CLOSE = {"atol": 1e-6, "rtol": 1e-5}


def plain_loop(scores: Tensor, smoothing: float = 0.0) -> Tensor:
    """CLIP4Clip, equations 7 to 9, term by term: rows are captions, columns clips."""
    count, total = len(scores), torch.zeros(())
    for right in range(count):
        for candidates in (scores[right], scores[:, right]):
            surprisals = [-(candidates[each].exp() / candidates.exp().sum()).log() for each in range(count)]
            total = total + (1 - smoothing) * surprisals[right] + smoothing * torch.stack(surprisals).mean()
    return total / (2 * count)


def scores_of(rows: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, rows, generator=torch.Generator().manual_seed(seed)).mul(3).requires_grad_()


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@pytest.mark.parametrize("rows", [2, 7])
def test_loss_and_gradient_equal_a_plain_loops(rows: int, smoothing: float) -> None:
    ours, theirs = scores_of(rows), scores_of(rows)
    loss, expected = pair_score_loss(ours, all_real(rows), alone, smoothing), plain_loop(theirs, smoothing)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(loss, expected, **CLOSE)
    torch.testing.assert_close(ours.grad, theirs.grad, **CLOSE)


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@pytest.mark.parametrize("num_ranks", [2, 3])
@pytest.mark.parametrize("num_real", [6, 4, 1, 0])
def test_ranks_that_score_their_own_clips_have_the_whole_batchs_loss(
    num_real: int, num_ranks: int, smoothing: float
) -> None:
    """Every rank in turn, what it gathers of the others worked out beforehand; a rank may be all padding."""
    ours, theirs, real = scores_of(6), scores_of(6), torch.arange(6) < num_real
    size = 6 // num_ranks
    blocks = ours.split(size, 1)

    def part(rank: int, gather: Callable[[Tensor], Tensor]) -> Tensor:
        return pair_score_loss(
            blocks[rank], GlobalRows(real[rank * size :][:size], real, rank * size), gather, smoothing
        )

    sent: list[list[Tensor]] = []
    for rank in range(num_ranks):
        sent.append([])

        def keep(rows: Tensor, own: list[Tensor] = sent[-1]) -> Tensor:
            own.append(rows)
            return rows

        part(rank, keep)
    losses = []
    for rank in range(num_ranks):
        calls = iter(zip(*sent, strict=True))
        losses.append(part(rank, lambda rows, calls=calls: torch.cat(next(calls))))  # type: ignore[misc]
    loss = torch.stack(losses).mean()
    assert torch.isfinite(loss)
    if num_real:
        expected = plain_loop(theirs[:num_real, :num_real], smoothing)
        torch.testing.assert_close(loss, expected, **CLOSE)
        loss.backward()
        expected.backward()
        torch.testing.assert_close(ours.grad, theirs.grad, **CLOSE)


def test_padded_rows_change_nothing_and_have_no_slope() -> None:
    real = torch.tensor([True, False, True, True, False])
    whole = scores_of(5)
    loss = pair_score_loss(whole, rows_of(real), alone, 0.2)
    torch.testing.assert_close(loss, plain_loop(whole.detach()[real][:, real], 0.2), **CLOSE)
    loss.backward()
    assert whole.grad is not None
    assert (whole.grad[~real] == 0).all()
    assert (whole.grad[:, ~real] == 0).all()


def test_contrastive_reads_the_scores_of_a_model_that_gives_them() -> None:
    class Scorer(TinyModel):
        gives = frozenset(("pair_scores",))

        def score_pairs(self, captions: Tensor, clips: Tensor) -> Tensor:
            return captions @ clips.pooled_BW.T  # type: ignore[attr-defined]

    model = Scorer()
    outputs = outputs_of(model, batch(5), all_real(5))
    expected = plain_loop(outputs.text.pooled_BW @ outputs.image.pooled_BW.T)  # type: ignore[union-attr]
    torch.testing.assert_close(Contrastive().loss(outputs), expected, **CLOSE)


def test_captions_are_learnt_to_find_their_clips() -> None:
    """Through the model that a recipe builds, with padded frames, to the scores that retrieval ranks by."""
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    small |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = ModelConfig.model_validate(
        {
            "image": {"type": "vit", "options": {**small, "patch_size": 4}, "pooling": "first"},
            "text": {"type": "bert", "options": {**small, "max_position_embeddings": TOKENS}},
            "video": {"kind": "tight", "max_frames": 3, "layers": 1, "heads": 2},
            "embedding_width": 16,
            "image_pixels": SIDE,
            "max_tokens": TOKENS,
        }
    )
    model = build("m", config, VOCABULARY, seed=0)
    arguments = batch(6)
    arguments["pixels"] = torch.randn(6, 3, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    arguments["frame_mask"] = torch.arange(3) < torch.tensor([1, 2, 3, 3, 2, 1])[:, None]
    objectives = ObjectivesConfig.model_validate({"contrastive": {}})
    check_objectives("pretrain.objectives", objectives, model.gives, SPECIAL)
    descent = torch.optim.Adam(model.parameters(), lr=0.003)
    first = torch.inf
    for step in range(120):
        loss, parts = total(outputs_of(model, arguments, all_real(6)), objectives.named, step)
        descent.zero_grad()
        loss.backward()
        descent.step()
        first = loss.item() if step == 0 else first
    assert set(parts) == {"contrastive"}
    assert loss.item() < 0.1 < 1.5 < first
    scores = outputs_of(model.eval(), arguments, all_real(6)).pair_scores
    assert torch.equal(scores.argmax(0), torch.arange(6))
