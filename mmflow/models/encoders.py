"""Encoders with one signature: images, clips or token ids in, a sequence of vectors and one pooled vector out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mmflow.core.errors import RecipeError
from mmflow.models.attention import AttentionPooling, Blocks, pool_by_probe, pool_eos, pool_last, pool_mean
from mmflow.models.backbones import freeze
from mmflow.models.config import EncoderConfig, ImageEncoderConfig, TextEncoderConfig, WindowsConfig

# Shapes: B batch, T tokens or regions, R regions, W width, H and S height and width in pixels. In patch dropout: N
# patches, K kept patches. In windows: N windows, C tokens of a window, D documents that have a given window.


# Where `transformers` applies the last norm after pooling, and returns the sequence as the last layer left it.
_NORM_OF_SEQUENCE = {"clip_vision_model": "post_layernorm", "convnext": "layernorm", "convnextv2": "layernorm"}


class Encoded(NamedTuple):
    """What an encoder gives: a vector for every token or region, and one for the whole."""

    sequence_BTW: Tensor
    pooled_BW: Tensor
    mask_BT: Tensor | None = None
    """True where a token is real; None if all are."""
    attentions: tuple[Tensor, ...] | None = None
    """Weights of each layer (B, heads, T, T), if requested and the backbone attends."""
    pooling_BH1T: Tensor | None = None
    """Weights of the learned query that pools the sequence, if requested and there is one."""

    def blanked(self) -> tuple[Tensor, Tensor, Tensor]:
        """The sequence with zeros where the mask is False, the pooled vector with zeros for rows that are all masked,
        and the mask (B, T).

        Masking the keys of attention is not enough: a masked token is also a query, and fusions pool a row's first
        token. Filled and not multiplied, because 0 · NaN is NaN.
        """
        mask_BT = self.mask_BT
        if mask_BT is None:
            mask_BT = torch.ones(self.sequence_BTW.shape[:2], dtype=torch.bool, device=self.sequence_BTW.device)
        sequence_BTW = self.sequence_BTW.masked_fill(~mask_BT[..., None], 0.0)
        return sequence_BTW, self.pooled_BW.masked_fill(~mask_BT.any(1, keepdim=True), 0.0), mask_BT


class Fused(NamedTuple):
    """Image and text after they read each other; None for what no head of the model reads."""

    text_BTW: Tensor | None
    image_BRW: Tensor | None
    pooled_BW: Tensor | None
    attentions: Mapping[str, tuple[Tensor, ...]] | None
    """On request, a map per layer: text_to_image (B, H, T, R), image_to_text (B, H, R, T), and for a single stream
    joint (B, H, T+R, T+R), text first. A row that reads is a distribution over what it reads; 0 if it reads nothing."""


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
            if not backbone.supports_gradient_checkpointing:
                model_type = backbone.config.model_type
                raise RecipeError(
                    f"{key}.activation_checkpointing: transformers has none for {model_type}; turn it off"
                )
            backbone.activation_checkpointing_enable({"use_reentrant": False})
        self.train()

    def train(self, mode: bool = True) -> Encoder:
        """Training mode, except for frozen modules: their running statistics stay and their dropout is off."""
        super().train(mode)
        for module in self._frozen:
            module.eval()
        return self

    def freeze_statistics(self) -> None:
        """Stop batch norms without trained parameters from updating their running statistics."""
        norms = (module for module in self.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm))
        self._frozen += [norm for norm in norms if not any(weight.requires_grad for weight in norm.parameters())]
        self.train(self.training)

    @contextmanager
    def _maps(self, wanted: bool) -> Iterator[dict[str, bool]]:
        # SDPA gives no attention maps, so this one call runs eager attention.
        if not wanted:
            yield {}
            return
        implementation = self.backbone.config._attn_implementation
        self.backbone.set_attn_implementation("eager")
        try:
            yield {"output_attentions": True}
        finally:
            self.backbone.set_attn_implementation(implementation)


class ImageEncoder(Encoder):
    """Pictures to regions: a ViT's class token and patches, or the places of a feature map."""

    def __init__(self, key: str, config: ImageEncoderConfig, backbone: Any, image_pixels: int) -> None:
        num_regions, width, has_pooler = _probe(key, backbone, image_pixels)
        if config.pooling == "pooler" and not has_pooler:
            raise _no_pooler(key, backbone)
        super().__init__(key, config, config.pooling, backbone, width)
        self.patch_dropout = None
        if config.patch_dropout:
            patch_size = getattr(backbone.config, "patch_size", None)
            num_patches = (image_pixels // patch_size) ** 2 if isinstance(patch_size, int) else 0
            self.patch_dropout = PatchDropout(config.patch_dropout, num_regions - num_patches)
            self.patch_dropout.attach(key, backbone, image_pixels, num_regions)

    def forward(self, inputs: Tensor, mask: Tensor | None = None, *, attentions: bool = False) -> Encoded:
        """Encode normalised pictures (B, 3, H, S) of float. `mask` is for clips, which `VideoEncoder` reads: None here.

        With patch dropout, a training step's sequence holds only the kept patches.
        """
        with self._maps(attentions) as options:
            output = self.backbone(inputs, **options)
        sequence_BTW = _as_sequence(output.last_hidden_state)
        if norm := _NORM_OF_SEQUENCE.get(self.backbone.config.model_type):
            sequence_BTW = getattr(self.backbone, norm)(sequence_BTW)
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


class PatchDropout(nn.Module):
    """Leaves random patches out after a ViT's embeddings, in training only (FLIP, arXiv 2212.00794). Tokens before the
    patches (the class token) stay.

    A module of its own, so that it follows the encoder's mode and not that of the embeddings, which may be frozen.
    """

    def __init__(self, share: float, prefix_tokens: int) -> None:
        super().__init__()
        self.share = share
        self.prefix_tokens = prefix_tokens

    def attach(self, key: str, backbone: Any, image_pixels: int, num_regions: int) -> None:
        """Follow the backbone's embeddings. Raises RecipeError naming `key` for one without patches to leave out."""
        refusal = RecipeError(
            f"{key}.patch_dropout: {backbone.config.model_type} has no patches that can be left out; set it to 0"
        )
        embeddings = getattr(backbone, "embeddings", None)
        if not isinstance(embeddings, nn.Module) or not 0 <= self.prefix_tokens < num_regions:
            raise refusal
        embeddings.register_forward_hook(self.after)
        try:
            num_left, _, _ = _probe(key, backbone, image_pixels)
        except (RecipeError, IndexError) as error:  # its positions are relative to the whole grid
            raise refusal from error
        if num_left >= num_regions:
            raise refusal

    def after(self, embeddings: nn.Module, inputs: Any, tokens_BTW: Tensor) -> Tensor | None:
        """Forward hook of the embeddings; a bound method, so that a copied model's hook follows the copy's mode."""
        return self(tokens_BTW) if self.training else None

    def forward(self, tokens_BTW: Tensor) -> Tensor:
        """(B, prefix + K, W) with K = N (1 - share), at least one, in their order, drawn separately for each picture
        from torch's generator on the tokens' device."""
        batch_size, num_tokens, width = tokens_BTW.shape
        num_patches = num_tokens - self.prefix_tokens
        num_kept = max(1, int(num_patches * (1 - self.share)))
        draws_BN = torch.rand(batch_size, num_patches, device=tokens_BTW.device)
        places_BK = draws_BN.topk(num_kept, dim=1).indices.sort(dim=1).values + self.prefix_tokens
        kept_BKW = tokens_BTW.gather(1, places_BK.unsqueeze(-1).expand(-1, -1, width))
        return torch.cat([tokens_BTW[:, : self.prefix_tokens], kept_BKW], dim=1)


class TextEncoder(Encoder):
    """Token ids to vectors."""

    def __init__(self, key: str, config: TextEncoderConfig, backbone: Any) -> None:
        super().__init__(key, config, config.pooling, backbone, int(backbone.config.hidden_size))
        settings = backbone.config
        self.padding = int(getattr(settings, "pad_token_id", None) or 0)
        self.eos: int | None = getattr(settings, "eos_token_id", None)
        self.whole_length = 0
        if settings.model_type == "clip_text_model":
            # Checkpoints from before transformers#24773 state 2, a word; their closing token is the last one.
            self.eos = None if self.eos == 2 else self.eos
            self.pooling = "eos" if self.pooling == "pooler" else self.pooling
        elif settings.model_type == "siglip_text_model" and self.pooling == "pooler":
            # It was trained without a mask on text padded to the whole length, and pools at the last place.
            self.whole_length = int(settings.max_position_embeddings)
            if settings.projection_size != self.width:
                raise RecipeError(
                    f"{key}.options.projection_size: {settings.projection_size} is not hidden_size, {self.width}; the "
                    "pooled vector is as wide as the tokens"
                )
        elif self.pooling == "pooler" and getattr(backbone, "pooler", None) is None:
            raise _no_pooler(key, backbone)

    def forward(self, inputs: Tensor, mask: Tensor | None = None, *, attentions: bool = False) -> Encoded:
        """Encode token ids (B, T) of int64; `mask` (B, T) is 1 or True for real tokens, None if all are real."""
        ids_BT, mask_BT = inputs, torch.ones_like(inputs, dtype=torch.bool) if mask is None else mask.bool()
        num_tokens = ids_BT.shape[1]
        # RoBERTa counts positions by the ids that are not padding, whatever the mask says.
        ids_BT = ids_BT.masked_fill(~mask_BT, self.padding)
        if self.whole_length:
            ids_BT = nn.functional.pad(ids_BT, (0, self.whole_length - num_tokens), value=self.padding)
        with self._maps(attentions) as options:
            output = self.backbone(ids_BT, attention_mask=None if self.whole_length else mask_BT, **options)
        sequence_BTW = output.last_hidden_state[:, :num_tokens]
        maps = None
        if attentions:
            # Only cut where needed: a slice of a map is not on the way to the output and gets no gradient.
            is_whole = ids_BT.shape[1] == num_tokens
            maps = tuple(
                map_BHTT if is_whole else map_BHTT[..., :num_tokens, :num_tokens] for map_BHTT in output.attentions
            )
        weights_BH1T = None
        if self.attention_pooling is not None:
            pooled_BW, weights_BH1T = self.attention_pooling(sequence_BTW, mask_BT, maps=attentions)
        elif self.pooling == "pooler":
            pooled_BW = output.pooler_output.flatten(1)
        elif self.pooling == "first":
            pooled_BW = sequence_BTW[:, 0]
        elif self.pooling == "last":
            pooled_BW = pool_last(sequence_BTW, mask_BT)
        elif self.pooling == "eos":
            pooled_BW = pool_eos(sequence_BTW, mask_BT, inputs, self.eos)
        else:
            pooled_BW = pool_mean(sequence_BTW, mask_BT)
        return Encoded(sequence_BTW, pooled_BW, mask_BT, maps, weights_BH1T)


class WindowEncoder(nn.Module):
    """Documents of thousands of tokens: a text encoder reads each window, a small transformer reads the windows'
    vectors (HIBERT, arXiv 1905.06566, section 3.1; ToBERT, arXiv 1910.10781, section 3.3).

    A window is the document's opening token and the next C - 1 tokens. Windows are read one after the other, and in
    training each is recomputed in the backward pass. So memory holds one window of the batch and a vector per window,
    however long the documents are.
    """

    def __init__(self, key: str, encoder: TextEncoder, config: WindowsConfig, max_tokens: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.width = encoder.width
        self.fresh_tokens = config.tokens - 1
        self.num_windows = max(1, -(-(max_tokens - 1) // self.fresh_tokens))
        self.windows = Blocks(f"{key}.windows", config, self.width, self.num_windows)

    def forward(self, inputs: Tensor, mask: Tensor | None = None, *, attentions: bool = False) -> Encoded:
        """Token ids (B, T) to one vector per window: sequence (B, N, W), its mean, the mask of windows (B, N), and on
        request the weights of each layer among windows (B, heads, N, N). N follows from `max_tokens`, not the batch.

        The encoder is called N times, also for windows that no document has (then with a single token): ZeRO-3 gathers
        weights in each call, so ranks with documents of different lengths must make the same calls.
        """
        mask_BT = torch.ones_like(inputs, dtype=torch.bool) if mask is None else mask.bool()
        windows = [self._window(inputs, mask_BT, number) for number in range(self.num_windows)]
        vectors_BNW = torch.stack([vector_BW for vector_BW, _ in windows], 1)
        mask_BN = torch.stack([has_B for _, has_B in windows], 1)
        sequence_BNW, weights = self.windows(vectors_BNW, mask_BN, maps=attentions)
        return Encoded(sequence_BNW, pool_mean(sequence_BNW, mask_BN), mask_BN, weights)

    def _window(self, ids_BT: Tensor, mask_BT: Tensor, number: int) -> tuple[Tensor, Tensor]:
        start = 1 + number * self.fresh_tokens
        ids_BC = torch.cat([ids_BT[:, :1], ids_BT[:, start : start + self.fresh_tokens]], 1)
        mask_BC = torch.cat([torch.ones_like(mask_BT[:, :1]), mask_BT[:, start : start + self.fresh_tokens]], 1)
        # A document without tokens gets the first window too: every row must have something to attend to.
        has_B = mask_BC[:, 1:].any(1) if number else torch.ones_like(mask_BT[:, 0])
        rows_D = has_B.nonzero()[:, 0]
        if len(rows_D):
            longest = int(mask_BC[rows_D].any(0).nonzero().max()) + 1
            ids_DC, mask_DC = ids_BC[rows_D, :longest], mask_BC[rows_D, :longest]
        else:
            rows_D = has_B.new_zeros(1, dtype=torch.int64)
            ids_DC, mask_DC = ids_BC[:1, :1], mask_BC[:1, :1]
        if torch.is_grad_enabled():
            read_DW = checkpoint(self._read, ids_DC, mask_DC, use_reentrant=False)
        else:
            read_DW = self._read(ids_DC, mask_DC)
        return read_DW.new_zeros(len(ids_BT), self.width).index_copy(0, rows_D, read_DW), has_B

    def _read(self, ids_DC: Tensor, mask_DC: Tensor) -> Tensor:
        pooled_DW: Tensor = self.encoder(ids_DC, mask_DC).pooled_BW
        return pooled_DW


TextTower = TextEncoder | WindowEncoder


def parameter_count(module: nn.Module) -> int:
    """The number of scalars in a module's parameters, also under ZeRO-3, where no rank holds all of them."""
    return sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in module.parameters())


def _probe(key: str, backbone: Any, image_pixels: int) -> tuple[int, int, bool]:
    """The number of regions of a picture, their width, and whether there is a pooler. Runs on tensors without storage,
    which costs neither arithmetic nor a second copy of the weights."""
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


def _no_pooler(key: str, backbone: Any) -> RecipeError:
    return RecipeError(f"{key}.pooling: {backbone.config.model_type} has no pooler of its own; use mean or first")


def _as_sequence(hidden: Tensor) -> Tensor:
    # Convolutional backbones give a map (B, W, h, w).
    return hidden.flatten(2).transpose(1, 2) if hidden.dim() == 4 else hidden
