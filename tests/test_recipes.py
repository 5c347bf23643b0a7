"""Every recipe beside the quickstart's is one that a reader can run, and says beforehand what comes of it."""

from __future__ import annotations

import re
from itertools import takewhile
from pathlib import Path

import pytest

from mmflow.recipe import load_recipe
from mmflow.stages.loop import Loop

RECIPES = Path(__file__).parent.parent / "pipelines" / "recipes"
PATHS = sorted(RECIPES.glob("*.yaml"))
README = (RECIPES.parent.parent / "README.md").read_text()
MEASURED = [RECIPES / name for name in re.findall(r"\(pipelines/recipes/(\w+\.yaml)\)", README)]


@pytest.mark.parametrize("path", MEASURED, ids=lambda path: path.stem)
def test_a_recipe_of_readmes_table_opens_with_its_command_time_and_result(path: Path) -> None:
    head = "\n".join(takewhile(lambda line: line.startswith("#"), path.read_text().splitlines()))
    assert re.search(rf"^#   Command: mmflow \w+ pipelines/recipes/{path.name}\b", head, flags=re.MULTILINE)
    assert re.search(r"^#   Time:    .*\b(minutes?|seconds)\b", head, flags=re.MULTILINE)
    assert re.search(r"^#   Result:  .*\d", head, flags=re.MULTILINE)


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_a_recipe_is_sound_before_anything_is_made(path: Path) -> None:
    Loop(load_recipe(str(path))).check()


def test_recipes_of_one_workspace_share_one_dataset() -> None:
    recipes = [load_recipe(str(path)) for path in PATHS]
    drawings = [recipe for recipe in recipes if recipe.workspace.endswith("drawings")]
    assert {recipe.name for recipe in drawings} >= {"clip", "siglip", "albef", "lxmert", "captioner", "distilled"}
    first = drawings[0]
    for recipe in drawings:
        assert (recipe.workspace, recipe.corpus, recipe.shard) == (first.workspace, first.corpus, first.shard)
