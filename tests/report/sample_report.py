"""A report as a real quickstart run writes it, with drawn pictures: the tests read it, and so may you, in a browser.

`python -m tests.report.sample_report report.html` writes the page.
"""

import math
import random
import sys
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from mmflow.report.run_page import render_report

COLORS = {"red": "红色", "green": "绿色", "blue": "蓝色", "orange": "橙色", "violet": "紫色", "brown": "棕色"}
SHAPES = {"circle": "圆", "square": "方块", "triangle": "三角", "ring": "环"}
CONCEPTS = [(color, shape) for shape in SHAPES for color in COLORS]
STAGES = {  # seconds and summary
    "corpus": (9.4, "4,495 records of OpenMoji 17.0.0"),
    "shard": (21.7, "3,953 samples in 6 shards, 542 quarantined"),
    "pretrain": (138.2, "700 steps, loss 0.41"),
    "distill": (79.9, "600 steps, loss 1.32"),
    "evaluate": (14.6, "4 models on 2 splits"),
    "promote": (0.84, "version 3 promoted"),
    "score": (22.5, "3,953 rows in 6 files"),
}
CLASSES = {"People & Body": 2104, "Objects": 534, "Symbols": 371, "Travel & Places": 358, "Food & Drink": 103}


def scored_row(number: int, **more: Any) -> dict[str, Any]:
    """A row of scores, as a page shows it."""
    color, shape = CONCEPTS[number]
    place = {"dataset": "openmoji", "shard": f"0000{number % 6}", "row": 17 * number}
    key = f"{color}-{shape}"
    return {**place, "key": key, "picture": key, "caption": f"the {color} {shape}", **more}


def sample_images() -> dict[str, bytes]:
    """One small picture a concept, keyed as the sample report's keys; PNG and JPEG in turn."""
    images = {}
    for row, (color, shape) in enumerate(CONCEPTS):
        picture = Image.new("RGB", (96, 96), "white")
        draw = ImageDraw.Draw(picture)
        (draw.rectangle if shape == "square" else draw.ellipse)((14, 14, 82, 82), fill=color)
        body = BytesIO()
        picture.save(body, "PNG" if row % 2 else "JPEG")
        images[f"{color}-{shape}"] = body.getvalue()
    return images


def curve(start: float, end: float, steps: int, seed: int, noise: float = 0.04) -> list[list[float]]:
    """[step, value] pairs that fall from start to end as losses do."""
    rng = random.Random(seed)
    return [
        [step, (end + (start - end) * math.exp(-4 * step / steps)) * (1 + rng.gauss(0, noise))]
        for step in range(0, steps, 10)
    ]


def training(stage: str, steps: int, seed: int, losses: dict[str, tuple[float, float]]) -> dict[str, Any]:
    curves = {name: curve(start, end, steps, seed + index) for index, (name, (start, end)) in enumerate(losses.items())}
    curves["learning_rate"] = [[step, 1e-3 * min(1, step / 50)] for step in range(0, steps, 10)]
    curves["logit_scale"] = curve(14.3, 38.0, steps, seed + 7, 0.004)
    curves["gradient_norm"] = curve(6.0, 1.1, steps, seed + 8, 0.22)
    curves["samples_per_second"] = curve(700.0, 1108.0, steps, seed + 9, 0.05)
    first = stage == "pretrain"
    return {
        "stage": stage,
        "parameters": 3_120_000 if first else 1_010_000,
        "steps": steps,
        "global_batch_size": 192,
        "num_workers": 2,
        "zero_stage": 2 if first else 1,
        "restarts": 0 if first else 1,
        "seconds": 131.6 if first else 74.2,
        "samples_per_second": 1021.4 if first else 1553.8,
        "loader_stall_share": 0.0043,
        "curves": curves,
    }


def measured(first: float, rank: float) -> dict[str, Any]:
    later = {"R@1": first, "R@5": 1 - (1 - first) ** 2.2, "R@10": 1 - (1 - first) ** 3.1}
    return {
        "text_to_image": {**later, "mean_rank": rank},
        "image_to_text": {**{name: value * 0.93 for name, value in later.items()}, "mean_rank": rank * 1.13},
        "zero_shot": {"accuracy": min(1.0, first * 0.6 + 0.1), "classes": 10},
    }


