"""Selection over pieces: which duplicate record is kept, and why the others are rejected."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmflow.cleaning import select
from mmflow.cleaning.captions import caption_hash
from mmflow.cleaning.config import DuplicatesConfig
from mmflow.cleaning.duplicates import shingles, similarity
from mmflow.cleaning.prepare import PIECE
from mmflow.cleaning.select import select_records
from mmflow.core.errors import CorruptArtifactError, MissingArtifactError, MisuseError
from mmflow.dataset.format import SCHEMA

pytestmark = pytest.mark.usefixtures("ray_cluster")
NOTHING = DuplicatesConfig(exact=False)


def record(place: int, **fields: Any) -> dict[str, Any]:
    """A row of a piece, unlike any other unless the fields say so."""
    texts = fields.pop("texts", [f"caption number {place}"])
    return {
        "place": place,
        "source": f"records.jsonl:{place}",
        "key": f"key-{place}",
        "split": "train",
        "captions": [{"language": "en", "text": text} for text in texts],
        "caption_hashes": [caption_hash(text) for text in texts],
        "pixel_hash": 2**63 + place,
        "perceptual_hash": place * 0x9E3779B97F4A7C15 % 2**64,
        **fields,
    }


def write_pieces(folder: Path, rows: Sequence[dict[str, Any]], num_pieces: int = 2) -> list[str]:
    folder.mkdir(parents=True, exist_ok=True)
    uris = []
    for number in range(num_pieces):
        uris.append(str(folder / f"{number}.parquet"))
        pq.write_table(pa.Table.from_pylist(list(rows[number::num_pieces]), PIECE), uris[-1])
    return uris


def write_shard(dataset: Path, rows: Sequence[dict[str, Any]], name: str = "00000") -> str:
    """An index of the rows, and a tar with their captions at the offsets of the index."""
    (dataset / "index").mkdir(parents=True, exist_ok=True)
    (dataset / "shards").mkdir(exist_ok=True)
    bodies = [row["captions"][0]["text"].encode() for row in rows]
    entries = []
    for number, row in enumerate(rows):
        place = {"txt_offset": len(b"".join(bodies[:number])), "txt_bytes": len(bodies[number])}
        entries.append({name: row[name] for name in SCHEMA.names if name in row} | place)
    (dataset / f"shards/{name}.tar").write_bytes(b"".join(bodies))
    uri = str(dataset / f"index/{name}.parquet")
    pq.write_table(pa.Table.from_pylist(entries, SCHEMA), uri)
    return uri


def verdicts(
    pieces: Sequence[str], duplicates: DuplicatesConfig = NOTHING, **settings: Any
) -> dict[int, tuple[str, str]]:
    """Place → (reason, detail) of the rejected rows."""
    selection = select_records(pieces, duplicates=duplicates, **{"max_images": None, **settings})
    rows = selection.rejected.to_pylist()
    assert [row["place"] for row in rows] == sorted({row["place"] for row in rows})
    return {row["place"]: (row["reason"], row["detail"]) for row in rows}


def test_the_first_record_of_a_repeated_key_is_kept(tmp_path: Path) -> None:
    rows = [record(0, key="a", reason="image_missing"), record(7, key="a", split="test"), record(5, key="a"), record(9)]
    rejections = verdicts(write_pieces(tmp_path, rows))
    assert rejections == {7: ("key_repeated", "an earlier record has this key (records.jsonl:5)")}


def test_a_record_with_the_key_of_a_known_sample_is_rejected(tmp_path: Path) -> None:
    known = write_shard(tmp_path / "old", [record(0, key="a")])
    rejections = verdicts(write_pieces(tmp_path, [record(7, key="a"), record(9)]), known=[known])
    assert rejections == {7: ("key_repeated", "a sample of the dataset has this key")}


def test_common_captions_are_listed_and_records_with_no_other_are_rejected(tmp_path: Path) -> None:
    rows = [record(place, texts=["Gramastar"]) for place in range(3)]
    rows += [
        record(3, texts=["gramastar", "a red fox"]),
        record(4, texts=["a fox", "a fox"]),
        record(5, texts=["a fox"]),
    ]
    pieces = write_pieces(tmp_path, rows)
    selection = select_records(pieces, duplicates=NOTHING, max_images=2)
    assert selection.common_captions.tolist() == [caption_hash("gramastar")]
    assert selection.rejected.to_pylist() == [
        {"place": place, "reason": "caption_too_common", "detail": "4 images have this caption"} for place in range(3)
    ]
    assert not select_records(pieces, duplicates=NOTHING, max_images=4).common_captions.size


def test_caption_counts_include_the_dataset_but_not_repeated_keys(tmp_path: Path) -> None:
    rows = [record(place, key="same", texts=["a fox"]) for place in range(3)] + [record(3, texts=["a fox"])]
    known = write_shard(tmp_path / "old", [record(0, texts=["a fox"])])
    pieces = write_pieces(tmp_path, rows)
    assert {reason for reason, _ in verdicts(pieces, max_images=2).values()} == {"key_repeated"}
    grown = verdicts(pieces, max_images=2, known=[known])
    assert grown[3] == ("caption_too_common", "3 images have this caption")


def test_among_equal_pixels_held_out_records_are_kept_over_train(tmp_path: Path) -> None:
    rows = [record(place, pixel_hash=7) for place in range(3)] + [record(3, pixel_hash=7, split="test"), record(4)]
    rejections = verdicts(write_pieces(tmp_path, rows), DuplicatesConfig())
    assert rejections == dict.fromkeys(range(3), ("duplicate_exact", "the same pixels as key-3"))


def test_near_duplicates_are_rejected_for_a_survivor_and_do_not_chain(tmp_path: Path) -> None:
    hashes = [0b0, 0b111, 0b111111, 0b0, 2**63 - 1]
    rows = [record(place, perceptual_hash=hash) for place, hash in enumerate(hashes)]
    rejections = verdicts(write_pieces(tmp_path, rows), DuplicatesConfig(exact=False, radius=3))
    assert rejections == {1: ("duplicate_near", "3 bits from key-0"), 3: ("duplicate_near", "0 bits from key-0")}


def test_a_duplicate_of_a_rejected_record_names_the_survivor(tmp_path: Path) -> None:
    rows = [record(0, perceptual_hash=1), record(1, perceptual_hash=3), record(2, perceptual_hash=3)]
    rejections = verdicts(write_pieces(tmp_path, rows), DuplicatesConfig(exact=False, radius=1))
    assert rejections == {1: ("duplicate_near", "1 bits from key-0"), 2: ("duplicate_near", "1 bits from key-0")}
    rows = [record(0, texts=["a b c d e f"]), record(1, texts=["A b c d e g"]), record(2, texts=["a b c d e g"])]
    rejections = verdicts(write_pieces(tmp_path, rows), DuplicatesConfig(exact=False, caption_similarity=0.6))
    assert rejections == dict.fromkeys((1, 2), ("duplicate_caption", "caption 60% like that of key-0"))


def test_similar_captions_are_rejected_unless_they_are_common(tmp_path: Path) -> None:
    rows = [
        record(0, texts=["A red fox asleep in the snow, at dawn"]),
        record(1, texts=["a red fox asleep in the snow at dawn"]),
        record(2, texts=["a red fox awake in the snow at dusk"]),
        *(record(place, texts=["untitled work", f"number {place} of the series"]) for place in range(3, 6)),
    ]
    settings = DuplicatesConfig(exact=False, caption_similarity=0.8)
    pieces = write_pieces(tmp_path, rows)
    assert verdicts(pieces, settings, max_images=2) == {1: ("duplicate_caption", "caption 100% like that of key-0")}
    assert set(verdicts(pieces, settings)) == {1, 4, 5}


def test_duplicates_of_an_evaluation_sample_are_rejected_in_every_split(tmp_path: Path) -> None:
    text = "a red fox asleep in the snow at dawn"
    sample = record(0, key="e", pixel_hash=7, perceptual_hash=0, texts=[text])
    evaluation = write_shard(tmp_path / "evaluated", [record(1), sample])
    known = write_shard(tmp_path / "old", [record(0, key="k", pixel_hash=7, perceptual_hash=0, texts=[text])])
    rows = [
        record(10, split="test", pixel_hash=7),
        record(11, perceptual_hash=0b11),
        record(12, texts=["A red fox asleep in the snow, at dawn"]),
        record(13, key="e"),
        record(14),
    ]
    settings = DuplicatesConfig(radius=2, caption_similarity=0.8)
    pieces = write_pieces(tmp_path, rows)
    assert verdicts(pieces, settings, evaluation=[evaluation], known=[known]) == {
        10: ("duplicate_of_evaluation", "the same pixels as e"),
        11: ("duplicate_of_evaluation", "2 bits from e"),
        12: ("duplicate_of_evaluation", "caption 100% like that of e"),
    }
    assert verdicts(pieces, settings, known=[known]) == {
        10: ("duplicate_exact", "the same pixels as k"),
        11: ("duplicate_near", "2 bits from k"),
        12: ("duplicate_caption", "caption 100% like that of k"),
    }


def test_evaluation_samples_without_hashes_are_an_error(tmp_path: Path) -> None:
    evaluation = write_shard(tmp_path / "adopted", [record(0, pixel_hash=None)])
    pieces = write_pieces(tmp_path, [record(1)])
    with pytest.raises(MisuseError, match="1 samples without pixel_hash"):
        select_records(pieces, duplicates=DuplicatesConfig(), max_images=None, evaluation=[evaluation])
    with pytest.raises(MisuseError, match="compares nothing"):
        select_records(pieces, duplicates=NOTHING, max_images=None, evaluation=[evaluation])


def test_an_unreadable_piece_is_named_in_the_error(tmp_path: Path) -> None:
    pieces = write_pieces(tmp_path, [record(0), record(1)])
    (tmp_path / "1.parquet").write_bytes(b"PAR1 but no more")
    with pytest.raises(CorruptArtifactError, match=r"1\.parquet"):
        select_records(pieces, duplicates=NOTHING, max_images=None)
    (tmp_path / "1.parquet").unlink()
    with pytest.raises(MissingArtifactError, match=r"1\.parquet"):
        select_records(pieces, duplicates=NOTHING, max_images=None)


def crowd(seed: int, number: int) -> list[dict[str, Any]]:
    """Records of few keys, hashes and words, so that all kinds of verdicts occur."""
    random = np.random.default_rng(seed)
    rows = []
    for place in random.permutation(number * 3)[:number].tolist():
        numbers = random.integers(number, size=(int(random.integers(3)), 2)).tolist()
        texts = [f"a red fox asleep in the snow of day {day // 8}, plate {plate}" for day, plate in numbers]
        rows.append(
            record(
                place,
                key=f"key-{random.integers(number)}",
                split=str(random.choice(["train", "test"])),
                pixel_hash=int(random.integers(number * 2)),
                perceptual_hash=int(random.integers(2**17)),
                texts=["a fox", *texts] if place % 2 else texts or ["a fox"],
                reason=None if random.random() < 0.9 else "image_missing",
            )
        )
    return rows


SETTINGS = {"duplicates": DuplicatesConfig(radius=2, caption_similarity=0.6), "max_images": 20}


def test_the_number_and_order_of_pieces_tasks_and_parts_change_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = crowd(0, 300)
    known = [write_shard(tmp_path / "old", crowd(1, 20), f"{number:05d}") for number in range(2)]
    expected = select_records(write_pieces(tmp_path / "one", rows, 1), known=known, **SETTINGS)
    assert len(set(expected.rejected["reason"].to_pylist())) == 5
    many = write_pieces(tmp_path / "many", [rows[number] for number in np.random.default_rng(2).permutation(300)], 9)
    monkeypatch.setattr(select, "FILES_PER_TASK", 2)
    for order, parts in ((many, 128), (many[::-1], 3)):
        monkeypatch.setattr(select, "MAX_PARTS", parts)
        monkeypatch.setattr(select, "MAX_SEARCHED_HERE", parts)  # the second time in tasks
        selection = select_records(order, known=known, **SETTINGS)
        assert selection.rejected.equals(expected.rejected)
        assert selection.common_captions.tolist() == expected.common_captions.tolist()


def duplicate_reasons(first: dict[str, Any], second: dict[str, Any]) -> dict[str, bool]:
    """Reason → whether the two records are duplicates for it, with the settings of the test below."""
    texts = [shingles(row["captions"][0]["text"]) for row in (first, second)]
    return {
        "key_repeated": first["key"] == second["key"],
        "duplicate_exact": first["pixel_hash"] == second["pixel_hash"],
        "duplicate_near": (first["perceptual_hash"] ^ second["perceptual_hash"]).bit_count() <= 2,
        "duplicate_caption": similarity(*texts) >= 0.6,
    }


@pytest.mark.parametrize(
    "duplicates",
    [
        DuplicatesConfig(),
        DuplicatesConfig(exact=False, radius=2),
        DuplicatesConfig(exact=False, caption_similarity=0.6),
    ],
)
def test_every_rejection_has_a_survivor_and_no_two_survivors_are_duplicates(
    tmp_path: Path, duplicates: DuplicatesConfig
) -> None:
    rows = [row for row in crowd(3, 200) if row["reason"] is None]
    rejections = verdicts(write_pieces(tmp_path, rows, 3), duplicates)
    survivors = [row for row in rows if row["place"] not in rejections]
    reasons = {"key_repeated"} | {reason for reason, _ in rejections.values()}
    assert len(reasons) == 2
    for first, second in combinations(survivors, 2):
        assert not any(duplicate_reasons(first, second)[reason] for reason in reasons)
    for row in rows:
        reason, detail = rejections.get(row["place"], ("", ""))
        if reason and reason != "key_repeated":
            (survivor,) = [kept for kept in survivors if kept["key"] == detail.split()[-1]]
            assert duplicate_reasons(row, survivor)[reason]
            assert (survivor["split"] == "train", survivor["place"]) < (row["split"] == "train", row["place"])


def test_progress_counts_the_rounds(tmp_path: Path) -> None:
    reported: list[tuple[int, int]] = []
    select_records(
        write_pieces(tmp_path, [record(0)]), progress=lambda done, total: reported.append((done, total)), **SETTINGS
    )
    assert reported == [(number, 6) for number in range(1, 7)]


def test_no_pieces_give_no_rejections() -> None:
    assert select_records([], **SETTINGS).rejected.num_rows == 0
