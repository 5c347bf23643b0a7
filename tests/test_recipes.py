"""Every recipe beside the quickstart's is one that a reader can run, and says beforehand what comes of it."""

from __future__ import annotations

import re
from itertools import takewhile
from pathlib import Path

import pytest
from PIL import Image

from mmflow.recipe import load_recipe
from mmflow.stages import Loop
from tests.tiny import tiny_fields, write_recipe

RECIPES = Path(__file__).parent.parent / "pipelines" / "recipes"
PATHS = sorted(RECIPES.glob("*.yaml"))
README = (RECIPES.parent.parent / "README.md").read_text()
SVG = """<svg xmlns="http://www.w3.org/2000/svg"><metadata><Work xmlns="http://web.resource.org/cc/">
<title>{title}</title><language>en</language></Work></metadata></svg>"""


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_a_recipe_opens_with_its_command_time_and_result(path: Path) -> None:
    head = "\n".join(takewhile(lambda line: line.startswith("#"), path.read_text().splitlines()))
    assert re.search(rf"^#   Command: mmflow \w+ pipelines/recipes/{path.name}\b", head, flags=re.MULTILINE)
    assert re.search(r"^#   Time:    .*\b(minutes?|seconds)\b", head, flags=re.MULTILINE)
    assert re.search(r"^#   Result:  .*\d", head, flags=re.MULTILINE)


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_a_recipe_is_sound_before_anything_is_made(path: Path) -> None:
    Loop(load_recipe(str(path))).check()


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_readme_names_a_recipe(path: Path) -> None:
    assert f"`{path.name}`" in README or f"pipelines/recipes/{path.name}" in README


def test_recipes_of_one_workspace_share_one_dataset() -> None:
    recipes = [load_recipe(str(path)) for path in PATHS]
    drawings = [recipe for recipe in recipes if recipe.workspace.endswith("drawings")]
    assert {recipe.name for recipe in drawings} >= {"clip", "siglip", "albef", "captioner"}
    first = drawings[0]
    for recipe in drawings:
        assert (recipe.workspace, recipe.corpus, recipe.shard) == (first.workspace, first.corpus, first.shard)


def test_one_command_shards_a_demonstration_corpus_on_a_fresh_machine(tmp_path: Path, ray_cluster: None) -> None:
    packages = tmp_path / "openclipart"
    for kind in ("png", "svg"):
        (packages / kind / "shapes").mkdir(parents=True)
    for colour in ("red", "blue"):
        Image.new("RGB", (32, 32), colour).save(packages / "png" / "shapes" / f"{colour}.png")
        (packages / "svg" / "shapes" / f"{colour}.svg").write_text(SVG.format(title=f"a {colour} square"))
    fields = tiny_fields(tmp_path / "workspace", "") | {
        "corpus": [{"name": "openclipart", "package_directory": str(packages)}],
        "shard": {"image": {"side": 32}},
    }
    dataset = Loop(load_recipe(write_recipe(tmp_path / "recipe.yaml", fields))).run("shard")
    assert dataset.manifest["totals"]["samples"] == 2
