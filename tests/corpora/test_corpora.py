"""The corpora of a recipe: each is written to its own folder, and all are sources of one dataset."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from mmflow.cleaning.prepare import Preparation, prepare_piece, read_piece
from mmflow.core.errors import RecipeError
from mmflow.corpora import corpora_of, sources_of
from mmflow.recipe import Recipe, load_recipe
from mmflow.sources.sources import list_units, read_unit
from mmflow.stages.loop import Loop
from tests.corpora.made import write_emoji_packages, write_files
from tests.corpora.test_openclipart import svg
from tests.imaging.picture_files import file_of

QUICKSTART = Path(__file__).parents[2] / "pipelines" / "quickstart.yaml"
CLIPARTS = 24


@pytest.fixture
def corpora(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """One corpus without splits in its records, and one with splits."""
    for number in range(CLIPARTS):
        picture = file_of(Image.new("RGB", (24, 24), (0, 10 * number, 0)))
        drawing = {f"png/shapes/{number}.png": picture, f"svg/shapes/{number}.svg": svg(f"drawing {number}")}
        write_files(tmp_path / "openclipart", drawing)
    packages = write_emoji_packages(tmp_path / "packages", monkeypatch)
    return [
        {"name": "openclipart", "package_directory": str(tmp_path / "openclipart")},
        {"name": "fluent_emoji_anim", "unseen_clip_share": 0.3, "package_directory": str(packages)},
    ]


def recipe_of(directory: Path, corpus: Any) -> Recipe:
    fields = yaml.safe_load(QUICKSTART.read_text())
    fields |= {"workspace": str(directory / "workspace"), "corpus": corpus}
    fields["shard"] = {
        "image": {"side": 16, "min_side": 8, "max_frames": 2},
        "splits": {"validation": 0.5},
        "samples_per_shard": 10,
    }
    path = directory / "recipe.yaml"
    path.write_text(yaml.safe_dump(fields))
    return load_recipe(str(path))


def corpus_identity(recipe: Recipe) -> str:
    return Loop(recipe).plan("corpus").identity


def test_a_list_of_one_corpus_has_the_identity_of_that_corpus(tmp_path: Path) -> None:
    """A workspace that already has the quickstart's drawings does not draw them again."""
    quickstart = yaml.safe_load(QUICKSTART.read_text())["corpus"]
    assert corpus_identity(recipe_of(tmp_path, quickstart)) == "3065335b53eaf383"
    assert corpus_identity(recipe_of(tmp_path, [quickstart])) == "3065335b53eaf383"
    assert corpus_identity(recipe_of(tmp_path, [quickstart, {"name": "openclipart"}])) != "3065335b53eaf383"


def test_the_package_directory_is_not_part_of_the_identity(tmp_path: Path, corpora: list[dict[str, Any]]) -> None:
    elsewhere = [{**corpus, "package_directory": "/elsewhere"} for corpus in corpora]
    assert corpus_identity(recipe_of(tmp_path, corpora)) == corpus_identity(recipe_of(tmp_path, elsewhere))


def test_several_corpora_are_written_to_their_own_folders(tmp_path: Path, corpora: list[dict[str, Any]]) -> None:
    pytest.importorskip("emoji")
    whole = Loop(recipe_of(tmp_path, corpora)).run("corpus")
    assert whole.manifest["records"] == CLIPARTS + 11
    folders = sorted(path.name for path in Path(whole.uri).iterdir() if path.is_dir())
    assert folders == ["fluent_emoji_anim", "openclipart"]
    # A rerun after a kill between the two only writes the second, with the same result.
    again = recipe_of(tmp_path, corpora).model_copy(update={"workspace": str(tmp_path / "again")})
    place = Path(Loop(again).plan("corpus").directory(again.workspace))
    place.mkdir(parents=True)
    (Path(whole.uri) / "openclipart").rename(place / "openclipart")
    (tmp_path / "openclipart").rename(tmp_path / "gone")
    assert Loop(again).run("corpus").fingerprint == whole.fingerprint


def test_records_of_several_corpora_keep_their_splits(tmp_path: Path, corpora: list[dict[str, Any]]) -> None:
    pytest.importorskip("emoji")
    recipe = recipe_of(tmp_path, corpora)
    corpus, shard = Loop(recipe).run("corpus"), recipe.shard
    sources = sources_of(corpus.uri, corpora_of(recipe.corpus or []))
    preparation = Preparation(
        dataset=str(tmp_path / "dataset"),
        image=shard.image,
        captions=shard.captions,
        splits=shard.splits,
        group_by=None,
        fetched=None,
    )
    tables = [table for unit in list_units(sources) for table in read_unit(unit, sources[unit.source])]
    pieces = [read_piece(prepare_piece(table, preparation)["piece"]).to_pylist() for table in tables]
    rows = [row for piece in pieces for row in piece]
    assert not [row["detail"] for row in rows if row["reason"] is not None]

    lines = Path(corpus.uri, "fluent_emoji_anim", "records.jsonl").read_text().splitlines()
    named = {record["key"]: record["split"] for record in map(json.loads, lines)}
    assert {"train", "unseen_clips"} <= set(named.values())
    assert {row["key"]: row["split"] for row in rows if row["key"] in named} == named
    assert {len(row["frames"]) for row in rows if row["key"] in named} == {1}  # after the first, of two
    drawings = [row["split"] for row in rows if row["key"] not in named]
    assert len(drawings) == CLIPARTS
    assert set(drawings) == {"train", "validation"}
    licenses = Counter(json.loads(row["metadata"])["license"] for row in rows)
    assert licenses == {"CC-PDDC": CLIPARTS, "MIT": len(named)}


@pytest.mark.parametrize(
    ("corpus", "message"),
    [
        ([], r"corpus: .* at least 1"),
        ([{"name": "openmoji"}, {"name": "openmoji"}], r"corpus: openmoji is named twice"),
        ([{"name": "easy_vqa"}, {"name": "fashion_mnist"}], r"corpus: easy_vqa and fashion_mnist .*mixture"),
        ([{"name": "openclipart", "image_pixels": 9}], r"corpus\.0\.image_pixels: unknown key"),
        ([{"name": "openmoji", "image_pixels": 9}], r"corpus\.0\.image_pixels: .*greater"),
        ([{"name": "openmoj"}], r"corpus\.0\.name: 'openmoj' .*'openmoji'"),
        ([{}], r"corpus\.0\.name: missing"),
        ({"name": "openclipart", "image_pixels": 64}, r"corpus\.image_pixels: unknown key"),
        ({"name": "openmoji", "imagepixels": 64}, r"corpus\.imagepixels: unknown key; did you mean 'image_pixels'"),
        ({"name": "openclip"}, r"corpus\.name: 'openclip' .*'openclipart'"),
        ({}, r"corpus\.name: missing"),
    ],
)
def test_a_mistake_in_a_corpus_is_reported_with_its_key(tmp_path: Path, corpus: Any, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        recipe_of(tmp_path, corpus)
