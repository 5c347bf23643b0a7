"""Stretched positions: the first as they were, the rest on the lines between them; short text read as before."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmflow.core.errors import RecipeError
from mmflow.models.checkpoints import num_positions, resampled, stretched
from mmflow.models.config import TextEncoderConfig
from mmflow.models.model import build_text_encoder
from tests.models.backbones import TEXT

LEARNED = ("bert", "roberta", "clip_text_model", "siglip_text_model")


@given(st.integers(2, 30), st.integers(0, 28), st.integers(2, 5), st.integers(0, 9))
def test_stretched_positions_equal_the_papers_loop(num: int, keep: int, factor: int, seed: int) -> None:
    """Written out from Long-CLIP's equation 2: the kept ones, then `factor` steps from each to the next."""
    keep = min(keep, num - 2)
    old = torch.randn(num, 3, generator=torch.Generator().manual_seed(seed))
    expected = [old[place] for place in range(keep)]
    for place in range(keep, num):
        step = old[place + 1] - old[place] if place + 1 < num else old[place] - old[place - 1]
        expected += [old[place] + step * part / factor for part in range(factor)]
    torch.testing.assert_close(stretched(old, keep, factor), torch.stack(expected))


def test_clips_77_positions_become_248() -> None:
    assert stretched(torch.randn(77, 2), 20, 4).shape == (248, 2)


@pytest.mark.parametrize("model_type", LEARNED)
def test_stretched_encoders_read_longer_text_and_short_text_as_before(model_type: str) -> None:
    def build(stretch: bool, max_tokens: int) -> object:
        torch.manual_seed(1)
        positions = {"stretch": 3, "keep": 10} if stretch else None
        fields = {"type": model_type, "options": TEXT[model_type], "positions": positions}
        config = TextEncoderConfig.model_validate(fields)
        return build_text_encoder("m.text", config, 64, max_tokens).eval()

    offset = model_type == "roberta"
    limit = 10 + (24 - offset - 10) * 3
    plain, longer = build(False, 24 - offset), build(True, limit)
    assert num_positions(longer.backbone) == limit  # type: ignore[attr-defined]
    short = torch.randint(5, 64, (2, 10))
    torch.testing.assert_close(longer(short).sequence_BTW, plain(short).sequence_BTW)  # type: ignore[operator]
    whole = torch.randint(5, 64, (2, limit))
    assert longer(whole).sequence_BTW.isfinite().all()  # type: ignore[operator]
    with pytest.raises(RecipeError, match=f"m.max_tokens: {limit + 1} tokens, and {model_type} has {limit} positions"):
        build(True, limit + 1)


def test_stretched_positions_are_trained() -> None:
    fields = {"type": "bert", "options": TEXT["bert"], "positions": {"stretch": 2, "keep": 4}}
    encoder = build_text_encoder("m.text", TextEncoderConfig.model_validate(fields), 64, 40)
    encoder(torch.randint(5, 64, (2, 40))).pooled_BW.square().sum().backward()
    table = encoder.backbone.embeddings.position_embeddings.weight  # type: ignore[union-attr]
    assert (table.grad[:40].abs().sum(1) > 0).all()


@pytest.mark.parametrize(
    ("model_type", "keep", "said"),
    [
        ("modernbert", 4, "m.text.positions: modernbert has no learned absolute positions; leave it out, and raise"),
        ("bert", 23, "m.text.positions.keep: 23 of 24 positions leaves fewer than two to interpolate between; give"),
        ("roberta", 22, "m.text.positions.keep: 22 of 23 positions leaves fewer than two to interpolate between; give"),
    ],
)
def test_positions_that_cannot_be_stretched_are_refused(model_type: str, keep: int, said: str) -> None:
    fields = {"type": model_type, "options": TEXT[model_type], "positions": {"stretch": 2, "keep": keep}}
    with pytest.raises(RecipeError) as caught:
        build_text_encoder("m.text", TextEncoderConfig.model_validate(fields), 64, 12)
    assert str(caught.value).startswith(said)


@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_resampled_positions_keep_what_is_before_the_grid_and_its_smoothness(prefix: int) -> None:
    """A grid of coordinates becomes the coordinates of the finer grid, as nearly as torch's bicubic filter has it."""
    rows, columns = torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij")
    grid = torch.stack([rows, columns], -1).flatten(0, 1)
    old = torch.cat([torch.full((prefix, 2), 99.0), grid])
    new = resampled(old, 8, 16)
    assert new.shape == (prefix + 256, 2)
    assert torch.equal(new[:prefix], old[:prefix])
    finer = (torch.arange(16) + 0.5) / 2 - 0.5
    inner = new[prefix:].view(16, 16, 2)[4:-4, 4:-4]
    torch.testing.assert_close(inner[..., 0], finer[4:-4, None].expand(8, 8), atol=0.05, rtol=0)
    torch.testing.assert_close(inner[..., 1], finer[None, 4:-4].expand(8, 8), atol=0.05, rtol=0)
    torch.testing.assert_close(resampled(old, 8, 8), old)
