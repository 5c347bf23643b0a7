"""What Dagster's daemon and pages load: the recipe named by MMFLOW_RECIPE."""

from __future__ import annotations

import os

from mmflow.recipe import load_recipe
from pipelines.assets import build_definitions

_recipe = load_recipe(os.environ.get("MMFLOW_RECIPE", "pipelines/quickstart.yaml"))
defs = build_definitions(_recipe, *((_recipe.schedule.cron, _recipe.schedule.timezone) if _recipe.schedule else ()))
