"""Stage `promote`: the candidate is registered and called challenger; the gate decides whether it becomes champion.

Both are judged on the same rows: a champion's own figures may come from another dataset, so it is examined again.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmflow.core.artifacts import content_hash
from mmflow.core.errors import CorruptArtifactError, MissingArtifactError, TrackingError
from mmflow.core.storage import exists, join, read_json, write_json
from mmflow.evaluation.config import EvaluateConfig
from mmflow.evaluation.stage import metrics_of, metrics_of_package
from mmflow.models.package import read_package
from mmflow.registry.config import PromoteConfig
from mmflow.registry.gate import decide
from mmflow.registry.versions import CHAMPION, Version, champion, register, set_alias

CHALLENGER = "challenger"
DECISION = "decision.json"


def promote_candidate(
    uri: str,
    *,
    tracking: str,
    settings: PromoteConfig,
    evaluation: str,
    package: str,
    dataset: str,
    examination: EvaluateConfig,
) -> Mapping[str, Any]:
    """Register, judge, and move the alias where the gate holds; the manifest's fields.

    The decision is written before the alias moves: a process killed between the two finds it, and moves the alias
    without judging the candidate against itself. Raises TrackingError where the registry cannot be reached.
    """
    card = read_package(package)
    metrics = metrics_of(evaluation, settings.candidate)
    version = register(
        settings.model,
        package,
        digest=card.digest,
        metrics=metrics,
        tags={f"mmflow.{name}": str(value) for name, value in card.card["lineage"].items() if name != "inputs"},
        uri=tracking,
    )
    if not exists(join(uri, DECISION)):
        held = champion(settings.model, uri=tracking)
        write_json(join(uri, DECISION), _decide(settings, metrics, version, held, dataset, examination))
    decision: dict[str, Any] = read_json(join(uri, DECISION))
    why = f"promotion {uri.rsplit('/', 1)[-1]}"
    set_alias(settings.model, CHALLENGER, version, why, uri=tracking)
    if decision["decision"] == "promoted":
        set_alias(settings.model, CHAMPION, version, "; ".join(decision["reasons"]), uri=tracking)
    return {"fingerprint": content_hash(decision), **decision}


def _decide(
    settings: PromoteConfig,
    metrics: Mapping[str, float],
    version: int,
    held: Version | None,
    dataset: str,
    examination: EvaluateConfig,
) -> dict[str, Any]:
    outcome = {"model": settings.model, "version": version, "champion_before": held.version if held else None}
    if held is not None and held.version == version:
        return {**outcome, "decision": "promoted", "reasons": ["it is the champion already"], "checks": []}
    champion_metrics = None
    if held is not None:
        try:
            champion_metrics = metrics_of_package(held.package_uri, dataset, examination)
        except (MissingArtifactError, CorruptArtifactError) as error:
            raise TrackingError(
                f"{settings.model}: the champion, version {held.version}, cannot be examined beside the challenger "
                f"({error}); restore its package, or `mmflow models rollback {settings.model}`"
            ) from error
    decision = decide(
        metrics,
        champion_metrics,
        metric=settings.metric,
        min_gain=settings.min_gain,
        floors=settings.floors,
        max_drop=settings.max_drop,
    )
    return {
        **outcome,
        "decision": "promoted" if decision.promoted else "refused",
        "reasons": list(decision.reasons),
        "checks": [
            {"name": check.name, "challenger": check.value, "threshold": check.threshold, "passed": check.passed}
            for check in decision.checks
        ],
    }
