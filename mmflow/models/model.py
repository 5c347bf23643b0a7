"""The composed model: encoders, the shared space, a fusion, heads and a decoder, as the recipe names them.

A dual encoder (CLIP, arXiv 2103.00020) is the smallest; with a fusion on top it aligns before it fuses (ALBEF, arXiv
2107.07651). Each part is a module that is called through its forward, so that ZeRO-3 gathers its parameters in time.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from mmflow.core.errors import MisuseError, RecipeError
from mmflow.loading.tokens import special_tokens
from mmflow.models.backbones import OWN_IDS, depths, encoder_config, load_backbone
from mmflow.models.config import HEADS, ImageEncoderConfig, ModelConfig, TextEncoderConfig, VideoConfig
from mmflow.models.decoder import Cache, Decoder, decoder_tokens
from mmflow.models.encoders import Encoded, Encoder, Fused, ImageEncoder, TextEncoder, TextTower, WindowEncoder
from mmflow.models.fusion import Fusion, build_fusion
from mmflow.models.heads import build_head
from mmflow.models.pretrained import num_positions, stretch_text
from mmflow.models.video import ImageTower, TightSimilarity, VideoEncoder

# Shapes: B batch, A captions, T tokens, R regions, W width, H and S height and width in pixels, E the width of the
# shared space.

MAX_LOGIT_SCALE = math.log(100)  # as CLIP clamps it: a sharper temperature makes the loss unstable


class Scale(NamedTuple):
    """logits = logit_scale · cosine + logit_bias; both (1,), fp32."""

    logit_scale: Tensor
    logit_bias: Tensor | None


class LogitScale(nn.Module):
    """CLIP's learned temperature (arXiv 2103.00020, section 2.3) and, for SigLIP (arXiv 2303.15343, section 3.2), its
    learned bias.

    A module of its own, because ZeRO-3 gathers parameters for the forward of the module that owns them. The parameters
    have shape (1,), not (): ZeRO cannot partition a scalar.
    """

    def __init__(self, temperature: float, bias: float | None = None) -> None:
        super().__init__()
        self.logit_scale = nn.Parameter(torch.full((1,), math.log(1 / temperature)))
        self.logit_bias = None if bias is None else nn.Parameter(torch.full((1,), bias))

    def forward(self) -> Scale:
        """The scale, and the bias if there is one. Without a bias the scale is at most 100; SigLIP has no such limit,
        and the models released with it reach 118."""
        if self.logit_bias is not None:
            # A sum, because ZeRO-3 frees the parameter itself after the forward.
            return Scale(self.logit_scale.exp(), self.logit_bias + 0.0)
        # The clamped value with the raw one's gradient: a plain clamp has no gradient above its bound, so a scale that
        # passed it would never come back.
        excess = (self.logit_scale - MAX_LOGIT_SCALE).clamp(min=0).detach()
        return Scale((self.logit_scale - excess).exp(), None)


class Model(nn.Module):
    """What is trained. `image` always exists; parts that the recipe does not name are None or empty."""

    def __init__(self, image: ImageTower, text: TextTower | None, config: ModelConfig) -> None:
        super().__init__()
        self.gives = config.gives
        self.image = image
        self.text = text
        self.embedding_width = width = config.embedding_width
        self.image_projection: nn.Linear | None = None
        self.text_projection: nn.Linear | None = None
        self.scale: LogitScale | None = None
        if text is not None and width is not None and "embeddings" in self.gives:
            self.image_projection = nn.Linear(image.width, width, bias=False)
            self.text_projection = nn.Linear(text.width, width, bias=False)
            self.scale = LogitScale(config.temperature, config.bias)
        self.similarity: TightSimilarity | None = None
        self.fusion: Fusion | None = None
        self.heads = nn.ModuleDict()
        self.decoder: Decoder | None = None

    def encode_image(self, pixels: Tensor, frame_mask_BF: Tensor | None = None, *, attentions: bool = False) -> Encoded:
        """Normalised pictures (B, 3, H, S), or clips (B, F, 3, H, S) with the mask of their frames (B, F)."""
        encoded: Encoded = self.image(pixels, frame_mask_BF, attentions=attentions)
        return encoded

    def encode_text(self, token_ids_BT: Tensor, token_mask_BT: Tensor, *, attentions: bool = False) -> Encoded:
        """Token ids and their mask, 1 or True for real tokens."""
        encoded: Encoded = _require(self.text, "text encoder")(token_ids_BT, token_mask_BT, attentions=attentions)
        return encoded

    def embed_image(self, image: Encoded) -> Tensor:
        """(B, E) of unit length, fp32."""
        return _unit(_require(self.image_projection, "shared space")(image.pooled_BW))

    def embed_text(self, text: Encoded) -> Tensor:
        """(B, E) of unit length, fp32."""
        return _unit(_require(self.text_projection, "shared space")(text.pooled_BW))

    def score_pairs(self, captions_AW: Tensor, clips: Encoded) -> Tensor:
        """(A, B): the score of each caption's pooled vector with each clip, one forward pass a pair."""
        similarity = _require(self.similarity, "tight similarity")
        scores_AB: Tensor = similarity(captions_AW, clips.sequence_BTW, clips.mask_BT)
        return scores_AB

    def fuse(self, image: Encoded, text: Encoded | None, *, attentions: bool = False) -> Fused:
        """Image and text after they read each other; without a fusion as the encoders gave them, with the pooled vector
        of the image. Raises MisuseError for a fusion without text."""
        if self.fusion is None:
            return Fused(None if text is None else text.sequence_BTW, image.sequence_BTW, image.pooled_BW, None)
        if text is None:
            raise MisuseError("model.fusion: it reads text with each picture, but there is none; give captions")
        fused: Fused = self.fusion(image, text, attentions=attentions)
        return fused

    def matching_logits(self, fused: Fused) -> Tensor:
        """(B, 2): not a pair, a pair."""
        return self._head("matching", fused.pooled_BW)

    def masked_language_logits(self, fused: Fused) -> Tensor:
        """(B, T, vocabulary)."""
        return self._head("masked_language", fused.text_BTW)

    def masked_image_pixels(self, fused: Fused) -> Tensor:
        """(B, patches, 3 · side²) in the order of `heads.patches`, with the `side` of `heads["masked_image"]`."""
        return self._head("masked_image", fused.image_BRW)

    def class_logits(self, fused: Fused) -> Tensor:
        """(B, classes)."""
        return self._head("classes", fused.pooled_BW)

    def _head(self, name: str, vectors: Tensor | None) -> Tensor:
        output: Tensor = _require(dict(self.heads).get(name), f"head {name}")(vectors)
        return output

    def memory(self, image: Encoded, text: Encoded | None = None) -> Encoded:
        """What the decoder reads: the image, or a question's tokens after they read the image. Raises MisuseError if a
        question is given to a decoder that reads none, or missing for one that does."""
        if ("decoded from the question" in self.gives) == (text is None):
            problem = "fused, but there is no question" if text is None else "image, but there is a question"
            raise MisuseError(f"model.decoder.memory: {problem}; evaluate the model on what it was trained for")
        if text is None:
            return image
        sequence_BTW = self.fuse(image, text).text_BTW
        assert sequence_BTW is not None  # `build` lets the decoder read it
        return text._replace(sequence_BTW=sequence_BTW)

    def decode(self, memory: Encoded, token_ids_BT: Tensor, cache: Cache | None = None) -> Tensor:
        """Logits (B, T, vocabulary) of the token after each of `token_ids_BT`, which are only padded on the right."""
        decoder = _require(self.decoder, "decoder")
        logits: Tensor = decoder(token_ids_BT, memory.sequence_BTW, memory.mask_BT, cache)
        return logits

    def forward(self, pixels: Tensor, token_ids_BT: Tensor, token_mask_BT: Tensor) -> dict[str, Tensor]:
        """The shared space: `image_embedding` and `text_embedding` (B, E), `logit_scale` (1,) and, if there is one,
        `logit_bias` (1,)."""
        outputs = {
            "image_embedding": self.embed_image(self.encode_image(pixels)),
            "text_embedding": self.embed_text(self.encode_text(token_ids_BT, token_mask_BT)),
        }
        scale: Scale = _require(self.scale, "shared space")()
        return outputs | {name: value for name, value in scale._asdict().items() if value is not None}


