"""A committed dataset opened by its URI: its shards and splits, and exports to webdataset and Ray Data.

Both exports read through the index, as training does. The tar readers of webdataset and Ray Data stop silently at a
damaged header; here a missing, short or altered shard is an error, and a sample costs a tenth of the time.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from mmflow.core.artifacts import canonical_json, read_artifact
from mmflow.dataset.cache import ShardCache
from mmflow.dataset.format import KIND, CommittedShards
from mmflow.dataset.reader import Reader, Sample

if TYPE_CHECKING:
    import ray.data
    import webdataset

BLOCK_BYTES = 64 << 20  # of images in one block of a Ray Dataset: half the size at which Ray splits a block
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

Run = tuple[int, int, int]  # shard, first row, the row after the last


@dataclass(frozen=True)
class Dataset(CommittedShards):
    """A committed dataset, as `open_dataset` returns it."""

    def as_webdataset(
        self, split: str, *, shuffle_shards: int | None = None, cache: ShardCache | None = None
    ) -> webdataset.FluidWrapper:
        """A webdataset pipeline of a split: {"__key__", "__url__", "jpg": bytes, "txt": bytes, "json": bytes}.

        Continue it as any other: `.decode("pil")`, `.shuffle(1000)`, `.to_tuple("jpg", "txt")`. webdataset's own stages
        divide the shards among ranks and DataLoader workers; `shuffle_shards` is a seed that shuffles them first,
        differently in each epoch. Only members in the index appear. Raises as `Reader.check` and `Reader.read`.
        """
        import webdataset

        reader = Reader(self, split, cache)
        reader.check()
        urls = [self.tar_uri(shard) for shard in reader.shards]
        pipeline = webdataset.FluidWrapper(webdataset.SimpleShardList(urls))
        if shuffle_shards is not None:
            pipeline.append(webdataset.detshuffle(bufsize=len(urls), initial=len(urls), seed=shuffle_shards))
        pipeline.append(webdataset.split_by_node)
        pipeline.append(webdataset.split_by_worker)
        pipeline.append(partial(_webdataset_samples, reader))
        return pipeline

    def to_ray_data(self, split: str, *, cache: ShardCache | None = None) -> ray.data.Dataset:
        """A Ray Dataset of a split with the columns of `RAY_SCHEMA`. Its row count is known before anything is read.

        Rows arrive as tasks finish, or in the order of the tars if Ray's `preserve_order` is set. Ray must be
        initialised. Raises as `Reader.check`; the tasks raise as `Reader.read`.
        """
        import ray.data
        from ray.data.block import BlockMetadata
        from ray.data.datasource import Datasource, ReadTask

        reader = Reader(self, split, cache)
        reader.check()
        uri, adopted = self.uri, self.adopted

        class SplitSource(Datasource):
            """The split, in as many tasks as Ray asks for: with the index, any run of rows can be read directly."""

            def estimate_inmemory_data_size(self) -> int:
                return sum(shard.bytes for shard in reader.shards)

            def get_read_tasks(
                self, parallelism: int, per_task_row_limit: int | None = None, data_context: Any = None
            ) -> list[ReadTask]:
                tasks = []
                for runs in cut([shard.samples for shard in reader.shards], parallelism):
                    # Only the task's own shards: a manifest of a hundred thousand would outweigh what a task reads.
                    shards = [asdict(reader.shards[shard]) for shard, _, _ in runs]
                    part = CommittedShards(uri, {"adopted": adopted, "shards": shards})
                    num_rows = sum(stop - first for _, first, stop in runs)
                    metadata = BlockMetadata(
                        num_rows=num_rows,
                        size_bytes=self.estimate_inmemory_data_size() * num_rows // len(reader),
                        exec_stats=None,
                        input_files=tuple(map(part.tar_uri, part.shards(split))),
                    )
                    work = partial(_blocks, part, split, cache, [(first, stop) for _, first, stop in runs])
                    tasks.append(ReadTask(work, metadata, RAY_SCHEMA, per_task_row_limit))
                return tasks

        data: ray.data.Dataset = ray.data.read_datasource(SplitSource())  # type: ignore[no-untyped-call]
        return data


def open_dataset(uri: str) -> Dataset:
    """The dataset at `uri`. Raises MissingArtifactError if none was committed there, MisuseError for another kind."""
    return Dataset(uri, read_artifact(uri, KIND).manifest)


def cut(shard_samples: Sequence[int], count: int) -> list[list[Run]]:
    """Lay the shards end to end and cut them into `count` parts of equal size, give or take a row.

    Fewer parts if there are fewer rows. No shard may be empty.
    """
    starts = [0, *accumulate(shard_samples)]
    count = min(count, starts[-1])
    parts = []
    for number in range(count):
        begin, end = number * starts[-1] // count, (number + 1) * starts[-1] // count
        shards = range(bisect_right(starts, begin) - 1, bisect_left(starts, end))
        parts.append(
            [(shard, max(begin - starts[shard], 0), min(end, starts[shard + 1]) - starts[shard]) for shard in shards]
        )
    return parts


def _webdataset_samples(reader: Reader, sources: Iterable[dict[str, str]]) -> Iterator[dict[str, Any]]:
    """The samples of the shards in `sources` ({"url"}), each as webdataset makes it from the members of a tar."""
    ordinals = {reader.dataset.tar_uri(shard): ordinal for ordinal, shard in enumerate(reader.shards)}
    for source in sources:
        url = source["url"]
        ordinal = ordinals[url]
        for members in reader.scan(ordinal, 0, reader.shards[ordinal].samples):
            sample: dict[str, Any] = {"__key__": members.key, "__url__": url, members.extension: members.image}
            if members.txt or not reader.dataset.adopted:  # our tars have an empty text for a missing caption
                sample["txt"] = members.txt
            if members.json:
                sample["json"] = members.json
            for number, frame in enumerate(members.frames, 1):
                sample[f"{number:03d}.{members.extension}"] = frame
            yield sample


def _blocks(
    shards: CommittedShards, split: str, cache: ShardCache | None, ranges: Sequence[tuple[int, int]]
) -> Iterator[pa.Table]:
    """Tables of rows first…stop-1 of each shard in turn, with `BLOCK_BYTES` of images each."""
    reader = Reader(shards, split, cache)
    samples: list[Sample] = []
    size = 0
    for shard, (first, stop) in enumerate(ranges):
        for sample in reader.samples(shard, first, stop):
            samples.append(sample)
            size += len(sample.image) + sum(map(len, sample.frames))
            if size >= BLOCK_BYTES:
                yield _table(samples)
                samples, size = [], 0
    if samples:
        yield _table(samples)


def _table(samples: Sequence[Sample]) -> pa.Table:
    rows = [
        {
            "key": sample.key,
            "image": sample.image,
            "image_extension": sample.extension,
            "captions": [{"text": caption.text, "language": caption.language} for caption in sample.captions],
            "metadata": canonical_json(sample.metadata),
            "frames": list(sample.frames),
        }
        for sample in samples
    ]
    return pa.Table.from_pylist(rows, RAY_SCHEMA)
