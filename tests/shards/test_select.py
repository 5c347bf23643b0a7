"""Selection over pieces: who stays of those that are alike, with a reason and a survivor for each that goes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmflow.ingest.captions import caption_hash
from mmflow.ingest.config import DuplicatesConfig
from mmflow.shards.index import SCHEMA
from mmflow.shards.pieces import PIECE
from mmflow.shards.select import select_records

pytestmark = pytest.mark.usefixtures("ray_cluster")
NOTHING = DuplicatesConfig(exact=False)


def record(place: int, **fields: Any) -> dict[str, Any]:
    """A row of a piece, like no other unless the fields say so."""
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
    """An index of the rows, and a tar that has their captions at the offsets that it says."""
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
    """Place → (reason, detail) of what was rejected."""
    selection = select_records(pieces, duplicates=duplicates, **{"max_images": None, **settings})
    rows = selection.rejected.to_pylist()
    assert [row["place"] for row in rows] == sorted({row["place"] for row in rows})
    return {row["place"]: (row["reason"], row["detail"]) for row in rows}


def test_of_a_repeated_key_the_first_stays(tmp_path: Path) -> None:
    rows = [record(0, key="a", reason="image_missing"), record(7, key="a", split="test"), record(5, key="a"), record(9)]
    found = verdicts(write_pieces(tmp_path, rows))
    assert found == {7: ("key_repeated", "an earlier record has this key (records.jsonl:5)")}


def test_a_sample_of_the_dataset_keeps_its_key(tmp_path: Path) -> None:
    known = write_shard(tmp_path / "old", [record(0, key="a")])
    found = verdicts(write_pieces(tmp_path, [record(7, key="a"), record(9)]), known=[known])
    assert found == {7: ("key_repeated", "a sample of the dataset has this key")}
