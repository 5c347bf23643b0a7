"""A recipe's loop as Dagster assets, one a stage, and a report at the end. Dagster orders, retries and shows them;
whether a stage has anything to do is for its manifest to say."""

from __future__ import annotations

import sys
import time
from typing import Any

from dagster import (
    AssetsDefinition,
    Definitions,
    MaterializeResult,
    ScheduleDefinition,
    asset,
    define_asset_job,
    in_process_executor,
)

from mmflow.core.errors import MmflowError
from mmflow.recipe import Recipe
from mmflow.report.run import write_report
from mmflow.stages.loop import STAGES, Loop

JOB = "loop"
# Stages share one embedded Ray and the machine's few cores; the multiprocess executor would start a Ray for each.
EXECUTOR = in_process_executor


def build_definitions(recipe: Recipe, cron: str | None = None, timezone: str = "UTC") -> Definitions:
    """The recipe's assets, the job `loop` of all of them, and a nightly schedule where there is a cron line."""
    loop = Loop(recipe)
    assets = [_stage_asset(loop, name) for name in loop.stages] + [_report_asset(loop)]
    job = define_asset_job(JOB, executor_def=EXECUTOR)
    schedules = []
    if cron:
        schedules.append(ScheduleDefinition("nightly", job=job, cron_schedule=cron, execution_timezone=timezone))
    return Definitions(assets=assets, jobs=[job], schedules=schedules, executor=EXECUTOR)


def _stage_asset(loop: Loop, name: str) -> AssetsDefinition:
    @asset(name=name, deps=list(loop.inputs_of(name)), description=STAGES[name].purpose, group_name=JOB)
    def run_stage() -> MaterializeResult[Any]:
        began = time.monotonic()
        artifact = loop.run(name)
        summary = STAGES[name].summary(artifact.manifest)
        seconds = f"{time.monotonic() - began:6.1f} s" if artifact.built else "  reused"
        print(f"{name:<9} {seconds}  {summary}", file=sys.stderr, flush=True)
        metadata: dict[str, Any] = {"uri": artifact.uri, "built": artifact.built, "summary": summary}
        return MaterializeResult(metadata=metadata, data_version=None)

    return run_stage


def _report_asset(loop: Loop) -> AssetsDefinition:
    @asset(name="report", deps=list(loop.stages), description="One page of the whole loop.", group_name=JOB)
    def run_report() -> MaterializeResult[Any]:
        return MaterializeResult(metadata={"uri": write_report(loop)})

    return run_report


def cause_of(error: BaseException) -> MmflowError | None:
    """The typed error that a stage raised, out of Dagster's wrapping."""
    to_see: list[BaseException | None] = [error]
    seen: set[int] = set()  # causes can go in a ring
    while to_see:
        each = to_see.pop()
        if isinstance(each, MmflowError):
            return each
        if each is not None and id(each) not in seen:
            seen.add(id(each))
            to_see += [each.__context__, each.__cause__]
    return None
