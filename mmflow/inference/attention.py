"""What a model looked at when it compared a picture with a text: weights over the picture and over the text's tokens.

Attention maps are followed in two ways: rollout follows where vectors flow, whatever they are used for (arXiv
2005.00928); the gradient-weighted way follows what raised the score (arXiv 2103.15679).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mmflow.dataset.reader import Sample
from mmflow.inference.predict import Predictor
from mmflow.models.encoders import Encoded, WindowEncoder
from mmflow.models.model import Model
from mmflow.models.package import LoadedModel

# Shapes: B batch, H heads, T tokens or regions that read, R regions of a picture, S tokens or regions that are read, or
# twice the side of a picture in pixels.

Maps = Sequence[Tensor]  # one per layer, from the first to the last
SALIENCY_CELLS = 8  # along each side, for encoders without attention: single pixels are noise


def rollout(maps_BHTT: Maps) -> Tensor:
    """(B, T, T): the share of each input in every output, if each layer mixes vectors by its map and adds what it read
    (equation 1: the product over layers of the mean over heads and the identity, half and half). Rows sum to 1."""
    flow: Tensor | None = None
    for layer in maps_BHTT:
        mixed = (layer.mean(1) + torch.eye(layer.shape[-1], device=layer.device)) / 2
        flow = mixed if flow is None else mixed @ flow
    assert flow is not None
    return flow


def counted(map_BHTS: Tensor, gradient_BHTS: Tensor) -> Tensor:
    """(B, T, S): the part of one layer's map that raised the score, mean over heads (equation 5)."""
    return (map_BHTS * gradient_BHTS).clamp(min=0).mean(1)


def self_relevance(counted_BTT: Sequence[Tensor]) -> Tensor:
    """(B, T, T): how much each input raised the score through every output of a stack of layers, from the `counted`
    part of each layer, first to last (equation 6)."""
    relevance = torch.eye(counted_BTT[0].shape[-1], device=counted_BTT[0].device).expand_as(counted_BTT[0])
    for layer in counted_BTT:
        relevance = relevance + layer @ relevance
    return relevance


def of_pooled(weights_BTT: Tensor, pooling: str, mask_BT: Tensor | None) -> Tensor:
    """(B, T): the weights of the pooled vector, which is the first token, the last real one, the end of the padding, or
    the mean of all.

    What a vector keeps of itself is left out: with a mean it is the same for all tokens, and would hide what was read.
    """
    rows, tokens = weights_BTT.shape[:2]
    real_BT = torch.ones(rows, tokens, dtype=torch.bool) if mask_BT is None else mask_BT.bool()
    read_BTT = weights_BTT * (1 - torch.eye(tokens, device=weights_BTT.device))
    if pooling == "mean":
        share_BT = real_BT.to(weights_BTT) / real_BT.sum(1, keepdim=True)
        return (share_BT[:, None] @ read_BTT).squeeze(1)
    if pooling in ("last", "eos"):
        return read_BTT[torch.arange(rows), real_BT.sum(1) - 1]
    return read_BTT[:, -1 if pooling == "end" else 0]


@dataclass(frozen=True)
class Looked:
    """One picture and one text: weights from 0 to the greatest, 1; None where there are none."""

    score: float  # the cosine, or the log-odds that they belong together
    picture: list[list[float]] | None  # rows of a square grid, by gradients
    rollout: list[list[float]] | None  # the same by rollout
    tokens: list[tuple[str, float]]  # the pieces of the text, in order


