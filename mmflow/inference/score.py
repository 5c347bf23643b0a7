"""Stage `score`: a Ray Data job that gives every row of a dataset the champion's opinion, exactly once.

One Parquet file an input shard, under a name that the shard decides, published whole: a file that is there is done, so
a killed job goes on with the shards that are missing, and no row can be written twice.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from mmflow.core.artifacts import content_hash
from mmflow.core.errors import MmflowError
from mmflow.core.progress import Report
from mmflow.core.storage import exists, file_sha256, join, publish, read_bytes
from mmflow.dataset.opened import open_dataset
from mmflow.dataset.reader import Sample
from mmflow.inference.config import ScoreConfig
from mmflow.inference.embed import Embeddings
from mmflow.models.package import read_package

HISTOGRAM_EDGES = [round(-1 + 0.05 * step, 2) for step in range(41)]


def score_dataset(
    uri: str,
    *,
    dataset: str,
    package: str,
    version: int,
    prompts: Mapping[str, Sequence[str]],
    language: str,
    settings: ScoreConfig,
    progress: Report,
) -> Mapping[str, Any]:
    """Score all splits of a dataset with a model package; the manifest's fields. Ray must be initialised.

    Columns: `key`, `split`, `row` (in its shard), `image_embedding` and `caption_embedding` (fixed-size lists of
    float16, unit length), `similarity` (their cosine), `best_class` and `class_similarity` (null without `prompts`).
    What is of a caption is null where a sample has none. Raises MmflowError where the rows written are not the rows of
    the dataset.
    """
    import ray

    data = open_dataset(dataset)
    shards = [shard for split in data.splits for shard in data.shards(split) if shard.samples]
    missing = [shard for shard in shards if not exists(_file(uri, shard.name))]
    done = len(shards) - len(missing)
    progress(done, len(shards), "shards")
    if missing:
        work = ray.data.from_items(
            [{"shard": shard.name, "split": shard.split} for shard in missing], override_num_blocks=len(missing)
        ).map_batches(
            ScoreShards,
            fn_constructor_args=(uri, dataset, package, {name: list(texts) for name, texts in prompts.items()}),
            fn_constructor_kwargs={"language": language, "batch_size": settings.batch_size},
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=min(settings.num_workers, len(missing))),
            num_cpus=settings.cpus_per_worker,
        )
        for _ in work.iter_rows():
            done += 1
            progress(done, len(shards), "shards")
    return _summary(uri, [(shard.name, shard.samples) for shard in shards], read_package(package).digest, version)


class ScoreShards:
    """A Ray Data actor: it loads the model once and scores whole shards."""

    def __init__(
        self, uri: str, dataset: str, package: str, prompts: dict[str, list[str]], *, language: str, batch_size: int
    ) -> None:
        from mmflow.inference.embed import class_embeddings
        from mmflow.models.package import load_package

        self.uri, self.language, self.batch_size = uri, language, batch_size
        self.data = open_dataset(dataset)
        self.loaded = load_package(read_package(package))
        self.classes = list(prompts)
        self.class_embeddings = class_embeddings(self.loaded, prompts, batch_size) if prompts else None

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Score the shards of a batch of {"shard", "split"}, and hand the batch on."""
        for name, split in zip(batch["shard"], batch["split"], strict=True):
            with publish(_file(self.uri, str(name))) as stream:
                pq.write_table(self._score(str(name), str(split)), stream, compression="zstd")
        return batch

    def _score(self, name: str, split: str) -> pa.Table:
        from mmflow.dataset.reader import Reader
        from mmflow.inference.embed import embed_captions, embed_images

        reader = Reader(self.data, split)
        ordinal = next(number for number, shard in enumerate(reader.shards) if shard.name == name)
        samples = list(reader.samples(ordinal, 0, reader.shards[ordinal].samples))
        captions = [_caption(sample, self.language) for sample in samples]
        images = embed_images(self.loaded, samples, self.batch_size)
        texts = embed_captions(self.loaded, [caption or "" for caption in captions], self.batch_size)
        without = np.array([caption is None for caption in captions])
        columns = {
            "key": pa.array([sample.key for sample in samples]),
            "split": pa.array([split] * len(samples)).dictionary_encode(),
            "row": pa.array(np.arange(len(samples))),
            "image_embedding": _vectors(images),
            "caption_embedding": _vectors(texts, without),
            "similarity": pa.array((images * texts).sum(axis=1), mask=without),
            "best_class": pa.nulls(len(samples), pa.string()),
            "class_similarity": pa.nulls(len(samples), pa.float32()),
        }
        if self.class_embeddings is not None:
            by_class = images @ self.class_embeddings.T
            best = by_class.argmax(axis=1)
            columns["best_class"] = pa.array([self.classes[each] for each in best])
            columns["class_similarity"] = pa.array(by_class.max(axis=1))
        return pa.table(columns)


def _caption(sample: Sample, language: str) -> str | None:
    """The first caption in the language, or else in any."""
    preferred = sorted(sample.captions, key=lambda each: each.language != language)
    return preferred[0].text if preferred else None


def _vectors(embeddings: Embeddings, without: NDArray[np.bool_] | None = None) -> pa.Array:
    flat = pa.array(embeddings.astype(np.float16).ravel())
    mask = None if without is None else pa.array(without)
    return pa.FixedSizeListArray.from_arrays(flat, embeddings.shape[1], mask=mask)


def _file(uri: str, shard: str) -> str:
    return join(uri, "scores", f"{shard}.parquet")


def _summary(uri: str, shards: Sequence[tuple[str, int]], digest: str, version: int) -> Mapping[str, Any]:
    """Count what was written, against what should have been, and describe it."""
    files, classes = [], dict[str, int]()
    counts = np.zeros(len(HISTOGRAM_EDGES) - 1, dtype=np.int64)
    for name, samples in shards:
        data = read_bytes(_file(uri, name))
        table = pq.read_table(io.BytesIO(data), columns=["similarity", "best_class"])
        if table.num_rows != samples:
            raise MmflowError(f"{_file(uri, name)}: {table.num_rows} rows for {samples} samples; delete it and rerun")
        files.append({"name": name, "rows": samples, "bytes": len(data), "sha256": file_sha256(_file(uri, name))})
        similarity = np.clip(table["similarity"].drop_null().to_numpy(), -1, 1)
        counts += np.histogram(similarity, bins=HISTOGRAM_EDGES)[0]
        for each in table["best_class"].value_counts().to_pylist():
            if each["values"] is not None:
                classes[each["values"]] = classes.get(each["values"], 0) + each["counts"]
    return {
        "fingerprint": content_hash(files),
        "model_digest": digest,
        "version": version,
        "files": files,
        "totals": {"rows": sum(file["rows"] for file in files), "bytes": sum(file["bytes"] for file in files)},
        "similarity": {"edges": HISTOGRAM_EDGES, "counts": counts.tolist()},
        "classes": [{"name": name, "rows": rows} for name, rows in sorted(classes.items(), key=lambda each: -each[1])],
    }
