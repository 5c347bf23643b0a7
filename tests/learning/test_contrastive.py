"""Losses over all pairs of a batch equal other implementations, with any padding and in any number of strips."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import cross_entropy, logsigmoid, normalize

from mmflow.learning import pair_losses
from mmflow.learning.objectives import ObjectivesConfig, check_objectives, total
from mmflow.learning.objectives.contrastive import Contrastive, contrastive_loss, pair_score_loss
from mmflow.learning.pair_losses import sigmoid_loss
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
    unit,
)

WIDTH = 6
CLOSE = {"atol": 1e-6, "rtol": 1e-5}

Leaves = tuple[Tensor, ...]


def leaves(rows: int, seed: int, *numbers: float, dtype: torch.dtype = torch.float32) -> Leaves:
    """Images, captions, a scale and perhaps a bias to differentiate by."""
    values = unit(rows, WIDTH, seed), unit(rows, WIDTH, seed + 1), *(torch.tensor([number]) for number in numbers)
    return tuple(value.to(dtype, copy=True).requires_grad_() for value in values)


def infonce(inputs: Leaves, rows: GlobalRows, smoothing: float = 0.0) -> Tensor:
    return contrastive_loss(*inputs, rows, alone, smoothing)


def sigmoid(inputs: Leaves, rows: GlobalRows, _: float = 0.0) -> Tensor:
    return sigmoid_loss(*inputs, rows, alone)


def dense_infonce(inputs: Leaves, smoothing: float = 0.0) -> Tensor:
    """CLIP's pseudocode, with the whole matrix."""
    image, text, scale = (tensor.float() for tensor in inputs)
    logits = scale * image @ text.T
    right = torch.arange(len(logits))
    return 0.5 * sum(cross_entropy(side, right, label_smoothing=smoothing) for side in (logits, logits.T))


def dense_sigmoid(inputs: Leaves, _: float = 0.0) -> Tensor:
    """Algorithm 1 of the SigLIP paper."""
    image, text, scale, bias = (tensor.float() for tensor in inputs)
    logits = scale * image @ text.T + bias
    labels = 2 * torch.eye(len(logits)) - 1
    return -logsigmoid(labels * logits).sum() / len(logits)


LOSSES = {"infonce": (infonce, dense_infonce, (20.0,)), "sigmoid": (sigmoid, dense_sigmoid, (10.0, -10.0))}


@pytest.fixture(params=[1, 40, pair_losses.STRIP_ELEMENTS], ids=["a row a strip", "some rows", "one strip"])
def strip_elements(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pair_losses, "STRIP_ELEMENTS", request.param)


def assert_same_gradients(ours: Leaves, theirs: Leaves, scale: float = 1.0) -> None:
    for tensor, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(tensor.grad, other.grad, atol=1e-6 * scale, rtol=1e-5)


@pytest.mark.usefixtures("strip_elements")
@pytest.mark.parametrize("rows", [2, 17])
@pytest.mark.parametrize("scale", [1.0, 14.3, 100.0])
def test_infonce_and_its_gradient_equal_those_of_transformers(rows: int, scale: float) -> None:
    from transformers.models.clip.modeling_clip import image_text_contrastive_loss

    seed = torch.seed() % 2**32
    ours, theirs = leaves(rows, seed, scale), leaves(rows, seed, scale)
    loss = infonce(ours, all_real(rows))
    expected = image_text_contrastive_loss(theirs[2] * theirs[0] @ theirs[1].T)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(loss, expected, **CLOSE)
    assert_same_gradients(ours, theirs, scale)


@pytest.mark.usefixtures("strip_elements")
@pytest.mark.parametrize(
    ("name", "numbers", "smoothing"),
    [
        ("infonce", (20.0,), 0.1),
        ("infonce", (20.0,), 0.6),
        ("sigmoid", (10.0, -10.0), 0.0),
        ("sigmoid", (100.0, -16.0), 0.0),
        ("sigmoid", (2.0, 3.0), 0.0),
    ],
)
def test_loss_and_gradient_equal_those_of_the_whole_matrix(
    name: str, numbers: tuple[float, ...], smoothing: float
) -> None:
    loss_of, dense, _ = LOSSES[name]
    seed = torch.seed() % 2**32
    ours, theirs = leaves(11, seed, *numbers), leaves(11, seed, *numbers)
    loss, expected = loss_of(ours, all_real(11), smoothing), dense(theirs, smoothing)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(loss, expected, **CLOSE)
    assert_same_gradients(ours, theirs, numbers[0])


def test_sigmoid_and_its_gradient_equal_those_of_transformers() -> None:
    """Through the smallest SigLIP that it builds, and its own embeddings."""
    from transformers import SiglipConfig, SiglipModel

    small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    torch.manual_seed(0)
    config = SiglipConfig(
        text_config={**small, "vocab_size": 20, "max_position_embeddings": 6},
        vision_config={**small, "image_size": 8, "patch_size": 4},
    )
    model = SiglipModel(config).eval()
    with torch.no_grad():
        model.logit_scale.fill_(math.log(10))
        model.logit_bias.fill_(-3.0)
    pixels, ids = torch.randn(5, 3, 8, 8), torch.randint(0, 20, (5, 6))
    output = model(input_ids=ids, pixel_values=pixels, return_loss=True)
    expected = torch.autograd.grad(output.loss, [model.logit_scale, model.logit_bias])
    image, text = (normalize(tensor, dim=-1).detach() for tensor in (output.image_embeds, output.text_embeds))
    raw_scale = model.logit_scale.detach().reshape(1).requires_grad_()
    bias = model.logit_bias.detach().reshape(1).requires_grad_()
    loss = sigmoid_loss(image, text, raw_scale.exp(), bias, all_real(5), alone)
    gradients = torch.autograd.grad(loss, [raw_scale, bias])
    torch.testing.assert_close(loss, output.loss, atol=1e-5, rtol=1e-5)
    for gradient, reference in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient.squeeze(), reference.squeeze(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", LOSSES)
def test_bf16_embeddings_lose_nothing_more_than_their_own_rounding(name: str) -> None:
    """The arithmetic is fp32, under autocast too."""
    loss_of, dense, numbers = LOSSES[name]
    ours, theirs = (leaves(9, 3, *numbers, dtype=torch.bfloat16) for _ in range(2))
    expected = dense(theirs)
    with torch.autocast("cpu", torch.bfloat16):
        loss = loss_of(ours, all_real(9))
        loss.backward()
    expected.backward()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, **CLOSE)
    for tensor, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(tensor.grad, other.grad)


