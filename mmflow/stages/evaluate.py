"""Stage `evaluate`: examine the teacher, the student and an untrained model on the held-out splits."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mmflow.core.artifacts import Stage
from mmflow.core.progress import progress
from mmflow.core.storage import join
from mmflow.stages import Inputs, LoopStage, Manifest
from mmflow.stages.training import PACKAGE, sections

if TYPE_CHECKING:
    from mmflow.recipe import Recipe

RESULTS = "results"  # the folder of a workspace that holds what models said of shards
MODELS = {"teacher": "pretrain", "student": "distill"}  # model → the stage that trains it


def _check(recipe: Recipe) -> None:
    from mmflow.evaluation.config import check_evaluation

    check_evaluation(recipe.evaluate, sections(recipe))


def _plan(recipe: Recipe, inputs: Inputs) -> Stage:
    def build(uri: str) -> Manifest:
        from mmflow.cluster.local import ensure_ray
        from mmflow.evaluation.evaluate import evaluate_models

        ensure_ray(num_cpus=(recipe.evaluate.num_workers or 1) * recipe.evaluate.cpus_per_worker)
        with progress("evaluate") as report:
            return evaluate_models(
                uri,
                dataset=inputs["shard"].uri,
                packages={model: inputs[stage].file(PACKAGE) for model, stage in MODELS.items() if stage in inputs},
                settings=recipe.evaluate,
                seed=recipe.seed,
                store=join(recipe.workspace, RESULTS),
                progress=report,
            )

    return Stage(
        name="evaluate",
        kind="evaluation",
        version=4,
        settings=recipe.evaluate.identity() | {"seed": recipe.seed},
        inputs={stage: artifact.fingerprint for stage, artifact in inputs.items()},
        build=build,
    )


EVALUATE = LoopStage(
    purpose="Examine teacher, student and an untrained model on held-out rows.",
    inputs=("shard", "pretrain", "distill"),
    check=_check,
    plan=_plan,
    summary=lambda manifest: f"{', '.join(manifest['models'])} on {', '.join(manifest['splits'])}",
)
