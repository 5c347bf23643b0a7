"""What readers of sources take and give: units, kinds, records, and the Arrow rows that records become.

The rows are the same for every kind of source. What cannot be read is a row too, so that nothing gets lost. Images stay
where they are until a record is prepared, unless the source holds their bytes. Rows travel in chunks that are the same
at every reading of a unit, so that a rerun recognises the pieces made from them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import xxhash

from mmflow.core.artifacts import canonical_json
from mmflow.sources.config import FieldsConfig, SourceConfig, SourceKind
from mmflow.sources.reasons import Reason, Rejected, damaged, malformed

# The bits of a record's place: source number, unit number in it, row number in that.
SOURCE_BITS, UNIT_BITS, ROW_BITS = 11, 24, 28
ROWS_PER_CHUNK = 128  # what one task decodes: a second of work, so that small corpora spread over all cores
BYTES_PER_CHUNK = 16 << 20
CAPTION = pa.struct([("language", pa.string()), ("text", pa.string())])
# `place` orders all records of all sources. `images` are paths or URIs as written, relative to the URI `root`;
# otherwise `bodies` holds the bytes of the files. Several are the frames of a clip. `split` may be null. `reason` and
# `detail` are null in good records; in rejected ones every column but `place` and `source` may be null.
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
# One chunk of `RECORDS` as one row: a block of Ray Data can then hold exactly one chunk.
CHUNK = pa.schema([("chunk", pa.large_list(pa.struct(list(RECORDS))))])
# A dot would end webdataset's key early, a slash is a folder, and upper case collides on some file systems.
KEY = re.compile(r"[a-z0-9][a-z0-9_-]{0,79}")
SPLIT = re.compile(r"[a-z0-9][a-z0-9_-]{0,39}")
NOT_OF_A_KEY = re.compile(r"[^a-z0-9_-]+")
RESPELLED_CHARACTERS = 60
DETAIL_CHARACTERS = 300

# Errors that make one row of a file, where other errors end the run: the file is gone, or we may not read it.
UNREADABLE = (FileNotFoundError, PermissionError, IsADirectoryError)


@dataclass(frozen=True, kw_only=True)
class Unit:
    """The part of a source that one task reads: a tar, a range of row groups, some images of a folder.

    `files` are relative to the directory `uri`, and so are image paths. `prefix` names that directory in messages and
    keys, without a path of this machine; `name` names the unit. `fingerprint` stands for the content, wherever it lies.
    `records` is about their number, if known before reading.
    """

    source: int = 0
    number: int = 0
    kind: SourceKind
    name: str
    uri: str
    prefix: str = ""
    files: tuple[str, ...] = ()
    fingerprint: str = ""
    records: int | None = None
    row_groups: tuple[int, int] | None = None  # of a Parquet file: from, to
    split: str | None = None  # of the records that name none

    def label(self, file: str) -> str:
        """The name of one of the unit's files in messages and keys."""
        return f"{self.prefix}/{file}" if self.prefix else file


@dataclass(frozen=True, slots=True)
class Fields:
    """A record's parts. `captions` are (language, text), with None for an unknown language.

    `images` are paths or URIs, or else `bodies` are the bytes of files. `no_image` says why there is neither.
    """

    key: str | None = None
    split: str | None = None
    images: Sequence[str] = ()
    bodies: Sequence[bytes] = ()
    captions: Sequence[tuple[str | None, str]] = ()
    metadata: Mapping[str, Any] = field(default_factory=dict)
    no_image: str = "it names no image"


