"""The composed model: a dual encoder with reproducible initial weights, and the other parts that a recipe names."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn

from mmflow.core.errors import MisuseError, RecipeError
from mmflow.models.config import ModelConfig
from mmflow.models.decoder import decoder_tokens
from mmflow.models.heads import patches
from mmflow.models.model import LogitScale, Model, build, with_special_tokens
from tests.models.backbones import TEXT

VIT = {"hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "patch_size": 8}
FUSED = {
    "image": {"type": "vit", "options": VIT, "pooling": "first"},
    "fusion": {"kind": "co_attention", "width": 16, "layers": 1, "heads": 2},
}
ALL_HEADS = ["matching", "masked_language", "masked_image", "classes"]
DECODER = {"width": 8, "layers": 1, "heads": 2}
ALONE = {"text": None, "embedding_width": None}  # no text encoder, no shared space


def inputs(batch: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(batch, 3, 16, 16), torch.randint(5, 64, (batch, 7)), torch.ones(batch, 7, dtype=torch.int64)


def altered(config: ModelConfig, **changes: Any) -> ModelConfig:
    return ModelConfig.model_validate(config.model_dump() | changes)


def build_model(config: ModelConfig, seed: int = 0, num_classes: int = 0, **changes: Any) -> Model:
    return build("pretrain.model", altered(config, **changes), 64, seed, num_classes)


def with_everything(config: ModelConfig, seed: int = 0) -> Model:
    return build_model(config, seed, num_classes=3, **FUSED, heads=ALL_HEADS)


def test_embeddings_have_unit_length_and_are_the_same_from_either_side(tiny_config: ModelConfig) -> None:
    model = build_model(tiny_config).eval()
    pixels, tokens, mask = inputs()
    outputs = model(pixels, tokens, mask)
    assert set(outputs) == {"image_embedding", "text_embedding", "logit_scale"}
    for name in ("image_embedding", "text_embedding"):
        assert outputs[name].shape == (5, 6)
        torch.testing.assert_close(outputs[name].norm(dim=1), torch.ones(5))
    torch.testing.assert_close(model.embed_image(model.encode_image(pixels)), outputs["image_embedding"])
    torch.testing.assert_close(model.embed_text(model.encode_text(tokens, mask)), outputs["text_embedding"])
    with torch.autocast("cpu", torch.bfloat16):
        assert {value.dtype for value in model(pixels, tokens, mask).values()} == {torch.float32}


def test_logit_scale_starts_at_the_temperature_and_is_at_most_a_hundred(tiny_config: ModelConfig) -> None:
    model = build_model(tiny_config).eval()
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


def test_with_siglips_bias_the_scale_has_no_bound(tiny_config: ModelConfig) -> None:
    model = build_model(tiny_config, bias=-10.0, temperature=0.1).eval()
    outputs = model(*inputs())
    torch.testing.assert_close(outputs["logit_bias"], torch.tensor([-10.0]))
    torch.testing.assert_close(outputs["logit_scale"], torch.tensor([10.0]))
    nn.init.constant_(model.scale.logit_scale, math.log(118))  # Google's own models reach it
    torch.testing.assert_close(model(*inputs())["logit_scale"], torch.tensor([118.0]))


def test_a_seed_gives_the_same_weights_after_any_other_draws(tiny_config: ModelConfig) -> None:
    first = build_model(tiny_config, 3).state_dict()
    torch.manual_seed(99)
    expected = torch.randn(4)
    torch.manual_seed(99)
    second = build_model(tiny_config, 3).state_dict()
    assert torch.equal(torch.randn(4), expected)  # the program's own random numbers are not disturbed
    assert all(torch.equal(first[name], second[name]) for name in first)
    other = build_model(tiny_config, 4).state_dict()
    assert not torch.equal(first["image_projection.weight"], other["image_projection.weight"])


def test_weights_of_a_dual_encoder_are_drawn_first_and_in_this_order(tiny_config: ModelConfig) -> None:
    """Image, text, projections: a committed recipe trains the same model, and one with a fusion starts from it."""
    from transformers import AutoConfig, AutoModel

    torch.manual_seed(3)
    image = AutoModel.from_config(AutoConfig.for_model("resnet", **tiny_config.image.options))
    text = AutoModel.from_config(
        AutoConfig.for_model("bert", vocab_size=64, **tiny_config.text.options), add_pooling_layer=False
    )
    projections = [nn.Linear(width, 6, bias=False).weight for width in (8, 8)]
    state = build_model(tiny_config, 3).state_dict()
    for prefix, module in (("image", image), ("text", text)):
        for name, value in module.state_dict().items():
            assert torch.equal(state[f"{prefix}.backbone.{name}"], value), name
    assert torch.equal(state["image_projection.weight"], projections[0])
    assert torch.equal(state["text_projection.weight"], projections[1])
    fused = build_model(tiny_config, 3, fusion={"kind": "gated", "width": 8}, heads=["matching"]).state_dict()
    assert all(torch.equal(fused[name], value) for name, value in state.items())


@pytest.mark.parametrize(
    ("changes", "gives"),
    [
        ({}, {"embeddings"}),
        ({"fusion": FUSED["fusion"], "heads": ["matching"]}, {"embeddings", "fused", "matching_logits"}),
        ({**ALONE, "heads": ["classes"]}, {"class_logits"}),
        ({**ALONE, "decoder": DECODER}, {"decoded", "decoded from the image"}),
        (
            {**FUSED, "heads": ALL_HEADS, "embedding_width": None},
            {"fused", "matching_logits", "masked_language_logits", "masked_image_pixels", "class_logits"},
        ),
    ],
)
def test_a_model_lists_its_outputs_and_has_no_other_part(
    tiny_config: ModelConfig, changes: dict[str, Any], gives: set[str]
) -> None:
    model = build_model(tiny_config, num_classes=3, **changes)
    assert model.gives == gives
    assert (model.scale is not None) == (model.image_projection is not None) == ("embeddings" in gives)
    assert (model.text is None) == (changes.get("text", 1) is None)


def test_heads_have_the_shapes_of_their_targets_and_train_all_weights(tiny_config: ModelConfig) -> None:
    """DeepSpeed reduces and saves every parameter."""
    model = with_everything(tiny_config)
    pixels, tokens, mask = inputs()
    image, text = model.encode_image(pixels), model.encode_text(tokens, mask)
    fused, scale = model.fuse(image, text), model.scale().logit_scale
    outputs = {
        (5, 2): model.matching_logits(fused),
        (5, 7, 64): model.masked_language_logits(fused),
        (5, 4, 192): model.masked_image_pixels(fused),
        (5, 3): model.class_logits(fused),
        (5, 5): scale * model.embed_image(image) @ model.embed_text(text).T,
    }
    for shape, output in outputs.items():
        assert output.shape == shape
    sum(output.square().sum() for output in outputs.values()).backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


def test_masked_words_are_predicted_with_the_table_that_words_are_looked_up_in(tiny_config: ModelConfig) -> None:
    model = with_everything(tiny_config)
    words = model.text.backbone.get_input_embeddings()
    head = model.heads["masked_language"]
    assert head.output.weight is words.weight
    assert [name for name in model.state_dict() if name.endswith("masked_language.output.weight")] == []
    assert len({id(parameter) for parameter in model.parameters()}) == len(list(model.parameters()))
    with torch.no_grad():
        words.weight[9] = 40 * head.norm(nn.functional.gelu(head.inner(torch.ones(16))))
    assert head(torch.ones(16)).argmax() == 9


def test_a_tied_model_is_restored_from_its_weights(tiny_config: ModelConfig) -> None:
    from safetensors.torch import load, save

    trained, restored = (with_everything(tiny_config, seed).eval() for seed in (1, 2))
    restored.load_state_dict(load(save({name: value.contiguous() for name, value in trained.state_dict().items()})))
    assert restored.heads["masked_language"].output.weight is restored.text.backbone.get_input_embeddings().weight
    pixels, tokens, mask = inputs()
    logits = [
        model.masked_language_logits(model.fuse(model.encode_image(pixels), model.encode_text(tokens, mask)))
        for model in (trained, restored)
    ]
    assert torch.equal(*logits)


def test_patches_are_cut_row_by_row() -> None:
    pixels = torch.arange(2 * 3 * 16 * 16.0).view(2, 3, 16, 16)
    cut = patches(pixels, 8)
    assert cut.shape == (2, 4, 192)
    for number, (row, column) in enumerate([(0, 0), (0, 8), (8, 0), (8, 8)]):
        assert torch.equal(cut[1, number], pixels[1, :, row : row + 8, column : column + 8].flatten())


def test_without_a_fusion_heads_read_the_encoders(tiny_config: ModelConfig) -> None:
    model = build_model(tiny_config, **{**FUSED, "fusion": None}, heads=["masked_image"])
    pixels, tokens, mask = inputs(2)
    image = model.encode_image(pixels)
    painted = model.masked_image_pixels(model.fuse(image, model.encode_text(tokens, mask)))
    patches_only = image.sequence_BTW[:, 1:]  # without the class token
    torch.testing.assert_close(painted, model.heads["masked_image"].output(patches_only))
    classifier = build_model(tiny_config, **ALONE, heads=["classes"], num_classes=3).eval()
    image = classifier.encode_image(pixels)
    logits = classifier.class_logits(classifier.fuse(image, None))
    torch.testing.assert_close(logits, classifier.heads["classes"](image.pooled_BW))


def test_a_decoder_reads_the_image_or_the_question_that_read_it(tiny_config: ModelConfig) -> None:
    pixels, tokens, mask = inputs(2)
    captioner = build_model(tiny_config, **ALONE, decoder=DECODER).eval()
    memory = captioner.memory(captioner.encode_image(pixels))
    assert captioner.decode(memory, tokens).shape == (2, 7, 64)
    reads_question = {"embedding_width": None, "decoder": {**DECODER, "memory": "fused"}}
    answerer = build_model(tiny_config, **FUSED, **reads_question).eval()
    image, text = answerer.encode_image(pixels), answerer.encode_text(tokens, mask)
    memory = answerer.memory(image, text)
    torch.testing.assert_close(memory.sequence_BTW, answerer.fuse(image, text).text_BTW)
    assert torch.equal(memory.mask_BT, mask.bool())
    assert answerer.decode(memory, tokens).shape == (2, 7, 64)
    for model, question in ((captioner, text), (answerer, None)):
        with pytest.raises(MisuseError, match=r"model\.decoder\.memory: (image|fused), but there is"):
            model.memory(image, question)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text": {"type": "berd"}}, "text.type: transformers has no 'berd'"),
        ({"heads": ["classes"]}, "heads: classes needs labels or answers"),
        ({"heads": ["masked_image"]}, "heads: masked_image needs an encoder with patches, resnet has none"),
        ({"heads": ["masked_image"], "image": {**FUSED["image"], "patch_dropout": 0.5}}, "heads: .* needs every patch"),
    ],
)
def test_mistakes_are_named_by_the_recipes_key(tiny_config: ModelConfig, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=f"^pretrain.model.{message}"):
        build_model(tiny_config, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text": None}, "embedding_width: a shared space needs a text encoder"),
        ({**ALONE, "fusion": FUSED["fusion"]}, "fusion: there is no text encoder"),
        ({"embedding_width": None, "bias": -10.0}, "bias: there are no similarities without embedding_width"),
        ({"heads": ["classes", "classes"]}, "heads: classes, classes names one twice"),
        ({"heads": ["matching"]}, "heads: matching reads image and text together; name a fusion"),
        ({**ALONE, "heads": ["masked_language"]}, "masked_language needs a text encoder"),
        ({"embedding_width": None, "heads": ["classes"]}, "text: nothing reads it"),
        ({"embedding_width": None, "heads": ["masked_language"]}, "image: nothing reads it"),
        ({"fusion": FUSED["fusion"] | {"kind": "cross_attention"}, "heads": ["masked_image"]}, "no patch reads the"),
        ({"fusion": {"kind": "gated", "layers": 2}}, "gated has no layers"),
        ({"fusion": {"kind": "co_attention", "layers": 2}}, "co_attention needs heads"),
        ({"fusion": {**FUSED["fusion"], "heads": 3}}, "width 16 is not a multiple of heads 3"),
        ({"decoder": {"width": 10, "heads": 4}}, "width 10 is not a multiple of heads 4"),
        ({"image": {"type": "vit", "options": {"image_size": 32}}}, "image_size follows from vocabulary_size and"),
        ({"video": {"kind": "tight"}}, "layers: tight needs it"),
        ({"video": {"kind": "sequential", "layers": 2}}, "heads: sequential needs it"),
        ({"video": {"layers": 4}}, "layers: mean has none"),
        ({"video": {"kind": "mean", "heads": 8}}, "heads: mean has none"),
        ({"video": {"kind": "tight", "layers": 1, "heads": 2}, "embedding_width": None}, "video: tight reads captions"),
        ({"video": {"kind": "tight", "layers": 1, "heads": 2}, "bias": -10.0}, "bias: it shifts cosines"),
    ],
)
def test_settings_that_do_not_fit_are_named(tiny_config: ModelConfig, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        altered(tiny_config, **changes)


def test_missing_parts_are_named(tiny_config: ModelConfig) -> None:
    model = build_model(tiny_config, **ALONE, heads=["classes"], num_classes=2)
    image = model.encode_image(inputs()[0])
    with pytest.raises(MisuseError, match="the model has no shared space"):
        model.embed_image(image)
    with pytest.raises(MisuseError, match="the model has no head matching"):
        model.matching_logits(model.fuse(image, None))
    with pytest.raises(MisuseError, match="the model has no decoder"):
        model.decode(image, torch.zeros(5, 2, dtype=torch.int64))


# --- special tokens of other tokenizers -------------------------------------------------------------------------------


def roberta_tokenizer(opens: bool = True) -> Tokenizer:
    """With other names and ids than ours: padding is 1, the closing token 2."""
    words = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", "red", "green", "apple", "pear"]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>" if opens else "$A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    return tokenizer


@pytest.mark.parametrize(
    "tokenizer",
    [roberta_tokenizer(opens=False), Tokenizer(models.WordLevel({"<pad>": 0, "<unk>": 1, "a": 2}, unk_token="<unk>"))],
)
def test_a_decoder_needs_a_tokenizer_that_opens_and_closes_texts(
    tiny_config: ModelConfig, tokenizer: Tokenizer
) -> None:
    with pytest.raises(RecipeError, match=r"^pretrain\.model\.decoder: the tokenizer does not put a token before"):
        with_special_tokens("pretrain.model", altered(tiny_config, decoder=DECODER), tokenizer)
    with_special_tokens("pretrain.model", tiny_config, tokenizer)


def test_decoder_tokens_are_the_tokenizers_own(tiny_tokenizer: Tokenizer) -> None:
    assert decoder_tokens("model", tiny_tokenizer) == (2, 3, 0)
    assert decoder_tokens("model", roberta_tokenizer()) == (0, 2, 1)


def test_a_fresh_encoder_gets_the_ids_of_another_tokenizers_special_tokens(tiny_config: ModelConfig) -> None:
    """RoBERTa gives padding no position: with our id of padding the opening token would have none."""
    tokenizer = roberta_tokenizer()
    text = {"type": "roberta", "options": TEXT["roberta"], "pooling": "eos"}
    config = with_special_tokens("distill.model", altered(tiny_config, text=text), tokenizer)
    assert config.text.options == TEXT["roberta"] | {"pad_token_id": 1, "eos_token_id": 2}
    encoder = build("distill.model", config, tokenizer.get_vocab_size(), seed=0).eval().text
    ids = torch.tensor([tokenizer.encode("red apple").ids])
    encoded = encoder(ids)
    torch.testing.assert_close(encoded.pooled_BW, encoded.sequence_BTW[:, 3])
    places = encoder.backbone.embeddings.create_position_ids_from_input_ids(ids, encoder.padding)
    assert places.tolist() == [[2, 3, 4, 5]]


def test_settings_of_special_tokens_are_kept(tiny_config: ModelConfig, tiny_tokenizer: Tokenizer) -> None:
    assert with_special_tokens("pretrain.model", tiny_config, tiny_tokenizer) is tiny_config
    text = {"type": "roberta", "options": TEXT["roberta"] | {"pad_token_id": 3, "eos_token_id": 4}}
    config = altered(tiny_config, text=text)
    assert with_special_tokens("distill.model", config, roberta_tokenizer()) is config
