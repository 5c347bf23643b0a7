"""The image and the text side of a model as a recipe asks for them, and their settings without the checkpoint that they
came from."""

from __future__ import annotations

from typing import Any, TypeVar

from mmflow.core.errors import RecipeError
from mmflow.models.backbones import OWN_IDS, load_backbone
from mmflow.models.config import EncoderConfig, ImageEncoderConfig, TextEncoderConfig, VideoConfig
from mmflow.models.encoders import ImageEncoder, TextEncoder
from mmflow.models.hierarchical import HierarchicalEncoder
from mmflow.models.positions import num_positions, stretch_text
from mmflow.models.video import VideoEncoder

ImageTower = ImageEncoder | VideoEncoder
TextTower = TextEncoder | HierarchicalEncoder
Settings = TypeVar("Settings", bound=EncoderConfig)


def build_image_encoder(
    key: str, config: ImageEncoderConfig, image_pixels: int, video: VideoConfig | None = None
) -> ImageTower:
    """An encoder of square pictures of `image_pixels`, or of clips of such frames. `key` is the recipe's, for errors.

    Raises RecipeError as `load_backbone` does, and for pictures smaller than a patch, layers that cannot be frozen or
    checkpointed, and patches that cannot be left out.
    """
    encoder = ImageEncoder(key, config, load_backbone(key, config, image_pixels=image_pixels), image_pixels)
    return encoder if video is None else VideoEncoder(f"{key.rpartition('.')[0]}.video", encoder, video)


def build_text_encoder(key: str, config: TextEncoderConfig, vocabulary_size: int, max_tokens: int) -> TextTower:
    """An encoder of token ids below `vocabulary_size`, at most `max_tokens` of them a text. `key` as above.

    Raises RecipeError as `load_backbone` does, and where there are more tokens than positions.
    """
    backbone = load_backbone(key, config, vocabulary_size=vocabulary_size)
    if config.positions is not None:
        stretch_text(f"{key}.positions", backbone, config.positions.keep, config.positions.stretch)
    tokens, setting = max_tokens, f"{key.rpartition('.')[0]}.max_tokens"
    if config.windows is not None and config.windows.tokens < max_tokens:
        tokens, setting = config.windows.tokens, f"{key}.windows.tokens"
    limit = num_positions(backbone)
    if limit is not None and tokens > limit:
        raise RecipeError(
            f"{setting}: {tokens} tokens, and {backbone.config.model_type} has {limit} positions; ask for fewer, raise "
            f"{key}.options.max_position_embeddings of fresh weights, or stretch trained ones by {key}.positions"
        )
    encoder = TextEncoder(key, config, backbone)
    return encoder if config.windows is None else HierarchicalEncoder(key, encoder, config.windows, max_tokens)


def without_checkpoint(config: Settings, tower: ImageTower | TextTower) -> Settings:
    """The settings that build `tower` with fresh weights, for a package that must load where no checkpoint is.

    Positions that were stretched are in them already.
    """
    from transformers import CONFIG_MAPPING

    if config.checkpoint is None:
        return config
    encoder = tower if isinstance(tower, (ImageEncoder, TextEncoder)) else tower.encoder
    settings = encoder.backbone.config
    usual = CONFIG_MAPPING[settings.model_type]().to_dict()
    options = {name: value for name, value in settings.to_dict().items() if _says(name, value, usual)}
    update: dict[str, Any] = {"type": settings.model_type, "checkpoint": None, "options": options}
    if isinstance(config, TextEncoderConfig):
        update["positions"] = None
    return type(config).model_validate(config.model_dump() | update)


# Of a checkpoint and its task, or what follows from the recipe.
_NOT_OPTIONS = frozenset(
    (
        "_name_or_path",  # a directory of the machine that the checkpoint was on
        "architectures",
        "dtype",
        "id2label",
        "image_size",
        "label2id",
        "model_type",
        "transformers_version",
        "vocab_size",
    )
)


def _says(name: str, value: Any, usual: dict[str, Any]) -> bool:
    # Ids of special tokens even where they are the usual ones: fresh weights are given those of our own tokenizer.
    return name in usual and name not in _NOT_OPTIONS and (value != usual[name] or name in OWN_IDS)
