"""Pieces: records made ready, before anyone knows which of them stay and in which shard.

A piece is two files. The pack holds the encoded images of some hundred records, one after another; the table has a row
for each record, good or rejected. Duplicates, common captions and the sizes of shards need every record to be seen
once, and a picture should be decoded once: so everything after this step moves rows and copies bytes.
"""

from __future__ import annotations

import pyarrow as pa

from mmflow.ingest.records import CAPTION

FRAME = pa.struct([("offset", pa.int64()), ("bytes", pa.int64())])
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
        ("frames", pa.list_(FRAME)),
        ("pixel_hash", pa.uint64()),
        ("perceptual_hash", pa.uint64()),
        ("caption_hashes", pa.list_(pa.uint64())),
        ("reason", pa.string()),
        ("detail", pa.string()),
    ]
)
