"""Every fusion: missing and padded rows change nothing, maps show what was read, every parameter gets a gradient."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mmflow.core.errors import RecipeError
from mmflow.models.config import FusionConfig
from mmflow.models.encoders import Encoded, Fused
from mmflow.models.fusion import FUSIONS, build_fusion

TEXT_WIDTH, IMAGE_WIDTH, WIDTH, HEADS = 8, 12, 16, 2
MIXING = ("concatenation", "gated")
ATTENDING = tuple(kind for kind in FUSIONS if kind not in MIXING)
ALL = frozenset({"text", "image", "pooled"})
MISSING = torch.tensor([False, True, False, True])


def fusion(kind: str, reads: frozenset[str] = ALL, layers: int = 2) -> Any:
    """In evaluation mode, with weights, norms and biases that differ from fresh ones."""
    attends = {"layers": layers, "heads": HEADS} if kind in ATTENDING else {}
    config = FusionConfig.model_validate({"kind": kind, "width": WIDTH, **attends})
    torch.manual_seed(3)
    module = build_fusion("model.fusion", config, IMAGE_WIDTH, TEXT_WIDTH, reads)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return module.eval()


def encodings(batch: int = 4, tokens: int = 6, regions: int = 5, seed: int = 0) -> tuple[Encoded, Encoded]:
    """Random image and text; row b of the text has b tokens of padding."""
    random = torch.Generator().manual_seed(seed)
    mask_BT = torch.arange(tokens) < tokens - torch.arange(batch)[:, None]
    image = Encoded(
        torch.randn(batch, regions, IMAGE_WIDTH, generator=random), torch.randn(batch, IMAGE_WIDTH, generator=random)
    )
    text = Encoded(
        torch.randn(batch, tokens, TEXT_WIDTH, generator=random),
        torch.randn(batch, TEXT_WIDTH, generator=random),
        mask_BT,
    )
    return image, text


def absent(encoded: Encoded, missing_B: Tensor = MISSING) -> Encoded:
    """The same with the rows of `missing_B` masked."""
    return encoded._replace(mask_BT=encoded.blanked()[2] & ~missing_B[:, None])


def parts(fused: Fused, text_BT: Tensor | None = None) -> list[Tensor]:
    """What a fusion gives, without the padding of the text."""
    tokens = fused.text_BTW if text_BT is None else fused.text_BTW[text_BT]
    return [tokens, fused.image_BRW, fused.pooled_BW]


def altered(encoded: Encoded, rows: Tensor, value: float | None = None) -> Encoded:
    """With other contents in these rows."""
    sequence, pooled = encoded.sequence_BTW.clone(), encoded.pooled_BW.clone()
    sequence[rows] = torch.randn_like(sequence[rows]) if value is None else value
    pooled[rows] = torch.randn_like(pooled[rows]) if value is None else value
    return encoded._replace(sequence_BTW=sequence, pooled_BW=pooled)


def pooled_difference(fused: Fused, other: Fused) -> Tensor:
    return (fused.pooled_BW - other.pooled_BW).abs().amax(1)


@pytest.mark.parametrize("kind", FUSIONS)
@pytest.mark.parametrize("side", ["image", "text"])
@pytest.mark.parametrize("value", [None, float("nan")])
def test_contents_of_missing_rows_change_nothing(kind: str, side: str, value: float | None) -> None:
    fuse = fusion(kind)
    image, text = encodings()
    if side == "image":
        before, after = fuse(absent(image), text), fuse(absent(altered(image, MISSING, value)), text)
    else:
        before, after = fuse(image, absent(text)), fuse(image, absent(altered(text, MISSING, value)))
    assert [tuple(part.shape) for part in parts(before)] == [(4, 6, WIDTH), (4, 5, WIDTH), (4, WIDTH)]
    assert before.attentions is None
    for part, expected in zip(parts(after), parts(before), strict=True):
        assert torch.equal(part, expected)
        assert expected.isfinite().all()


@pytest.mark.parametrize("kind", FUSIONS)
def test_contents_of_existing_rows_change_much(kind: str) -> None:
    fuse = fusion(kind)
    image, text = encodings()
    difference_B = pooled_difference(fuse(absent(image), text), fuse(absent(altered(image, ~MISSING)), text))
    assert (difference_B[~MISSING] > 1e-3).all()
    assert (difference_B[MISSING] == 0).all()
    difference_B = pooled_difference(fuse(image, absent(text)), fuse(image, absent(altered(text, ~MISSING))))
    assert (difference_B[~MISSING] > 1e-3).all()
    # A row without text still reads its image.
    difference_B = pooled_difference(fuse(image, absent(text)), fuse(altered(image, MISSING), absent(text)))
    assert (difference_B[MISSING] > 1e-3).all()


@pytest.mark.parametrize("kind", FUSIONS)
def test_missing_rows_get_no_gradient_and_spoil_no_other(kind: str) -> None:
    fuse = fusion(kind)
    image, text = encodings()
    sequence, pooled = image.sequence_BTW.requires_grad_(), image.pooled_BW.requires_grad_()
    fused = fuse(absent(image), absent(text, torch.tensor([True, True, False, False])))
    sum(part.square().sum() for part in parts(fused)).backward()
    assert all(parameter.grad.isfinite().all() for parameter in fuse.parameters())
    gradients = [gradient for gradient in (sequence.grad, pooled.grad) if gradient is not None]
    assert all((gradient[MISSING] == 0).all() for gradient in gradients)
    assert any((gradient[~MISSING] != 0).any() for gradient in gradients)


@pytest.mark.parametrize("kind", FUSIONS)
@settings(max_examples=15, deadline=None)
@given(tokens=st.integers(1, 7), extra=st.integers(1, 5), seed=st.integers(0, 99))
def test_padding_changes_nothing(kind: str, tokens: int, extra: int, seed: int) -> None:
    fuse = fusion(kind, layers=1)
    image, text = encodings(batch=1, tokens=tokens, seed=seed)
    longer = text._replace(
        sequence_BTW=torch.cat([text.sequence_BTW, torch.full((1, extra, TEXT_WIDTH), 9.0)], 1),
        mask_BT=torch.arange(tokens + extra)[None] < tokens,
    )
    with torch.inference_mode():
        padded, plain = parts(fuse(image, longer), longer.mask_BT), parts(fuse(image, text), text.mask_BT)
    for part, expected in zip(padded, plain, strict=True):
        torch.testing.assert_close(part, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", FUSIONS)
@pytest.mark.parametrize(
    "reads", [frozenset(some) for size in (1, 2, 3) for some in itertools.combinations(sorted(ALL), size)]
)
@pytest.mark.parametrize("layers", [1, 2])
def test_every_parameter_gets_a_gradient_for_each_set_of_outputs(kind: str, reads: frozenset[str], layers: int) -> None:
    if kind == "cross_attention" and "image" in reads:
        pytest.skip("refused by ModelConfig: no region reads anything")
    fuse = fusion(kind, reads, layers)
    fused = fuse(*encodings())
    given_parts = {"text": fused.text_BTW, "image": fused.image_BRW, "pooled": fused.pooled_BW}
    assert {name for name, part in given_parts.items() if part is not None} == reads
    sum(part.square().sum() for part in given_parts.values() if part is not None).backward()
    assert [name for name, parameter in fuse.named_parameters() if parameter.grad is None] == []


@pytest.mark.parametrize("kind", ATTENDING)
def test_maps_are_distributions_over_real_places_and_change_nothing(kind: str) -> None:
    fuse = fusion(kind)
    image, text = encodings()
    image = absent(image)
    plain, fused = fuse(image, text), fuse(image, text, attentions=True)
    for part, expected in zip(parts(plain), parts(fused), strict=True):
        torch.testing.assert_close(part, expected, atol=1e-5, rtol=1e-5)
    assert len(fused.attentions["text_to_image"]) == 2
    for map_BHTR in fused.attentions["text_to_image"]:
        assert map_BHTR.shape == (4, HEADS, 6, 5)
        assert (map_BHTR[MISSING] == 0).all()
        if kind != "single_stream":
            torch.testing.assert_close(map_BHTR[~MISSING].sum(-1), torch.ones(2, HEADS, 6))
    for joint in fused.attentions.get("joint", ()):
        torch.testing.assert_close(joint.sum(-1), torch.ones(4, HEADS, 11))
        assert (joint[..., :6].masked_select(~text.mask_BT[:, None, None]) == 0).all()
    for map_BHRT in fused.attentions.get("image_to_text", ()):
        assert map_BHRT.shape == (4, HEADS, 5, 6)
        assert (map_BHRT.masked_select(~text.mask_BT[:, None, None]) == 0).all()


def test_a_map_points_at_the_region_that_was_read() -> None:
    """The key of one region is made to match every query."""
    fuse = fusion("cross_attention", frozenset({"pooled"}), layers=1)
    image, text = encodings(batch=1)
    attention = fuse.layers[0].cross_attention.attention
    with torch.no_grad():
        for projection in (attention.query, attention.key):
            projection.weight.zero_()
            projection.bias.zero_()
        attention.query.bias += 1.0
        entered = fuse.image_entrance(image.sequence_BTW)[0]
        attention.key.weight += 5 * entered[3] / entered[3].square().sum()
    map_BHTR = fuse(image, text, attentions=True).attentions["text_to_image"][0]
    assert (map_BHTR.argmax(-1) == 3).all()


@pytest.mark.parametrize("kind", FUSIONS)
def test_dropout_only_acts_in_training(kind: str) -> None:
    fuse, (image, text) = fusion(kind), encodings()
    assert torch.equal(fuse(image, text).pooled_BW, fuse(image, text).pooled_BW)
    fuse.train()
    assert not torch.equal(fuse(image, text).pooled_BW, fuse(image, text).pooled_BW)


def test_a_fusion_that_nothing_reads_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"pretrain\.model\.fusion: nothing reads it; name one or more heads"):
        build_fusion("pretrain.model.fusion", FusionConfig(kind="gated"), 8, 8, frozenset())


def mixed_by_loop(kind: str, mix: Any, text: Tensor, image: Tensor) -> Tensor:
    """The equation of one pair of vectors, a unit at a time."""

    def dot(weights: Tensor, vector: list[float]) -> float:
        return sum(w * x for w, x in zip(weights.tolist(), vector, strict=True))

    both = [*text.tolist(), *image.tolist()]
    units = []
    for unit in range(WIDTH):
        if kind == "gated":  # arXiv 1702.01992, section 3.1
            sides = ((mix.text, text, unit), (mix.image, image, WIDTH + unit))
            units.append(
                sum(
                    math.tanh(dot(side.weight[unit], vector.tolist()))
                    / (1 + math.exp(-dot(mix.gates.weight[row], both)))
                    for side, vector, row in sides
                )
            )
        else:
            x = dot(mix.inner.weight[unit], both) + mix.inner.bias[unit].item()
            units.append(0.5 * x * (1 + math.erf(x / math.sqrt(2))))
    if kind == "gated":
        return torch.tensor(units)
    mean = sum(units) / WIDTH
    deviation = math.sqrt(sum((unit - mean) ** 2 for unit in units) / WIDTH + mix.norm.eps)
    scaled = [(unit - mean) / deviation for unit in units]
    return torch.tensor(scaled) * mix.norm.weight.detach() + mix.norm.bias.detach()


@pytest.mark.parametrize("kind", MIXING)
def test_mixing_equals_its_equation_by_loops(kind: str) -> None:
    fuse, (image, text) = fusion(kind), encodings()
    with torch.no_grad():
        fused = fuse(image, text)
    pairs = [(fused.pooled_BW[row], text.pooled_BW[row], image.pooled_BW[row]) for row in range(4)]
    token, region = text.sequence_BTW[1, 2], image.sequence_BTW[1, 3]
    pairs += [(fused.text_BTW[1, 2], token, image.pooled_BW[1]), (fused.image_BRW[1, 3], text.pooled_BW[1], region)]
    for mixed, of_text, of_image in pairs:
        torch.testing.assert_close(mixed, mixed_by_loop(kind, fuse.mix, of_text, of_image), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", MIXING)
def test_mixing_has_the_gradient_of_finite_differences(kind: str) -> None:
    fuse = fusion(kind, frozenset({"pooled"})).double()
    image, text = encodings(batch=2)
    text_BM, image_BM = text.pooled_BW.double().requires_grad_(), image.pooled_BW.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda t, i: fuse.mix(t[:, None], i[:, None]), (text_BM, image_BM))
