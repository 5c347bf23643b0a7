"""Export a package's dual encoder, for `transformers` or as two ONNX graphs. Nothing is written unless the exported
model gives the same numbers."""

from __future__ import annotations

import json
import os
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mmflow.core.errors import MisuseError, MmflowError
from mmflow.loading.tokens import pad, special_tokens, tokenise
from mmflow.models.encoders import ImageEncoder, TextEncoder
from mmflow.models.model import Model
from mmflow.models.package import PREPROCESSOR, TOKENIZER, LoadedModel, preprocessor
from mmflow.models.pretrained import one_line

# Shapes: B batch, T tokens, S side of a picture in pixels, E width of the shared space.

TOLERANCE = 1e-4
"""Largest difference of logits or embeddings between the exported model and its package."""
IMAGE, TEXT, SCALE = "image.onnx", "text.onnx", "scale.json"
ONNX_INSTEAD = "train with another, or export the two towers to ONNX, which holds any"


class Exported(NamedTuple):
    """What was written: the layout's `model_type`, and the largest difference of logits on random inputs."""

    layout: str
    difference: float


def export_transformers(loaded: LoadedModel, directory: str | Path) -> Exported:
    """Write a directory that `transformers` loads by itself, in CLIP's, SigLIP's or VisionTextDualEncoder's layout: the
    two towers, their projections and the scale, the tokenizer and the image processor. Fusion, heads and decoder are
    left out.

    The directory appears whole, after the model loaded from it has given the same logits to 1e-4. Raises MisuseError
    if it exists or no layout can hold the towers, MmflowError if the logits differ.
    """
    with _staged(Path(directory), loaded) as staging:
        theirs = _to_transformers(loaded)
        theirs.save_pretrained(staging)
        _write_tokenizer_config(loaded, staging)
        reloaded = type(theirs).from_pretrained(staging, local_files_only=True).eval()
        difference = _check(f"{directory}: logits", _difference(loaded, reloaded))
    return Exported(theirs.config.model_type, difference)


def export_onnx(loaded: LoadedModel, directory: str | Path) -> Mapping[str, float]:
    """Write `image.onnx`: pixels (B, 3, S, S) of float32 → image_embedding (B, E); `text.onnx`: token_ids and
    token_mask (B, T) of int64 → text_embedding (B, E); `scale.json`; the tokenizer's and the image processor's file.

    The directory appears whole, after onnxruntime has given torch's embeddings to 1e-4 for other numbers of rows and
    tokens than those of the trace. Returns the largest difference of each graph. Raises MisuseError if the directory
    exists, the model has no shared space, or packages are missing; MmflowError if embeddings differ.
    """
    with _staged(Path(directory), loaded) as staging:
        if loaded.model.scale is None:
            why = "video: tight" if loaded.config.tight else "embedding_width: null"
            raise MisuseError(f"model.{why}, so there is no shared space to export; train a model that has one")
        scale = {name: value.item() for name, value in loaded.model.scale()._asdict().items() if value is not None}
        (staging / SCALE).write_text(json.dumps(scale) + "\n")
        pixels, token_ids, token_mask = random_inputs(loaded, rows=3)
        _trace(loaded.model, {"pixels": pixels}, "image_embedding", staging / IMAGE)
        texts = {"token_ids": token_ids, "token_mask": token_mask}
        _trace(loaded.model, texts, "text_embedding", staging / TEXT)
        differences = _onnx_differences(loaded, staging)
        for name, difference in differences.items():
            _check(f"{Path(directory) / name}: embeddings", difference)
    return differences


@contextmanager
def _staged(directory: Path, loaded: LoadedModel) -> Iterator[Path]:
    """A directory that takes its final name if the block succeeds, with the tokenizer's and the image processor's file.
    Raises MisuseError if that name is taken."""
    if directory.exists():
        raise MisuseError(f"{directory}: exists; name a new directory, or remove it")
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=f".{directory.name}.") as scratch:
        staging = Path(scratch) / directory.name
        staging.mkdir()
        yield staging
        (staging / TOKENIZER).write_text(loaded.tokenizer.to_str())
        (staging / PREPROCESSOR).write_text(json.dumps(preprocessor(loaded.config), indent=2) + "\n")
        os.replace(staging, directory)


def _check(subject: str, difference: float) -> float:
    if not difference <= TOLERANCE:  # also true for NaN
        raise MmflowError(f"{subject} differ by {difference:.2g}, more than {TOLERANCE}; nothing written")
    return difference


