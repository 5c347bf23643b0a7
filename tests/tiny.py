"""A corpus and a recipe small enough to run the whole loop in seconds: coloured shapes, named in two languages."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml
from PIL import Image, ImageDraw

COLOURS = {"red": "红", "green": "绿", "blue": "蓝", "yellow": "黄", "black": "黑", "purple": "紫"}
SHAPES = {"circle": "圆", "square": "方", "bar": "条"}
PLACES = {"left": "左", "middle": "中", "right": "右"}

# The smallest dual encoder that is one: two convolutions, one layer of BERT.
SMALLEST_MODEL: dict[str, Any] = {
    "image": {
        "type": "resnet",
        "options": {"embedding_size": 4, "hidden_sizes": [8], "depths": [1], "layer_type": "basic"},
        "pooling": "pooler",
    },
    "text": {
        "type": "bert",
        "options": {
            "hidden_size": 8,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 16,
            "max_position_embeddings": 16,
        },
        "pooling": "mean",
    },
    "embedding_width": 6,
    "image_pixels": 16,
    "max_tokens": 8,
    "vocabulary_size": 64,
}


def write_shapes(directory: Path) -> str:
    """54 pictures, one of them without a file and one without a caption; the URI of their records."""
    (directory / "images").mkdir(parents=True)
    records = []
    for colour, colour_zh in COLOURS.items():
        for shape, shape_zh in SHAPES.items():
            for number, (place, place_zh) in enumerate(PLACES.items()):
                key = f"{colour}-{shape}-{place}"
                _draw(colour, shape, number).save(directory / "images" / f"{key}.png")
                captions = [
                    {"language": "en", "text": f"{colour} {shape} {place}"},
                    {"language": "zh", "text": f"{place_zh}{colour_zh}{shape_zh}"},
                ]
                split = "held_out" if len(records) % 4 == 3 else "train"
                record = {"key": key, "image": f"images/{key}.png", "captions": captions, "split": split}
                records.append({**record, "classes": {"shape": shape}})
    records[0]["image"] = "images/nowhere.png"
    records[1]["captions"] = []
    path = directory / "records.jsonl"
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
    return str(path)


def _draw(colour: str, shape: str, place: int) -> Image.Image:
    picture = Image.new("RGB", (32, 32), "white")
    left = 2 + 9 * place
    box = {"circle": (left, 10, left + 9, 19), "square": (left, 10, left + 9, 19), "bar": (left + 3, 2, left + 6, 30)}
    pen = ImageDraw.Draw(picture)
    (pen.ellipse if shape == "circle" else pen.rectangle)(box[shape], fill=colour)
    return picture


def tiny_fields(workspace: Path, records: str) -> dict[str, object]:
    """A recipe's fields: two ranks, ZeRO-2, a checkpoint every fourth step."""
    text = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    model = {
        "image": {
            "type": "resnet",
            "options": {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"},
            "pooling": "pooler",
        },
        "text": {"type": "bert", "options": {**text, "max_position_embeddings": 16}},
        "embedding_width": 16,
        "image_pixels": 24,
        "max_tokens": 12,
        "vocabulary_size": 200,
    }
    training = {
        "epochs": 8,
        "global_batch_size": 16,
        "optimizer": {"learning_rate": 0.01, "warmup_steps": 2},
        "num_workers": 2,
        "checkpoint_every_steps": 4,
        "log_every_steps": 1,
    }
    return {
        "name": "tiny",
        "workspace": str(workspace),
        "seed": 3,
        "shard": {"sources": [{"uri": records}], "image": {"side": 32, "min_side": 8}, "samples_per_shard": 20},
        "pretrain": {
            "model": model,
            "training": training,
            "loader": {"augment": {"max_zoom": 1.1, "max_shift": 0.05, "token_dropout": 0.1}},
        },
        # As many as it takes to be surely better than one that learnt nothing.
        "distill": {"model": {**model, "embedding_width": 8}, "training": {**training, "epochs": 16}},
        "evaluate": {
            "splits": ["held_out"],
            "languages": ["en", "zh"],
            "zero_shot": {"label": "shape", "prompts": {shape: [shape] for shape in SHAPES}},
        },
        "promote": {"model": "tiny-dual-encoder", "metric": "held_out/text_to_image/R@5"},
    }


def write_recipe(path: Path, fields: dict[str, object]) -> str:
    """The fields as a recipe file; its path."""
    path.write_text(yaml.safe_dump(fields, allow_unicode=True))
    return str(path)