@pytest.mark.parametrize("name", LOSSES)
@given(
    rows=st.integers(2, 12),
    padding=st.integers(1, 12),
    smoothing=st.sampled_from([0.0, 0.2]),
    strip_elements=st.sampled_from([20, 1 << 20]),
    seed=st.integers(0, 999),
)
def test_padded_rows_change_nothing(
    name: str, rows: int, padding: int, smoothing: float, strip_elements: int, seed: int
) -> None:
    """Wherever they are and whatever is in them."""
    loss_of, dense, numbers = LOSSES[name]
    places = torch.randperm(rows + padding, generator=torch.Generator().manual_seed(seed))[:rows].sort().values
    real = torch.zeros(rows + padding, dtype=torch.bool)
    real[places] = True
    plain, padded = leaves(rows, seed, *numbers), leaves(rows + padding, seed + 7, *numbers)
    with torch.no_grad():
        for short, long in zip(plain[:2], padded[:2], strict=True):
            long[places] = short
    expected = dense(plain, smoothing)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pair_losses, "STRIP_ELEMENTS", strip_elements)
        loss = loss_of(padded, rows_of(real), smoothing)
        loss.backward()
    torch.testing.assert_close(loss, expected, **CLOSE)
    expected.backward()
    assert_same_gradients(padded[2:], plain[2:])
    for short, long in zip(plain[:2], padded[:2], strict=True):
        assert long.grad is not None
        torch.testing.assert_close(long.grad[places], short.grad, atol=1e-6, rtol=1e-5)
        assert (long.grad[~real] == 0).all()


def test_sigmoid_s_gradient_is_multiplied_by_the_weight_of_the_loss() -> None:
    """The gradient is computed before the weight is known."""
    once, thrice = leaves(4, 0, 10.0, -10.0), leaves(4, 0, 10.0, -10.0)
    sigmoid(once, all_real(4)).backward()
    (3 * sigmoid(thrice, all_real(4))).backward()
    for tensor, other in zip(once, thrice, strict=True):
        assert tensor.grad is not None
        torch.testing.assert_close(3 * tensor.grad, other.grad)


def test_values_of_infonce_at_the_largest_scale() -> None:
    """Nothing overflows or vanishes: perfect pairs, collapsed and opposed embeddings, every pair swapped."""
    perfect, collapsed, pair = torch.eye(WIDTH), unit(1, WIDTH, 0).repeat(8, 1), torch.eye(2)
    cases = [
        (perfect, perfect, 0.0),
        (collapsed, collapsed, math.log(8)),
        (collapsed, -collapsed, math.log(8)),
        (pair, pair.flip(0), 100.0),
    ]
    for image, text, expected in cases:
        loss = contrastive_loss(image, text, torch.tensor([100.0]), all_real(len(image)), alone)
        torch.testing.assert_close(loss, torch.tensor(expected), atol=1e-4, rtol=1e-6)


# --- scores pair by pair ----------------------------------------------------------------------------------------------


def plain_loop(scores: Tensor, smoothing: float = 0.0) -> Tensor:
    """CLIP4Clip, equations 7 to 9, term by term: rows are captions, columns clips."""
    count, total = len(scores), torch.zeros(())
    for right in range(count):
        for candidates in (scores[right], scores[:, right]):
            surprisals = [-(candidates[row].exp() / candidates.exp().sum()).log() for row in range(count)]
            total = total + (1 - smoothing) * surprisals[right] + smoothing * torch.stack(surprisals).mean()
    return total / (2 * count)


def scores_of(rows: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, rows, generator=torch.Generator().manual_seed(seed)).mul(3).requires_grad_()


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@pytest.mark.parametrize("real", [[True] * 2, [True] * 7, [True, False, True, True, False]])
def test_pair_scores_loss_and_gradient_equal_a_plain_loop_over_real_pairs(real: list[bool], smoothing: float) -> None:
    """So the gradient of padded rows and columns is zero."""
    is_real = torch.tensor(real)
    ours, theirs = scores_of(len(real)), scores_of(len(real))
    loss = pair_score_loss(ours, rows_of(is_real), alone, smoothing)
    expected = plain_loop(theirs[is_real][:, is_real], smoothing)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(loss, expected, **CLOSE)
    torch.testing.assert_close(ours.grad, theirs.grad, **CLOSE)


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@pytest.mark.parametrize("num_ranks", [2, 3])
@pytest.mark.parametrize("num_real", [6, 4, 1, 0])
def test_ranks_that_score_only_their_own_clips_have_the_loss_of_the_whole_batch(
    num_real: int, num_ranks: int, smoothing: float
) -> None:
    """The ranks run in turn: a first pass records what each sends. A rank may have only padding."""
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
