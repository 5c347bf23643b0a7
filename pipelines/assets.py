"""A recipe's loop as Dagster assets: one a stage, and the report. Dagster orders, retries and shows them; a stage's
manifest decides whether there is work to do."""

from __future__ import annotations

import sys
from typing import Any

from dagster import (
    AssetsDefinition,
    Definitions,
    MaterializeResult,
    asset,
    define_asset_job,
    in_process_executor,
)

from mmflow.core.errors import MmflowError
from mmflow.recipe import Recipe
from mmflow.report.figures import write_report
from mmflow.stages.loop import STAGES, Loop
from pipelines.schedule import schedules_of

JOB = "loop"
# Stages share one embedded Ray and the machine's few cores; the multiprocess executor would start a Ray for each.
EXECUTOR = in_process_executor


def build_definitions(recipe: Recipe) -> Definitions:
    """The recipe's assets, the job `loop` that runs all of them, and its schedules."""
    loop = Loop(recipe)

    @asset(name="report", deps=list(loop.stages), description="One page about the whole loop.", group_name=JOB)
    def report() -> MaterializeResult[Any]:
        return MaterializeResult(metadata={"uri": write_report(loop)})

    job = define_asset_job(JOB, executor_def=EXECUTOR)
    assets = [*(_stage_asset(loop, name) for name in loop.stages), report]
    return Definitions(assets=assets, jobs=[job], schedules=schedules_of(recipe, JOB), executor=EXECUTOR)


def _stage_asset(loop: Loop, name: str) -> AssetsDefinition:
    @asset(name=name, deps=list(loop.inputs_of(name)), description=STAGES[name].purpose, group_name=JOB)
    def run_stage() -> MaterializeResult[Any]:
        artifact = loop.run(name)
        summary = STAGES[name].summary(artifact.manifest)
        seconds = f"{artifact.build['seconds']:6.1f} s" if artifact.built else "  reused"
        print(f"{name:<9} {seconds}  {summary}", file=sys.stderr, flush=True)
        metadata: dict[str, Any] = {"uri": artifact.uri, "built": artifact.built, "summary": summary}
        return MaterializeResult(metadata=metadata)

    return run_stage


def cause_of(error: BaseException) -> MmflowError | None:
    """The stage's own error, out of Dagster's wrapping."""
    waiting: list[BaseException | None] = [error]
    seen: set[int] = set()  # causes can form a ring
    while waiting:
        cause = waiting.pop()
        if isinstance(cause, MmflowError):
            return cause
        if cause is not None and id(cause) not in seen:
            seen.add(id(cause))
            waiting += [cause.__context__, cause.__cause__]
    return None
