"""Records to pieces: load, clean, decode, resize, encode. Knows no Ray, so that any process can prepare a piece.

Each record is touched once, and what comes of it, image or reason, is on disk when the task ends. A rerun recognises
its pieces by their plan: what a killed build had decoded is not decoded again.
"""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash

from mmflow.cleaning.captions import caption_hash, clean_captions
from mmflow.cleaning.config import CaptionConfig, ImageConfig
from mmflow.cleaning.images import PreparedImage, prepare_images
from mmflow.cleaning.pieces import PIECE, PREPARED, finished_rows, pack_uri, write_piece_table
from mmflow.core.artifacts import canonical_json
from mmflow.core.errors import MissingArtifactError, MisuseError
from mmflow.core.storage import filesystem, join, local_path, publish, read_bytes
from mmflow.fetch.fetched import FetchedStore
from mmflow.sources.reasons import Reason, Rejected
from mmflow.sources.records import rows_of_chunks

PREPARE_VERSION = 2  # raise it when the same records and settings come to make other pieces
TRAIN = "train"
URLS = ("http://", "https://")
MAX_IMAGE_BYTES = 256 << 20
# What a file system says of a file that it will say again: these reject the record, any other error fails the task.
LASTING_ERRORS = (errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.EINVAL)
PIECES = pa.schema([("piece", pa.string()), ("records", pa.int64())])

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Preparation:
    """What is made of a record, and where: all that a task needs beside the records."""

    dataset: str  # URI
    image: ImageConfig
    captions: CaptionConfig
    splits: Mapping[str, float]
    group_by: str | None
    fetched: str | None  # URI of the store of fetched images

    @property
    def settings(self) -> dict[str, Any]:
        """What decides about the outcome, without a path of this machine."""
        return {
            "version": PREPARE_VERSION,
            "image": self.image.model_dump(),
            "captions": self.captions.model_dump(),
            "splits": dict(self.splits),
            "group_by": self.group_by,
        }


def prepare_block(block: Any, preparation: Preparation) -> Any:
    """Write the pieces of a block of `CHUNK`, one for each chunk of a reader; return their rows of `PIECES`."""
    chunks = (rows_of_chunks(block.slice(row, 1)) for row in range(block.num_rows))
    return pa.Table.from_pylist([prepare_piece(chunk, preparation) for chunk in chunks if chunk.num_rows], PIECES)


def prepare_piece(records: pa.Table, preparation: Preparation) -> Row:
    """Write a piece, unless an earlier run did; return its row of `PIECES`."""
    rows = records.to_pylist()
    plan = plan_of(rows, preparation)
    # Ray Data may cut a chunk elsewhere in another run: the name says which records it is.
    uri = join(preparation.dataset, PREPARED, f"{rows[0]['place']:016x}-{len(rows)}.parquet")
    if finished_rows(uri, plan) is None:
        entries: list[Row] = []
        with publish(pack_uri(uri)) as stream:
            for row in rows:
                entry, bodies = prepare_row(row, preparation, stream.tell())
                entries.append(entry)
                stream.writelines(bodies)
            pack_bytes = stream.tell()
        write_piece_table(uri, pa.Table.from_pylist(entries, PIECE), plan, pack_bytes)
    return {"piece": uri, "records": len(rows)}


def plan_of(rows: list[Row], preparation: Preparation) -> str:
    """xxh3_128 (hex) of everything that a piece follows from; of local image files their sizes and times.

    A picture that was missing when a build was killed, and is there now, is looked at again.
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
        found = os.stat(path) if path is not None else None
    except (OSError, ValueError):
        return None
    return [found.st_size, found.st_mtime_ns] if found else None


def _resolved(root: str, image: str) -> str:
    return image if "://" in image or image.startswith(("/", "file:")) else join(root, image)


def prepare_row(row: Row, preparation: Preparation, offset: int) -> tuple[Row, list[bytes]]:
    """A record's row of `PIECE` and the bodies of its images, of which the first goes to `offset` of the pack."""
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
        **_described(image),
        "image_offset": offset,
        "frames": frames,
        "caption_hashes": [caption_hash(caption["text"]) for caption in captions],
    }, bodies


def _described(image: PreparedImage) -> Row:
    return {
        "image_extension": image.extension,
        "width": image.width,
        "height": image.height,
        "image_bytes": len(image.data),
        "pixel_hash": image.pixel_hash,
        "perceptual_hash": image.perceptual_hash,
    }


def split_of(row: Row, splits: Mapping[str, float], group_by: str | None) -> str:
    """The split of a record that names none: by a hash of its group, so that equals of a group are never parted.

    The seed of the shuffle has no say: a record held out once stays held out.
    """
    group = json.loads(row["metadata"]).get(group_by) if group_by else None
    name = row["key"] if group is None else canonical_json(group)
    draw = xxhash.xxh3_64_intdigest(f"split/{name}".encode()) / 2**64
    for split, share in sorted(splits.items()):
        if draw < share:
            return split
        draw -= share
    return TRAIN


def load_images(row: Row, preparation: Preparation) -> list[bytes]:
    """The files' bytes, from wherever the record has them. Raises Rejected for what stays amiss."""
    if row["bodies"]:
        return list(row["bodies"])
    if not row["images"]:
        raise Rejected(Reason.image_missing, "the record names none")
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
    """The store, opened once a dataset: what a worker knew of it may be old when it comes to the next one."""
    return FetchedStore(uri)


def load_image(root: str, image: str) -> bytes:
    """One file's bytes; `image` is a URI, or a path relative to `root`. Raises Rejected for what stays amiss."""
    uri = _resolved(root, image)
    try:
        path = local_path(uri)
        if path is None:
            system, remote = filesystem(uri)
            size = system.get_file_info(remote).size or 0
        else:
            found = os.stat(path)
            if not stat.S_ISREG(found.st_mode):  # a FIFO would be waited on for ever
                raise Rejected(Reason.image_unreadable, f"{image}: not a file")
            size = found.st_size
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
