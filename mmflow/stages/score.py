"""Stage `score`: embeddings, best class and image–caption similarity for every row of the dataset, by the champion."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mmflow.core.artifacts import Stage
from mmflow.core.errors import MissingArtifactError
from mmflow.core.progress import progress
from mmflow.stages import Inputs, LoopStage, Manifest
from mmflow.stages.evaluate import MODELS
from mmflow.stages.training import sections

if TYPE_CHECKING:
    from mmflow.recipe import Recipe


def _absent(recipe: Recipe) -> str:
    model = sections(recipe)[MODELS[recipe.promote.candidate]].model
    if "embeddings" in model.gives:
        return ""
    reason = "model.video is tight" if model.tight else "model.embedding_width is null"
    return f"the candidate has no shared embedding space: its {reason}"


def _plan(recipe: Recipe, inputs: Inputs) -> Stage:
    from mmflow.registry.tracking import tracking_uri
    from mmflow.registry.versions import champion

    model = champion(recipe.promote.model, uri=tracking_uri(recipe.workspace))
    if model is None:
        raise MissingArtifactError(f"{recipe.promote.model}: no version has the champion alias; promote one first")
    zero_shot = recipe.evaluate.zero_shot
    prompts = zero_shot.texts if zero_shot else {}
    language = recipe.evaluate.languages[0]

    def build(uri: str) -> Manifest:
        from mmflow.cluster.local import ensure_ray
        from mmflow.inference.score import score_dataset

        ensure_ray(num_cpus=recipe.score.num_workers * recipe.score.cpus_per_worker)
        with progress("score") as report:
            return score_dataset(
                uri,
                dataset=inputs["shard"].uri,
                package=model.package_uri,
                version=model.version,
                prompts=prompts,
                language=language,
                settings=recipe.score,
                progress=report,
            )

    return Stage(
        name="score",
        kind="scores",
        version=1,
        settings=recipe.score.identity() | {"prompts": prompts, "language": language},
        inputs={"shard": inputs["shard"].fingerprint, "model": model.digest},
        build=build,
    )


SCORE = LoopStage(
    purpose="Score the whole dataset with the champion: embeddings, best class, similarity.",
    inputs=("shard", "promote"),
    absent=_absent,
    plan=_plan,
    summary=lambda manifest: f"{manifest['totals']['rows']:,} rows by version {manifest['version']}",
)
