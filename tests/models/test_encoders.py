"""Any encoder behind one signature: what goes in comes out as transformers gives it, at rest or in training."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from mmflow.core.errors import RecipeError
from mmflow.models.config import ImageEncoderConfig, TextEncoderConfig
from mmflow.models.encoders import Encoder, ImageEncoder, TextEncoder, parameter_count
from mmflow.models.model import build_image_encoder, build_text_encoder
from tests.models.backbones import IMAGE, LAYERS, TEXT, VITS

PIXELS, VOCABULARY, MAX_TOKENS = 16, 64, 12


def image(model_type: str, **settings: Any) -> ImageEncoder:
    options = IMAGE[model_type] | settings.pop("options", {})
    config = ImageEncoderConfig(type=model_type, options=options, **settings)
    encoder = build_image_encoder("pretrain.model.image", config, PIXELS)
    assert isinstance(encoder, ImageEncoder)
    return encoder


def text(model_type: str, **settings: Any) -> TextEncoder:
    options = TEXT[model_type] | settings.pop("options", {})
    config = TextEncoderConfig(type=model_type, options=options, **settings)
    encoder = build_text_encoder("pretrain.model.text", config, VOCABULARY, MAX_TOKENS)
    assert isinstance(encoder, TextEncoder)
    return encoder


def tokens(batch_size: int, length: int) -> Tensor:
    """Ids without special tokens, each text closed by [SEP]."""
    ids = torch.randint(5, VOCABULARY, (batch_size, length))
    ids[:, -1] = 3
    return ids


def without_gradient(encoder: Encoder) -> list[str]:
    return [name for name, each in encoder.named_parameters() if each.requires_grad and each.grad is None]


@pytest.mark.parametrize("pooling", ["pooler", "mean", "first", "attention"])
@pytest.mark.parametrize("model_type", IMAGE)
def test_image_encoders_train_every_weight_they_have(model_type: str, pooling: str) -> None:
    """DeepSpeed reduces and saves every parameter, one that nothing reads among them."""
    encoder = image(model_type, pooling=pooling)
    encoded = encoder(torch.randn(3, 3, PIXELS, PIXELS))
    regions = {"vit": 5, "clip_vision_model": 5, "dinov2": 5}.get(model_type, 4)
    assert encoded.sequence_BTW.shape == (3, regions, 8)
    assert encoded.pooled_BW.shape == (3, encoder.width) == (3, 8)
    assert (encoded.mask_BT, encoded.attentions) == (None, None)
    encoded.pooled_BW.square().sum().backward()
    assert without_gradient(encoder) == []


@pytest.mark.parametrize("pooling", ["pooler", "mean", "first", "last", "eos", "attention"])
@pytest.mark.parametrize("model_type", TEXT)
def test_text_encoders_train_every_weight_they_have(model_type: str, pooling: str) -> None:
    if (model_type, pooling) == ("modernbert", "pooler"):
        pytest.skip("it has none, which another test asks for")
    encoder = text(model_type, pooling=pooling)
    encoded = encoder(tokens(3, 7), torch.ones(3, 7, dtype=torch.int64))
    assert (encoded.sequence_BTW.shape, encoded.pooled_BW.shape, encoder.width) == ((3, 7, 8), (3, 8), 8)
    assert encoded.mask_BT is not None
    assert encoded.mask_BT.dtype is torch.bool
    encoded.pooled_BW.square().sum().backward()
    assert without_gradient(encoder) == []


@pytest.mark.parametrize("pooling", ["pooler", "mean", "first", "last", "eos", "attention"])
@pytest.mark.parametrize("model_type", TEXT)
def test_padding_changes_nothing(model_type: str, pooling: str) -> None:
    """Neither how long it is nor which ids stand in it: RoBERTa's positions count ids, SigLIP's pooler reads it all."""
    if (model_type, pooling) == ("modernbert", "pooler"):
        pytest.skip("it has none, which another test asks for")
    encoder = text(model_type, pooling=pooling).eval()
    ids = tokens(2, 5)
    padded = torch.cat([ids, torch.randint(0, VOCABULARY, (2, 4))], 1)
    mask = torch.cat([torch.ones(2, 5), torch.zeros(2, 4)], 1).long()
    plain, other = encoder(ids), encoder(padded, mask)
    torch.testing.assert_close(other.pooled_BW, plain.pooled_BW, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(other.sequence_BTW[:, :5], plain.sequence_BTW, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("model_type", TEXT)
def test_a_text_without_tokens_is_finite_and_leaves_the_others_alone(model_type: str) -> None:
    encoder = text(model_type)
    ids = tokens(2, 5)
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 0, 0, 0]])
    encoder.eval()
    encoded = encoder(ids, mask)
    torch.testing.assert_close(encoded.pooled_BW[:1], encoder(ids[:1]).pooled_BW, atol=1e-6, rtol=1e-5)
    encoded.pooled_BW[0].sum().backward()
    assert all(each.grad is None or each.grad.isfinite().all() for each in encoder.parameters())


@pytest.mark.parametrize("model_type", [*VITS, *TEXT])
def test_maps_are_asked_for_and_change_nothing(model_type: str) -> None:
    is_text = model_type in TEXT
    encoder: Encoder = (text if is_text else image)(model_type).eval()
    inputs = tokens(2, 5) if is_text else torch.randn(2, 3, PIXELS, PIXELS)
    assert encoder.backbone.config._attn_implementation == "sdpa"
    plain, mapped = encoder(inputs), encoder(inputs, attentions=True)
    assert encoder.backbone.config._attn_implementation == "sdpa"
    torch.testing.assert_close(mapped.sequence_BTW, plain.sequence_BTW, atol=1e-5, rtol=1e-5)
    length = plain.sequence_BTW.shape[1]
    assert [each.shape for each in mapped.attentions] == [(2, 2, length, length)] * 2
    torch.testing.assert_close(mapped.attentions[0].sum(-1), torch.ones(2, 2, length))


def test_convolutions_have_no_maps() -> None:
    assert image("resnet")(torch.randn(2, 3, PIXELS, PIXELS), attentions=True).attentions is None


def test_clip_pools_at_the_closing_token() -> None:
    encoder = text("clip_text_model", pooling="pooler").eval()
    ids = tokens(2, 7)
    ids[0, 3] = 3
    encoded = encoder(ids)
    torch.testing.assert_close(encoded.pooled_BW[0], encoded.sequence_BTW[0, 3])
    torch.testing.assert_close(encoded.pooled_BW[1], encoded.sequence_BTW[1, 6])
    torch.testing.assert_close(encoded.pooled_BW, encoder.backbone(ids).pooler_output)


def test_clip_of_a_checkpoint_that_misstates_its_closing_token_pools_at_the_last() -> None:
    """They state 2, a word of their vocabulary; transformers then takes the greatest id, which closes the text."""
    encoder = text("clip_text_model", pooling="pooler", options={"eos_token_id": 2}).eval()
    ids = torch.tensor([[5, 2, 9, 63, 0], [5, 7, 8, 9, 63]])
    mask = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]])
    torch.testing.assert_close(encoder(ids, mask).pooled_BW, encoder.backbone(ids, mask).pooler_output)


def test_siglip_reads_its_whole_length_as_it_was_trained() -> None:
    encoder = text("siglip_text_model", pooling="pooler", options={"pad_token_id": 1}).eval()
    ids = tokens(2, 7)
    whole = torch.cat([ids, torch.ones(2, 17, dtype=torch.int64)], 1)
    expected = encoder.backbone(whole)
    encoded = encoder(ids)
    torch.testing.assert_close(encoded.pooled_BW, expected.pooler_output)
    torch.testing.assert_close(encoded.sequence_BTW, expected.last_hidden_state[:, :7])


def test_the_sequence_is_normed_where_transformers_norms_the_pooled_vector_alone() -> None:
    pixels = torch.randn(2, 3, PIXELS, PIXELS)
    encoder = image("clip_vision_model", pooling="first").eval()
    torch.testing.assert_close(encoder(pixels).pooled_BW, encoder.backbone(pixels).pooler_output)
    encoder = image("convnext").eval()
    hidden = encoder.backbone(pixels).last_hidden_state.flatten(2).transpose(1, 2)
    torch.testing.assert_close(encoder(pixels).sequence_BTW, encoder.backbone.layernorm(hidden))


@pytest.mark.parametrize("model_type", VITS)
def test_patch_dropout_leaves_patches_out_in_training_alone(model_type: str) -> None:
    encoder = image(model_type, patch_dropout=0.5)
    pixels = torch.randn(6, 3, PIXELS, PIXELS)
    prefix = 0 if model_type == "siglip_vision_model" else 1
    assert encoder.train()(pixels).sequence_BTW.shape == (6, prefix + 2, 8)
    whole = encoder.eval()(pixels)
    assert whole.sequence_BTW.shape == (6, prefix + 4, 8)
    torch.testing.assert_close(whole.sequence_BTW, image_like(encoder, model_type)(pixels).sequence_BTW)


def image_like(encoder: ImageEncoder, model_type: str) -> ImageEncoder:
    other = image(model_type).eval()
    other.load_state_dict(encoder.state_dict())
    return other


def test_patch_dropout_is_drawn_by_torchs_generator_for_each_picture() -> None:
    encoder = image("vit", patch_dropout=0.5, options={"hidden_dropout_prob": 0.0})
    pixels = torch.randn(1, 3, PIXELS, PIXELS).expand(32, -1, -1, -1)
    torch.manual_seed(1)
    first = encoder(pixels).pooled_BW
    torch.manual_seed(1)
    assert torch.equal(encoder(pixels).pooled_BW, first)
    assert not torch.equal(encoder(pixels).pooled_BW, first)
    assert len({tuple(row) for row in first.detach().numpy().round(4).tolist()}) > 3  # of 6 ways to keep two of four


def test_patch_dropout_keeps_patches_as_they_are_and_in_order() -> None:
    encoder = image("vit", patch_dropout=0.5, options={"hidden_dropout_prob": 0.0})
    pixels = torch.randn(3, 3, PIXELS, PIXELS)
    encoder.eval()
    whole_BTW = encoder.backbone.embeddings(pixels)
    encoder.train()
    kept_BTW = encoder.backbone.embeddings(pixels)
    assert torch.equal(kept_BTW[:, 0], whole_BTW[:, 0])
    for kept, whole in zip(kept_BTW[:, 1:], whole_BTW[:, 1:], strict=True):
        places = [next(place for place, row in enumerate(whole) if torch.equal(row, patch)) for patch in kept]
        assert places == sorted(set(places))


def test_a_copy_with_patch_dropout_follows_its_own_mode() -> None:
    encoder = image("vit", patch_dropout=0.5)
    copied = copy.deepcopy(encoder).eval()
    pixels = torch.randn(2, 3, PIXELS, PIXELS)
    assert copied(pixels).sequence_BTW.shape[1] == 5
    assert encoder(pixels).sequence_BTW.shape[1] == 3


@pytest.mark.parametrize("model_type", [*VITS, *TEXT])
def test_checkpointed_activations_give_equal_gradients(model_type: str) -> None:
    is_text = model_type in TEXT
    options = {"attention_dropout": 0.2} if "attention_dropout" in default_options(model_type) else {}
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(5)
        build = text if is_text else image
        encoder: Encoder = build(model_type, activation_checkpointing=checkpointing, options=options)
        inputs = tokens(2, 5) if is_text else torch.randn(2, 3, PIXELS, PIXELS)
        torch.manual_seed(6)
        encoder(inputs).pooled_BW.square().sum().backward()
        gradients.append({name: each.grad for name, each in encoder.named_parameters()})
        assert _recomputes(encoder, inputs) == checkpointing
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


def default_options(model_type: str) -> dict[str, Any]:
    from transformers import CONFIG_MAPPING

    return dict(CONFIG_MAPPING[model_type]().to_dict())


def _recomputes(encoder: Encoder, inputs: Tensor) -> bool:
    """Whether the backward pass runs a layer's parts again."""
    linear = next(
        each for name, each in encoder.backbone.named_modules() if isinstance(each, torch.nn.Linear) and ".1." in name
    )
    calls = []
    handle = linear.register_forward_hook(lambda *_: calls.append(1))
    pooled = encoder(inputs).pooled_BW
    before = len(calls)
    pooled.sum().backward()
    handle.remove()
    return len(calls) > before


