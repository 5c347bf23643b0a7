"""Fusions against independent references: LXMERT, VisualBERT and BLIP of transformers with mapped weights, and a plain
loop of ViLBERT's equation. Values and gradients, fp32 to 1e-5, bf16 to its own precision."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmflow.models.config import FusionConfig
from mmflow.models.encoders import Encoded
from mmflow.models.fusion import (
    AttentionLayer,
    EachReadsBoth,
    EachReadsOther,
    FeedForward,
    TextReadsImage,
    build_fusion,
)

WIDTH, HEADS = 16, 2
STREAMS = frozenset({"text", "image"})
SIZES = {"hidden_size": WIDTH, "num_attention_heads": HEADS, "intermediate_size": 4 * WIDTH, "layer_norm_eps": 1e-12}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def roughen(module: nn.Module) -> None:
    """Weights, biases and norms far from their initial values."""
    torch.manual_seed(7)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.4)


def streams() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Text (4, 6, W) with padding, its mask, image (4, 5, W) where one row only has two regions."""
    torch.manual_seed(1)
    text_BT = torch.arange(6) < 6 - torch.arange(4)[:, None]
    image_BR = torch.ones(4, 5, dtype=torch.bool)
    image_BR[2, 2:] = False
    return torch.randn(4, 6, WIDTH), text_BT, torch.randn(4, 5, WIDTH), image_BR


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)[:, None, None]


def copy(ours: nn.Module, theirs: nn.Module) -> None:
    ours.load_state_dict(theirs.state_dict())


def copy_attention(ours: AttentionLayer, attention: Any, output: Any) -> None:
    """From BERT's pair of an attention and its output."""
    for name in ("query", "key", "value"):
        copy(getattr(ours.attention, name), getattr(attention, name))
    copy(ours.attention.output, output.dense)
    copy(ours.norm, output.LayerNorm)


def copy_feed_forward(ours: FeedForward, intermediate: Any, output: Any) -> None:
    copy(ours.inner, intermediate.dense)
    copy(ours.output, output.dense)
    copy(ours.norm, output.LayerNorm)


def lxmert() -> tuple[Any, Any]:
    from transformers import LxmertConfig
    from transformers.models.lxmert.modeling_lxmert import LxmertXLayer

    theirs = LxmertXLayer(LxmertConfig(**SIZES, **NO_DROPOUT)).eval()
    roughen(theirs)
    ours = EachReadsBoth(WIDTH, HEADS, 0.0, STREAMS).eval()
    copy_attention(ours.cross_attention, theirs.visual_attention.att, theirs.visual_attention.output)
    for stream, short in (("text", "lang"), ("image", "visn")):
        own = getattr(theirs, f"{short}_self_att")
        copy_attention(ours.self_attention[stream], own.self, own.output)
        inner, outer = getattr(theirs, f"{short}_inter"), getattr(theirs, f"{short}_output")
        copy_feed_forward(ours.feed_forward[stream], inner, outer)
    return ours, theirs


def blip() -> tuple[Any, Any]:
    from transformers.models.blip.configuration_blip import BlipTextConfig
    from transformers.models.blip.modeling_blip_text import BlipTextLayer

    config = BlipTextConfig(**SIZES, **NO_DROPOUT, encoder_hidden_size=WIDTH, is_decoder=True)
    theirs = BlipTextLayer(config, 0).eval()
    roughen(theirs)
    ours = TextReadsImage(WIDTH, HEADS, 0.0, STREAMS).eval()
    copy_attention(ours.self_attention, theirs.attention.self, theirs.attention.output)
    copy_attention(ours.cross_attention, theirs.crossattention.self, theirs.crossattention.output)
    copy_feed_forward(ours.feed_forward, theirs.intermediate, theirs.output)
    return ours, theirs


TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.06}  # bf16 has 8 bits, and values here are about 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_co_attention_is_lxmert_s_cross_modality_layer(dtype: torch.dtype) -> None:
    ours, theirs = lxmert()
    text, text_BT, image, image_BR = streams()
    with torch.no_grad():
        expected_text, expected_image, expected_map = theirs(
            text, additive(text_BT, text.dtype), image, additive(image_BR, text.dtype), output_attentions=True
        )
        ours = ours.to(dtype)
        found_text, found_image, maps = ours(text.to(dtype), text_BT, image.to(dtype), image_BR, True)
    tolerance = TOLERANCE[dtype]
    assert found_text.dtype == dtype
    torch.testing.assert_close(found_text.float(), expected_text, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(found_image.float(), expected_image, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(maps["text_to_image"].float(), expected_map, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cross_attention_is_blip_s_image_grounded_text_layer(dtype: torch.dtype) -> None:
    """For images without a mask: transformers 5.23 loses it on the way to this layer's attention."""
    ours, theirs = blip()
    text, text_BT, image, _ = streams()
    whole_BR = torch.ones(4, 5, dtype=torch.bool)
    with torch.no_grad():
        expected = theirs(text, image, attention_mask=additive(text_BT, text.dtype))
        fused_text, unchanged_image, _ = ours.to(dtype)(text.to(dtype), text_BT, image.to(dtype), whole_BR, False)
    torch.testing.assert_close(fused_text.float(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    assert torch.equal(unchanged_image, image.to(dtype))


def gradients(outputs: Any, weights: tuple[Tensor, ...], module: nn.Module, *inputs: Tensor) -> list[Tensor]:
    """Of a weighted sum of outputs, with respect to the inputs and then the parameters."""
    loss = sum((output * weight).sum() for output, weight in zip(outputs, weights, strict=True))
    return list(torch.autograd.grad(loss, [*inputs, *module.parameters()]))


def total(values: list[Tensor]) -> list[float]:
    """Sorted sizes: the two modules register their weights in different orders."""
    return sorted(value.double().square().sum().item() for value in values)


def test_gradients_are_lxmert_s() -> None:
    ours, theirs = lxmert()
    text, text_BT, image, image_BR = streams()
    weights = torch.randn(4, 6, WIDTH), torch.randn(4, 5, WIDTH)
    text.requires_grad_()
    image.requires_grad_()
    reference = theirs(text, additive(text_BT, text.dtype), image, additive(image_BR, text.dtype))
    expected = gradients(reference, weights, theirs, text, image)
    found = gradients(ours(text, text_BT, image, image_BR, False)[:2], weights, ours, text, image)
    for gradient, reference_gradient in zip(found[:2], expected[:2], strict=True):
        torch.testing.assert_close(gradient, reference_gradient, atol=1e-4, rtol=1e-5)
    assert total(found) == pytest.approx(total(expected), rel=1e-4, abs=1e-6)


def visual_bert() -> tuple[Any, Any]:
    """The whole model: its image embeddings are our entrance, its positions and segments the entrance's bias."""
    from transformers import VisualBertConfig, VisualBertModel

    sizes = SIZES | {"vocab_size": 30, "num_hidden_layers": 2, "visual_embedding_dim": 12, "max_position_embeddings": 9}
    theirs = VisualBertModel(VisualBertConfig(**sizes, **NO_DROPOUT)).eval()
    roughen(theirs)
    config = FusionConfig(kind="single_stream", width=WIDTH, layers=2, heads=HEADS, dropout=0.0)
    ours: Any = build_fusion("fusion", config, 12, WIDTH, frozenset({"text", "image", "pooled"})).eval()
    embeddings = theirs.embeddings
    with torch.no_grad():
        ours.text_entrance.projection.weight.copy_(torch.eye(WIDTH))
        ours.text_entrance.projection.bias.copy_(embeddings.token_type_embeddings.weight[0])
        ours.image_entrance.projection.weight.copy_(embeddings.visual_projection.weight)
        ours.image_entrance.projection.bias.copy_(
            embeddings.visual_projection.bias
            + embeddings.visual_token_type_embeddings.weight[1]
            + embeddings.visual_position_embeddings.weight[0]
        )
    for entrance in (ours.text_entrance, ours.image_entrance):
        copy(entrance.norm, embeddings.LayerNorm)
    for mine, layer in zip(ours.layers, theirs.encoder.layer, strict=True):
        copy_attention(mine.attention, layer.attention.self, layer.attention.output)
        copy_feed_forward(mine.feed_forward, layer.intermediate, layer.output)
    copy(ours.pooler.dense, theirs.pooler.dense)
    return ours, theirs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_single_stream_is_visual_bert(dtype: torch.dtype) -> None:
    ours, theirs = visual_bert()
    ids, text_BT = torch.randint(0, 30, (4, 6)), torch.arange(6) < 6 - torch.arange(4)[:, None]
    regions, image_BR = torch.randn(4, 5, 12), torch.arange(5) < 5 - torch.arange(4)[:, None]
    words = theirs.embeddings.word_embeddings(ids) + theirs.embeddings.position_embeddings(torch.arange(6))
    regions.requires_grad_()
    reference = theirs(ids, attention_mask=text_BT.long(), visual_embeds=regions, visual_attention_mask=image_BR.long())
    expected_gradient = torch.autograd.grad(reference.pooler_output.square().sum(), regions, retain_graph=True)[0]
    cast = regions.detach().to(dtype).requires_grad_()
    fused = ours.to(dtype)(
        Encoded(cast, cast.mean(1), image_BR), Encoded(words.detach().to(dtype), words.mean(1).to(dtype), text_BT)
    )
    gradient = torch.autograd.grad(fused.pooled_BW.float().square().sum(), cast)[0]
    tolerance = TOLERANCE[dtype]
    sequence = reference.last_hidden_state
    outputs = fused.text_BTW[text_BT], fused.image_BRW[image_BR], fused.pooled_BW
    expected = sequence[:, :6][text_BT], sequence[:, 6:][image_BR], reference.pooler_output
    for output, value in zip(outputs, expected, strict=True):
        torch.testing.assert_close(output.float(), value, atol=tolerance, rtol=tolerance)
    if dtype == torch.float32:
        torch.testing.assert_close(gradient, expected_gradient, atol=1e-5, rtol=1e-5)


def attend_by_loop(layer: AttentionLayer, x: list[list[Tensor]], context: list[list[Tensor]], mask: Tensor) -> Any:
    """arXiv 1706.03762, equation 1, one head, query and key at a time, then the residual and its norm."""
    width = WIDTH // HEADS
    rows = []
    for row, queries in enumerate(x):
        places = []
        for place in queries:
            read = []
            for head in range(HEADS):
                part = slice(head * width, (head + 1) * width)
                query = layer.attention.query(place)[part]
                keys = [k for k, there in enumerate(mask[row]) if there]
                scores = [query @ layer.attention.key(context[row][k])[part] / math.sqrt(width) for k in keys]
                weights = torch.stack(scores).softmax(0)
                values = [layer.attention.value(context[row][k])[part] for k in keys]
                read.append(sum(weight * value for weight, value in zip(weights, values, strict=True)))
            places.append(layer.norm(place + layer.attention.output(torch.cat(read))))
        rows.append(places)
    return rows


def test_both_directions_is_vilbert_s_equation_by_loops() -> None:
    """arXiv 1908.02265, section 2.2: the keys and values of each modality go to the other's attention."""
    ours = EachReadsOther(WIDTH, HEADS, 0.0, STREAMS).eval()
    nn.init.normal_(ours.attention["text"].norm.weight)
    text, text_BT, image, image_BR = streams()
    text.requires_grad_()
    image.requires_grad_()
    text_rows, image_rows = [list(row) for row in text], [list(row) for row in image]
    read_text = attend_by_loop(ours.attention["text"], text_rows, image_rows, image_BR)
    read_image = attend_by_loop(ours.attention["image"], image_rows, text_rows, text_BT)

    def feed_forward(layer: FeedForward, rows: Any) -> Tensor:
        x = torch.stack([torch.stack(row) for row in rows])
        return layer.norm(x + layer.output(nn.functional.gelu(layer.inner(x))))

    expected = feed_forward(ours.feed_forward["text"], read_text), feed_forward(ours.feed_forward["image"], read_image)
    fused = ours(text, text_BT, image, image_BR, False)[:2]
    weights = torch.randn(4, 6, WIDTH), torch.randn(4, 5, WIDTH)
    for actual, reference in zip(fused, expected, strict=True):
        torch.testing.assert_close(actual, reference, atol=1e-5, rtol=1e-5)
    pairs = (gradients(outputs, weights, ours, text, image) for outputs in (fused, expected))
    for actual, reference in zip(*pairs, strict=True):
        torch.testing.assert_close(actual, reference, atol=1e-4, rtol=1e-4)