def split(rows: int, teacher: float, student: float) -> dict[str, Any]:
    models = {
        "teacher": measured(teacher, 5.23),
        "student": measured(student, 6.41),
        "untrained": measured(1.6 / rows, rows * 0.47),
        "chance": measured(1 / rows, (rows + 1) / 2),
    }
    for name in ("teacher", "student"):
        zh = {name: value * 0.9 for name, value in models[name]["text_to_image"].items() if name != "mean_rank"}
        models[name]["languages"] = {"zh": {"text_to_image": zh}}
    return {"rows": rows, "models": models}


def queries() -> list[dict[str, Any]]:
    rng, made = random.Random(3), []
    for index, rank in enumerate((1, 1, 3, 1, 1, 17, 1, 2, 1, 1, 6, 1)):
        color, shape = CONCEPTS[index * 2]
        wrong = [concept for concept in CONCEPTS if concept != (color, shape)]
        rng.shuffle(wrong)
        found = [*wrong[: rank - 1], (color, shape), *wrong[rank - 1 : 4]] if rank <= 5 else wrong[:5]
        results = [
            {
                "key": f"{c}-{s}",
                "caption": f"{c} {s}",
                "score": 0.71 - 0.043 * place,
                "correct": (c, s) == (color, shape),
            }
            for place, (c, s) in enumerate(found)
        ]
        made.append({"caption": f"{color} {shape}", "key": f"{color}-{shape}", "rank": rank, "results": results})
    return made


def look(index: int) -> dict[str, Any]:
    color, shape = CONCEPTS[index * 5]
    ring = [[math.exp(-((row - 3.5) ** 2 + (column - 3.5) ** 2) / 9) for column in range(8)] for row in range(8)]
    return {
        "key": f"{color}-{shape}",
        "caption": f"{color} {shape}",
        "score": 0.42 - 0.03 * index,
        "picture": ring,
        "rollout": [[0.2 + 0.1 * (column % 3) for column in range(8)] for _ in range(8)],
        "tokens": [{"text": color, "weight": 0.9}, {"text": f" {shape}", "weight": 0.35 + 0.1 * index}],
    }


def written() -> dict[str, Any]:
    keys = [f"{color}-{shape}" for color, shape in CONCEPTS[:4]]
    answer = {"answer": "circle", "people": ["circle", "a circle"]}
    return {
        "model": "student",
        "split": "unseen_variants",
        "captions": [{"key": key, "caption": f"a {key}", "people": [f"the {key}", key]} for key in keys],
        "answers": [
            {"key": key, "question": f"what is a {key}?", **answer, "accuracy": 0.6 if place else 0.0}
            for place, key in enumerate(keys)
        ],
        "by_answer": [{"answer": "circle", "questions": 12, "accuracy": 0.75}],
        "confusion": {"classes": ["circle", "square"], "counts": [[7, 2, 1], [3, 5, 0]]},
    }


def check(name: str, challenger: float, threshold: float) -> dict[str, Any]:
    return {"name": name, "challenger": challenger, "threshold": threshold, "passed": True}


def dataset() -> dict[str, Any]:
    shards = {"unseen_variants": (400, 1), "unseen_concepts": (160, 1), "train": (3393, 4)}
    examples = [
        {
            "key": f"{color}-{shape}",
            "split": list(shards)[number % 3],
            "captions": [
                {"language": "en", "text": f"{color} {shape}"},
                {"language": "zh", "text": COLORS[color] + SHAPES[shape]},
            ],
        }
        for number, (color, shape) in enumerate(CONCEPTS)
    ]
    row = {"reason": "caption_missing", "detail": "no caption in any of en, zh"}
    return {
        "fingerprint": "34cd9e0a51b2",
        "samples": 3953,
        "bytes": 14_630_000,
        "splits": {name: {"samples": samples, "shards": number} for name, (samples, number) in shards.items()},
        "examples": examples,
        "quarantine": {
            "records": 542,
            "reasons": {"caption_missing": 486, "image_undecodable": 39, "duplicate": 17},
            "rows": [{"source": f"records.jsonl:{17 + number * 3}", **row} for number in range(50)],
        },
    }