def random_inputs(loaded: LoadedModel, rows: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Random pictures (rows, 3, side, side), and random texts of different lengths as ids and mask (rows, T).

    The texts go through the tokenizer, which adds the special tokens that text encoders look for.
    """
    random = torch.Generator().manual_seed(seed)
    side = loaded.config.image_pixels
    pixels = torch.randn(rows, 3, side, side, generator=random)
    tokenizer, max_tokens = loaded.tokenizer, loaded.config.max_tokens
    lengths = torch.randint(1, max(2, max_tokens // 2), (rows,), generator=random).tolist()
    texts = [
        tokenizer.decode(torch.randint(0, tokenizer.get_vocab_size(), (length,), generator=random).tolist())
        for length in lengths
    ]
    ids, mask = pad(tokenise(tokenizer, texts, max_tokens), special_tokens(tokenizer).pad)
    return pixels, torch.from_numpy(ids), torch.from_numpy(mask)


# --- for transformers ------------------------------------------------------------------------------------------------


def _to_transformers(loaded: LoadedModel) -> Any:
    """The model of `transformers` with our weights."""
    model = loaded.model
    image, text, scale = model.image, model.text, model.scale
    if not isinstance(image, ImageEncoder) or not isinstance(text, TextEncoder) or scale is None:
        raise MisuseError(
            "model: transformers' dual encoders read one picture and one sequence of tokens; leave out video and "
            "text.windows, and give the model an embedding_width"
        )
    _check_pooling(loaded, image.backbone.config, text.backbone.config)
    theirs = _empty_layout(model, image.backbone.config, text.backbone.config)
    _copy(theirs.vision_model, image.backbone)
    _copy(theirs.text_model, text.backbone)
    with torch.no_grad():
        for ours, name in ((model.image_projection, "visual_projection"), (model.text_projection, "text_projection")):
            if ours is not None and hasattr(theirs, name):
                getattr(theirs, name).load_state_dict(ours.state_dict())
        # Ours have shape (1,), some of theirs have shape ().
        logit_scale, logit_bias = scale()
        theirs.logit_scale.copy_(logit_scale.log().reshape(theirs.logit_scale.shape))
        if logit_bias is not None:
            theirs.logit_bias.copy_(logit_bias.reshape(theirs.logit_bias.shape))
    return theirs.eval()


def _empty_layout(model: Model, vision: Any, text: Any) -> Any:
    """A model of `transformers` that can hold these towers. Raises MisuseError if there is none."""
    import transformers

    kinds = vision.model_type, text.model_type
    towers = {"vision_config": vision.to_dict(), "text_config": text.to_dict()}
    is_biased = model.scale is not None and model.scale.logit_bias is not None
    if kinds == ("siglip_vision_model", "siglip_text_model") and is_biased:
        if not all(_is_identity(projection) for projection in (model.image_projection, model.text_projection)):
            raise MisuseError(
                f"model.embedding_width: SigLIP's layout has no projections, this model does; {ONNX_INSTEAD}"
            )
        return transformers.SiglipModel(transformers.SiglipConfig(**towers))
    if is_biased:
        raise MisuseError(f"model.bias: only SigLIP's layout has one, and the towers are {kinds}; {ONNX_INSTEAD}")
    towers["projection_dim"] = model.embedding_width or 0
    if kinds == ("clip_vision_model", "clip_text_model"):
        return transformers.CLIPModel(transformers.CLIPConfig(**towers))
    try:
        return transformers.VisionTextDualEncoderModel(transformers.VisionTextDualEncoderConfig(**towers))
    except ValueError as error:  # siglip_text_model, which AutoModel does not know
        raise MisuseError(f"model: transformers' VisionTextDualEncoder cannot hold {kinds}; {ONNX_INSTEAD}") from error


def _check_pooling(loaded: LoadedModel, vision: Any, text: Any) -> None:
    text_pooling = None if loaded.config.text is None else loaded.config.text.pooling
    if text.model_type == "clip_text_model" and text_pooling == "eos":
        text_pooling = "pooler"  # CLIP's pooler takes the closing token
    for side, pooling, backbone in (("image", loaded.config.image.pooling, vision), ("text", text_pooling, text)):
        if pooling != "pooler":
            raise MisuseError(
                f"model.{side}.pooling: {pooling}, but transformers' dual encoders read {backbone.model_type}'s "
                f"pooler; {ONNX_INSTEAD}"
            )
    if getattr(vision, "hidden_sizes", None):
        raise MisuseError(
            f"model.image: {vision.model_type} gives a map, but transformers' dual encoders project vectors; "
            f"{ONNX_INSTEAD}"
        )


def _is_identity(projection: nn.Linear | None) -> bool:
    return projection is not None and torch.equal(projection.weight, torch.eye(*projection.weight.shape))


def _copy(theirs: Any, ours: Any) -> None:
    result = theirs.load_state_dict(ours.state_dict(), strict=False)
    # DINOv2's mask token belongs to its own pretraining task and is not in our encoders.
    lost = [name for name in (*result.missing_keys, *result.unexpected_keys) if not name.endswith("mask_token")]
    if lost:
        raise MmflowError(f"{ours.config.model_type}: the layout has no place for {lost[0]}; {ONNX_INSTEAD}")


def _write_tokenizer_config(loaded: LoadedModel, directory: Path) -> None:
    special = special_tokens(loaded.tokenizer)
    names = ("pad_token", "unk_token", "cls_token", "sep_token")
    ids = dict(zip(names, (special.pad, special.unknown, special.first, special.last), strict=True))
    tokens = {name: loaded.tokenizer.id_to_token(token) for name, token in ids.items() if token is not None}
    settings = {**tokens, "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": loaded.config.max_tokens}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")


@torch.inference_mode()
def _difference(loaded: LoadedModel, theirs: Any) -> float:
    """The largest difference between our logits (B, B) and those of the model of `transformers`."""
    pixels, token_ids, token_mask = random_inputs(loaded, rows=4)
    outputs = loaded.model(pixels, token_ids, token_mask)
    expected = outputs["logit_scale"] * outputs["text_embedding"] @ outputs["image_embedding"].T
    expected = expected + outputs.get("logit_bias", torch.zeros(1))
    mask: Tensor | None = token_mask
    if theirs.config.model_type == "siglip":  # it reads texts padded to their whole length, without a mask
        text = theirs.config.text_config
        token_ids = token_ids.masked_fill(token_mask == 0, text.pad_token_id)
        num_padding = text.max_position_embeddings - token_ids.shape[1]
        token_ids, mask = nn.functional.pad(token_ids, (0, num_padding), value=text.pad_token_id), None
    logits = theirs(input_ids=token_ids, attention_mask=mask, pixel_values=pixels).logits_per_text
    return float((logits - expected).abs().max())


# --- as ONNX ---------------------------------------------------------------------------------------------------------


class _Tower(nn.Module):
    """One side of a model, by the number of its inputs: pixels, or token ids and their mask."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model

    def forward(self, *inputs: Tensor) -> Tensor:
        if len(inputs) == 1:
            return self.model.embed_image(self.model.encode_image(*inputs))
        return self.model.embed_text(self.model.encode_text(*inputs))


def _trace(model: Model, inputs: Mapping[str, Tensor], output: str, path: Path) -> None:
    try:
        import onnxscript  # noqa: F401 — torch's exporter needs it
    except ImportError as error:
        raise MisuseError("export to ONNX needs more packages: pip install 'mmflow[onnx]'") from error
    batch, tokens = torch.export.Dim("batch"), torch.export.Dim("tokens")
    shapes = tuple({0: batch} if name == "pixels" else {0: batch, 1: tokens} for name in inputs)
    names: Any = {"input_names": list(inputs), "output_names": [output], "dynamic_shapes": {"inputs": shapes}}
    options: Any = {"dynamo": True, "external_data": False, "verbose": False}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(_Tower(model).eval(), tuple(inputs.values()), path, **names, **options)


@torch.inference_mode()
def _onnx_differences(loaded: LoadedModel, directory: Path) -> dict[str, float]:
    import onnxruntime

    pixels, token_ids, token_mask = random_inputs(loaded, rows=5, seed=1)
    outputs = loaded.model(pixels, token_ids, token_mask)
    graphs = {
        IMAGE: ({"pixels": pixels}, outputs["image_embedding"]),
        TEXT: ({"token_ids": token_ids, "token_mask": token_mask}, outputs["text_embedding"]),
    }
    differences = {}
    for name, (inputs, expected) in graphs.items():
        session = onnxruntime.InferenceSession(directory / name, providers=["CPUExecutionProvider"])
        try:
            (embedding,) = session.run(None, {key: value.numpy() for key, value in inputs.items()})
        except Exception as error:  # onnxruntime has many kinds of its own
            raise MmflowError(f"{name}: onnxruntime rejects it ({one_line(error)[:200]})") from error
        differences[name] = float((torch.from_numpy(embedding) - expected).abs().max())
    return differences
