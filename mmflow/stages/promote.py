"""Stage `promote`: register the candidate as challenger; the gate decides whether it becomes champion.

Both are judged on the same rows: a champion's own metrics may come from another dataset, so it is examined again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from mmflow.core.artifacts import Stage, content_hash
from mmflow.core.errors import CorruptArtifactError, MissingArtifactError, TrackingError
from mmflow.core.progress import progress
from mmflow.core.storage import exists, join, read_json, write_json
from mmflow.stages import Inputs, LoopStage, Manifest
from mmflow.stages.evaluate import MODELS, RESULTS
from mmflow.stages.training import PACKAGE

if TYPE_CHECKING:
    from mmflow.recipe import Recipe

CHALLENGER = "challenger"
DECISION = "decision.json"


def _plan(recipe: Recipe, inputs: Inputs) -> Stage:
    from mmflow.registry.tracking import tracking_uri, without_credentials

    tracking = tracking_uri(recipe.workspace)
    # A registry in the workspace moves with it. One elsewhere has versions of its own, so it is part of the identity.
    registry = "workspace" if tracking.startswith("sqlite:") else without_credentials(tracking)
    return Stage(
        name="promote",
        kind="promotion",
        version=1,
        settings=recipe.promote.identity() | {"registry": registry},
        inputs={stage: artifact.fingerprint for stage, artifact in inputs.items()},
        build=lambda uri: _promote(uri, recipe, inputs, tracking),
    )


def _promote(uri: str, recipe: Recipe, inputs: Inputs, tracking: str) -> Manifest:
    """Register, judge, and move the alias if the gate holds; the manifest's fields.

    The decision is written before the alias moves: a process killed between the two finds it, and moves the alias
    without judging the candidate against itself. Raises TrackingError if the registry cannot be reached.
    """
    from mmflow.evaluation.evaluate import metrics_of
    from mmflow.models.package import read_package
    from mmflow.registry.versions import CHAMPION, register, set_alias

    settings = recipe.promote
    package = read_package(inputs[MODELS[settings.candidate]].file(PACKAGE))
    metrics = metrics_of(inputs["evaluate"].uri, settings.candidate)
    version = register(
        settings.model,
        package.uri,
        digest=package.digest,
        metrics=metrics,
        tags={f"mmflow.{name}": str(value) for name, value in package.card["lineage"].items() if name != "inputs"},
        uri=tracking,
    )
    if not exists(join(uri, DECISION)):
        decision = _decide(recipe, metrics, version, tracking, inputs["shard"].uri)
        write_json(join(uri, DECISION), decision)
    decision = read_json(join(uri, DECISION))
    set_alias(settings.model, CHALLENGER, version, f"promotion {uri.rsplit('/', 1)[-1]}", uri=tracking)
    if decision["decision"] == "promoted":
        set_alias(settings.model, CHAMPION, version, "; ".join(decision["reasons"]), uri=tracking)
    return {"fingerprint": content_hash(decision), **decision}


def _decide(recipe: Recipe, metrics: Mapping[str, float], version: int, tracking: str, dataset: str) -> dict[str, Any]:
    from mmflow.cluster.local import ensure_ray
    from mmflow.evaluation.evaluate import metrics_of_package
    from mmflow.registry.gate import decide
    from mmflow.registry.versions import champion

    settings, examination = recipe.promote, recipe.evaluate
    holder = champion(settings.model, uri=tracking)
    outcome = {"model": settings.model, "version": version, "champion_before": holder.version if holder else None}
    if holder is not None and holder.version == version:
        return {**outcome, "decision": "promoted", "reasons": ["it is the champion already"], "checks": []}
    champion_metrics = None
    if holder is not None:
        try:
            ensure_ray(num_cpus=(examination.num_workers or 1) * examination.cpus_per_worker)
            store = join(recipe.workspace, RESULTS)
            with progress("promote") as report:
                champion_metrics = metrics_of_package(holder.package_uri, dataset, examination, store, report)
        except (MissingArtifactError, CorruptArtifactError) as error:
            raise TrackingError(
                f"{settings.model}: the champion, version {holder.version}, cannot be compared with the challenger "
                f"({error}); restore its package, or `mmflow models rollback {settings.model}`"
            ) from error
    decision = decide(settings, metrics, champion_metrics)
    return {
        **outcome,
        "decision": "promoted" if decision.promoted else "refused",
        "reasons": list(decision.reasons),
        "checks": [asdict(check) for check in decision.checks],
    }


PROMOTE = LoopStage(
    purpose="Register the candidate in MLflow, and make it champion if the gate holds.",
    inputs=("shard", "pretrain", "distill", "evaluate"),
    plan=_plan,
    summary=lambda manifest: f"version {manifest['version']} of {manifest['model']} {manifest['decision']}",
)