def look(predictor: Predictor, sample: Sample, text: str) -> Looked:
    """What raised the cosine of a picture and a text, or without a shared space the odds that they match.

    An encoder without attention (a convolutional one) shows its gradients with respect to pixels (saliency, arXiv
    1312.6034), and so does a fusion without attention. The model must give embeddings, pair scores or matching logits.
    """
    model = predictor.model
    pixels, frame_mask = predictor.image_inputs([sample])
    ids, mask = _whole_length(model.text, *predictor.text_inputs([text]))
    pixels.requires_grad_()
    with _differentiable(model):
        image = model.encode_image(pixels, frame_mask, attentions=_attends(model.image))
        read = model.encode_text(ids, mask, attentions=_attends(model.text))
        score, maps = _score(model, image, read)
        layers = [layer for stack in maps.values() for layer in stack]
        *gradients, of_pixels = torch.autograd.grad(score, [*layers, pixels], allow_unused=True)
    in_order = iter(
        counted(layer, torch.zeros_like(layer) if gradient is None else gradient).detach()
        for layer, gradient in zip(layers, gradients, strict=True)
    )
    counts = {name: [next(in_order) for _ in stack] for name, stack in maps.items()}
    if model.gives & {"embeddings", "pair_scores"}:
        encoders: dict[str, tuple[Any, Encoded]] = {"image": (model.image, image), "text": (model.text, read)}
        weights = {
            side: _read_by_pooled(
                self_relevance(counts[side]) if counts[side] else None,
                next(iter(counts[f"{side} query"]), None),
                _pooling(encoder),
                encoded.mask_BT,
            )
            for side, (encoder, encoded) in encoders.items()
        }
    else:
        weights = _read_by_each_other(counts, read.sequence_BTW.shape[1])
    picture, flow = None, None
    if pixels.dim() == 4:  # a clip's regions are frames
        by_pixels = None if of_pixels is None else _saliency(of_pixels)
        picture = by_pixels if weights["image"] is None else _grid(weights["image"], predictor.loaded)
        if maps["image"]:
            flows = rollout([layer.detach() for layer in maps["image"]])
            query = None if image.pooling_BH1T is None else image.pooling_BH1T.detach().mean(1)
            read_1R = _read_by_pooled(flows, query, _pooling(model.image), None)
            flow = None if read_1R is None else _grid(read_1R, predictor.loaded)
    by_token = _of_tokens(model.text, weights["text"], ids.shape[1])
    return Looked(float(score.detach()), picture, flow, _pieces(predictor.loaded, text, by_token))


def _score(model: Model, image: Encoded, text: Encoded) -> tuple[Tensor, dict[str, Maps]]:
    """How well the two fit, (), and the attention maps that it came through, by part of the model."""
    maps: dict[str, Maps] = {}
    for side, encoded in (("image", image), ("text", text)):
        maps[side] = encoded.attentions or ()
        maps[f"{side} query"] = () if encoded.pooling_BH1T is None else (encoded.pooling_BH1T,)
    if "embeddings" in model.gives:
        return (model.embed_image(image) * model.embed_text(text)).sum(), maps
    if "pair_scores" in model.gives:
        return model.score_pairs(text.pooled_BW, image).sum(), maps
    fused = model.fuse(image, text, attentions=True)
    odds_12 = model.matching_logits(fused)
    between = fused.attentions or {}
    # A single stream's two directions are slices of one map, and a slice has no gradient of its own.
    maps |= {"joint": between["joint"]} if "joint" in between else between
    return (odds_12[:, 1] - odds_12[:, 0]).sum(), maps


@contextmanager
def _differentiable(model: nn.Module) -> Iterator[None]:
    # Layers before the first trained weight get no gradient, so the maps of a frozen encoder would have none.
    frozen = [weight for weight in model.parameters() if not weight.requires_grad]
    for weight in frozen:
        weight.requires_grad_(True)
    try:
        yield
    finally:
        for weight in frozen:
            weight.requires_grad_(False)


def _whole_length(encoder: Any, ids_1T: Tensor, mask_1T: Tensor) -> tuple[Tensor, Tensor]:
    """The text padded to the length that SigLIP reads, which pools its last place: the maps of a shorter text would be
    cut, and a cut map has no gradient."""
    more = max(0, getattr(encoder, "whole_length", 0) - ids_1T.shape[1])
    return nn.functional.pad(ids_1T, (0, more)), nn.functional.pad(mask_1T, (0, more))


def _attends(encoder: Any) -> bool:
    config = getattr(getattr(encoder, "backbone", None), "config", None)
    # A backbone with stages (Swin) attends within windows, and has only maps of those.
    return config is None or (hasattr(config, "num_attention_heads") and not hasattr(config, "depths"))


