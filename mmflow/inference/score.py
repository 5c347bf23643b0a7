"""Task `score`: embeddings, image–caption similarity and best class of every row, as one Parquet file per shard."""

from __future__ import annotations

import hashlib
import io
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import IO, Annotated, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pydantic import Field

from mmflow.core.artifacts import content_hash
from mmflow.core.config import OPERATIONAL, Config
from mmflow.core.errors import MmflowError
from mmflow.core.progress import Report
from mmflow.core.storage import join, read_bytes
from mmflow.dataset.format import ShardInfo
from mmflow.dataset.reader import Reader, Sample
from mmflow.inference.runner import Task, Write, run, shards_of
from mmflow.models.package import LoadedModel, read_package

HISTOGRAM_EDGES = [round(-1 + 0.05 * step, 2) for step in range(41)]


class ScoreConfig(Config):
    """Stage `score`: the champion's embeddings, best class and image–caption similarity for every row."""

    num_workers: Annotated[int, OPERATIONAL] = Field(1, ge=1)
    """Actors that hold the model."""
    cpus_per_worker: Annotated[int, OPERATIONAL] = Field(1, ge=1)
    """CPU cores that each actor reserves."""
    batch_size: Annotated[int, OPERATIONAL] = Field(256, ge=1)
    """Rows embedded at a time."""


@dataclass(frozen=True, kw_only=True)
class Score(Task):
    """Scores of all splits of a dataset.

    Columns: `key`, `split`, `row` (in its shard), `image_embedding` and `caption_embedding` (fixed-size lists of
    float16, unit length), `similarity` (their cosine), `best_class` and `class_similarity` (null without `prompts`).
    Caption columns are null for samples without a caption.
    """

    prompts: Mapping[str, Sequence[str]]
    language: str
    batch_size: int

    def file(self, uri: str, shard: ShardInfo) -> str:
        """<scores>/scores/<shard>.parquet"""
        return join(uri, "scores", f"{shard.name}.parquet")

    def start(self, loaded: LoadedModel) -> Write:
        """Embed the classes first: they are the same for every shard."""
        from mmflow.inference.predict import Predictor

        predictor = Predictor(loaded, self.batch_size)
        classes = predictor.embed_classes(self.prompts) if self.prompts else None

        def write(reader: Reader, shard: int, stream: IO[bytes]) -> None:
            samples = list(reader.samples(shard, 0, reader.shards[shard].samples))
            captions = [_caption(sample, self.language) for sample in samples]
            images = predictor.embed_images(samples)
            texts = predictor.embed_captions([caption or "" for caption in captions])
            missing = np.array([caption is None for caption in captions])
            columns = {
                "key": pa.array([sample.key for sample in samples]),
                "split": pa.array([reader.split] * len(samples)).dictionary_encode(),
                "row": pa.array(np.arange(len(samples))),
                "image_embedding": _vectors(images),
                "caption_embedding": _vectors(texts, missing),
                "similarity": pa.array((images * texts).sum(axis=1), mask=missing),
                "best_class": pa.nulls(len(samples), pa.string()),
                "class_similarity": pa.nulls(len(samples), pa.float32()),
            }
            if classes is not None:
                by_class = images @ classes.T
                names = list(self.prompts)
                columns["best_class"] = pa.array([names[best] for best in by_class.argmax(axis=1)])
                columns["class_similarity"] = pa.array(by_class.max(axis=1))
            pq.write_table(pa.table(columns), stream, compression="zstd")

        return write


def _caption(sample: Sample, language: str) -> str | None:
    """The first caption in the language, or else the first of all."""
    preferred = sorted(sample.captions, key=lambda caption: caption.language != language)
    return preferred[0].text if preferred else None


def _vectors(embeddings: NDArray[np.float32], missing: NDArray[np.bool_] | None = None) -> pa.Array:
    flat = pa.array(embeddings.astype(np.float16).ravel())
    mask = None if missing is None else pa.array(missing)
    return pa.FixedSizeListArray.from_arrays(flat, embeddings.shape[1], mask=mask)


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
    """Score all splits of a dataset with a model package; returns the manifest's fields. Ray must be initialised.

    Raises MmflowError where a file does not have a row for each sample.
    """
    prompts = {name: list(texts) for name, texts in prompts.items()}
    task = Score(dataset=dataset, package=package, prompts=prompts, language=language, batch_size=settings.batch_size)
    shards = shards_of(dataset)
    workers, cpus = settings.num_workers, settings.cpus_per_worker
    run(task, uri, shards, num_workers=workers, cpus_per_worker=cpus, progress=progress)
    return {"model_digest": read_package(package).digest, "version": version, **_summary(task, uri, shards)}


def _summary(task: Score, uri: str, shards: Sequence[ShardInfo]) -> dict[str, Any]:
    """What the files hold: counts and checksums, and how similarities and classes are spread."""
    files, classes = [], Counter[str]()
    counts = np.zeros(len(HISTOGRAM_EDGES) - 1, dtype=np.int64)
    for shard in shards:
        file = task.file(uri, shard)
        data = read_bytes(file)
        table = pq.read_table(io.BytesIO(data), columns=["similarity", "best_class"])
        if table.num_rows != shard.samples:
            raise MmflowError(f"{file}: {table.num_rows} rows for {shard.samples} samples; delete it and rerun")
        sha256 = hashlib.sha256(data).hexdigest()
        files.append({"name": shard.name, "rows": shard.samples, "bytes": len(data), "sha256": sha256})
        similarity = np.clip(table["similarity"].drop_null().to_numpy(), -1, 1)
        counts += np.histogram(similarity, bins=HISTOGRAM_EDGES)[0]
        classes.update(table["best_class"].drop_null().to_pylist())
    return {
        "fingerprint": content_hash(files),
        "files": files,
        "totals": {"rows": sum(file["rows"] for file in files), "bytes": sum(file["bytes"] for file in files)},
        "similarity": {"edges": HISTOGRAM_EDGES, "counts": counts.tolist()},
        "classes": [{"name": name, "rows": rows} for name, rows in classes.most_common()],
    }