def sample_report() -> dict[str, Any]:
    """A fresh, complete report: every section that the page knows is there."""
    identities = {stage: f"{random.Random(stage).getrandbits(64):016x}" for stage in STAGES}
    losses = {"loss": (7.9, 1.32), "contrastive": (5.2, 0.52), "soft_labels": (1.9, 0.44), "features": (0.98, 0.21)}
    return {
        "name": "quickstart",
        "created": "2026-11-22T03:00:00+00:00",
        "seconds": 287.3,
        "peak_memory_bytes": 1_930_000_000,
        "recipe": "name: quickstart\n\npretrain:\n  steps: 700\n  global_batch_size: 192\n",
        "machine": {"cores": 2, "memory_bytes": 8_250_000_000, "accelerator": "cpu", "python": "3.11.7"},
        "versions": {"torch": "2.9.1", "deepspeed": "0.18.2", "ray": "2.52.0", "mlflow": "3.6.0", "mmflow": "0.1.0"},
        "stages": [
            {
                "stage": stage,
                "status": "reused" if stage == "corpus" else "built",
                "seconds": seconds,
                "artifact": f"{stage}/{identities[stage]}",
                "identity": identities[stage],
                "summary": summary,
            }
            for stage, (seconds, summary) in STAGES.items()
        ],
        "dataset": dataset(),
        "training": {
            "teacher": training("pretrain", 700, 11, {"loss": (5.2, 0.41), "contrastive": (5.2, 0.41)}),
            "student": training("distill", 600, 23, losses),
        },
        "evaluation": {
            "headline": {"split": "unseen_variants", "direction": "text_to_image", "metric": "R@1"},
            "splits": {"unseen_concepts": split(160, 0.137, 0.118), "unseen_variants": split(400, 0.683, 0.6618)},
        },
        "retrieval": {"split": "unseen_variants", "model": "student", "queries": queries()},
        "looks": {"model": "student", "rows": [look(index) for index in range(4)]},
        "written": written(),
        "comparison": {
            "teacher_parameters": 3_120_000,
            "student_parameters": 1_010_000,
            "share_of_teacher": {
                "unseen_variants": {
                    "text_to_image/R@10": 0.974,
                    "text_to_image/R@1": 0.969,
                    "zero_shot/accuracy": 0.94,
                },
                "unseen_concepts": {"text_to_image/R@10": 0.913},
            },
            "latency_ms": {"teacher": 8.24, "student": 3.13},
            "pictures_per_second": {"teacher": 412.0, "student": 1530.0},
        },
        "promotion": {
            "model": "openmoji-dual-encoder",
            "version": 3,
            "decision": "promoted",
            "champion_before": 2,
            "reasons": ["all 3 checks passed"],
            "checks": [
                check("unseen_variants text_to_image R@1 >= champion", 0.6618, 0.6125),
                check("unseen_concepts text_to_image R@10 >= 0.30", 0.3223, 0.30),
                check("latency_ms <= 5", 3.13, 5.0),
            ],
        },
        "scores": {
            "rows": 3953,
            "errors": 2,
            "files": 6,
            "bytes": 8_410_000,
            "seconds": 22.5,
            "rows_per_second": 175.7,
            "model": {"name": "openmoji-dual-encoder", "version": 3},
            "similarity": {
                "edges": [-0.2 + 0.04 * edge for edge in range(26)],
                "counts": [1 + round(520 * math.exp(-(((bin_ - 17) / 4.2) ** 2))) for bin_ in range(25)],
            },
            "classes": [{"name": name, "rows": rows} for name, rows in CLASSES.items()],
            "labels": [{"name": "circle", "rows": 2310}, {"name": "square", "rows": 1643}],
            "best": [scored_row(number, similarity=0.91 - 0.01 * number) for number in range(6)],
            "worst": [scored_row(number + 6, similarity=0.02 * number - 0.3) for number in range(6)],
            "examples": [
                scored_row(
                    number,
                    says=[{"of": f"what is picture {number}?", "text": f"answer {number}"}],
                    neighbours=[scored_row(number + other, similarity=0.97 - 0.1 * other) for other in range(5)],
                )
                for number in range(8)
            ],
        },
        "lineage": [
            {"stage": stage, "inputs": [f"{before} {identities[before][:4]}"], "output": f"{stage} made"}
            for before, stage in pairwise(STAGES)
        ],
    }


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(render_report(sample_report(), sample_images()), encoding="utf-8")
