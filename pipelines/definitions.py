"""What Dagster's daemon and pages load: the recipe that MMFLOW_RECIPE names."""

from __future__ import annotations

import os

from mmflow.recipe import load_recipe
from pipelines.assets import build_definitions

defs = build_definitions(load_recipe(os.environ.get("MMFLOW_RECIPE", "pipelines/quickstart.yaml")))
