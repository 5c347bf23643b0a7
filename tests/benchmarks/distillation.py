"""How much of its teacher a student keeps: losses compared with each other and with a student without a teacher.

Quality, not speed: what differs from round to round is the seed, of the teacher and of its students alike.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

import yaml

from tests.benchmarks.measure import ROOT, SCRATCH, SHARE, call
from tests.benchmarks.table import Row, faster

RECIPE = ROOT / "pipelines" / "recipes" / "distilled.yaml"
SEEDS = range(7, 7 + max(1, round(3 * SHARE)))
ROUNDS = len(SEEDS)
ALONE = "no teacher"
COMBINED = "features and similarities"  # the recipe's own
LOSSES: Mapping[str, Mapping[str, float]] = {
    "features": {"features": 10.0},
    "similarities": {"similarities": 1.0},
    "soft labels": {"soft_labels": 1.0},
    COMBINED: {"features": 10.0, "similarities": 1.0},
}
METRIC, DIRECTIONS = "R@10", ("text_to_image", "image_to_text")
LEAST_SHARE, LEAST_GAIN = 0.95, 1.1
PEERS = ()
VERSIONS = ("torch", "deepspeed", "ray", "transformers")


def run() -> list[Row]:
    """For each seed: the teacher, the student alone, and the student with each of the losses."""
    found: dict[str, list[float]] = {name: [] for name in ("teacher", ALONE, *LOSSES)}
    for seed in SEEDS:
        alone = call("tests.benchmarks.distillation:examine", fields=_without_teacher(seed))
        found[ALONE].append(alone["recall"]["teacher"])
        for name, losses in LOSSES.items():
            taught = call("tests.benchmarks.distillation:examine", fields=_fields(seed, losses))
            found[name].append(taught["recall"]["student"])
        found["teacher"].append(taught["recall"]["teacher"])
        print(f"  seed {seed}: " + ", ".join(f"{name} {each[-1]:.4g}%" for name, each in found.items()), flush=True)
    size = taught["parameters"]["student"] / taught["parameters"]["teacher"]
    note = f"held out, mean over three splits and both ways; {size:.0%} of the teacher's parameters"
    goals = {ALONE: LEAST_GAIN, "teacher": LEAST_SHARE}
    rows = []
    for name in LOSSES:
        for peer, least in goals.items():
            goal = least if name == COMBINED else None
            rows.append(faster(name, found[name], peer, found[peer], unit=f"% {METRIC}", goal=goal, note=note))
    return rows


def _fields(seed: int, losses: Mapping[str, float]) -> dict[str, Any]:
    """The recipe, with these losses and a seed."""
    fields: dict[str, Any] = yaml.safe_load(RECIPE.read_text(encoding="utf-8"))
    fields["distill"]["losses"] = dict(losses)
    return {**fields, "seed": seed, "workspace": str(SCRATCH / "distillation")}


def _without_teacher(seed: int) -> dict[str, Any]:
    """The recipe with the student as its only model: the teacher's vocabulary, trained on the pairs alone."""
    fields = _fields(seed, {})
    student = {name: fields["distill"][name] for name in ("model", "loader", "objectives", "training")}
    student["model"]["vocabulary_size"] = fields["pretrain"]["model"]["vocabulary_size"]
    del fields["distill"]
    return {**fields, "pretrain": student, "promote": {**fields["promote"], "candidate": "teacher"}}


# --- called in a process of its own -----------------------------------------------------------------------------------


def examine(fields: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Held-out recall in % and parameters of each model of a recipe. Finished stages are reused."""
    from mmflow.cluster.local import stop_ray
    from mmflow.core.storage import read_json
    from mmflow.recipe import Recipe
    from mmflow.stages.loop import Loop

    loop = Loop(Recipe.model_validate(fields))
    models = {"teacher": "pretrain", "student": "distill"}
    trained = {model: stage for model, stage in models.items() if stage in loop.stages}
    built = {stage: loop.run(stage) for stage in ("shard", *trained.values(), "evaluate")}
    stop_ray()
    splits = read_json(built["evaluate"].file("metrics.json")).values()
    return {
        "recall": {
            model: 100 * statistics.mean(split["models"][model][way][METRIC] for split in splits for way in DIRECTIONS)
            for model in trained
        },
        "parameters": {model: built[stage].manifest["parameters"] for model, stage in trained.items()},
    }
