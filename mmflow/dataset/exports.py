"""A dataset in the hands of people who have their own loop: as a webdataset pipeline, and as a Ray Dataset.

Both read through the index, as training does. The tar readers that they would use end in silence at a damaged header;
here a shard that is missing, short or altered is an error, and a sample costs a tenth.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from mmflow.core.artifacts import canonical_json
from mmflow.dataset.dataset import Dataset

if TYPE_CHECKING:
    import ray.data
    import webdataset

    from mmflow.dataset.cache import ShardCache
    from mmflow.dataset.reader import Reader, Sample

BLOCK_BYTES = 64 << 20  # of images in one block of a Ray Dataset: half of what Ray splits a block at
# `image` is the file as it is stored, `frames` a clip's files after the first, and `metadata` JSON.
RAY_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("image", pa.binary()),
        ("image_extension", pa.string()),
        ("captions", pa.list_(pa.struct([("text", pa.string()), ("language", pa.string())]))),
        ("metadata", pa.string()),
        ("frames", pa.list_(pa.binary())),
    ]
)

Piece = tuple[int, int, int]  # shard, first row, the row after the last


def as_webdataset(
    dataset: Dataset, split: str, *, shuffle_shards: int | None = None, cache: ShardCache | None = None
) -> webdataset.FluidWrapper:
    """A webdataset pipeline of a split's samples: {"__key__", "__url__", "jpg": bytes, "txt": bytes, "json": bytes}.

    It goes on as any other: `.decode("pil")`, `.shuffle(1000)`, `.to_tuple("jpg", "txt")`. Shards are shared out among
    ranks and DataLoader workers by webdataset's own stages; `shuffle_shards` is a seed to shuffle them with before,
    otherwise in each epoch. Only members that the index knows are there. Raises as `Reader.check` and `Reader.read`.
    """
    import webdataset

    from mmflow.dataset.reader import Reader

    reader = Reader(dataset, split, cache)
    reader.check()
    urls = [dataset.tar_uri(shard) for shard in reader.shards]
    pipeline = webdataset.FluidWrapper(webdataset.SimpleShardList(urls))
    if shuffle_shards is not None:
        pipeline.append(webdataset.detshuffle(bufsize=len(urls), initial=len(urls), seed=shuffle_shards))
    pipeline.append(webdataset.split_by_node)
    pipeline.append(webdataset.split_by_worker)
    pipeline.append(partial(_tar_samples, reader))
    return pipeline


def to_ray_data(dataset: Dataset, split: str, *, cache: ShardCache | None = None) -> ray.data.Dataset:
    """A Ray Dataset of a split's samples, with the columns of `RAY_SCHEMA`; its count is known before anything is read.

    Rows come as their tasks end, in the order of the tars where Ray's `preserve_order` is set. Ray must be initialised.
    Raises as `Reader.check`; the tasks raise as `Reader.read`.
    """
    import ray.data
    from ray.data.block import BlockMetadata
    from ray.data.datasource import Datasource, ReadTask

    from mmflow.dataset.reader import Reader

    reader = Reader(dataset, split, cache)
    reader.check()

    class Shards(Datasource):
        """The split, in as many tasks as Ray asks for: the index makes any run of rows as near as any other."""

        def estimate_inmemory_data_size(self) -> int:
            return sum(shard.bytes for shard in reader.shards)

        def get_read_tasks(
            self, parallelism: int, per_task_row_limit: int | None = None, data_context: Any = None
        ) -> list[ReadTask]:
            tasks = []
            for pieces in cut([shard.samples for shard in reader.shards], parallelism):
                shards = [reader.shards[shard] for shard, _, _ in pieces]
                rows = sum(stop - first for _, first, stop in pieces)
                metadata = BlockMetadata(
                    num_rows=rows,
                    size_bytes=self.estimate_inmemory_data_size() * rows // len(reader),
                    exec_stats=None,
                    input_files=tuple(map(dataset.tar_uri, shards)),
                )
                # The manifest of a task's own shards: that of a hundred thousand would outweigh what a task reads.
                part = Dataset(dataset.uri, {"adopted": dataset.adopted, "shards": [asdict(shard) for shard in shards]})
                work = partial(_blocks, part, split, cache, [(first, stop) for _, first, stop in pieces])
                tasks.append(ReadTask(work, metadata, RAY_SCHEMA, per_task_row_limit))
            return tasks

    found: ray.data.Dataset = ray.data.read_datasource(Shards())  # type: ignore[no-untyped-call]
    return found


def cut(shard_samples: Sequence[int], count: int) -> list[list[Piece]]:
    """Shards laid end to end and cut into `count` runs that differ by a row at most; fewer where rows are fewer.

    No shard may be empty.
    """
    starts = [0, *accumulate(shard_samples)]
    count = min(count, starts[-1])
    runs = []
    for number in range(count):
        begin, end = number * starts[-1] // count, (number + 1) * starts[-1] // count
        shards = range(bisect_right(starts, begin) - 1, bisect_left(starts, end))
        runs.append(
            [(each, max(begin - starts[each], 0), min(end, starts[each + 1]) - starts[each]) for each in shards]
        )
    return runs


def _tar_samples(reader: Reader, shards: Iterable[dict[str, str]]) -> Iterator[dict[str, Any]]:
    """The samples of shards given as {"url"}, each a dict as webdataset makes them of a tar's members."""
    ordinals = {reader.dataset.tar_uri(shard): ordinal for ordinal, shard in enumerate(reader.shards)}
    for each in shards:
        url = each["url"]
        ordinal = ordinals[url]
        for members in reader.scan(ordinal, 0, reader.shards[ordinal].samples):
            sample: dict[str, Any] = {"__key__": members.key, "__url__": url, members.extension: members.image}
            if members.txt or not reader.dataset.adopted:  # of ours a text without a caption is there, and empty
                sample["txt"] = members.txt
            if members.json:
                sample["json"] = members.json
            for number, frame in enumerate(members.frames, 1):
                sample[f"{number:03d}.{members.extension}"] = frame
            yield sample


def _blocks(
    dataset: Dataset, split: str, cache: ShardCache | None, ranges: Sequence[tuple[int, int]]
) -> Iterator[pa.Table]:
    """Tables of the rows first…stop-1 of each shard in turn, of `BLOCK_BYTES` of images each."""
    from mmflow.dataset.reader import Reader

    reader = Reader(dataset, split, cache)
    rows: list[Sample] = []
    size = 0
    for shard, (first, stop) in enumerate(ranges):
        for sample in reader.samples(shard, first, stop):
            rows.append(sample)
            size += len(sample.image) + sum(map(len, sample.frames))
            if size >= BLOCK_BYTES:
                yield _table(rows)
                rows, size = [], 0
    if rows:
        yield _table(rows)


def _table(samples: Sequence[Sample]) -> pa.Table:
    return pa.Table.from_pylist(
        [
            {
                "key": sample.key,
                "image": sample.image,
                "image_extension": sample.extension,
                "captions": [{"text": each.text, "language": each.language} for each in sample.captions],
                "metadata": canonical_json(sample.metadata),
                "frames": list(sample.frames),
            }
            for sample in samples
        ],
        RAY_SCHEMA,
    )
