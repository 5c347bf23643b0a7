"""Tiny models with fresh weights, and a split of coloured squares, as examinations take them."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from tokenizers import Tokenizer

from mmflow.dataset.opened import Dataset
from mmflow.dataset.reader import Caption, Sample
from mmflow.evaluation.config import EvaluateConfig
from mmflow.evaluation.evaluate import prepare
from mmflow.evaluation.examination import Subject
from mmflow.inference.predict import Predictor
from mmflow.inference.runner import Model
from mmflow.loading.tokens import train_tokenizer
from mmflow.models.config import ModelConfig
from mmflow.models.encoders import parameter_count
from mmflow.models.model import build
from mmflow.models.package import LoadedModel, Package, write_package
from tests.dataset.handmade import Handmade, write_dataset

COLOURS = ("red", "green", "blue", "yellow", "black", "white")
TEXT: dict[str, Any] = {
    "type": "bert",
    "options": {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "max_position_embeddings": 32,
    },
}
IMAGE: dict[str, dict[str, Any]] = {
    "vit": {
        "type": "vit",
        "options": {
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 32,
            "patch_size": 8,
        },
        "pooling": "first",
    },
    "resnet": {
        "type": "resnet",
        "options": {"embedding_size": 4, "hidden_sizes": [8], "depths": [1], "layer_type": "basic"},
        "pooling": "pooler",
    },
}
BASE: dict[str, Any] = {"image_pixels": 16, "max_tokens": 12, "vocabulary_size": 400}
DECODER: dict[str, Any] = {"width": 16, "layers": 1, "heads": 2}


def dual_config(image: str = "vit") -> ModelConfig:
    return ModelConfig.model_validate({**BASE, "image": IMAGE[image], "text": TEXT, "embedding_width": 8})


def matcher_config(kind: str = "single_stream") -> ModelConfig:
    fusion = {"kind": kind, "width": 16, "layers": 1, "heads": 2}
    return ModelConfig.model_validate(
        {**BASE, "image": IMAGE["vit"], "text": TEXT, "embedding_width": None, "fusion": fusion, "heads": ["matching"]}
    )


def answerer_config(**more: Any) -> ModelConfig:
    fusion = {"kind": "cross_attention", "width": 16, "layers": 1, "heads": 2}
    fields = {**BASE, "image": IMAGE["vit"], "text": TEXT, "embedding_width": None, "fusion": fusion, **more}
    return ModelConfig.model_validate(fields)


def captioner_config() -> ModelConfig:
    return ModelConfig.model_validate({**BASE, "image": IMAGE["vit"], "embedding_width": None, "decoder": DECODER})


def tight_config() -> ModelConfig:
    """A model that compares clip and caption pair by pair."""
    video = {"kind": "tight", "max_frames": 3, "layers": 1, "heads": 2}
    return altered(dual_config(), video=video)


def ranker_config() -> ModelConfig:
    """A dual encoder with a head that reads pairs."""
    fusion = {"kind": "single_stream", "width": 16, "layers": 1, "heads": 2}
    return altered(dual_config(), fusion=fusion, heads=["matching"])


def altered(config: ModelConfig, **changes: Any) -> ModelConfig:
    return ModelConfig.model_validate(config.model_dump() | changes)


def classifier_config() -> ModelConfig:
    return ModelConfig.model_validate({**BASE, "image": IMAGE["resnet"], "embedding_width": None, "heads": ["classes"]})


def captions_of(colour: str) -> list[str]:
    return [f"a {colour} square", f"square in {colour}", f"the {colour} one on the left of it all"]


def tokenizer() -> Tokenizer:
    return train_tokenizer([text for colour in COLOURS for text in captions_of(colour)], 400)


def loaded_model(config: ModelConfig, classes: tuple[str, ...] = (), seed: int = 0) -> LoadedModel:
    made = tokenizer()
    model = build("model", config, made.get_vocab_size(), seed=seed, num_classes=len(classes)).eval()
    return LoadedModel(model, made, config, classes)


def written_package(uri: Path, loaded: LoadedModel) -> Package:
    """The model as a package at `uri`."""
    return write_package(
        str(uri),
        state=loaded.model.state_dict(),
        config=loaded.config,
        tokenizer_json=loaded.tokenizer.to_str(),
        parameters=parameter_count(loaded.model),
        lineage={},
        classes=loaded.classes,
    )


def predictor(config: ModelConfig, classes: tuple[str, ...] = (), batch_size: int = 4) -> Predictor:
    return Predictor(loaded_model(config, classes), batch_size)


def picture(colour: str) -> Sample:
    body = io.BytesIO()
    drawn = Image.new("RGB", (20, 20), colour)
    drawn.paste((128, 128, 128), (0, 0, 10, 7))
    drawn.save(body, "PNG")
    return Sample(colour, body.getvalue(), "png", tuple(Caption(text, "en") for text in captions_of(colour)), {})


def squares() -> list[Handmade]:
    """A sample a colour: the first and third have three captions, the others one; the first three have one in German
    too."""
    return [
        Handmade(
            key=colour,
            captions=[
                *({"language": "en", "text": text} for text in captions_of(colour)[: 3 if row in (0, 2) else 1]),
                *({"language": "de", "text": f"square {colour}"} for _ in range(row < 3)),
            ],
            metadata={
                "classes": {"colour": colour},
                "questions": [{"question": "what colour is it?", "answers": [colour, colour, "dark"]}],
            },
            size=(24, 20),
        )
        for row, colour in enumerate(COLOURS)
    ]


def write_squares(directory: Path, samples: Sequence[Handmade] | None = None) -> Dataset:
    """Samples of split held_out in two shards, the first of four."""
    samples = squares() if samples is None else samples
    return write_dataset(directory, [("held_out", samples[:4]), ("held_out", samples[4:])])


def settings(**sections: Any) -> EvaluateConfig:
    """Of an evaluation of split held_out."""
    return EvaluateConfig.model_validate({"splits": ["held_out"], "batch_size": 4, **sections})


def quiet(done: int, total: int, what: str) -> None:
    """Reports nothing."""


def asked(folder: Path, dataset: Dataset, loaded: LoadedModel, asks: EvaluateConfig) -> Subject:
    """The model and the rows of split held_out, with everything computed that the settings ask for."""
    package = written_package(folder / "package", loaded)
    models = {"student": Model(package=package.uri)}
    return prepare(models, dataset.uri, asks, str(folder / "results"), quiet)["student", "held_out"]