@dataclass(frozen=True, slots=True)
class Record:
    """One record as its reader gives it: its fields, or why it has none.

    `name` is its place in words, without a path of this machine: the row's `source`, and the key of a record without.
    """

    name: str
    content: Fields | Rejected


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A kind of source: how `auto` recognises it, how it is cut into units, and how a unit is read."""

    read: Callable[[Unit, SourceConfig], Iterator[Record]]
    extensions: tuple[str, ...] = ()  # of files of this kind; kinds without any are always folders
    recognises: Callable[[Sequence[str]], bool] = lambda files: False  # `auto`: a folder with these files
    units_of_file: Callable[[Unit], Iterable[Unit]] = lambda unit: [unit]  # from a unit with that file
    # From a unit without files; None: the units of each file with one of the extensions.
    units_of_folder: Callable[[Unit, SourceConfig], Iterable[Unit]] | None = None
    record_per_line: bool = False
    may_name_urls: bool = False
    # Whether a unit of a kind that may name URLs certainly names none.
    holds_bodies: Callable[[Unit, FieldsConfig], bool] = lambda unit, fields: False


def tables_of(records: Iterable[Record], source: SourceConfig, unit: Unit) -> Iterator[pa.Table]:
    """The rows of a unit as tables of `RECORDS`, one per chunk. Raises ValueError past the bits of `place`."""
    rows: list[dict[str, Any]] = []
    num_bytes = 0
    for number, record in enumerate(records):
        row = row_of(record, source, unit.uri)
        row["place"] = place_of(unit.source, unit.number, number)
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
    """The `RECORDS` within rows of `CHUNK`."""
    if not chunks.num_rows:
        return RECORDS.empty_table()
    records = chunks["chunk"].combine_chunks().flatten()
    return pa.Table.from_arrays(records.flatten(), schema=RECORDS)


def place_of(source: int, unit: int, row: int) -> int:
    """The place of a row. Raises ValueError where a number does not fit its bits."""
    for name, value, bits in (("sources", source, SOURCE_BITS), ("units", unit, UNIT_BITS), ("rows", row, ROW_BITS)):
        if value >> bits:
            raise ValueError(f"{value:,} {name}, at most {(1 << bits) - 1:,} can be counted; split the source")
    return source << UNIT_BITS + ROW_BITS | unit << ROW_BITS | row


def row_of(record: Record, source: SourceConfig, root: str) -> dict[str, Any]:
    """The row of `RECORDS`, without its place."""
    row: dict[str, Any] = {"source": _printable(record.name), "root": root}
    try:
        if isinstance(record.content, Rejected):
            raise record.content
        fields = record.content
        metadata = dict(fields.metadata)
        if source.license is not None and not metadata.get("license"):
            metadata["license"] = source.license
        key = key_of(fields.key, record.name, source.keys)
        if fields.key is not None and key != fields.key:
            metadata["source_key"] = fields.key
        row["key"] = key
        if source.weight < 1 and xxhash.xxh3_64_intdigest(f"weight/{key}".encode()) / 2**64 >= source.weight:
            raise Rejected(Reason.not_sampled, f"the source's weight is {source.weight}")
        row |= _columns(fields, metadata, source.language)
        if not row["images"] and not row["bodies"]:
            raise Rejected(Reason.image_missing, fields.no_image)
    except Rejected as rejected:
        row |= {"reason": str(rejected.reason), "detail": _printable(rejected.detail)}
    return row


def key_of(key: str | None, name: str, policy: str) -> str:
    """The record's own key if tars can carry it, else respelled; without a key, one made from its place.

    Raises Rejected with key_invalid if the policy is strict and tars cannot carry the key.
    """
    if key is None:
        return respell(name)
    if KEY.fullmatch(key):
        return key
    if policy == "strict":
        raise Rejected(Reason.key_invalid, f"{key[:100]!r}: lower-case letters, digits, - and _ are needed, at most 80")
    return respell(key)


def respell(key: str) -> str:
    """A key that tars can carry, with a hash of the original at the end, so that different keys stay different.

    The hash has 16 digits: for names in other scripts, or that differ after 60 letters, it is all that differs, and 8
    digits collide after about 65,000 names.
    """
    spelled = NOT_OF_A_KEY.sub("-", key.lower())[:RESPELLED_CHARACTERS].strip("-_")
    digest = xxhash.xxh3_64_hexdigest(key.encode("utf-8", "surrogatepass"))
    return f"{spelled}-{digest}" if spelled else digest


def unreadable(error: OSError) -> Rejected:
    """The rejection for a file that fails with one of `UNREADABLE`."""
    return damaged(f"cannot be read: {error.strerror or 'no such file'}")


def attempt(make: Callable[..., Fields], *arguments: Any, **options: Any) -> Fields | Rejected:
    """What `make` returns, or the rejection that it raises."""
    try:
        return make(*arguments, **options)
    except Rejected as rejected:
        return rejected


def _columns(fields: Fields, metadata: Mapping[str, Any], language: str) -> dict[str, Any]:
    """The columns of a record's content. Raises Rejected with record_malformed."""
    captions = [{"language": tag or language, "text": text} for tag, text in fields.captions]
    if fields.split is not None and not SPLIT.fullmatch(fields.split):
        raise malformed(f"split {fields.split[:80]!r}: lower-case letters, digits, - and _ are needed, at most 40")
    try:
        text = canonical_json(metadata)
        # No file can hold half of a surrogate pair, or bytes that are not text.
        for string in (text, *(value for caption in captions for value in caption.values()), *fields.images):
            string.encode()
    except UnicodeEncodeError as error:
        raise malformed(f"not text: {error.reason}") from error
    except (ValueError, RecursionError) as error:
        raise malformed(str(error)) from error
    return {
        "split": fields.split,
        "images": None if fields.bodies else list(fields.images),
        "bodies": list(fields.bodies) or None,
        "captions": captions,
        "metadata": text,
    }


def _printable(text: str) -> str:
    """One line of text that every file can hold."""
    return " ".join(text[:DETAIL_CHARACTERS].encode("utf-8", "backslashreplace").decode().split())
