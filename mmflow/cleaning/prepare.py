"""Records to pieces: load, clean, decode, resize, encode. Knows nothing about Ray: any process can prepare a piece.

A piece is two files. The pack holds the encoded images of some hundred records, one after another. The table has a row
for each record, good or rejected. Duplicates, common captions and the sizes of shards can only be known once every
record was seen, and a picture should be decoded once: later steps only move rows and copy bytes. A rerun recognises
finished pieces by their plan, so what a killed build had decoded is not decoded again.
"""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash
from pyarrow import fs

from mmflow.cleaning.captions import caption_hash, clean_captions
from mmflow.cleaning.config import CaptionConfig, ImageConfig
from mmflow.cleaning.images import prepare_images
from mmflow.core.artifacts import canonical_json
from mmflow.core.errors import CorruptArtifactError, MissingArtifactError, MisuseError
from mmflow.core.storage import filesystem, join, local_path, publish, read_bytes
from mmflow.fetch.store import FetchedStore
from mmflow.sources.reasons import Reason, Rejected
from mmflow.sources.records import CAPTION, rows_of_chunks

PREPARE_VERSION = 2  # increase it when the same records and settings give other pieces
PREPARED = "prepared"  # the folder of an unfinished dataset that holds its pieces
TRAIN = "train"
URLS = ("http://", "https://")
MAX_IMAGE_BYTES = 256 << 20
# File system errors that a retry would repeat: they reject the record. Any other error fails the task.
LASTING_ERRORS = (errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.EINVAL)
# One row per record. `captions` are clean and `split` is final; offsets are bytes from the start of the pack. `reason`
# and `detail` are null in a good record; in a rejected one everything but `place` and `source` may be null.
# `caption_hashes` has the `caption_hash` of each of the `captions`.
PIECE = pa.schema(
    [
        ("place", pa.int64()),
        ("source", pa.string()),
        ("key", pa.string()),
        ("split", pa.string()),
        ("captions", pa.list_(CAPTION)),
        ("metadata", pa.string()),
        ("image_extension", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("image_offset", pa.int64()),
        ("image_bytes", pa.int64()),
        ("frames", pa.list_(pa.struct([("offset", pa.int64()), ("bytes", pa.int64())]))),
        ("pixel_hash", pa.uint64()),
        ("perceptual_hash", pa.uint64()),
        ("caption_hashes", pa.list_(pa.uint64())),
        ("reason", pa.string()),
        ("detail", pa.string()),
    ]
)
COMMIT = b"mmflow.piece"
PREPARED_PIECES = pa.schema([("piece", pa.string()), ("records", pa.int64())])

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Preparation:
    """What to make of a record, and where: everything that a task needs besides the records."""

    dataset: str  # URI
    image: ImageConfig
    captions: CaptionConfig
    splits: Mapping[str, float]
    group_by: str | None
    fetched: str | None  # URI of the store of fetched images

    @property
    def settings(self) -> dict[str, Any]:
        """What decides about the outcome, without paths of this machine."""
        return {
            "version": PREPARE_VERSION,
            "image": self.image.identity(),
            "captions": self.captions.identity(),
            "splits": dict(self.splits),
            "group_by": self.group_by,
        }


def prepare_block(block: Any, preparation: Preparation) -> Any:
    """Write one piece for each chunk of a block of `CHUNK`; return their rows of `PREPARED_PIECES`."""
    chunks = (rows_of_chunks(block.slice(row, 1)) for row in range(block.num_rows))
    pieces = [prepare_piece(chunk, preparation) for chunk in chunks if chunk.num_rows]
    return pa.Table.from_pylist(pieces, PREPARED_PIECES)


def prepare_piece(records: pa.Table, preparation: Preparation) -> Row:
    """Write a piece, unless an earlier run did; return its row of `PREPARED_PIECES`."""
    rows = records.to_pylist()
    plan = plan_of(rows, preparation)
    # Ray Data may cut a chunk elsewhere in another run: the name says which records it holds.
    uri = join(preparation.dataset, PREPARED, f"{rows[0]['place']:016x}-{len(rows)}.parquet")
    if not is_finished(uri, plan):
        entries: list[Row] = []
        with publish(pack_uri(uri)) as stream:
            for row in rows:
                entry, bodies = prepare_row(row, preparation, stream.tell())
                entries.append(entry)
                stream.writelines(bodies)
            pack_bytes = stream.tell()
        # After the pack: the table says that both are complete.
        metadata = {COMMIT: json.dumps({"plan": plan, "pack_bytes": pack_bytes}).encode()}
        with publish(uri) as stream:
            table = pa.Table.from_pylist(entries, PIECE).replace_schema_metadata(metadata)
            pq.write_table(table, stream, compression="zstd")
    return {"piece": uri, "records": len(rows)}


def plan_of(rows: list[Row], preparation: Preparation) -> str:
    """xxh3_128 (hex) of everything that decides about a piece; for local image files, of their sizes and times.

    So a picture that was missing when a build was killed, and exists now, is looked at again.
    """
    digest = xxhash.xxh3_128(canonical_json(preparation.settings).encode())
    for row in rows:
        bodies = [xxhash.xxh3_128_hexdigest(body) for body in row["bodies"] or ()]
        stamps = [] if row["bodies"] else [_stamp(row["root"], image) for image in row["images"] or ()]
        kept = {name: value for name, value in row.items() if name != "bodies"}
        digest.update(canonical_json({**kept, "bodies": bodies, "stamps": stamps}).encode() + b"\n")
    return digest.hexdigest()


def _stamp(root: str, image: str) -> list[int] | None:
    if image.startswith(URLS):
        return None
    try:
        path = local_path(_resolved(root, image))
        status = os.stat(path) if path is not None else None
    except (OSError, ValueError):
        return None
    return [status.st_size, status.st_mtime_ns] if status else None


def _resolved(root: str, image: str) -> str:
    return image if "://" in image or image.startswith(("/", "file:")) else join(root, image)


def prepare_row(row: Row, preparation: Preparation, offset: int) -> tuple[Row, list[bytes]]:
    """A record's row of `PIECE` and the bodies of its images; the first body goes to `offset` of the pack."""
    entry: Row = {"place": row["place"], "source": row["source"], "key": row["key"]}
    try:
        if row["reason"] is not None:
            raise Rejected(Reason(row["reason"]), row["detail"])
        captions = clean_captions(row["captions"] or [], preparation.captions)
        image = prepare_images(load_images(row, preparation), preparation.image)
    except Rejected as rejected:
        return {**entry, "reason": str(rejected.reason), "detail": rejected.detail}, []
    bodies = [image.data, *image.frames]
    starts = offset + np.cumsum([0, *(len(body) for body in bodies)])
    frames = [{"offset": int(start), "bytes": len(body)} for start, body in zip(starts[1:], image.frames, strict=False)]
    return {
        **entry,
        "split": row["split"] or split_of(row, preparation.splits, preparation.group_by),
        "captions": captions,
        "metadata": row["metadata"],
        "image_extension": image.extension,
        "width": image.width,
        "height": image.height,
        "image_offset": offset,
        "image_bytes": len(image.data),
        "frames": frames,
        "pixel_hash": image.pixel_hash,
        "perceptual_hash": image.perceptual_hash,
        "caption_hashes": [caption_hash(caption["text"]) for caption in captions],
    }, bodies


def split_of(row: Row, splits: Mapping[str, float], group_by: str | None) -> str:
    """The split of a record that names none, by a hash of its group, so that a group is never divided.

    Independent of the shuffle's seed: a record that was held out once stays held out.
    """
    group = json.loads(row["metadata"]).get(group_by) if group_by else None
    name = row["key"] if group is None else canonical_json(group)
    draw = xxhash.xxh3_64_intdigest(f"split/{name}".encode()) / 2**64
    for split, share in sorted(splits.items()):
        if draw < share:
            return split
        draw -= share
    return TRAIN


# --- the record's image files -----------------------------------------------------------------------------------------


def load_images(row: Row, preparation: Preparation) -> list[bytes]:
    """The bytes of the record's image files, from wherever they are. Raises Rejected for a lasting failure."""
    if row["bodies"]:
        return list(row["bodies"])
    if not row["images"]:
        raise Rejected(Reason.image_missing, "the record names no image")
    bodies = []
    for image in row["images"]:
        if not image.startswith(URLS):
            bodies.append(load_image(row["root"], image))
        elif preparation.fetched is None:
            raise Rejected(Reason.fetch_pending, "no image was fetched yet; run `mmflow shard`")
        else:
            bodies.append(_store(preparation.fetched, preparation.dataset).load(image))
    return bodies


@lru_cache(maxsize=1)
def _store(uri: str, dataset: str) -> FetchedStore:
    """The store, opened once per dataset: what a worker read of it may be outdated when the next dataset is built."""
    return FetchedStore(uri)


def load_image(root: str, image: str) -> bytes:
    """The bytes of one file; `image` is a URI, or a path relative to `root`. Raises Rejected for a lasting failure."""
    uri = _resolved(root, image)
    try:
        path = local_path(uri)
        if path is None:
            system, remote = filesystem(uri)
            size = system.get_file_info(remote).size or 0
        else:
            status = os.stat(path)
            if not stat.S_ISREG(status.st_mode):  # reading a FIFO would wait for ever
                raise Rejected(Reason.image_unreadable, f"{image}: not a file")
            size = status.st_size
        if size > MAX_IMAGE_BYTES:
            raise Rejected(Reason.image_too_large, f"{image}: {size} bytes, at most {MAX_IMAGE_BYTES}")
        return read_bytes(uri) if path is None else path.read_bytes()
    except (FileNotFoundError, MissingArtifactError) as error:
        raise Rejected(Reason.image_missing, f"{image}: no such file") from error
    except MisuseError as error:
        raise Rejected(Reason.image_unsupported, f"{image}: not a path, s3:// or gs://") from error
    except ValueError as error:  # a NUL within a path
        raise Rejected(Reason.image_unreadable, f"{image!r}: {error}") from error
    except OSError as error:
        if error.errno not in LASTING_ERRORS:
            raise
        raise Rejected(Reason.image_unreadable, f"{image}: {os.strerror(error.errno)}") from error


# --- the pieces -------------------------------------------------------------------------------------------------------


def pack_uri(piece: str) -> str:
    """The URI of the pack that belongs to the piece's table."""
    path, mark, query = piece.partition("?")
    return path.removesuffix(".parquet") + ".pack" + mark + query


def read_piece(uri: str, columns: Sequence[str] | None = None) -> pa.Table:
    """The piece's rows. Raises CorruptArtifactError if the table cannot be read."""
    system, path = filesystem(uri)
    try:
        with system.open_input_file(path) as stream:
            # Not `pq.read_table`, which plans a whole dataset's scan for each of these small files.
            return pq.ParquetFile(stream).read(columns=columns, use_threads=False).replace_schema_metadata()
    except pa.ArrowException as error:
        raise CorruptArtifactError(f"{uri}: not a piece ({error}); delete it and rerun") from error


def is_finished(uri: str, plan: str) -> bool:
    """Whether an earlier run finished this piece from the same plan."""
    try:
        metadata = pq.ParquetFile(pa.BufferReader(read_bytes(uri))).schema_arrow.metadata
        commit = json.loads(metadata[COMMIT])
    except (MissingArtifactError, pa.ArrowException, KeyError, TypeError, ValueError):
        return False
    system, path = filesystem(pack_uri(uri))
    return bool(commit["plan"] == plan and system.get_file_info(path).size == commit["pack_bytes"])


def remove_pieces(uri: str) -> None:
    """Delete the pieces of a committed dataset: they only served to resume its build."""
    system, path = filesystem(join(uri, PREPARED))
    if system.get_file_info(path).type == fs.FileType.Directory:
        system.delete_dir(path)
