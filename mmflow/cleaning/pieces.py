"""Pieces: records made ready, before anyone knows which of them stay and in which shard.

A piece is two files. The pack holds the encoded images of some hundred records, one after another; the table has a row
for each record, good or rejected. Duplicates, common captions and the sizes of shards need every record to be seen
once, and a picture should be decoded once: so everything after this step moves rows and copies bytes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from mmflow.core.errors import CorruptArtifactError, MissingArtifactError
from mmflow.core.storage import filesystem, join, publish, read_bytes
from mmflow.sources.records import CAPTION

PREPARED = "prepared"  # the folder of a dataset under way that holds its pieces
PIECE_FRAME = pa.struct([("offset", pa.int64()), ("bytes", pa.int64())])
# One row a record. `captions` are clean, `split` is final; offsets count from the start of the piece's pack, in bytes.
# `reason` and `detail` are null in a good record; in a rejected one all but `place` and `source` may be null.
# `caption_hashes` is xxh3_64 of each caption's case-folded text, in the order of `captions`.
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
        ("frames", pa.list_(PIECE_FRAME)),
        ("pixel_hash", pa.uint64()),
        ("perceptual_hash", pa.uint64()),
        ("caption_hashes", pa.list_(pa.uint64())),
        ("reason", pa.string()),
        ("detail", pa.string()),
    ]
)
COMMIT = b"mmflow.piece"


def pack_uri(piece: str) -> str:
    """Where the images of the piece at this URI (its table) lie."""
    path, mark, query = piece.partition("?")
    return path.removesuffix(".parquet") + ".pack" + mark + query


def write_piece_table(uri: str, table: pa.Table, plan: str, pack_bytes: int) -> None:
    """Publish a piece's table. Called AFTER its pack is: the table says that both are whole."""
    metadata = {COMMIT: json.dumps({"plan": plan, "pack_bytes": pack_bytes}).encode()}
    with publish(uri) as stream:
        pq.write_table(table.cast(PIECE).replace_schema_metadata(metadata), stream, compression="zstd")


def read_piece(uri: str, columns: Sequence[str] | None = None) -> pa.Table:
    """The piece's rows. Raises CorruptArtifactError where the table cannot be read."""
    system, path = filesystem(uri)
    try:
        with system.open_input_file(path) as stream:
            # Not `pq.read_table`, which plans a whole dataset's scan for each of these small files.
            return pq.ParquetFile(stream).read(columns=columns, use_threads=False).replace_schema_metadata()
    except pa.ArrowException as error:
        raise CorruptArtifactError(f"{uri}: not a piece ({error}); delete it and rerun") from error


def finished_rows(uri: str, plan: str) -> int | None:
    """How many rows a piece has that an earlier run finished from the same plan; None where there is none."""
    try:
        data = read_bytes(uri)
        table = pq.ParquetFile(pa.BufferReader(data))
        commit = json.loads(table.schema_arrow.metadata[COMMIT])
    except (MissingArtifactError, pa.ArrowException, KeyError, TypeError, ValueError):
        return None
    system, path = filesystem(pack_uri(uri))
    whole = commit["plan"] == plan and system.get_file_info(path).size == commit["pack_bytes"]
    return int(table.metadata.num_rows) if whole else None


def remove_pieces(uri: str) -> None:
    """Delete the pieces of a committed dataset: they served to resume its build."""
    system, path = filesystem(join(uri, PREPARED))
    if system.get_file_info(path).type == fs.FileType.Directory:
        system.delete_dir(path)
