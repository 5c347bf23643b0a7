"""A dual encoder (CLIP, arXiv 2103.00020): image and text meet in one space and are compared by cosine."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from mmflow.models.config import ModelConfig
from mmflow.models.encoders import Encoder, build_encoder

# Shapes: B batch, T tokens, H and S height and width in pixels, E the width of the shared space.

MAX_LOGIT_SCALE = math.log(100)  # CLIP's clamp: a sharper temperature makes the loss unstable


class DualEncoder(nn.Module):
    """Two encoders, a projection each, and a learned temperature."""

    def __init__(self, image: Encoder, text: Encoder, embedding_width: int, temperature: float) -> None:
        super().__init__()
        self.image = image
        self.text = text
        self.image_projection = nn.Linear(image.width, embedding_width, bias=False)
        self.text_projection = nn.Linear(text.width, embedding_width, bias=False)
        # Shape (1,), not (): ZeRO cannot partition a parameter without a dimension.
        self.logit_scale = nn.Parameter(torch.full((1,), math.log(1 / temperature)))

    def forward(self, pixels_B3HS: Tensor, token_ids_BT: Tensor, token_mask_BT: Tensor) -> dict[str, Tensor]:
        """Embeddings of both sides, each (B, E) of unit length, and `logit_scale` (1,), what cosines are scaled by."""
        return {
            "image_embedding": self.embed_images(pixels_B3HS),
            "text_embedding": self.embed_captions(token_ids_BT, token_mask_BT),
            "logit_scale": self._scale().exp(),
        }

    def _scale(self) -> Tensor:
        # The clamped value with the raw one's gradient: a plain clamp has none past its bound, and would never let the
        # scale come back.
        over = (self.logit_scale - MAX_LOGIT_SCALE).clamp(min=0).detach()
        return self.logit_scale - over

    def embed_images(self, pixels_B3HS: Tensor) -> Tensor:
        """(B, E) of unit length, from normalised pictures."""
        return _unit(self.image_projection(self.image(pixels_B3HS).pooled_BW))

    def embed_captions(self, token_ids_BT: Tensor, token_mask_BT: Tensor) -> Tensor:
        """(B, E) of unit length, from token ids and their mask."""
        return _unit(self.text_projection(self.text(token_ids_BT, token_mask_BT).pooled_BW))


def _unit(rows_BE: Tensor) -> Tensor:
    # fp32 from here on, losses included: in bf16 a cosine has three digits, and the logit scale multiplies its error.
    return nn.functional.normalize(rows_BE.float(), dim=-1)


def build_dual_encoder(key: str, config: ModelConfig, vocabulary_size: int, seed: int) -> DualEncoder:
    """A dual encoder with fresh weights, the same for the same seed. `key` is the recipe's key, for errors."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        image = build_encoder(
            f"{key}.image",
            config.image.type,
            config.image.options,
            config.image.pooling,
            image_pixels=config.image_pixels,
        )
        text = build_encoder(
            f"{key}.text", config.text.type, config.text.options, config.text.pooling, vocabulary_size=vocabulary_size
        )
        return DualEncoder(image, text, config.embedding_width, config.temperature)
