"""Nightly retraining: what starts the loop by itself, and Dagster's daemon that watches for it, with its pages."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from importlib.util import find_spec
from typing import TYPE_CHECKING

from mmflow.core.errors import MmflowError, RecipeError
from mmflow.recipe import Recipe
from pipelines.run import dagster_home

if TYPE_CHECKING:
    from dagster import ScheduleDefinition

PAGES = ("127.0.0.1", 3070)


def schedules_of(recipe: Recipe, job: str) -> list[ScheduleDefinition]:
    """What starts the job of that name by itself: the recipe's cron line, where it has one."""
    from dagster import ScheduleDefinition

    schedule = recipe.schedule
    if schedule is None:
        return []
    return [
        ScheduleDefinition("nightly", job_name=job, cron_schedule=schedule.cron, execution_timezone=schedule.timezone)
    ]


def run_scheduler(recipe: Recipe, path: str) -> None:
    """Run the daemon, and the pages on loopback, until stopped.

    Raises RecipeError if the recipe has no `schedule` or cannot run, MmflowError if the daemon ends by itself.
    """
    from mmflow.stages.loop import Loop

    if recipe.schedule is None:
        raise RecipeError(f"{path}: no schedule section; add `schedule: {{cron: '0 2 * * *'}}`")
    Loop(recipe).check()
    environment = os.environ | {"DAGSTER_HOME": dagster_home(recipe), "MMFLOW_RECIPE": path}
    commands = [[sys.executable, "-m", "dagster._daemon", "run", "-m", "pipelines.definitions"]]
    print(f"{recipe.name}: {recipe.schedule.cron} {recipe.schedule.timezone}", file=sys.stderr, flush=True)
    if find_spec("dagster_webserver"):
        host, port = PAGES
        commands.append(
            [sys.executable, "-m", "dagster_webserver", "-m", "pipelines.definitions", "-h", host, "-p", str(port)]
        )
        print(f"http://{host}:{port}", file=sys.stderr, flush=True)
    running = [subprocess.Popen(command, env=environment) for command in commands]
    try:
        running[0].wait()
    finally:
        for process in running:
            process.terminate()
        for process in running:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=20)
    raise MmflowError(f"{recipe.name}: Dagster's daemon ended with {running[0].returncode}; its log is above")