@pytest.mark.parametrize("model_type", [*IMAGE, *TEXT])
@pytest.mark.parametrize("frozen", [1, 2, "all"])
def test_frozen_layers_neither_learn_nor_count(model_type: str, frozen: int | str) -> None:
    is_text = model_type in TEXT
    encoder: Encoder = (text if is_text else image)(model_type, frozen_layers=frozen, pooling="attention")
    before = copy.deepcopy(encoder.state_dict())
    inputs = tokens(4, 5) if is_text else torch.randn(4, 3, PIXELS, PIXELS)
    learned = [each for each in encoder.parameters() if each.requires_grad]
    optimizer = torch.optim.SGD(learned, lr=1.0)
    encoder(inputs).pooled_BW.square().sum().backward()
    optimizer.step()
    changed = {name for name, value in encoder.state_dict().items() if not torch.equal(value, before[name])}
    assert any(name.startswith("attention_pooling.") for name in changed)
    in_backbone = {name for name in changed if name.startswith("backbone.")}
    if frozen == "all":
        assert in_backbone == set()
    else:
        assert not any("embed" in name or ".0." in name for name in in_backbone if "stages.1" not in name)
        assert any(".1." in name for name in in_backbone) == (frozen == 1)


def test_frozen_layers_leave_nothing_out() -> None:
    """Their dropout is still, that of the layers above goes on."""
    options = {"hidden_dropout_prob": 0.5}
    pixels = torch.randn(4, 3, PIXELS, PIXELS)
    still = image("vit", frozen_layers="all", options=options)
    assert torch.equal(still(pixels).pooled_BW, still(pixels).pooled_BW)
    half = image("vit", frozen_layers=1, options=options).train()
    assert torch.equal(half.backbone.embeddings(pixels), half.backbone.embeddings(pixels))
    assert not torch.equal(half(pixels).pooled_BW, half(pixels).pooled_BW)
    assert not half.eval().backbone.layers[1].training


