"""Encoders behind one signature: pictures, clips or token ids to a sequence of vectors and one pooled vector."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mmflow.core.errors import RecipeError
from mmflow.models.config import EncoderConfig, ImageEncoderConfig, TextEncoderConfig
from mmflow.models.depth import freeze
from mmflow.models.patch_dropout import PatchDropout
from mmflow.models.pooling import AttentionPooling, pool_by_probe, pool_eos, pool_last, pool_mean

# Shapes: B batch, T tokens or regions, W the encoder's width, H and S height and width of a picture in pixels.


class Encoded(NamedTuple):
    """What an encoder gives: every token or region, and one vector for the whole."""

    sequence_BTW: Tensor
    pooled_BW: Tensor
    mask_BT: Tensor | None = None
    """True where a token is real; None where all are."""
    attentions: tuple[Tensor, ...] | None = None
    """Each layer's weights (B, heads, T, T), where they were asked for and the backbone attends."""
    pooling_BH1T: Tensor | None = None
    """The weights of the learned query that pools the sequence, where they were asked for and one does."""


class Encoder(nn.Module):
    """A backbone of `transformers` and the pooling of its output."""

    def __init__(self, key: str, config: EncoderConfig, pooling: str, backbone: Any, width: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.width = width
        self.pooling = pooling
        self.layer_decay = config.layer_decay
        self.attention_pooling = AttentionPooling(width) if pooling == "attention" else None
        self._frozen = freeze(f"{key}.frozen_layers", backbone, config.frozen_layers)
        if config.activation_checkpointing:
            _checkpoint_activations(key, backbone)
        self.train()

    def train(self, mode: bool = True) -> Encoder:
        """Training mode but for what is frozen, whose norms count no more and whose dropout leaves nothing out."""
        super().train(mode)
        for module in self._frozen:
            module.eval()
        return self

    def freeze_statistics(self) -> None:
        """Have norms of which nothing is trained leave their running statistics as they are."""
        norms = (each for each in self.modules() if isinstance(each, nn.modules.batchnorm._BatchNorm))
        self._frozen += [norm for norm in norms if not any(each.requires_grad for each in norm.parameters())]
        self.train(self.training)

    @contextmanager
    def _maps(self, asked: bool) -> Iterator[dict[str, bool]]:
        # SDPA gives no maps, so eager for this one call.
        if not asked:
            yield {}
            return
        usual = self.backbone.config._attn_implementation
        self.backbone.set_attn_implementation("eager")
        try:
            yield {"output_attentions": True}
        finally:
            self.backbone.set_attn_implementation(usual)


class ImageEncoder(Encoder):
    """Pictures to regions: patches behind what a ViT puts before them (the class token), or places of a map."""

    def __init__(self, key: str, config: ImageEncoderConfig, backbone: Any, image_pixels: int) -> None:
        num_regions, width, has_pooler = _probe(key, backbone, image_pixels)
        if config.pooling == "pooler" and not has_pooler:
            raise _no_pooler(key, backbone)
        super().__init__(key, config, config.pooling, backbone, width)
        self.patch_dropout = None
        if config.patch_dropout:
            num_patches = (image_pixels // backbone.config.patch_size) ** 2 if _is_patched(backbone) else 0
            self.patch_dropout = PatchDropout(config.patch_dropout, num_regions - num_patches)
            _drop_patches(key, backbone, self.patch_dropout, image_pixels, num_regions)

    def forward(self, inputs: Tensor, mask: Tensor | None = None, *, attentions: bool = False) -> Encoded:
        """Encode normalised pictures (B, 3, H, S) of float. `mask` is for clips, which `VideoEncoder` reads: None here.

        With patch dropout a training step's sequence holds the kept patches alone.
        """
        with self._maps(attentions) as asked:
            output = self.backbone(inputs, **asked)
        sequence_BTW = _normed_sequence(self.backbone, output.last_hidden_state)
        weights_BH1T = None
        if self.attention_pooling is not None:
            pooled_BW, weights_BH1T = self.attention_pooling(sequence_BTW, None, maps=attentions)
        elif self.pooling == "pooler" and attentions and self.backbone.config.model_type == "siglip_vision_model":
            pooled_BW, weights_BH1T = pool_by_probe(self.backbone.head, sequence_BTW)
        elif self.pooling == "pooler":
            pooled_BW = output.pooler_output.flatten(1)
        else:
            pooled_BW = sequence_BTW[:, 0] if self.pooling == "first" else sequence_BTW.mean(1)
        return Encoded(sequence_BTW, pooled_BW, None, output.get("attentions") if attentions else None, weights_BH1T)


class TextEncoder(Encoder):
    """Token ids to vectors."""

    def __init__(self, key: str, config: TextEncoderConfig, backbone: Any) -> None:
        super().__init__(key, config, config.pooling, backbone, int(backbone.config.hidden_size))
        settings = backbone.config
        self.padding = int(getattr(settings, "pad_token_id", None) or 0)
        self.eos: int | None = getattr(settings, "eos_token_id", None)
        self.whole_length = 0
        if settings.model_type == "clip_text_model":
            # Checkpoints from before transformers#24773 state 2, a word, where the closing token is the last.
            self.eos = None if self.eos == 2 else self.eos
            self.pooling = "eos" if self.pooling == "pooler" else self.pooling
        elif settings.model_type == "siglip_text_model" and self.pooling == "pooler":
            # It was trained on text padded to the whole length and read without a mask, pooled at the last place.
            self.whole_length = int(settings.max_position_embeddings)
            if settings.projection_size != self.width:
                raise RecipeError(
                    f"{key}.options.projection_size: {settings.projection_size} is not hidden_size, {self.width}; the "
                    "pooled vector is as wide as the tokens"
                )
        elif self.pooling == "pooler" and getattr(backbone, "pooler", None) is None:
            raise _no_pooler(key, backbone)

    def forward(self, inputs: Tensor, mask: Tensor | None = None, *, attentions: bool = False) -> Encoded:
        """Encode token ids (B, T) of int64; `mask` (B, T) is 1 or True where real, None where all are."""
        ids_BT, mask_BT = inputs, torch.ones_like(inputs, dtype=torch.bool) if mask is None else mask.bool()
        num_tokens = ids_BT.shape[1]
        # RoBERTa counts its positions by the ids that are not padding, whatever the mask says.
        ids_BT = ids_BT.masked_fill(~mask_BT, self.padding)
        if self.whole_length:
            ids_BT = nn.functional.pad(ids_BT, (0, self.whole_length - num_tokens), value=self.padding)
        with self._maps(attentions) as asked:
            output = self.backbone(ids_BT, attention_mask=None if self.whole_length else mask_BT, **asked)
        sequence_BTW = output.last_hidden_state[:, :num_tokens]
        # A slice of a map is not on the way to what is made of it, and would have no gradient: cut where there is need.
        maps = tuple(_cut(each, num_tokens) for each in output.attentions) if attentions else None
        weights_BH1T = None
        if self.attention_pooling is not None:
            pooled_BW, weights_BH1T = self.attention_pooling(sequence_BTW, mask_BT, maps=attentions)
        else:
            pooled_BW = self._pool(sequence_BTW, mask_BT, inputs, output)
        return Encoded(sequence_BTW, pooled_BW, mask_BT, maps, weights_BH1T)

    def _pool(self, sequence_BTW: Tensor, mask_BT: Tensor, ids_BT: Tensor, output: Any) -> Tensor:
        pooled_BW: Tensor
        if self.pooling == "pooler":
            pooled_BW = output.pooler_output.flatten(1)
        elif self.pooling == "first":
            pooled_BW = sequence_BTW[:, 0]
        elif self.pooling == "last":
            pooled_BW = pool_last(sequence_BTW, mask_BT)
        elif self.pooling == "eos":
            pooled_BW = pool_eos(sequence_BTW, mask_BT, ids_BT, self.eos)
        else:
            pooled_BW = pool_mean(sequence_BTW, mask_BT)
        return pooled_BW


def _probe(key: str, backbone: Any, image_pixels: int) -> tuple[int, int, bool]:
    # Regions of a picture, their width, and whether there is a pooler: from tensors without storage, so that neither
    # arithmetic nor a second copy of the weights is spent on it.
    tensors = dict(backbone.named_parameters()) | dict(backbone.named_buffers())
    picture = torch.empty(1, 3, image_pixels, image_pixels, device="meta")
    was_training = backbone.training
    backbone.eval()
    try:
        weightless = {name: tensor.to("meta") for name, tensor in tensors.items()}
        with torch.no_grad():
            output = torch.func.functional_call(backbone, weightless, (picture,))
    except (RuntimeError, ValueError, ZeroDivisionError) as error:
        reason = " ".join(str(error).split())
        raise RecipeError(
            f"{key.rpartition('.')[0]}.image_pixels: {backbone.config.model_type} cannot read pictures of "
            f"{image_pixels} by {image_pixels} pixels ({reason}); raise it, or lower {key}.options.patch_size"
        ) from error
    finally:
        backbone.train(was_training)
    _, num_regions, width = _as_sequence(output.last_hidden_state).shape
    return num_regions, width, output.get("pooler_output") is not None


def _cut(map_BHTT: Tensor, num_tokens: int) -> Tensor:
    return map_BHTT if map_BHTT.shape[-1] == num_tokens else map_BHTT[..., :num_tokens, :num_tokens]


def _no_pooler(key: str, backbone: Any) -> RecipeError:
    return RecipeError(f"{key}.pooling: {backbone.config.model_type} has no pooler of its own; use mean or first")


def _as_sequence(hidden: Tensor) -> Tensor:
    # Convolutional backbones give a map (B, W, h, w).
    return hidden.flatten(2).transpose(1, 2) if hidden.dim() == 4 else hidden


# Where `transformers` puts the last norm behind the pooling, and gives the sequence as the last layer left it.
_NORM_OF_SEQUENCE = {"clip_vision_model": "post_layernorm", "convnext": "layernorm", "convnextv2": "layernorm"}


def _normed_sequence(backbone: Any, hidden: Tensor) -> Tensor:
    norm = _NORM_OF_SEQUENCE.get(backbone.config.model_type)
    sequence_BTW = _as_sequence(hidden)
    return getattr(backbone, norm)(sequence_BTW) if norm else sequence_BTW


def _is_patched(backbone: Any) -> bool:
    return isinstance(getattr(backbone.config, "patch_size", None), int)


def _drop_patches(key: str, backbone: Any, dropout: PatchDropout, image_pixels: int, num_regions: int) -> None:
    refusal = RecipeError(
        f"{key}.patch_dropout: {backbone.config.model_type} has no patches that can be left out; set it to 0"
    )
    embeddings = getattr(backbone, "embeddings", None)
    if not isinstance(embeddings, nn.Module) or dropout.prefix_tokens < 0 or dropout.prefix_tokens >= num_regions:
        raise refusal
    embeddings.register_forward_hook(dropout.after)
    try:
        left, _, _ = _probe(key, backbone, image_pixels)
    except (RecipeError, IndexError) as error:  # positions relative to a whole grid
        raise refusal from error
    if left >= num_regions:
        raise refusal


def _checkpoint_activations(key: str, backbone: Any) -> None:
    if not backbone.supports_gradient_checkpointing:
        model_type = backbone.config.model_type
        raise RecipeError(f"{key}.activation_checkpointing: transformers has none for {model_type}; set it to false")
    backbone.activation_checkpointing_enable({"use_reentrant": False})


def parameter_count(module: nn.Module) -> int:
    """The number of scalars in a module's parameters, of those too that ZeRO-3 has left no rank the whole of."""
    return sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in module.parameters())
