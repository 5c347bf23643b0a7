"""Adapters fit every kind of part, change nothing at first, and compute the same after merging."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mmflow.models.config import LoraConfig, ModelConfig
from mmflow.models.encoders import parameter_count
from mmflow.models.fusion import FUSIONS
from mmflow.models.lora import adapt, adapter_count, merged
from mmflow.models.model import Model, build
from tests.models.backbones import IMAGE, TEXT
from tests.tiny import SMALLEST_MODEL

VIT = {"type": "vit", "options": IMAGE["vit"]}
LORA = LoraConfig(rank=2, alpha=3.0)


def fused(kind: str) -> dict[str, Any]:
    attends = {} if kind in ("concatenation", "gated") else {"layers": 1, "heads": 2}
    return {"image": VIT, "fusion": {"kind": kind, "width": 8, **attends}, "heads": ["matching"]}


MODELS: dict[str, dict[str, Any]] = {
    "vit and bert": {"image": VIT},
    "clip": {
        "image": {"type": "clip_vision_model", "options": IMAGE["clip_vision_model"], "pooling": "pooler"},
        "text": {"type": "clip_text_model", "options": TEXT["clip_text_model"], "pooling": "pooler"},
    },
    "siglip": {"image": {"type": "siglip_vision_model", "options": IMAGE["siglip_vision_model"], "pooling": "pooler"}},
    "decoder": {"image": VIT, "decoder": {"width": 8, "layers": 1, "heads": 2}},
    **{kind: fused(kind) for kind in FUSIONS},
}


def model_of(name: str) -> Model:
    config = ModelConfig.model_validate(SMALLEST_MODEL | MODELS[name])
    return build("pretrain.model", config, 64, seed=1).eval()


@torch.no_grad()
def outputs(model: Model) -> list[Tensor]:
    """Everything that the model computes from two pictures and texts."""
    random = torch.Generator().manual_seed(2)
    pixels = torch.randn(2, 3, 16, 16, generator=random)
    ids, mask = torch.randint(5, 64, (2, 6), generator=random), torch.ones(2, 6, dtype=torch.int64)
    image, text = model.encode_image(pixels), model.encode_text(ids, mask)
    computed = [model.embed_image(image), model.embed_text(text)]
    if model.fusion is not None:
        computed.append(model.matching_logits(model.fuse(image, text)))
    if model.decoder is not None:
        computed.append(model.decode(model.memory(image), ids))
    return computed


@pytest.mark.parametrize("name", MODELS)
def test_a_merged_model_equals_the_adapted_one(name: str) -> None:
    plain, adapted = model_of(name), model_of(name)
    before = outputs(plain)
    adapt("pretrain.lora", adapted, LORA, [], seed=1)
    adapted.eval()
    torch.testing.assert_close(outputs(adapted), before)
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter_name, parameter in adapted.named_parameters():
            if ".lora_B." in parameter_name:
                parameter.normal_()
    after = outputs(adapted)
    plain.load_state_dict(merged(adapted.state_dict(), LORA))
    for merged_output, adapted_output, plain_output in zip(outputs(plain), after, before, strict=True):
        torch.testing.assert_close(merged_output, adapted_output, rtol=1e-4, atol=5e-5)
        assert not torch.allclose(merged_output, plain_output, atol=1e-3)
    parts = {weight.split(".")[0] for weight, _ in adapted.named_parameters() if ".lora_" in weight}
    assert parts == {"image", "text"} | {part for part in ("fusion", "decoder") if part in MODELS[name]}
    assert adapter_count(adapted) == parameter_count(adapted) - parameter_count(plain)


@pytest.mark.parametrize(("fresh", "named"), [(["fusion"], None), ([], ["fusion"])])
def test_frozen_parts_get_no_adapter_and_fresh_or_named_ones_are_trained_in_full(
    fresh: list[str], named: list[str] | None
) -> None:
    model = model_of("cross_attention")
    for parameter in model.image.parameters():
        parameter.requires_grad_(False)
    adapt("pretrain.lora", model, LORA.model_copy(update={"trained": named}), fresh, seed=1)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert not any(name.startswith("image.") for name in trained)
    assert all(".lora_" in name for name in trained if name.startswith("text."))
    fusion = {name for name, _ in model.named_parameters() if name.startswith("fusion.")}
    assert fusion <= trained
    assert not any(".lora_" in name for name in fusion)


def test_running_statistics_do_not_change() -> None:
    config = ModelConfig.model_validate(SMALLEST_MODEL)
    model = build("pretrain.model", config, 64, seed=1)
    adapt("pretrain.lora", model, LORA, [], seed=1)
    model.train()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.encode_image(torch.randn(4, 3, 16, 16))
    assert [name for name, buffer in model.named_buffers() if not torch.equal(buffer, before[name])] == []