def _require(part: nn.Module | None, name: str) -> nn.Module:
    if part is None:
        raise MisuseError(f"the model has no {name}; name it in the recipe's model section and train one that has it")
    return part


def _unit(rows_BE: Tensor) -> Tensor:
    # fp32 from here on, losses included: a bf16 cosine has three digits, and the logit scale multiplies its error.
    return nn.functional.normalize(rows_BE.float(), dim=-1)


def build(key: str, config: ModelConfig, vocabulary_size: int, seed: int, num_classes: int = 0) -> Model:
    """A model with fresh weights, the same for the same seed. `key` is the recipe's key, for errors.

    `vocabulary_size` is the tokenizer's, `num_classes` the number of labels or answers for the head `classes`. Raises
    RecipeError naming the key.
    """
    # Encoders and projections come first and in this order, so that a dual encoder's weights do not depend on the
    # model's other parts.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        image = build_image_encoder(f"{key}.image", config.image, config.image_pixels, config.video)
        text = None
        if config.text is not None:
            text = build_text_encoder(f"{key}.text", config.text, vocabulary_size, config.max_tokens)
        model = Model(image, text, config)
        if config.tight and config.video and config.embedding_width and text is not None:
            model.similarity = TightSimilarity(
                f"{key}.video", config.video, config.embedding_width, image_width=image.width, text_width=text.width
            )
        decodes_fused = "decoded from the question" in model.gives
        if config.fusion is not None and text is not None:
            reads = {HEADS[head].reads for head in config.heads} | ({"text"} if decodes_fused else set())
            model.fusion = build_fusion(f"{key}.fusion", config.fusion, image.width, text.width, frozenset(reads))
        for name in config.heads:
            model.heads[name] = build_head(f"{key}.heads", name, config, image, text, vocabulary_size, num_classes)
        if config.decoder is not None:
            width = config.fusion.width if config.fusion and decodes_fused else image.width
            model.decoder = Decoder(
                config.decoder, memory_width=width, vocabulary_size=vocabulary_size, max_tokens=config.max_tokens
            )
        return model


