"""What is predicted from the fused vectors: whether a pair belongs together, hidden words and patches, the class."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from mmflow.core.errors import RecipeError
from mmflow.models.config import ModelConfig
from mmflow.models.encoders import ImageEncoder, TextEncoder, TextTower
from mmflow.models.fusion import LAYER_NORM_EPS
from mmflow.models.video import ImageTower

# Shapes: B batch, R regions, P patches, S side of a picture, W width, V vocabulary.


class MaskedLanguageHead(nn.Module):
    """E LayerNorm(GELU(A x + a)) + b, with E the text encoder's word embeddings (BERT, arXiv 1810.04805, appendix A;
    tied as in arXiv 1608.05859), or a matrix of its own if the encoder has none.

    The tied parameter belongs to this module and to the encoder, so that ZeRO-3 gathers it for both. It is saved once,
    under the encoder's name.
    """

    def __init__(self, width: int, vocabulary_size: int, embeddings: nn.Module | None) -> None:
        super().__init__()
        tied = embeddings.weight if isinstance(embeddings, nn.Embedding) else None
        num_rows, inner = (vocabulary_size, width) if tied is None else tied.shape
        self.inner = nn.Linear(width, inner)
        self.norm = nn.LayerNorm(inner, eps=LAYER_NORM_EPS)
        self.output = nn.Linear(inner, num_rows)
        nn.init.zeros_(self.output.bias)
        if tied is not None:
            self.output.weight = tied
            self.register_state_dict_post_hook(_omit_tied)  # type: ignore[no-untyped-call]
            self.register_load_state_dict_pre_hook(_supply_tied)  # type: ignore[no-untyped-call]

    def forward(self, x_W: Tensor) -> Tensor:
        """(…, W) → (…, V)."""
        logits: Tensor = self.output(self.norm(nn.functional.gelu(self.inner(x_W))))
        return logits


def _omit_tied(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    state.pop(f"{prefix}output.weight")  # safetensors rejects two names for the same memory


def _supply_tied(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    assert isinstance(module, MaskedLanguageHead)
    state[f"{prefix}output.weight"] = module.output.weight.detach()  # the encoder has loaded it


class MaskedImageHead(nn.Module):
    """The pixels of each patch by one linear layer (SimMIM, arXiv 2111.09886, section 3.3)."""

    def __init__(self, width: int, image_pixels: int, side: int) -> None:
        super().__init__()
        self.side = side
        self.num_patches = (image_pixels // side) ** 2
        self.output = nn.Linear(width, 3 * side**2)

    def forward(self, image_BRW: Tensor) -> Tensor:
        """(B, R, W) → (B, P, 3 · side²), in the order of `patches`. Class and register tokens precede the patches."""
        pixels: Tensor = self.output(image_BRW[:, -self.num_patches :])
        return pixels


def patches(pixels_B3SS: Tensor, side: int) -> Tensor:
    """Pictures cut into patches row by row: (B, P, 3 · side²), each by channel, row and column. Pixels left over at the
    right and bottom edge belong to no patch."""
    rows = pixels_B3SS.shape[-1] // side
    kept = pixels_B3SS[..., : rows * side, : rows * side].reshape(-1, 3, rows, side, rows, side)
    return kept.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def build_head(
    key: str,
    name: str,
    config: ModelConfig,
    image: ImageTower,
    text: TextTower | None,
    vocabulary_size: int,
    num_classes: int,
) -> nn.Module:
    """One head with fresh weights, as wide as its input. Raises RecipeError naming `key`, the recipe's key."""
    if name == "masked_language":
        assert isinstance(text, TextEncoder)  # ModelConfig checks it
        width = config.fusion.width if config.fusion else text.width
        return MaskedLanguageHead(width, vocabulary_size, text.backbone.get_input_embeddings())
    width = config.fusion.width if config.fusion else image.width
    if name == "masked_image":
        assert isinstance(image, ImageEncoder)  # ModelConfig checks it
        return MaskedImageHead(width, config.image_pixels, _patch_side(key, config, image.backbone.config))
    if name == "matching":
        return nn.Linear(width, 2)
    if num_classes < 1:
        raise RecipeError(
            f"{key}: classes needs labels or answers; name loader.label, or read a dataset with questions"
        )
    return nn.Linear(width, num_classes)


def _patch_side(key: str, config: ModelConfig, backbone: Any) -> int:
    side = getattr(backbone, "patch_size", None)
    if not isinstance(side, int) or hasattr(backbone, "depths"):
        raise RecipeError(f"{key}: masked_image needs an encoder with patches, {backbone.model_type} has none; use vit")
    if config.image.patch_dropout:
        raise RecipeError(f"{key}: masked_image needs every patch; set image.patch_dropout to 0")
    return side
