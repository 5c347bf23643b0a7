"""Records as rows, read from JSONL: what cannot be read is a row too, with the reason, so that nothing gets lost.

Images stay where they are until a shard is written: only these rows, a few hundred bytes each, travel in the shuffle.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

import pyarrow as pa

from mmflow.artifacts import canonical_json, filesystem
from mmflow.ingest.reasons import Reason, Rejected

ROWS_PER_BLOCK = 16_384
LINE_BITS = 40  # a record's place: the source's number above, the line's number in the lowest 40 bits
CAPTION = pa.struct([("language", pa.string()), ("text", pa.string())])
# `place` orders all records of all sources. `images` are paths or URIs as written, relative to the URI `root`, or else
# `bodies` are the files' own bytes; more than one are the frames of a clip. `split` is null where the source names none.
# `reason` and `detail` are null in a good record; in a rejected one all but `place`, `source` and `chunk` may be null.
RECORDS = pa.schema(
    [
        ("place", pa.int64()),
        ("chunk", pa.int64()),
        ("source", pa.string()),
        ("key", pa.string()),
        ("split", pa.string()),
        ("root", pa.string()),
        ("images", pa.list_(pa.string())),
        ("bodies", pa.list_(pa.large_binary())),
        ("captions", pa.list_(CAPTION)),
        ("metadata", pa.string()),
        ("reason", pa.string()),
        ("detail", pa.string()),
    ]
)
# A dot would end webdataset's key early, a slash is a folder, and upper case collides on some file systems.
KEY = re.compile(r"[a-z0-9][a-z0-9_-]{0,79}")
SPLIT = re.compile(r"[a-z0-9][a-z0-9_-]{0,39}")


def read_jsonl(uri: str, name: str, number: int) -> Iterator[pa.Table]:
    """Tables of `RECORDS` of a JSONL file, the source of this number; blank lines are no records."""
    root = uri.rpartition("/")[0] or "."
    system, path = filesystem(uri)
    rows: list[dict[str, Any]] = []
    with io.BufferedReader(system.open_input_stream(path), 1 << 20) as lines:
        for line_number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            row = {"place": number << LINE_BITS | line_number, "source": f"{name}:{line_number}", "root": root}
            try:
                row |= parse_record(line)
            except Rejected as rejected:
                row |= {"reason": str(rejected.reason), "detail": rejected.detail}
            rows.append(row)
            if len(rows) == ROWS_PER_BLOCK:
                yield pa.Table.from_pylist(rows, RECORDS)
                rows = []
    yield pa.Table.from_pylist(rows, RECORDS)


def parse_record(line: bytes) -> dict[str, Any]:
    """The fields of a record from its line of JSON; what is not a field of ours is its metadata, as canonical JSON.

    Raises Rejected with record_malformed, or with key_invalid for a key that tars could not carry.
    """
    try:
        value = json.loads(line.decode("utf-8-sig"), parse_constant=_refuse_constant)
        canonical_json(value).encode()
    # Invalid UTF-8, or half of a surrogate pair, which no file can hold.
    except (UnicodeDecodeError, UnicodeEncodeError) as error:
        raise _malformed(f"not text: {error.reason}") from error
    except (ValueError, RecursionError) as error:
        raise _malformed(f"not JSON: {error}") from error
    if not isinstance(value, dict):
        raise _malformed(f"a JSON object is needed, not {type(value).__name__}")
    key = _string(value, "key")
    image = _string(value, "image")
    split = _string(value, "split") if "split" in value else "train"
    captions = _captions(value)
    if not SPLIT.fullmatch(split):
        raise _malformed(f"split {split[:80]!r}: lower-case letters, digits, - and _ are needed, at most 40")
    if not KEY.fullmatch(key):
        raise Rejected(Reason.key_invalid, f"{key[:100]!r}: lower-case letters, digits, - and _ are needed, at most 80")
    metadata = {name: field for name, field in value.items() if name not in ("key", "image", "split", "captions")}
    return {"key": key, "image": image, "split": split, "captions": captions, "metadata": canonical_json(metadata)}


def _captions(value: Mapping[str, Any]) -> list[dict[str, str]]:
    captions = value.get("captions")
    if not isinstance(captions, list):
        raise _malformed(f"`captions` must be a list, not {type(captions).__name__}")
    cleaned = []
    for caption in captions:
        if not isinstance(caption, dict):
            raise _malformed(f"a caption must be an object, not {type(caption).__name__}")
        language = _string(caption, "language") if "language" in caption else "und"
        cleaned.append({"language": language, "text": _string(caption, "text")})
    return cleaned


def _string(value: Mapping[str, Any], name: str) -> str:
    field = value.get(name)
    if not isinstance(field, str):
        raise _malformed(f"`{name}` must be a string, not {type(field).__name__}")
    return field


def _malformed(detail: str) -> Rejected:
    return Rejected(Reason.record_malformed, detail[:300])


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")
