"""Every fusion: what is missing or padded changes nothing, maps are what was read, nothing is without a gradient."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from mmflow.core.errors import RecipeError
from mmflow.models.config import FusionConfig
from mmflow.models.encoders import Encoded, Fused
from mmflow.models.fusion import build_fusion
from tests.models.fusions import ALL, ATTENDING, HEADS, KINDS, WIDTH, encodings, fusion

MISSING = torch.tensor([False, True, False, True])


def absent(encoded: Encoded, missing_B: Tensor) -> Encoded:
    """The same rows with those of `missing_B` masked."""
    mask_BT = encoded.blanked()[2]
    return encoded._replace(mask_BT=mask_BT & ~missing_B[:, None])


def parts(fused: Fused, text_BT: Tensor | None = None) -> list[Tensor]:
    """What a fusion gives, padding of the text left out."""
    tokens = fused.text_BTW if text_BT is None else fused.text_BTW[text_BT]
    return [tokens, fused.image_BRW, fused.pooled_BW]


def altered(encoded: Encoded, rows: Tensor, value: float | None = None) -> Encoded:
    """Other contents in these rows."""
    sequence, pooled = encoded.sequence_BTW.clone(), encoded.pooled_BW.clone()
    sequence[rows] = torch.randn_like(sequence[rows]) if value is None else value
    pooled[rows] = torch.randn_like(pooled[rows]) if value is None else value
    return encoded._replace(sequence_BTW=sequence, pooled_BW=pooled)


@pytest.mark.parametrize("kind", KINDS)
def test_shapes(kind: str) -> None:
    image, text = encodings()
    fused = fusion(kind)(image, text)
    assert [tuple(part.shape) for part in parts(fused)] == [(4, 6, WIDTH), (4, 5, WIDTH), (4, WIDTH)]
    assert fused.attentions is None


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("side", ["image", "text"])
@pytest.mark.parametrize("value", [None, float("nan")])
def test_contents_of_what_is_missing_change_nothing(kind: str, side: str, value: float | None) -> None:
    made = fusion(kind)
    image, text = encodings()
    if side == "image":
        one = made(absent(image, MISSING), text)
        other = made(absent(altered(image, MISSING, value), MISSING), text)
    else:
        one = made(image, absent(text, MISSING))
        other = made(image, absent(altered(text, MISSING, value), MISSING))
    for found, expected in zip(parts(other), parts(one), strict=True):
        assert torch.equal(found, expected)
        assert expected.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_contents_of_what_is_there_change_much(kind: str) -> None:
    made = fusion(kind)
    image, text = encodings()
    one, other = made(absent(image, MISSING), text), made(absent(altered(image, ~MISSING), MISSING), text)
    difference_B = (one.pooled_BW - other.pooled_BW).abs().amax(1)
    assert (difference_B[~MISSING] > 1e-3).all()
    assert (difference_B[MISSING] == 0).all()
    one, other = made(image, absent(text, MISSING)), made(image, absent(altered(text, ~MISSING), MISSING))
    difference_B = (one.pooled_BW - other.pooled_BW).abs().amax(1)
    assert (difference_B[~MISSING] > 1e-3).all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_without_text_still_reads_its_image(kind: str) -> None:
    made = fusion(kind)
    image, text = encodings()
    one = made(image, absent(text, MISSING)).pooled_BW
    other = made(altered(image, MISSING), absent(text, MISSING)).pooled_BW
    assert ((one - other).abs().amax(1)[MISSING] > 1e-3).all()


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_missing_gets_no_gradient_and_spoils_none(kind: str) -> None:
    made = fusion(kind)
    image, text = encodings()
    sequence, pooled = image.sequence_BTW.requires_grad_(), image.pooled_BW.requires_grad_()
    fused = made(absent(image, MISSING), absent(text, torch.tensor([True, True, False, False])))
    sum(part.square().sum() for part in parts(fused)).backward()
    assert all(parameter.grad.isfinite().all() for parameter in made.parameters())
    for gradient in (sequence.grad, pooled.grad):
        if gradient is not None:
            assert (gradient[MISSING] == 0).all()
    assert any(gradient is not None and (gradient[~MISSING] != 0).any() for gradient in (sequence.grad, pooled.grad))


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=15, deadline=None)
@given(tokens=st.integers(1, 7), extra=st.integers(1, 5), seed=st.integers(0, 99))
def test_padding_changes_nothing(kind: str, tokens: int, extra: int, seed: int) -> None:
    made = fusion(kind, layers=1)
    image, text = encodings(batch=1, tokens=tokens, seed=seed)
    longer = text._replace(
        sequence_BTW=torch.cat([text.sequence_BTW, torch.full((1, extra, text.sequence_BTW.shape[2]), 9.0)], 1),
        mask_BT=torch.arange(tokens + extra)[None] < tokens,
    )
    with torch.inference_mode():
        found, expected = made(image, longer), made(image, text)
    for one, other in zip(parts(found, longer.mask_BT), parts(expected, text.mask_BT), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "reads", [frozenset(some) for size in (1, 2, 3) for some in itertools.combinations(sorted(ALL), size)]
)
@pytest.mark.parametrize("layers", [1, 2])
def test_no_parameter_is_without_a_gradient_whatever_is_read(kind: str, reads: frozenset[str], layers: int) -> None:
    if kind == "cross_attention" and "image" in reads:
        pytest.skip("refused by ModelConfig: no region reads anything")
    made = fusion(kind, reads, layers)
    fused = made(*encodings())
    given = {"text": fused.text_BTW, "image": fused.image_BRW, "pooled": fused.pooled_BW}
    assert {name for name, part in given.items() if part is not None} == reads
    sum(part.square().sum() for part in given.values() if part is not None).backward()
    assert [name for name, parameter in made.named_parameters() if parameter.grad is None] == []


@pytest.mark.parametrize("kind", ATTENDING)
def test_maps_are_distributions_over_what_is_there_and_asking_changes_nothing(kind: str) -> None:
    made = fusion(kind)
    image, text = encodings()
    image = absent(image, MISSING)
    plain, fused = made(image, text), made(image, text, attentions=True)
    for one, other in zip(parts(plain), parts(fused), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
    assert len(fused.attentions["text_to_image"]) == 2
    for map_BHTR in fused.attentions["text_to_image"]:
        assert map_BHTR.shape == (4, HEADS, 6, 5)
        assert (map_BHTR[MISSING] == 0).all()
    if kind == "single_stream":
        for joint in fused.attentions["joint"]:
            torch.testing.assert_close(joint.sum(-1), torch.ones(4, HEADS, 11))
            assert (joint[..., :6].masked_select(~text.mask_BT[:, None, None]) == 0).all()
    else:
        for map_BHTR in fused.attentions["text_to_image"]:
            torch.testing.assert_close(map_BHTR[~MISSING].sum(-1), torch.ones(2, HEADS, 6))
    for map_BHRT in fused.attentions.get("image_to_text", ()):
        assert map_BHRT.shape == (4, HEADS, 5, 6)
        assert (map_BHRT.masked_select(~text.mask_BT[:, None, None]) == 0).all()


def test_a_map_points_at_the_region_that_was_read() -> None:
    """The key of one region is made to answer every query."""
    made = fusion("cross_attention", frozenset({"pooled"}), layers=1)
    image, text = encodings(batch=1)
    attention = made.layers[0].cross_attention.attention
    with torch.no_grad():
        for each in (attention.query, attention.key):
            each.weight.zero_()
            each.bias.zero_()
        attention.query.bias += 1.0
        entered = made.image_entrance(image.sequence_BTW)[0]
        attention.key.weight += 5 * entered[3] / entered[3].square().sum()
    attended = made(image, text, attentions=True).attentions["text_to_image"][0]
    assert (attended.argmax(-1) == 3).all()


def test_dropout_is_of_training_alone() -> None:
    for kind in KINDS:
        made, (image, text) = fusion(kind), encodings()
        assert torch.equal(made(image, text).pooled_BW, made(image, text).pooled_BW)
        made.train()
        assert not torch.equal(made(image, text).pooled_BW, made(image, text).pooled_BW)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"kind": "gated", "layers": 2}, "gated has no layers; leave them out"),
        ({"kind": "co_attention", "layers": 2}, "co_attention needs heads; give their number"),
        ({"kind": "co_attention", "layers": 2, "heads": 3, "width": 16}, "width 16 is not a multiple of heads 3"),
    ],
)
def test_options_that_a_kind_lacks_or_wants_are_named(fields: dict[str, object], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        FusionConfig.model_validate(fields)


def test_a_fusion_that_nothing_reads_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"pretrain\.model\.fusion: nothing reads it; name one or more heads"):
        build_fusion("pretrain.model.fusion", FusionConfig(kind="gated"), 8, 8, frozenset())
