"""The two towers of a dual encoder as ONNX graphs, for places where there is no torch."""

from __future__ import annotations

import json
import os
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from mmflow.core.errors import MisuseError, MmflowError
from mmflow.models.exchange.probe import TOLERANCE, probe
from mmflow.models.model import Model
from mmflow.models.package import PREPROCESSOR, TOKENIZER, LoadedModel, preprocessor

# Shapes: B batch, T tokens, S side of a picture in pixels, E width of the shared space.

IMAGE, TEXT, SCALE = "image.onnx", "text.onnx", "scale.json"


class _ImageTower(nn.Module):
    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor) -> Tensor:
        return self.model.embed_image(self.model.encode_image(pixels))


class _TextTower(nn.Module):
    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model

    def forward(self, token_ids: Tensor, token_mask: Tensor) -> Tensor:
        return self.model.embed_text(self.model.encode_text(token_ids, token_mask))


def export_onnx(loaded: LoadedModel, directory: str | Path) -> Mapping[str, float]:
    """Write `image.onnx`: pixels (B, 3, S, S) of float32 → image_embedding (B, E); `text.onnx`: token_ids and
    token_mask (B, T) of int64 → text_embedding (B, E); `scale.json`; the tokenizer's and the image processor's file.

    The directory appears whole, after onnxruntime has given torch's embeddings to 1e-4 for another number of rows and
    tokens than the graph was made from; returns the largest difference of each graph. Raises MisuseError where the
    directory exists, the model has no shared space, or the packages are missing; MmflowError where embeddings differ.
    """
    directory = Path(directory)
    if directory.exists():
        raise MisuseError(f"{directory}: exists; name a new directory, or remove it")
    if loaded.model.scale is None:
        why = "video: tight" if loaded.config.tight else "embedding_width: null"
        raise MisuseError(f"model.{why}, and the towers of a shared space are exported; train a model that has one")
    directory.parent.mkdir(parents=True, exist_ok=True)
    scale = {name: value.item() for name, value in loaded.model.scale()._asdict().items() if value is not None}
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=f".{directory.name}.") as scratch:
        staging = Path(scratch) / directory.name
        staging.mkdir()
        pixels, token_ids, token_mask = probe(loaded, rows=3)
        _trace(_ImageTower(loaded.model), {"pixels": pixels}, "image_embedding", staging / IMAGE)
        _trace(
            _TextTower(loaded.model),
            {"token_ids": token_ids, "token_mask": token_mask},
            "text_embedding",
            staging / TEXT,
        )
        (staging / SCALE).write_text(json.dumps(scale) + "\n")
        (staging / TOKENIZER).write_text(loaded.tokenizer.to_str())
        (staging / PREPROCESSOR).write_text(json.dumps(preprocessor(loaded.config), indent=2) + "\n")
        differences = _differences(loaded, staging)
        for name, difference in differences.items():
            if not difference <= TOLERANCE:
                raise MmflowError(
                    f"{directory / name}: embeddings differ by {difference:.2g}, more than {TOLERANCE}; nothing written"
                )
        os.replace(staging, directory)
    return differences


def _trace(tower: nn.Module, inputs: Mapping[str, Tensor], output: str, path: Path) -> None:
    try:
        import onnxscript  # noqa: F401 — what torch's exporter asks for
    except ImportError as error:
        raise MisuseError("export to ONNX needs more packages: pip install 'mmflow[onnx]'") from error
    batch, tokens = torch.export.Dim("batch"), torch.export.Dim("tokens")
    shapes = {name: {0: batch} if name == "pixels" else {0: batch, 1: tokens} for name in inputs}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            tower.eval(),
            tuple(inputs.values()),
            path,
            input_names=list(inputs),
            output_names=[output],
            dynamic_shapes=shapes,
            dynamo=True,
            external_data=False,
            verbose=False,
        )


@torch.inference_mode()
def _differences(loaded: LoadedModel, directory: Path) -> dict[str, float]:
    import onnxruntime

    pixels, token_ids, token_mask = probe(loaded, rows=5, seed=1)
    outputs = loaded.model(pixels, token_ids, token_mask)
    feeds = {IMAGE: {"pixels": pixels}, TEXT: {"token_ids": token_ids, "token_mask": token_mask}}
    expected = {IMAGE: outputs["image_embedding"], TEXT: outputs["text_embedding"]}
    differences = {}
    for name, feed in feeds.items():
        session = onnxruntime.InferenceSession(directory / name, providers=["CPUExecutionProvider"])
        try:
            (found,) = session.run(None, {each: value.numpy() for each, value in feed.items()})
        except Exception as error:  # onnxruntime's own, of many kinds
            raise MmflowError(f"{name}: onnxruntime refuses it ({' '.join(str(error).split())[:200]})") from error
        differences[name] = float((torch.from_numpy(found) - expected[name]).abs().max())
    return differences
