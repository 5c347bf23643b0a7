"""Growing a dataset: old shards keep every byte, and new records are added once."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmflow.dataset.config import ShardConfig
from mmflow.dataset.grow import find_base, parts_of, read_parts
from mmflow.dataset.opened import Dataset
from mmflow.dataset.verify import verify_dataset
from mmflow.sources.config import SourceConfig
from mmflow.sources.sources import list_units
from tests.dataset.conftest import SETTINGS, Build, contents


def add_folder(directory: Path, name: str, pictures: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    (directory / name).mkdir(parents=True)
    for number in range(pictures):
        pixels = np.kron(random.integers(0, 256, (4, 4, 3), np.uint8), np.ones((8, 8, 1), np.uint8))
        Image.fromarray(pixels).save(directory / name / f"{number}.png")
        (directory / name / f"{number}.txt").write_text(f"{name} {number}")


def grow(build: Build, base: Dataset, directory: Path, folder: Path, settings: ShardConfig = SETTINGS) -> Dataset:
    """Grow the dataset like the shard stage."""
    sources = [SourceConfig(uri=str(folder), keys="strict")]
    units = list_units(sources)
    parts = parts_of(units, sources)
    assert find_base([base.uri], settings, set(parts), {}) == base
    new = [unit for unit, part in zip(units, parts, strict=True) if part not in read_parts(base.uri)]
    return build(directory, str(folder), units=new, base=base, settings=settings)


def keys(dataset: Dataset) -> set[str]:
    shards = [shard for split in dataset.splits for shard in dataset.shards(split)]
    return {key for shard in shards for key in dataset.index(shard)["key"].to_pylist()}


def test_new_files_become_new_shards_and_old_shards_keep_every_byte(build: Build, tmp_path: Path) -> None:
    add_folder(tmp_path / "photos", "cats", 30, seed=1)
    base = build(tmp_path / "first", str(tmp_path / "photos"))
    before = contents(base.uri)
    add_folder(tmp_path / "photos", "dogs", 20, seed=2)
    grown = grow(build, base, tmp_path / "second", tmp_path / "photos")
    after = contents(grown.uri)
    assert {name: after[name] for name in before if "/" in name} == {
        name: data for name, data in before.items() if "/" in name
    }
    assert len(keys(grown)) == 50
    assert keys(base) < keys(grown)
    assert grown.manifest["totals"]["records"] == 50
    assert grown.manifest["grown_from"] == base.fingerprint != grown.fingerprint
    assert verify_dataset(grown.uri) == []
    assert contents(base.uri) == before
    shutil.rmtree(base.uri)  # the grown dataset does not need its base
    assert verify_dataset(grown.uri) == []


def test_a_picture_of_the_old_dataset_is_not_added_again(build: Build, tmp_path: Path) -> None:
    add_folder(tmp_path / "photos", "cats", 12, seed=1)
    base = build(tmp_path / "first", str(tmp_path / "photos"))
    add_folder(tmp_path / "photos", "again", 12, seed=1)
    add_folder(tmp_path / "photos", "other", 5, seed=3)
    grown = grow(build, base, tmp_path / "second", tmp_path / "photos")
    assert grown.manifest["totals"]["reasons"] == {"duplicate_exact": 12}
    assert grown.manifest["totals"]["samples"] == 17
    assert verify_dataset(grown.uri) == []


def test_changed_files_or_settings_prevent_growing(build: Build, tmp_path: Path) -> None:
    add_folder(tmp_path / "photos", "cats", 6, seed=1)
    base = build(tmp_path / "first", str(tmp_path / "photos"))
    sources = [SourceConfig(uri=str(tmp_path / "photos"), keys="strict")]

    def base_for(settings: ShardConfig = SETTINGS, **inputs: str) -> Dataset | None:
        return find_base([base.uri, str(tmp_path)], settings, set(parts_of(list_units(sources), sources)), inputs)

    assert base_for() == base
    assert base_for(SETTINGS.model_copy(update={"seed": 8})) is None
    assert base_for(evaluation="another fingerprint") is None
    assert base_for(fetched="more than before") is None
    sources[0] = sources[0].model_copy(update={"license": "CC0-1.0"})
    assert base_for() is None
    sources[0] = sources[0].model_copy(update={"license": None})
    (tmp_path / "photos/cats/0.txt").write_text("another caption altogether")
    assert base_for() is None


def test_growing_with_only_rejected_records_keeps_the_samples(build: Build, tmp_path: Path) -> None:
    add_folder(tmp_path / "photos", "cats", 6, seed=1)
    base = build(tmp_path / "first", str(tmp_path / "photos"))
    (tmp_path / "photos/empty").mkdir()
    (tmp_path / "photos/empty/x.png").write_bytes(b"")
    (tmp_path / "photos/empty/x.txt").write_text("nothing to see")
    grown = grow(build, base, tmp_path / "second", tmp_path / "photos")
    assert keys(grown) == keys(base)
    assert grown.manifest["totals"]["reasons"] == {"image_truncated": 1}
    assert verify_dataset(grown.uri) == []


@pytest.mark.parametrize("lost", ["index", "shards"])
def test_a_killed_growth_is_resumed(lost: str, build: Build, tmp_path: Path) -> None:
    add_folder(tmp_path / "photos", "cats", 20, seed=1)
    base = build(tmp_path / "first", str(tmp_path / "photos"))
    add_folder(tmp_path / "photos", "dogs", 20, seed=2)
    whole = grow(build, base, tmp_path / "second", tmp_path / "photos")
    again = tmp_path / "third"
    shutil.copytree(whole.uri, again)
    (again / "manifest.json").unlink()
    newest = max((again / lost).iterdir())
    newest.unlink()
    (again / "shards/00000.tar").unlink()  # a hard link: the base has the same file
    (again / "shards/00000.tar").write_bytes(b"of a killed build")
    grown = grow(build, base, again, tmp_path / "photos")
    assert contents(grown.uri) == contents(whole.uri)
    assert json.loads((again / "manifest.json").read_text())["fingerprint"] == whole.fingerprint


def test_a_too_common_caption_stays_too_common(build: Build, tmp_path: Path) -> None:
    captions = SETTINGS.captions.model_copy(update={"max_images": 4})
    settings = SETTINGS.model_copy(update={"captions": captions})
    add_folder(tmp_path / "photos", "cats", 8, seed=1)
    for number in range(6):
        (tmp_path / f"photos/cats/{number}.txt").write_text("logo")
    base = build(tmp_path / "first", str(tmp_path / "photos"), settings=settings)
    assert base.manifest["totals"]["reasons"] == {"caption_too_common": 6}
    add_folder(tmp_path / "photos", "dogs", 3, seed=2)
    (tmp_path / "photos/dogs/0.txt").write_text("logo")
    grown = grow(build, base, tmp_path / "second", tmp_path / "photos", settings)
    assert grown.manifest["totals"]["reasons"] == {"caption_too_common": 7}
    assert grown.manifest["totals"]["samples"] == 4
