"""Metrics of a large split from its results: in seconds, and in memory that does not grow with its square."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmflow.core.storage import write_bytes
from mmflow.dataset.opened import Dataset
from mmflow.evaluation.config import EXAMINATIONS
from mmflow.evaluation.examination import Subject, read_rows
from mmflow.inference.result import Result, Stored, lists_of, vectors_of
from mmflow.inference.runner import Model
from mmflow.inference.tasks.pairs import GivenMatches
from mmflow.learning.retrieval import ranks_of_right
from tests.dataset.handmade import Handmade, write_dataset
from tests.evaluation.models import loaded_model, ranker_config, settings, written_package

ROWS, SHARD_ROWS = 20_000, 5_000
ASKS = settings(
    matching={"candidates": 16},
    robustness={"pictures": ["jpeg"], "captions": ["typos", "shuffled_words"]},
    slices={},
    max_errors=0.1,
)
SECONDS, KIBIBYTES = 40, 400 << 10  # of computing; all similarities would be 1.6 GB

MEASURE = """
import json, sys
from time import process_time
from mmflow.evaluation.evaluate import metrics_of_package
from tests.evaluation.models import quiet
from tests.evaluation.test_large_evaluation import ASKS

def peak():
    return int(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))

before, began = peak(), process_time()
metrics = metrics_of_package(*sys.argv[1:3], ASKS, sys.argv[3], quiet)
print(json.dumps({"kibibytes": peak() - before, "seconds": process_time() - began, "metrics": metrics}))
"""


def write_result(store: Path, model: Model, result: Result, dataset: Dataset, values: pa.Array, failed: int) -> None:
    """A result of all rows of split held_out, in which one row failed."""
    stored, first = Stored(str(store), model.digest, result), 0
    for shard in dataset.shards("held_out"):
        rows = range(first, first := first + shard.samples)
        columns = {
            "key": pa.array([f"key-{row}" for row in rows]),
            "row": pa.array(range(shard.samples), pa.int32()),
            "error": pa.array(["gone" if row == failed else None for row in rows], pa.string()),
        }
        (field,) = result.fields(model.load())
        table = pa.table(columns).append_column(field, values.slice(rows.start, len(rows)).cast(field.type))
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink)
        write_bytes(stored.uri(shard), sink.getvalue().to_pybytes())


@pytest.mark.slow
def test_twenty_thousand_rows_take_seconds_and_little_memory(tmp_path: Path) -> None:
    samples = [
        Handmade(key=f"key-{row}", captions=[{"language": "en", "text": f"square {row}"}], size=(8, 8))
        for row in range(ROWS)
    ]
    shards = [("held_out", samples[first : first + SHARD_ROWS]) for first in range(0, ROWS, SHARD_ROWS)]
    dataset, store, failed = write_dataset(tmp_path / "dataset", shards), tmp_path / "results", 7_001
    package = written_package(tmp_path / "package", loaded_model(ranker_config())).uri
    model, random = Model(package=package), np.random.default_rng(0)
    vectors = {True: random.normal(size=(ROWS, 8)), False: random.normal(size=(ROWS, 8))}
    for result in dict.fromkeys(
        result
        for name in ("retrieval", "matching", "robustness")
        for result in EXAMINATIONS[name].asks(ASKS.named.get(name), ["en"], frozenset({"embeddings"}))
    ):
        of_pictures = result.task == "image_embedding"
        values = vectors_of(vectors[of_pictures].astype(np.float32), "float16")
        write_result(store, model, result, dataset, values if of_pictures else lists_of(values, [1] * ROWS), failed)
    rows = read_rows(dataset, "held_out", ["en"]).without({failed: "gone"})
    (given,) = EXAMINATIONS["matching"].asks_then(Subject(model, rows, str(store)), ASKS.matching)
    assert isinstance(given, GivenMatches)
    lengths = [len(texts) for own in given.texts.values() for texts in own]
    odds = pa.array(random.normal(size=sum(lengths)), pa.float32())
    write_result(store, model, given, dataset, lists_of(odds, lengths), failed)
    arguments = [package, dataset.uri, str(store)]
    run = subprocess.run([sys.executable, "-c", MEASURE, *arguments], capture_output=True, text=True, check=True)
    found = json.loads(run.stdout)
    assert found["seconds"] < SECONDS
    assert found["kibibytes"] < KIBIBYTES
    kept = np.delete(np.arange(ROWS), failed)
    texts, images = (vectors[part][kept].astype(np.float16).astype(np.float32) for part in (False, True))
    ranks = ranks_of_right(texts @ images.T)
    assert found["metrics"]["held_out/text_to_image/mean_rank"] == pytest.approx(ranks.mean(), rel=1e-4)
    assert found["metrics"]["held_out/robustness/typos/R@1_drop"] == 0.0  # the changed have the same vectors