def test_a_frozen_batch_norm_does_not_count() -> None:
    encoder = image("resnet", frozen_layers=1).train()
    first = encoder.backbone.embedder.embedder.normalization
    last = [each for each in encoder.backbone.modules() if isinstance(each, torch.nn.BatchNorm2d)][-1]
    encoder(torch.randn(4, 3, PIXELS, PIXELS) + 5)
    assert (int(first.num_batches_tracked), int(last.num_batches_tracked)) == (0, 1)


def refusal(side: str, model_type: str, options: dict[str, Any], **settings: Any) -> str:
    def build() -> None:
        if side == "image":
            build_image_encoder("m.image", ImageEncoderConfig(type=model_type, options=options, **settings), PIXELS)
        else:
            config = TextEncoderConfig(type=model_type, options=options, **settings)
            build_text_encoder("m.text", config, VOCABULARY, MAX_TOKENS)

    with pytest.raises(RecipeError) as caught:
        build()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_unknown_type_is_answered_with_the_nearest() -> None:
    assert refusal("text", "brt", {}) == "m.text.type: transformers has no 'brt'; did you mean 'bert'?"
    assert refusal("text", "%%", {}) == "m.text.type: transformers has no '%%'"


def test_unknown_option_is_answered_with_the_nearest() -> None:
    said = "m.text.options.hiden_size: bert has no such option; did you mean 'hidden_size'?"
    assert refusal("text", "bert", {"hiden_size": 8}) == said


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"hidden_size": 30, "num_attention_heads": 4}, "not a multiple of the number of attention heads"),
        ({"hidden_size": "wide"}, "'hidden_size' expected int, got str (value: 'wide')"),
        ({"layer_norm_eps": [1]}, "'layer_norm_eps' expected float"),
    ],
)
def test_option_of_a_wrong_value_is_a_mistake_of_the_recipe(options: dict[str, Any], said: str) -> None:
    message = refusal("text", "bert", TEXT["bert"] | options)
    assert message.startswith("m.text: bert ")
    assert said in message