def build_image_encoder(
    key: str, config: ImageEncoderConfig, image_pixels: int, video: VideoConfig | None = None
) -> ImageTower:
    """An encoder of square pictures of `image_pixels`, or of clips of such frames. `key` is the recipe's, for errors.

    Raises RecipeError as `load_backbone` does, for pictures smaller than a patch, for layers that cannot be frozen or
    recomputed, and for patches that cannot be left out.
    """
    encoder = ImageEncoder(key, config, load_backbone(key, config, image_pixels=image_pixels), image_pixels)
    return encoder if video is None else VideoEncoder(f"{key.rpartition('.')[0]}.video", encoder, video)


def build_text_encoder(key: str, config: TextEncoderConfig, vocabulary_size: int, max_tokens: int) -> TextTower:
    """An encoder of token ids below `vocabulary_size`, at most `max_tokens` per text. `key` is the recipe's.

    Raises RecipeError as `load_backbone` does, and for more tokens than positions.
    """
    backbone = load_backbone(key, config, vocabulary_size=vocabulary_size)
    if config.positions is not None:
        stretch_text(f"{key}.positions", backbone, config.positions.keep, config.positions.stretch)
    num_tokens, setting = max_tokens, f"{key.rpartition('.')[0]}.max_tokens"
    if config.windows is not None and config.windows.tokens < max_tokens:
        num_tokens, setting = config.windows.tokens, f"{key}.windows.tokens"
    limit = num_positions(backbone)
    if limit is not None and num_tokens > limit:
        raise RecipeError(
            f"{setting}: {num_tokens} tokens, but {backbone.config.model_type} has {limit} positions; use fewer, raise "
            f"{key}.options.max_position_embeddings for fresh weights, or stretch trained ones with {key}.positions"
        )
    encoder = TextEncoder(key, config, backbone)
    return encoder if config.windows is None else WindowEncoder(key, encoder, config.windows, max_tokens)


def with_special_tokens(key: str, config: ModelConfig, tokenizer: Tokenizer) -> ModelConfig:
    """The settings with the tokenizer's ids of padding and the closing token as options of a fresh text encoder, unless
    the recipe sets them or they are those of mmflow's own tokenizer.

    A student has its teacher's tokenizer, which may come from a checkpoint: RoBERTa counts positions by the id of
    padding, CLIP pools at that of the closing token. Raises RecipeError as `decoder_tokens` if there is a decoder.
    """
    if config.decoder is not None:
        decoder_tokens(key, tokenizer)
    text = config.text
    if text is None or text.checkpoint is not None:
        return config
    special = special_tokens(tokenizer)
    ids = {"pad_token_id": special.pad, "eos_token_id": special.last}
    known = encoder_config(f"{key}.text", text).to_dict()
    options = {name: token for name, token in ids.items() if name in known and token != OWN_IDS[name]}
    if not options.keys() - text.options.keys():
        return config
    return config.model_copy(update={"text": text.model_copy(update={"options": {**options, **text.options}})})


def learning_rate_factors(module: nn.Module) -> dict[str, float]:
    """Layer-wise learning-rate decay (ELECTRA, arXiv 2003.10555, appendix A; BEiT): the factor of each parameter's
    learning rate, by its name in `module`; 1 for names that are missing.

    In a backbone of L layers it is `layer_decay` ** (L + 1 - depth), with depth 0 for the embeddings, 1 … L for the
    layers and L + 1 for what follows. Everything else (projections, fusion, heads) learns at the full rate.
    """
    factors: dict[str, float] = {}
    for name, part in module.named_modules():
        if isinstance(part, Encoder) and part.layer_decay != 1:
            prefix = f"{name}.backbone." if name else "backbone."
            depth_of, deepest = depths(f"{name or 'encoder'}.layer_decay", part.backbone)
            factors |= {prefix + weight: part.layer_decay ** (deepest - depth) for weight, depth in depth_of.items()}
    return {name: factor for name, factor in factors.items() if factor != 1}
