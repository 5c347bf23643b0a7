"""Any encoder of `transformers` behind one signature: inputs to a sequence of vectors and one pooled vector."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from mmflow.errors import RecipeError

# Shapes: B batch, T tokens or patches, W the encoder's width, H and S height and width of a picture in pixels.


class Encoded(NamedTuple):
    """What an encoder gives: every token or region, and one vector for the whole."""

    sequence_BTW: Tensor
    pooled_BW: Tensor


class Encoder(nn.Module):
    """A backbone and the pooling of its output."""

    def __init__(self, backbone: nn.Module, width: int, pooling: str) -> None:
        super().__init__()
        self.backbone = backbone
        self.width = width
        self.pooling = pooling

    def forward(self, inputs: Tensor, attention_mask_BT: Tensor | None = None) -> Encoded:
        """Encode pictures (B, 3, H, S) of float, or token ids (B, T) of int64 with their mask (B, T), 1 where real."""
        if attention_mask_BT is None:
            output = self.backbone(inputs)
        else:
            output = self.backbone(inputs, attention_mask=attention_mask_BT)
        sequence = output.last_hidden_state
        if sequence.dim() == 4:  # convolutional backbones give a map (B, W, h, s)
            sequence = sequence.flatten(2).transpose(1, 2)
        return Encoded(sequence, self._pool(sequence, attention_mask_BT, output.get("pooler_output")))

    def _pool(self, sequence_BTW: Tensor, mask_BT: Tensor | None, pooler_output: Tensor | None) -> Tensor:
        if self.pooling == "pooler" and pooler_output is not None:
            return pooler_output.flatten(1)
        if self.pooling == "first":
            return sequence_BTW[:, 0]
        if mask_BT is None:
            return sequence_BTW.mean(1)
        weights_BT1 = mask_BT.to(sequence_BTW.dtype).unsqueeze(-1)
        return (sequence_BTW * weights_BT1).sum(1) / weights_BT1.sum(1).clamp(min=1)


def encoder_config(
    key: str, model_type: str, options: Mapping[str, Any], *, image_pixels: int = 0, vocabulary_size: int = 0
) -> Any:
    """The `transformers` configuration of an encoder, checked, before any weight is made.

    `key` is the recipe's key, for errors. Raises RecipeError for an unknown type or an option that the type lacks:
    `transformers` itself would take any word and use the default without a sound.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import CONFIG_MAPPING, AutoConfig

    known_types = CONFIG_MAPPING.keys()
    if model_type not in known_types:
        raise RecipeError(f"{key}.type: transformers has no {model_type!r}{_nearest(model_type, known_types)}")
    known = AutoConfig.for_model(model_type).to_dict()
    derived = {"image_size": image_pixels, "vocab_size": vocabulary_size}
    for option in options:
        if option not in known:
            raise RecipeError(f"{key}.options.{option}: {model_type} has no such option{_nearest(option, known)}")
    settings = {name: value for name, value in derived.items() if value and name in known} | dict(options)
    try:
        return AutoConfig.for_model(model_type, **settings)
    except (ValueError, TypeError, StrictDataclassError) as error:
        raise RecipeError(f"{key}: {model_type} does not take these options ({_one_line(error)})") from error


def build_encoder(
    key: str,
    model_type: str,
    options: Mapping[str, Any],
    pooling: str,
    *,
    image_pixels: int = 0,
    vocabulary_size: int = 0,
) -> Encoder:
    """A randomly initialised encoder of a `transformers` type. Raises RecipeError as `encoder_config` does."""
    from transformers import AutoModel

    config = encoder_config(key, model_type, options, image_pixels=image_pixels, vocabulary_size=vocabulary_size)
    # A pooler that nothing reads has parameters without gradients, which weigh on every all-reduce and checkpoint.
    extra = {"add_pooling_layer": False} if pooling != "pooler" and model_type in _POOLER_IS_OPTIONAL else {}
    try:
        backbone = AutoModel.from_config(config, **extra)  # type: ignore[no-untyped-call]
    except (ValueError, TypeError) as error:
        raise RecipeError(f"{key}: {model_type} cannot be built from these options ({_one_line(error)})") from error
    return Encoder(backbone, _width(key, model_type, config), pooling)


_POOLER_IS_OPTIONAL = frozenset({"bert", "roberta", "xlm-roberta", "vit", "deit", "beit"})


def _width(key: str, model_type: str, config: Any) -> int:
    sizes = getattr(config, "hidden_sizes", None)
    width = sizes[-1] if sizes else getattr(config, "hidden_size", None)
    if width is None:
        raise RecipeError(f"{key}.type: {model_type} states neither hidden_size nor hidden_sizes; use another encoder")
    return int(width)


def _nearest(word: str, known: Iterable[str]) -> str:
    nearest = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {nearest[0]!r}?" if nearest else ""


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def parameter_count(module: nn.Module) -> int:
    """The number of trained scalars."""
    return sum(parameter.numel() for parameter in module.parameters())