@pytest.mark.parametrize(
    ("side", "model_type", "said"),
    [
        ("image", "bert", "m.image.type: bert is no encoder of pictures; use another"),
        ("text", "vit", "m.text.type: vit is no encoder of text; use another"),
        ("text", "t5", "m.text.type: t5 is no encoder of text; use another"),
        ("image", "clip", "m.image.type: clip "),
        ("text", "clip", "m.text.type: clip "),
    ],
)
def test_type_of_another_kind_is_refused(side: str, model_type: str, said: str) -> None:
    assert refusal(side, model_type, {}).startswith(said)


@pytest.mark.parametrize(
    ("model_type", "options"),
    [(each, LAYERS | {"patch_size": 32}) for each in ("vit", "clip_vision_model", "siglip_vision_model")]
    + [("convnext", {"hidden_sizes": [8] * 4, "depths": [1] * 4, "num_stages": 4, "patch_size": 4})],
)
def test_pictures_smaller_than_a_patch_are_refused(model_type: str, options: dict[str, Any]) -> None:
    message = refusal("image", model_type, options)
    assert message.startswith(f"m.image_pixels: {model_type} cannot read pictures of 16 by 16 pixels (")
    assert message.endswith("); raise it, or lower m.image.options.patch_size")


@pytest.mark.parametrize(("model_type", "limit"), [("bert", 9), ("clip_text_model", 9), ("roberta", 8)])
def test_more_tokens_than_positions_are_refused(model_type: str, limit: int) -> None:
    """RoBERTa's positions start at pad + 1, so one fewer than it states is of use."""
    assert refusal("text", model_type, TEXT[model_type] | {"max_position_embeddings": 9}) == (
        f"m.max_tokens: 12 tokens, and {model_type} has {limit} positions; ask for fewer, raise "
        "m.text.options.max_position_embeddings of fresh weights, or stretch trained ones by m.text.positions"
    )


