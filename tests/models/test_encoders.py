"""Every encoder has one signature and the outputs of transformers, in evaluation and in training."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mmflow.core.errors import RecipeError
from mmflow.models.attention import AttentionPooling, pool_eos, pool_last, pool_mean
from mmflow.models.config import ImageEncoderConfig
from mmflow.models.encoders import Encoder, ImageEncoder, parameter_count
from tests.models.backbones import IMAGE, LAYERS, PIXELS, TEXT, VITS, VOCABULARY, image_encoder, text_encoder, token_ids

TEXT_POOLINGS = [
    (model_type, pooling)
    for model_type in TEXT
    for pooling in ("pooler", "mean", "first", "last", "eos", "attention")
    if (model_type, pooling) != ("modernbert", "pooler")  # it has none
]


def pictures(batch_size: int) -> Tensor:
    return torch.randn(batch_size, 3, PIXELS, PIXELS)


def encoder_and_inputs(model_type: str, batch_size: int = 2, **settings: Any) -> tuple[Any, Tensor]:
    if model_type in TEXT:
        return text_encoder(model_type, **settings), token_ids(batch_size, 5)
    return image_encoder(model_type, **settings), pictures(batch_size)


def without_gradient(encoder: Encoder) -> list[str]:
    return [name for name, weight in encoder.named_parameters() if weight.requires_grad and weight.grad is None]


@pytest.mark.parametrize("pooling", ["pooler", "mean", "first", "attention"])
@pytest.mark.parametrize("model_type", IMAGE)
def test_image_encoders_train_all_their_weights(model_type: str, pooling: str) -> None:
    """DeepSpeed would also reduce and save weights that nothing reads."""
    encoder = image_encoder(model_type, pooling=pooling)
    encoded = encoder(pictures(3))
    num_regions = {"vit": 5, "clip_vision_model": 5, "dinov2": 5}.get(model_type, 4)
    assert encoded.sequence_BTW.shape == (3, num_regions, 8)
    assert encoded.pooled_BW.shape == (3, encoder.width) == (3, 8)
    assert (encoded.mask_BT, encoded.attentions) == (None, None)
    encoded.pooled_BW.square().sum().backward()
    assert without_gradient(encoder) == []


@pytest.mark.parametrize(("model_type", "pooling"), TEXT_POOLINGS)
def test_text_encoders_train_all_their_weights(model_type: str, pooling: str) -> None:
    encoder = text_encoder(model_type, pooling=pooling)
    encoded = encoder(token_ids(3, 7), torch.ones(3, 7, dtype=torch.int64))
    assert (encoded.sequence_BTW.shape, encoded.pooled_BW.shape, encoder.width) == ((3, 7, 8), (3, 8), 8)
    assert encoded.mask_BT.dtype is torch.bool
    encoded.pooled_BW.square().sum().backward()
    assert without_gradient(encoder) == []


@pytest.mark.parametrize(("model_type", "pooling"), TEXT_POOLINGS)
def test_padding_changes_nothing(model_type: str, pooling: str) -> None:
    """Neither its length nor its ids: RoBERTa's positions count ids, SigLIP's pooler reads all of it."""
    encoder = text_encoder(model_type, pooling=pooling).eval()
    ids = token_ids(2, 5)
    padded = torch.cat([ids, torch.randint(0, VOCABULARY, (2, 4))], 1)
    mask = torch.cat([torch.ones(2, 5), torch.zeros(2, 4)], 1).long()
    plain, other = encoder(ids), encoder(padded, mask)
    torch.testing.assert_close(other.pooled_BW, plain.pooled_BW, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(other.sequence_BTW[:, :5], plain.sequence_BTW, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("model_type", TEXT)
def test_a_text_without_tokens_is_finite_and_does_not_change_the_others(model_type: str) -> None:
    encoder, ids = text_encoder(model_type).eval(), token_ids(2, 5)
    encoded = encoder(ids, torch.tensor([[1, 1, 1, 1, 1], [0, 0, 0, 0, 0]]))
    torch.testing.assert_close(encoded.pooled_BW[:1], encoder(ids[:1]).pooled_BW, atol=1e-6, rtol=1e-5)
    encoded.pooled_BW[0].sum().backward()
    assert all(weight.grad is None or weight.grad.isfinite().all() for weight in encoder.parameters())


@pytest.mark.parametrize("model_type", [*VITS, *TEXT])
def test_requested_maps_change_nothing(model_type: str) -> None:
    encoder, inputs = encoder_and_inputs(model_type)
    encoder.eval()
    plain, mapped = encoder(inputs), encoder(inputs, attentions=True)
    assert encoder.backbone.config._attn_implementation == "sdpa"
    torch.testing.assert_close(mapped.sequence_BTW, plain.sequence_BTW, atol=1e-5, rtol=1e-5)
    length = plain.sequence_BTW.shape[1]
    assert [map_BHTT.shape for map_BHTT in mapped.attentions] == [(2, 2, length, length)] * 2
    torch.testing.assert_close(mapped.attentions[0].sum(-1), torch.ones(2, 2, length))


def test_convolutions_have_no_maps() -> None:
    assert image_encoder("resnet")(pictures(2), attentions=True).attentions is None


def test_clip_pools_at_the_closing_token() -> None:
    encoder, ids = text_encoder("clip_text_model", pooling="pooler").eval(), token_ids(2, 7)
    ids[0, 3] = 3
    encoded = encoder(ids)
    torch.testing.assert_close(encoded.pooled_BW[0], encoded.sequence_BTW[0, 3])
    torch.testing.assert_close(encoded.pooled_BW[1], encoded.sequence_BTW[1, 6])
    torch.testing.assert_close(encoded.pooled_BW, encoder.backbone(ids).pooler_output)


def test_clip_with_a_wrong_closing_token_in_its_checkpoint_pools_at_the_last() -> None:
    """They state 2, a word of their vocabulary; transformers then uses the largest id, which closes the text."""
    encoder = text_encoder("clip_text_model", pooling="pooler", options={"eos_token_id": 2}).eval()
    ids = torch.tensor([[5, 2, 9, 63, 0], [5, 7, 8, 9, 63]])
    mask = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]])
    torch.testing.assert_close(encoder(ids, mask).pooled_BW, encoder.backbone(ids, mask).pooler_output)


def test_siglip_reads_its_whole_length_as_in_its_training() -> None:
    encoder = text_encoder("siglip_text_model", pooling="pooler", options={"pad_token_id": 1}).eval()
    ids = token_ids(2, 7)
    expected = encoder.backbone(torch.cat([ids, torch.ones(2, 17, dtype=torch.int64)], 1))
    encoded = encoder(ids)
    torch.testing.assert_close(encoded.pooled_BW, expected.pooler_output)
    torch.testing.assert_close(encoded.sequence_BTW, expected.last_hidden_state[:, :7])


def test_the_sequence_is_normed_where_transformers_only_norms_the_pooled_vector() -> None:
    pixels = pictures(2)
    encoder = image_encoder("clip_vision_model", pooling="first").eval()
    torch.testing.assert_close(encoder(pixels).pooled_BW, encoder.backbone(pixels).pooler_output)
    encoder = image_encoder("convnext").eval()
    hidden = encoder.backbone(pixels).last_hidden_state.flatten(2).transpose(1, 2)
    torch.testing.assert_close(encoder(pixels).sequence_BTW, encoder.backbone.layernorm(hidden))


@pytest.mark.parametrize("model_type", VITS)
def test_patch_dropout_only_acts_in_training(model_type: str) -> None:
    encoder, pixels = image_encoder(model_type, patch_dropout=0.5), pictures(6)
    num_prefix = 0 if model_type == "siglip_vision_model" else 1
    assert encoder(pixels).sequence_BTW.shape == (6, num_prefix + 2, 8)
    whole = encoder.eval()(pixels)
    assert whole.sequence_BTW.shape == (6, num_prefix + 4, 8)
    plain = image_encoder(model_type).eval()
    plain.load_state_dict(encoder.state_dict())
    torch.testing.assert_close(whole.sequence_BTW, plain(pixels).sequence_BTW)


def without_other_dropout() -> ImageEncoder:
    return image_encoder("vit", patch_dropout=0.5, options={"hidden_dropout_prob": 0.0})


def test_patch_dropout_is_drawn_separately_for_each_picture_from_torchs_generator() -> None:
    encoder, pixels = without_other_dropout(), pictures(1).expand(32, -1, -1, -1)
    torch.manual_seed(1)
    first = encoder(pixels).pooled_BW
    torch.manual_seed(1)
    assert torch.equal(encoder(pixels).pooled_BW, first)
    assert not torch.equal(encoder(pixels).pooled_BW, first)
    assert len({tuple(row) for row in first.detach().numpy().round(4).tolist()}) > 3  # of 6 ways to keep two of four


def test_patch_dropout_keeps_patches_unchanged_and_in_order() -> None:
    encoder, pixels = without_other_dropout(), pictures(3)
    whole_BTW = encoder.eval().backbone.embeddings(pixels)
    kept_BTW = encoder.train().backbone.embeddings(pixels)
    assert torch.equal(kept_BTW[:, 0], whole_BTW[:, 0])
    for kept, whole in zip(kept_BTW[:, 1:], whole_BTW[:, 1:], strict=True):
        places = [next(place for place, row in enumerate(whole) if torch.equal(row, patch)) for patch in kept]
        assert places == sorted(set(places))


def test_a_copy_with_patch_dropout_follows_its_own_mode() -> None:
    encoder, pixels = image_encoder("vit", patch_dropout=0.5), pictures(2)
    copied = copy.deepcopy(encoder).eval()
    assert copied(pixels).sequence_BTW.shape[1] == 5
    assert encoder(pixels).sequence_BTW.shape[1] == 3


@pytest.mark.parametrize("model_type", [*VITS, *TEXT])
def test_recomputed_activations_give_equal_gradients(model_type: str) -> None:
    from transformers import CONFIG_MAPPING

    has_dropout = "attention_dropout" in CONFIG_MAPPING[model_type]().to_dict()
    gradients = []
    for recomputes in (False, True):
        torch.manual_seed(5)
        options = {"attention_dropout": 0.2} if has_dropout else {}
        encoder, inputs = encoder_and_inputs(model_type, activation_checkpointing=recomputes, options=options)
        torch.manual_seed(6)
        encoder(inputs).pooled_BW.square().sum().backward()
        gradients.append({name: weight.grad for name, weight in encoder.named_parameters()})
        linear = next(
            module
            for name, module in encoder.backbone.named_modules()
            if isinstance(module, torch.nn.Linear) and ".1." in name
        )
        calls = []
        linear.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        pooled = encoder(inputs).pooled_BW
        num_forward = len(calls)
        pooled.sum().backward()
        assert (len(calls) > num_forward) == recomputes
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


@pytest.mark.parametrize("model_type", [*IMAGE, *TEXT])
@pytest.mark.parametrize("frozen", [1, 2, "all"])
def test_frozen_layers_do_not_change_in_training(model_type: str, frozen: int | str) -> None:
    encoder, inputs = encoder_and_inputs(model_type, batch_size=4, frozen_layers=frozen, pooling="attention")
    before = copy.deepcopy(encoder.state_dict())
    optimizer = torch.optim.SGD([weight for weight in encoder.parameters() if weight.requires_grad], lr=1.0)
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


def test_dropout_is_off_in_frozen_layers_only() -> None:
    options, pixels = {"hidden_dropout_prob": 0.5}, pictures(4)
    frozen = image_encoder("vit", frozen_layers="all", options=options)
    assert torch.equal(frozen(pixels).pooled_BW, frozen(pixels).pooled_BW)
    half = image_encoder("vit", frozen_layers=1, options=options).train()
    assert torch.equal(half.backbone.embeddings(pixels), half.backbone.embeddings(pixels))
    assert not torch.equal(half(pixels).pooled_BW, half(pixels).pooled_BW)
    assert not half.eval().backbone.layers[1].training


def test_a_frozen_batch_norm_keeps_its_statistics() -> None:
    encoder = image_encoder("resnet", frozen_layers=1).train()
    first = encoder.backbone.embedder.embedder.normalization
    last = [module for module in encoder.backbone.modules() if isinstance(module, torch.nn.BatchNorm2d)][-1]
    encoder(pictures(4) + 5)
    assert (int(first.num_batches_tracked), int(last.num_batches_tracked)) == (0, 1)


SMALL_PATCHES = {"hidden_sizes": [8] * 4, "depths": [1] * 4, "num_stages": 4, "patch_size": 4}
SWIN = {"patch_size": 2, "embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4}


@pytest.mark.parametrize(
    ("side", "model_type", "settings", "message"),
    [
        ("text", "brt", {}, "m.text.type: transformers has no 'brt'; did you mean 'bert'?"),
        ("text", "%%", {}, "m.text.type: transformers has no '%%'"),
        ("text", "bert", {"options": {"hiden_size": 8}}, "m.text.options.hiden_size: .* did you mean 'hidden_size'"),
        ("text", "bert", {"options": {"hidden_size": 30, "num_attention_heads": 4}}, "m.text: bert .*not a multiple"),
        ("text", "bert", {"options": {"hidden_size": "wide"}}, "m.text: bert .*'hidden_size' expected int, got str"),
        ("text", "bert", {"options": {"layer_norm_eps": [1]}}, "m.text: bert .*'layer_norm_eps' expected float"),
        ("image", "bert", {}, "m.image.type: bert is not an encoder of pictures"),
        ("text", "vit", {}, "m.text.type: vit is not an encoder of text"),
        ("text", "t5", {}, "m.text.type: t5 is not an encoder of text"),
        ("image", "clip", {}, "m.image.type: clip "),
        ("text", "clip", {}, "m.text.type: clip "),
        *[
            ("image", name, {"options": LAYERS | {"patch_size": 32}}, f"m.image_pixels: {name} cannot read .* 16 by 16")
            for name in ("vit", "clip_vision_model", "siglip_vision_model")
        ],
        ("image", "convnext", {"options": SMALL_PATCHES}, "m.image_pixels: convnext cannot read pictures of 16 by 16"),
        ("image", "resnet", {"patch_dropout": 0.5}, "m.image.patch_dropout: resnet has no patches"),
        ("image", "swin", {"patch_dropout": 0.5, "options": SWIN}, "m.image.patch_dropout: swin has no patches"),
        ("image", "resnet", {"activation_checkpointing": True}, "m.image.activation_checkpointing: transformers has"),
        ("image", "vit", {"frozen_layers": 3}, "m.image.frozen_layers: 3 of 2 layers; give fewer, or all"),
        ("text", "modernbert", {"pooling": "pooler"}, "m.text.pooling: modernbert has no pooler of its own; use"),
        # RoBERTa's positions start at pad + 1, so it can use one fewer than it states.
        *[
            ("text", name, {"options": {"max_position_embeddings": 9}}, f"m.max_tokens: 12 tokens, .* {limit} pos")
            for name, limit in (("bert", 9), ("clip_text_model", 9), ("roberta", 8))
        ],
    ],
)
def test_unsupported_settings_are_refused(side: str, model_type: str, settings: Any, message: str) -> None:
    with pytest.raises(RecipeError, match=f"^{message}") as caught:
        (image_encoder if side == "image" else text_encoder)(model_type, **settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("model_type", ["bert", "clip_text_model", "roberta", "siglip_text_model"])
def test_as_many_tokens_as_positions_are_read(model_type: str) -> None:
    limit = 12 + (model_type == "roberta")
    encoder = text_encoder(model_type, options={"max_position_embeddings": limit})
    assert encoder(token_ids(2, 12)).pooled_BW.isfinite().all()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"type": "vit", "frozen_layers": -1}, "frozen_layers"),
        ({"type": "vit", "frozen_layers": "most"}, "frozen_layers"),
        ({}, "give either type, for fresh weights, or checkpoint"),
        ({"type": "vit", "checkpoint": "/somewhere"}, "give either type, for fresh weights, or checkpoint"),
    ],
)
def test_invalid_encoder_settings_are_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ImageEncoderConfig.model_validate(fields)


def test_sizes_follow_from_the_recipe() -> None:
    assert text_encoder("bert").backbone.get_input_embeddings().weight.shape == (VOCABULARY, 8)
    assert image_encoder("vit").backbone.config.image_size == PIXELS
    assert parameter_count(torch.nn.Linear(3, 5)) == 20


# --- poolings ---------------------------------------------------------------------------------------------------------


@given(lengths=st.lists(st.integers(1, 6), min_size=1, max_size=4), seed=st.integers(0, 99))
def test_poolings_equal_a_loop_over_rows(lengths: list[int], seed: int) -> None:
    eos, generator = 3, torch.Generator().manual_seed(seed)
    sequence = torch.randn(len(lengths), max(lengths), 3, generator=generator)
    ids = torch.randint(0, 6, (len(lengths), max(lengths)), generator=generator)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    mean, last, closing = pool_mean(sequence, mask), pool_last(sequence, mask), pool_eos(sequence, mask, ids, eos)
    for row, length in enumerate(lengths):
        torch.testing.assert_close(mean[row], sequence[row, :length].mean(0))
        assert torch.equal(last[row], sequence[row, length - 1])
        places = [place for place in range(length) if ids[row, place] == eos] or [length - 1]
        assert torch.equal(closing[row], sequence[row, places[0]])
    assert torch.equal(pool_eos(sequence, mask, ids, None), last)
    assert torch.equal(pool_mean(sequence, torch.zeros_like(mask)), torch.zeros(len(lengths), 3))


@pytest.mark.parametrize("width", [8, 128])
def test_attention_pooling_equals_its_equation_on_real_tokens(width: int) -> None:
    """softmax(q kᵀ / √d) v written out, head by head."""
    pooling = AttentionPooling(width)
    heads = 2 if width == 128 else 1
    sequence, mask = torch.randn(3, 6, width), torch.arange(6) < torch.tensor([[2], [6], [1]])
    attention = pooling.attention
    expected = []
    for vectors, real in zip(sequence, mask, strict=True):
        query, keys, values = (
            attention.query(pooling.query[0]),
            *(project(vectors[real]) for project in (attention.key, attention.value)),
        )
        read = [
            ((q @ k.T) * q.shape[-1] ** -0.5).softmax(-1) @ v
            for q, k, v in zip(query.chunk(heads, 1), keys.chunk(heads, 1), values.chunk(heads, 1), strict=True)
        ]
        expected.append(pooling.norm(attention.output(torch.cat(read, 1)))[0])
    pooled, weights = pooling(sequence, mask)
    torch.testing.assert_close(pooled, torch.stack(expected))
    assert weights is None
    pooled, weights = pooling(sequence, mask, maps=True)
    torch.testing.assert_close(pooled, torch.stack(expected))
    assert weights.shape == (3, heads, 1, 6)
    assert torch.equal(weights > 0, mask[:, None, None].expand_as(weights))
