"""The composed model: a dual encoder as it always was, and parts that exist where the recipe names them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from mmflow.core.errors import MisuseError, RecipeError
from mmflow.models.config import ModelConfig
from mmflow.models.heads import patches
from mmflow.models.model import LogitScale, Model, build

VIT = {"hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "patch_size": 8}
FUSED = {
    "image": {"type": "vit", "options": VIT, "pooling": "first"},
    "fusion": {"kind": "co_attention", "width": 16, "layers": 1, "heads": 2},
}
ALL_HEADS = ["matching", "masked_language", "masked_image", "classes"]


def inputs(batch: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(batch, 3, 16, 16), torch.randint(5, 64, (batch, 7)), torch.ones(batch, 7, dtype=torch.int64)


def altered(config: ModelConfig, **changes: Any) -> ModelConfig:
    return ModelConfig.model_validate(config.model_dump() | changes)


def made(config: ModelConfig, seed: int = 0, num_classes: int = 0) -> Model:
    return build("pretrain.model", config, 64, seed, num_classes)


def everything(config: ModelConfig) -> ModelConfig:
    return altered(config, **FUSED, heads=ALL_HEADS)


def test_embeddings_are_of_unit_length_in_one_space(tiny_config: ModelConfig) -> None:
    outputs = made(tiny_config).eval()(*inputs())
    assert set(outputs) == {"image_embedding", "text_embedding", "logit_scale"}
    for name in ("image_embedding", "text_embedding"):
        assert outputs[name].shape == (5, 6)
        torch.testing.assert_close(outputs[name].norm(dim=1), torch.ones(5))


def test_both_sides_embed_as_the_whole_does(tiny_config: ModelConfig) -> None:
    model = made(tiny_config).eval()
    pixels, tokens, mask = inputs()
    outputs = model(pixels, tokens, mask)
    torch.testing.assert_close(model.embed_image(model.encode_image(pixels)), outputs["image_embedding"])
    torch.testing.assert_close(model.embed_text(model.encode_text(tokens, mask)), outputs["text_embedding"])


def test_embeddings_are_fp32_in_bf16_autocast(tiny_config: ModelConfig) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        outputs = made(tiny_config).eval()(*inputs())
    assert {value.dtype for value in outputs.values()} == {torch.float32}


def test_logit_scale_begins_at_the_temperature_and_ends_at_a_hundred(tiny_config: ModelConfig) -> None:
    model = made(tiny_config).eval()
    assert model.scale.logit_scale.shape == (1,)  # ZeRO cannot partition a scalar
    torch.testing.assert_close(model(*inputs())["logit_scale"], torch.tensor([1 / 0.07]))
    for value, expected in ((math.log(99), 99.0), (math.log(101), 100.0), (50.0, 100.0)):
        nn.init.constant_(model.scale.logit_scale, value)
        torch.testing.assert_close(model(*inputs())["logit_scale"], torch.tensor([expected]))


def test_a_scale_past_its_bound_can_come_back() -> None:
    scale = LogitScale(0.07)
    nn.init.constant_(scale.logit_scale, 6.0)
    scale().logit_scale.sum().backward()
    torch.testing.assert_close(scale.logit_scale.grad, torch.tensor([100.0]))


def test_a_bias_is_siglip_s_and_its_scale_has_no_bound(tiny_config: ModelConfig) -> None:
    model = made(altered(tiny_config, bias=-10.0, temperature=0.1)).eval()
    outputs = model(*inputs())
    torch.testing.assert_close(outputs["logit_bias"], torch.tensor([-10.0]))
    torch.testing.assert_close(outputs["logit_scale"], torch.tensor([10.0]))
    nn.init.constant_(model.scale.logit_scale, math.log(118))  # as far as Google's own went
    torch.testing.assert_close(model(*inputs())["logit_scale"], torch.tensor([118.0]))


def test_a_seed_gives_the_weights_whatever_was_drawn_before(tiny_config: ModelConfig) -> None:
    first = made(tiny_config, 3).state_dict()
    torch.manual_seed(99)
    expected = torch.randn(4)
    torch.manual_seed(99)
    second = made(tiny_config, 3).state_dict()
    assert torch.equal(torch.randn(4), expected)  # and the program's own random numbers go on undisturbed
    assert all(torch.equal(first[name], second[name]) for name in first)
    other = made(tiny_config, 4).state_dict()
    assert not torch.equal(first["image_projection.weight"], other["image_projection.weight"])


def test_weights_of_a_dual_encoder_are_drawn_in_the_order_that_they_always_were(tiny_config: ModelConfig) -> None:
    """Image, text, projections: a committed recipe trains the same model, and one with a fusion starts from it."""
    from transformers import AutoConfig, AutoModel

    torch.manual_seed(3)
    image = AutoModel.from_config(AutoConfig.for_model("resnet", **tiny_config.image.options))
    text = AutoModel.from_config(
        AutoConfig.for_model("bert", vocab_size=64, **tiny_config.text.options), add_pooling_layer=False
    )
    projections = [nn.Linear(width, 6, bias=False).weight for width in (8, 8)]
    found = made(tiny_config, 3).state_dict()
    for prefix, module in (("image", image), ("text", text)):
        for name, value in module.state_dict().items():
            assert torch.equal(found[f"{prefix}.backbone.{name}"], value), name
    assert torch.equal(found["image_projection.weight"], projections[0])
    assert torch.equal(found["text_projection.weight"], projections[1])
    fusion = {"kind": "gated", "width": 8}
    fused = made(altered(tiny_config, fusion=fusion, heads=["matching"]), 3).state_dict()
    assert all(torch.equal(fused[name], value) for name, value in found.items())


def test_packages_from_before_the_scale_was_a_module_load(tiny_config: ModelConfig) -> None:
    state = dict(made(tiny_config, 1).state_dict())
    state["logit_scale"] = state.pop("scale.logit_scale") + 1
    model = made(tiny_config, 2)
    model.load_state_dict(state)
    assert torch.equal(model.scale.logit_scale, state["logit_scale"])


@pytest.mark.parametrize(
    ("changes", "gives"),
    [
        ({}, {"embeddings"}),
        ({"fusion": FUSED["fusion"], "heads": ["matching"]}, {"embeddings", "fused", "matching_logits"}),
        ({"text": None, "embedding_width": None, "heads": ["classes"]}, {"class_logits"}),
        (
            {"text": None, "embedding_width": None, "decoder": {"width": 8, "layers": 1, "heads": 2}},
            {"decoded", "decoded from the image"},
        ),
        (
            {**FUSED, "heads": ALL_HEADS, "embedding_width": None},
            {"fused", "matching_logits", "masked_language_logits", "masked_image_pixels", "class_logits"},
        ),
    ],
)
def test_a_model_names_what_it_gives_and_has_no_other_part(
    tiny_config: ModelConfig, changes: dict[str, Any], gives: set[str]
) -> None:
    model = made(altered(tiny_config, **changes), num_classes=3)
    assert model.gives == gives
    assert (model.scale is not None) == (model.image_projection is not None) == ("embeddings" in gives)
    assert (model.text is None) == (changes.get("text", 1) is None)


def test_heads_have_the_shapes_of_what_they_predict(tiny_config: ModelConfig) -> None:
    model = made(everything(tiny_config), num_classes=3).eval()
    pixels, tokens, mask = inputs()
    fused = model.fuse(model.encode_image(pixels), model.encode_text(tokens, mask))
    assert model.matching_logits(fused).shape == (5, 2)
    assert model.masked_language_logits(fused).shape == (5, 7, 64)
    assert model.masked_image_pixels(fused).shape == patches(pixels, 8).shape == (5, 4, 192)
    assert model.class_logits(fused).shape == (5, 3)


def test_every_parameter_has_a_gradient(tiny_config: ModelConfig) -> None:
    """DeepSpeed reduces and saves every one."""
    model = made(everything(tiny_config), num_classes=3)
    pixels, tokens, mask = inputs()
    image, text = model.encode_image(pixels), model.encode_text(tokens, mask)
    fused, scale = model.fuse(image, text), model.scale().logit_scale
    loss = (scale * model.embed_image(image) @ model.embed_text(text).T).square().sum()
    for head in (model.matching_logits, model.masked_language_logits, model.masked_image_pixels, model.class_logits):
        loss = loss + head(fused).square().sum()
    loss.backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


def test_masked_words_are_read_off_the_embeddings_that_words_are_looked_up_in(tiny_config: ModelConfig) -> None:
    model = made(everything(tiny_config), num_classes=3)
    words = model.text.backbone.get_input_embeddings()
    head = model.heads["masked_language"]
    assert head.output.weight is words.weight
    assert [name for name in model.state_dict() if name.endswith("masked_language.output.weight")] == []
    assert len({id(parameter) for parameter in model.parameters()}) == len(list(model.parameters()))
    with torch.no_grad():
        words.weight[9] = 40 * head.norm(nn.functional.gelu(head.inner(torch.ones(16))))
    assert head(torch.ones(16)).argmax() == 9


def test_a_tied_model_comes_back_whole_from_its_weights(tiny_config: ModelConfig) -> None:
    from safetensors.torch import load, save

    one, other = (made(everything(tiny_config), seed, num_classes=3).eval() for seed in (1, 2))
    other.load_state_dict(load(save({name: value.contiguous() for name, value in one.state_dict().items()})))
    assert other.heads["masked_language"].output.weight is other.text.backbone.get_input_embeddings().weight
    pixels, tokens, mask = inputs()
    logits = [
        model.masked_language_logits(model.fuse(model.encode_image(pixels), model.encode_text(tokens, mask)))
        for model in (one, other)
    ]
    assert torch.equal(*logits)


def test_patches_are_cut_row_by_row() -> None:
    pixels = torch.arange(2 * 3 * 16 * 16.0).view(2, 3, 16, 16)
    cut = patches(pixels, 8)
    assert cut.shape == (2, 4, 192)
    for number, (row, column) in enumerate([(0, 0), (0, 8), (8, 0), (8, 8)]):
        assert torch.equal(cut[1, number], pixels[1, :, row : row + 8, column : column + 8].flatten())


def test_masked_image_head_reads_patches_and_not_the_class_token(tiny_config: ModelConfig) -> None:
    model = made(altered(tiny_config, **{**FUSED, "fusion": None}, heads=["masked_image"]))
    pixels, tokens, mask = inputs(2)
    image = model.encode_image(pixels)
    painted = model.masked_image_pixels(model.fuse(image, model.encode_text(tokens, mask)))
    torch.testing.assert_close(painted, model.heads["masked_image"].output(image.sequence_BTW[:, 1:]))


def test_a_classifier_reads_its_pictures_alone(tiny_config: ModelConfig) -> None:
    model = made(altered(tiny_config, text=None, embedding_width=None, heads=["classes"]), num_classes=3).eval()
    image = model.encode_image(inputs()[0])
    logits = model.class_logits(model.fuse(image, None))
    torch.testing.assert_close(logits, model.heads["classes"](image.pooled_BW))


def test_decoder_reads_the_picture_or_the_question_after_it_read_the_picture(tiny_config: ModelConfig) -> None:
    pixels, tokens, mask = inputs(2)
    decoder = {"width": 8, "layers": 1, "heads": 2, "memory": "image"}
    captioner = made(altered(tiny_config, text=None, embedding_width=None, decoder=decoder)).eval()
    memory = captioner.memory(captioner.encode_image(pixels))
    assert captioner.decode(memory, tokens).shape == (2, 7, 64)
    answerer = made(altered(tiny_config, **FUSED, embedding_width=None, decoder={**decoder, "memory": "fused"})).eval()
    image, text = answerer.encode_image(pixels), answerer.encode_text(tokens, mask)
    memory = answerer.memory(image, text)
    torch.testing.assert_close(memory.sequence_BTW, answerer.fuse(image, text).text_BTW)
    assert torch.equal(memory.mask_BT, mask.bool())
    assert answerer.decode(memory, tokens).shape == (2, 7, 64)


def test_mistakes_are_named_by_the_recipe_s_key(tiny_config: ModelConfig) -> None:
    wrong = tiny_config.model_copy(update={"text": tiny_config.text.model_copy(update={"type": "berd"})})
    with pytest.raises(RecipeError, match=r"pretrain\.model\.text\.type: transformers has no 'berd'"):
        made(wrong)
    with pytest.raises(RecipeError, match=r"pretrain\.model\.heads: classes needs labels or answers"):
        made(altered(tiny_config, heads=["classes"]))
    with pytest.raises(RecipeError, match=r"pretrain\.model\.heads: masked_image needs an encoder of patches, resnet"):
        made(altered(tiny_config, heads=["masked_image"]))
    dropping = {**FUSED["image"], "patch_dropout": 0.5}
    with pytest.raises(RecipeError, match=r"pretrain\.model\.heads: masked_image needs every patch"):
        made(altered(tiny_config, image=dropping, heads=["masked_image"]))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"text": None}, "embedding_width: a shared space needs a text encoder"),
        ({"text": None, "embedding_width": None, "fusion": FUSED["fusion"]}, "fusion: there is no text encoder"),
        ({"embedding_width": None, "bias": -10.0}, "bias: there are no similarities without embedding_width"),
        ({"heads": ["classes", "classes"]}, "heads: classes, classes names one twice"),
        ({"heads": ["matching"]}, "heads: matching reads image and text together; name a fusion"),
        ({"text": None, "embedding_width": None, "heads": ["masked_language"]}, "masked_language needs a text encoder"),
        ({"embedding_width": None, "heads": ["classes"]}, "text: nothing reads it"),
        ({"embedding_width": None, "heads": ["masked_language"]}, "image: nothing reads it"),
        (
            {"fusion": {**FUSED["fusion"], "kind": "cross_attention"}, "heads": ["masked_image"]},
            "in cross_attention no patch reads the text",
        ),
    ],
)
def test_parts_that_cannot_be_together_are_named(tiny_config: ModelConfig, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        altered(tiny_config, **changes)


def test_a_size_that_follows_from_another_key_cannot_be_set_twice(tiny_config: ModelConfig) -> None:
    fields = tiny_config.model_dump()
    fields["image"]["options"]["image_size"] = 32
    with pytest.raises(ValidationError, match="image_size follows from vocabulary_size and image_pixels"):
        ModelConfig.model_validate(fields)


def test_what_a_model_lacks_is_named(tiny_config: ModelConfig) -> None:
    model = made(altered(tiny_config, text=None, embedding_width=None, heads=["classes"]), num_classes=2)
    image = model.encode_image(inputs()[0])
    with pytest.raises(MisuseError, match="the model has no shared space"):
        model.embed_image(image)
    with pytest.raises(MisuseError, match="the model has no head matching"):
        model.matching_logits(model.fuse(image, None))
    with pytest.raises(MisuseError, match="the model has no decoder"):
        model.decode(image, torch.zeros(5, 2, dtype=torch.int64))