@pytest.mark.parametrize("model_type", ["bert", "clip_text_model", "roberta", "siglip_text_model"])
def test_as_many_tokens_as_positions_are_read(model_type: str) -> None:
    limit = 12 + (model_type == "roberta")
    encoder = text(model_type, options={"max_position_embeddings": limit})
    assert encoder(tokens(2, 12)).pooled_BW.isfinite().all()


@pytest.mark.parametrize(
    ("side", "model_type", "settings", "said"),
    [
        ("image", "resnet", {"patch_dropout": 0.5}, "m.image.patch_dropout: resnet has no patches that can be left"),
        ("image", "swin", {"patch_dropout": 0.5}, "m.image.patch_dropout: swin has no patches that can be left out"),
        ("image", "resnet", {"activation_checkpointing": True}, "m.image.activation_checkpointing: transformers has"),
        ("image", "vit", {"frozen_layers": 3}, "m.image.frozen_layers: 3 of 2 layers; give fewer, or all"),
        ("text", "modernbert", {"pooling": "pooler"}, "m.text.pooling: modernbert has no pooler of its own; use"),
    ],
)
def test_what_a_backbone_cannot_do_is_refused(side: str, model_type: str, settings: dict[str, Any], said: str) -> None:
    swin = {"patch_size": 2, "embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4}
    options = ({"swin": swin} | IMAGE | TEXT)[model_type]
    assert refusal(side, model_type, options, **settings).startswith(said)


@pytest.mark.parametrize("frozen", [-1, "most"])
def test_frozen_layers_are_a_number_or_all(frozen: int | str) -> None:
    with pytest.raises(ValueError, match="frozen_layers"):
        ImageEncoderConfig.model_validate({"type": "vit", "frozen_layers": frozen})


def test_an_encoder_has_one_origin() -> None:
    for origins in ({}, {"type": "vit", "checkpoint": "/somewhere"}):
        with pytest.raises(ValueError, match="give either type, for fresh weights, or checkpoint"):
            ImageEncoderConfig.model_validate(origins)


def test_sizes_follow_from_the_recipe() -> None:
    assert text("bert").backbone.get_input_embeddings().weight.shape == (VOCABULARY, 8)
    assert image("vit").backbone.config.image_size == PIXELS


def test_parameter_count_counts_scalars() -> None:
    assert parameter_count(torch.nn.Linear(3, 5)) == 20
