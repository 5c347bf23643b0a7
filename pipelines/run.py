"""Run a recipe's loop now, in this process, as a Dagster run that its pages can show afterwards."""

from __future__ import annotations

import os
import sys

from mmflow.core.errors import MmflowError
from mmflow.core.storage import join, local_path
from mmflow.recipe import Recipe

DAGSTER_YAML = """\
# Runs, events and schedules of this workspace, on SQLite. Set DAGSTER_HOME to keep them elsewhere.
telemetry:
  enabled: false
"""


def dagster_home(recipe: Recipe) -> str:
    """DAGSTER_HOME, or a folder of the workspace; created if it is not there."""
    home = local_path(os.environ.get("DAGSTER_HOME") or join(recipe.workspace, "dagster"))
    if home is None:
        raise MmflowError(f"{recipe.workspace}: Dagster's records need a local disk; set DAGSTER_HOME")
    home.mkdir(parents=True, exist_ok=True)
    if not (home / "dagster.yaml").exists():
        (home / "dagster.yaml").write_text(DAGSTER_YAML)
    os.environ["DAGSTER_HOME"] = str(home)
    return str(home)


def run_pipeline(recipe: Recipe) -> None:
    """Run every stage that is not committed yet, write the report, and print its path last.

    Raises the MmflowError of a stage that fails. What was committed before stays, and a rerun continues from there.
    """
    from dagster import DagsterInstance

    from mmflow.stages.loop import Loop
    from pipelines.assets import JOB, build_definitions, cause_of

    Loop(recipe).check()
    dagster_home(recipe)
    print(f"{recipe.name}: {recipe.workspace}", file=sys.stderr, flush=True)
    job = build_definitions(recipe).resolve_job_def(JOB)
    quiet = {"loggers": {"console": {"config": {"log_level": "CRITICAL"}}}}
    with DagsterInstance.get() as instance:
        try:
            job.execute_in_process(run_config=quiet, instance=instance)
        except Exception as error:
            cause = cause_of(error)
            if cause is None:
                raise
            raise cause from error
    page = join(recipe.workspace, "report.html")
    print(local_path(page) or page)
