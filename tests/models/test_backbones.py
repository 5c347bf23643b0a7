"""Learning rates by layer, and positions stretched for longer text or resampled for other picture sizes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmflow.core.errors import RecipeError
from mmflow.models.model import learning_rate_factors
from mmflow.models.pretrained import num_positions, resampled, stretched
from tests.models.backbones import IMAGE, TEXT, image_encoder, text_encoder

LEARNED = ("bert", "roberta", "clip_text_model", "siglip_text_model")


@pytest.mark.parametrize("model_type", [*IMAGE, *TEXT])
def test_learning_rates_fall_from_the_last_layer_to_the_embeddings(model_type: str) -> None:
    encoder = (image_encoder if model_type in IMAGE else text_encoder)(model_type, layer_decay=0.5, pooling="attention")
    model = torch.nn.ModuleDict({"side": encoder})
    factors = learning_rate_factors(model)
    names = {name for name, _ in model.named_parameters()}
    assert factors.keys() <= names
    of_layer: dict[str, set[float]] = {"0": set(), "1": set()}
    for name in names:
        parts = name.split(".")
        if places := [place for place, part in enumerate(parts) if part in ("layer", "layers", "stages")]:
            of_layer[parts[places[0] + 1]].add(factors[name])
        elif any("embed" in part or part == "pre_layrnorm" for part in parts):
            assert factors[name] == 0.125, name
        else:
            assert name not in factors, name
    assert of_layer == {"0": {0.25}, "1": {0.5}}


def test_only_encoders_with_decay_have_factors() -> None:
    assert learning_rate_factors(image_encoder("vit")) == {}
    windows = {"tokens": 8, "heads": 2}
    factors = learning_rate_factors(text_encoder("bert", 40, layer_decay=0.5, windows=windows))
    assert factors["encoder.backbone.embeddings.word_embeddings.weight"] == 0.125
    assert not any(name.startswith("windows.") for name in factors)


def test_shared_layers_cannot_be_counted() -> None:
    options = {"hidden_size": 8, "embedding_size": 4, "num_hidden_layers": 3, "num_attention_heads": 2}
    with pytest.raises(RecipeError, match="albert has no list of layers to count; leave it out"):
        learning_rate_factors(text_encoder("albert", options=options, layer_decay=0.5))
    with pytest.raises(RecipeError, match=r"^m.text.frozen_layers: albert has no list of layers to count"):
        text_encoder("albert", options=options, frozen_layers=1)


@given(st.integers(2, 30), st.integers(0, 28), st.integers(2, 5), st.integers(0, 9))
def test_stretched_positions_equal_the_papers_loop(num: int, keep: int, factor: int, seed: int) -> None:
    """Long-CLIP's equation 2 written out: the kept ones, then `factor` steps from each to the next."""
    keep = min(keep, num - 2)
    old = torch.randn(num, 3, generator=torch.Generator().manual_seed(seed))
    expected = [old[place] for place in range(keep)]
    for place in range(keep, num):
        step = old[place + 1] - old[place] if place + 1 < num else old[place] - old[place - 1]
        expected += [old[place] + step * part / factor for part in range(factor)]
    torch.testing.assert_close(stretched(old, keep, factor), torch.stack(expected))
    assert stretched(torch.randn(77, 2), 20, 4).shape == (248, 2)  # CLIP's


@pytest.mark.parametrize("model_type", LEARNED)
def test_stretched_encoders_read_longer_text_and_short_text_as_before(model_type: str) -> None:
    offset = model_type == "roberta"
    limit = 10 + (24 - offset - 10) * 3
    positions = {"stretch": 3, "keep": 10}
    torch.manual_seed(1)
    plain = text_encoder(model_type, 24 - offset).eval()
    torch.manual_seed(1)
    longer = text_encoder(model_type, limit, positions=positions).eval()
    assert num_positions(longer.backbone) == limit
    short = torch.randint(5, 64, (2, 10))
    torch.testing.assert_close(longer(short).sequence_BTW, plain(short).sequence_BTW)
    assert longer(torch.randint(5, 64, (2, limit))).sequence_BTW.isfinite().all()
    with pytest.raises(RecipeError, match=f"m.max_tokens: {limit + 1} tokens, but {model_type} has {limit} positions"):
        text_encoder(model_type, limit + 1, positions=positions)


def test_stretched_positions_are_trained() -> None:
    encoder = text_encoder("bert", 40, positions={"stretch": 2, "keep": 4})
    encoder(torch.randint(5, 64, (2, 40))).pooled_BW.square().sum().backward()
    table = encoder.backbone.embeddings.position_embeddings.weight
    assert (table.grad[:40].abs().sum(1) > 0).all()


@pytest.mark.parametrize(
    ("model_type", "keep", "message"),
    [
        ("modernbert", 4, "m.text.positions: modernbert has no learned absolute positions"),
        ("bert", 23, "m.text.positions.keep: 23 of 24 positions leaves fewer than two"),
        ("roberta", 22, "m.text.positions.keep: 22 of 23 positions leaves fewer than two"),
    ],
)
def test_positions_that_cannot_be_stretched_are_refused(model_type: str, keep: int, message: str) -> None:
    with pytest.raises(RecipeError, match=f"^{message}"):
        text_encoder(model_type, positions={"stretch": 2, "keep": keep})


@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_resampled_positions_keep_those_before_the_grid_and_are_smooth(prefix: int) -> None:
    """A grid of coordinates becomes the coordinates of the finer grid, within the error of torch's bicubic filter."""
    rows, columns = torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij")
    old = torch.cat([torch.full((prefix, 2), 99.0), torch.stack([rows, columns], -1).flatten(0, 1)])
    new = resampled(old, 8, 16)
    assert new.shape == (prefix + 256, 2)
    assert torch.equal(new[:prefix], old[:prefix])
    finer = ((torch.arange(16) + 0.5) / 2 - 0.5)[4:-4]
    inner = new[prefix:].view(16, 16, 2)[4:-4, 4:-4]
    torch.testing.assert_close(inner[..., 0], finer[:, None].expand(8, 8), atol=0.05, rtol=0)
    torch.testing.assert_close(inner[..., 1], finer[None].expand(8, 8), atol=0.05, rtol=0)
    torch.testing.assert_close(resampled(old, 8, 8), old)
