"""Records as rows, the same from every kind of source: what cannot be read is a row too, so that nothing gets lost.

Images stay where they are until a record is prepared, unless its source holds their bytes. Rows travel in chunks that
are the same at every reading of a unit: a piece made of one is recognised by a rerun.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import xxhash

from mmflow.core.artifacts import canonical_json
from mmflow.sources.config import SourceConfig
from mmflow.sources.fields import Fields
from mmflow.sources.reasons import Reason, Rejected

# A record's place: the source's number (11 bits), the unit's in it (24 bits), the row's in that (28 bits).
SOURCE_BITS, UNIT_BITS, ROW_BITS = 11, 24, 28
ROWS_PER_CHUNK = 128  # what one task decodes: a second of work, so that small corpora spread out and no core waits long
BYTES_PER_CHUNK = 16 << 20
CAPTION = pa.struct([("language", pa.string()), ("text", pa.string())])
# `place` orders all records of all sources. `images` are paths or URIs as written, relative to the URI `root`, or else
# `bodies` are the files' own bytes; more than one are the frames of a clip. `split` may be
# null. `reason` and `detail` are null in a good record; in a rejected one all but `place` and `source` may be.
RECORDS = pa.schema(
    [
        ("place", pa.int64()),
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
# A chunk of `RECORDS` as one row, of which a block can hold exactly one.
CHUNK = pa.schema([("chunk", pa.large_list(pa.struct(list(RECORDS))))])
# A dot would end webdataset's key early, a slash is a folder, and upper case collides on some file systems.
KEY = re.compile(r"[a-z0-9][a-z0-9_-]{0,79}")
SPLIT = re.compile(r"[a-z0-9][a-z0-9_-]{0,39}")
NOT_OF_A_KEY = re.compile(r"[^a-z0-9_-]+")
RESPELLED_CHARACTERS = 60

# A file that its reader gives a row of its own, where other errors end the run: it is gone, or closed to us.
UNREADABLE = (FileNotFoundError, PermissionError, IsADirectoryError)

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Found:
    """What a reader found: a record's fields, or why there are none.

    `name` is its place in words, without a path of this machine: it is the row's `source`, and makes the key of a
    record that has none. `row` counts within the unit.
    """

    row: int
    name: str
    what: Fields | Rejected


def tables_of(found: Iterable[Found], source: SourceConfig, number: int, unit: int, root: str) -> Iterator[pa.Table]:
    """The rows of a unit as tables of `RECORDS`, a table a chunk. Raises ValueError past the bits of `place`."""
    rows: list[Row] = []
    num_bytes = 0
    for each in found:
        row = row_of(each, source, root)
        row["place"] = place_of(number, unit, each.row)
        size = sum(map(len, row.get("bodies") or ()))
        size += sum(len(caption["text"]) for caption in row.get("captions") or ()) + len(row.get("metadata") or "")
        if rows and (len(rows) == ROWS_PER_CHUNK or num_bytes + size > BYTES_PER_CHUNK):
            yield pa.Table.from_pylist(rows, RECORDS)
            rows, num_bytes = [], 0
        rows.append(row)
        num_bytes += size
    if rows:
        yield pa.Table.from_pylist(rows, RECORDS)


def rows_of_chunks(chunks: pa.Table) -> pa.Table:
    """The `RECORDS` of rows of `CHUNK`."""
    if not chunks.num_rows:
        return RECORDS.empty_table()
    records = chunks["chunk"].combine_chunks().flatten()
    return pa.Table.from_arrays(records.flatten(), schema=RECORDS)


def place_of(source: int, unit: int, row: int) -> int:
    """The place of a row. Raises ValueError where a number has more bits than it is given."""
    for name, value, bits in (("sources", source, SOURCE_BITS), ("units", unit, UNIT_BITS), ("rows", row, ROW_BITS)):
        if value >> bits:
            raise ValueError(f"{value:,} {name}, at most {(1 << bits) - 1:,} can be counted; split the source")
    return source << UNIT_BITS + ROW_BITS | unit << ROW_BITS | row


def row_of(found: Found, source: SourceConfig, root: str) -> Row:
    """The row of `RECORDS`, but for its place."""
    row: Row = {"source": printable(found.name), "root": root}
    try:
        if isinstance(found.what, Rejected):
            raise found.what
        fields = found.what
        metadata = dict(fields.metadata)
        if source.license is not None and not metadata.get("license"):
            metadata["license"] = source.license
        key = key_of(fields.key, found.name, source.keys)
        if fields.key is not None and key != fields.key:
            metadata["source_key"] = fields.key
        row["key"] = key
        if source.weight < 1 and xxhash.xxh3_64_intdigest(f"weight/{key}".encode()) / 2**64 >= source.weight:
            raise Rejected(Reason.not_sampled, f"the source's weight is {source.weight}")
        row |= _checked(fields, metadata, source.language)
        if not row["images"] and not row["bodies"]:
            raise Rejected(Reason.image_missing, fields.no_image)
    except Rejected as rejected:
        row |= {"reason": str(rejected.reason), "detail": printable(rejected.detail)}
    return row


def key_of(key: str | None, name: str, policy: str) -> str:
    """The record's key: its own where tars can carry it, or respelled, or made from its place.

    Raises Rejected with key_invalid where the policy is strict, and the key is one that tars could not carry.
    """
    if key is None:
        return respell(name)
    if KEY.fullmatch(key):
        return key
    if policy == "strict":
        raise Rejected(Reason.key_invalid, f"{key[:100]!r}: lower-case letters, digits, - and _ are needed, at most 80")
    return respell(key)


def respell(key: str) -> str:
    """A key that tars can carry, with a hash of the original behind it, so that no two originals fall together.

    16 digits of it: names in a script that respells to nothing, or that differ behind the 60th letter, have no more
    than the hash to tell them apart, and 8 digits fall together once in about 65,000 of them.
    """
    spelled = NOT_OF_A_KEY.sub("-", key.lower())[:RESPELLED_CHARACTERS].strip("-_")
    digest = xxhash.xxh3_64_hexdigest(key.encode("utf-8", "surrogatepass"))
    return f"{spelled}-{digest}" if spelled else digest


def printable(text: str, limit: int = 300) -> str:
    """A detail on one line, of text that every file can hold."""
    return " ".join(text[:limit].encode("utf-8", "backslashreplace").decode().split())


def _checked(fields: Fields, metadata: Mapping[str, Any], language: str) -> Row:
    captions = [{"language": tag or language, "text": text} for tag, text in fields.captions]
    if fields.split is not None and not SPLIT.fullmatch(fields.split):
        raise malformed(f"split {fields.split[:80]!r}: lower-case letters, digits, - and _ are needed, at most 40")
    try:
        text = canonical_json(metadata)
        # Half of a surrogate pair, or bytes that are no text: no file can hold either.
        for each in (text, *(value for caption in captions for value in caption.values()), *fields.images):
            each.encode()
    except (UnicodeEncodeError, ValueError, RecursionError) as error:
        what = f"not text: {error.reason}" if isinstance(error, UnicodeEncodeError) else str(error)
        raise malformed(what) from error
    return {
        "split": fields.split,
        "images": None if fields.bodies else list(fields.images),
        "bodies": list(fields.bodies) or None,
        "captions": captions,
        "metadata": text,
    }


def malformed(detail: str) -> Rejected:
    """A verdict of record_malformed."""
    return Rejected(Reason.record_malformed, printable(detail))


def unreadable(error: OSError) -> Rejected:
    """A verdict of source_damaged, for a file of the kinds of error in `UNREADABLE`."""
    return Rejected(Reason.source_damaged, f"cannot be read: {error.strerror or 'no such file'}")