def _pooling(encoder: Any) -> str:
    return "end" if getattr(encoder, "whole_length", 0) else str(getattr(encoder, "pooling", "mean"))


def _read_by_pooled(
    weights_BTT: Tensor | None, query_B1T: Tensor | None, pooling: str, mask_BT: Tensor | None
) -> Tensor | None:
    """(B, T): what the pooled vector read of its side; None for an encoder without attention. A learned query that
    pools is not one of the layers' outputs, but reads them (equation 10)."""
    if weights_BTT is None:
        return None
    return of_pooled(weights_BTT, pooling, mask_BT) if query_B1T is None else (query_B1T @ weights_BTT).squeeze(1)


def _read_by_each_other(counts: Mapping[str, list[Tensor]], num_tokens: int) -> dict[str, Tensor | None]:
    """(1, R) and (1, T): what counted where one side read the other (equation 10), passed on to its inputs."""
    joint = counts.get("joint", [])
    text_reads = counts.get("text_to_image") or [layer[:, :num_tokens, num_tokens:] for layer in joint]
    image_reads = counts.get("image_to_text") or [layer[:, num_tokens:, :num_tokens] for layer in joint]
    parts = {
        "image": [layer_BTR.sum(1) for layer_BTR in text_reads] + [layer_BRT.sum(2) for layer_BRT in image_reads],
        "text": [layer_BTR.sum(2) for layer_BTR in text_reads] + [layer_BRT.sum(1) for layer_BRT in image_reads],
    }
    weights: dict[str, Tensor | None] = {}
    for side, layers in parts.items():
        whole = torch.stack(layers).sum(0) if layers else None
        if whole is not None and counts[side]:
            whole = (whole[:, None] @ self_relevance(counts[side])).squeeze(1)
        weights[side] = whole
    return weights


def _of_tokens(encoder: Any, weights_1T: Tensor | None, num_tokens: int) -> Tensor | None:
    """(1, T): a token of a document that is read in windows has the weight of its window."""
    if weights_1T is None or not isinstance(encoder, WindowEncoder):
        return weights_1T
    return weights_1T[:, (torch.arange(num_tokens) - 1).clamp(min=0) // encoder.fresh_tokens]


def _grid(weights_1R: Tensor, loaded: LoadedModel) -> list[list[float]] | None:
    """The regions as a square; class and register tokens, which come first, are left out."""
    regions = weights_1R.shape[1]
    patch = getattr(getattr(loaded.model.image, "backbone", None), "config", None)
    patch = getattr(patch, "patch_size", None)
    side = loaded.config.image_pixels // patch if isinstance(patch, int) else math.isqrt(regions)
    return _scaled(weights_1R[0, regions - side**2 :].view(side, side)) if side > 1 else None


def _saliency(gradient_13SS: Tensor) -> list[list[float]] | None:
    strongest = gradient_13SS.abs().amax(1, keepdim=True)
    return _scaled(torch.nn.functional.adaptive_avg_pool2d(strongest, SALIENCY_CELLS)[0, 0])


def _scaled(weights: Tensor) -> list[list[float]] | None:
    most = float(weights.max())
    if not math.isfinite(most) or most <= 0:
        return None
    return [[round(float(weight) / most, 3) for weight in row] for row in weights.clamp(min=0)]


def _pieces(loaded: LoadedModel, text: str, weights_1T: Tensor | None) -> list[tuple[str, float]]:
    encoding = loaded.tokenizer.encode(text)
    spans = encoding.offsets[: loaded.config.max_tokens]
    weights = [0.0] * len(spans) if weights_1T is None else weights_1T[0].tolist()
    # Special tokens take most of the attention, and say nothing.
    pieces, before = list[tuple[str, float]](), 0
    for (start, end), weight, special in zip(spans, weights, encoding.special_tokens_mask, strict=False):
        if end > start and not special:
            pieces.append((text[before:end], weight))  # with the space before it
            before = end
    most = max((weight for _, weight in pieces), default=0.0)
    if not math.isfinite(most) or most <= 0:
        return [(piece, 0.0) for piece, _ in pieces]
    return [(piece, round(max(0.0, weight) / most, 3)) for piece, weight in pieces]
