"""The runner writes one whole file per shard and only those that are missing; scores say what the model does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from mmflow.core.errors import MmflowError
from mmflow.dataset.opened import Dataset
from mmflow.dataset.reader import Reader
from mmflow.inference.predict import Predictor
from mmflow.inference.runner import ShardWorker
from mmflow.inference.score import Score, ScoreConfig, score_dataset
from tests.dataset.handmade import Handmade, write_dataset
from tests.evaluation.models import COLOURS, captions_of, dual_config, loaded_model, written_package

PROMPTS = {colour: [f"a {colour} square", colour] for colour in COLOURS[:3]}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Six samples in three shards of two splits, one shard empty; the last sample's only caption is Chinese."""
    samples = [
        Handmade(key=colour, captions=[{"language": "en", "text": captions_of(colour)[0]}], size=(24, 20))
        for colour in COLOURS[:-1]
    ]
    samples.append(Handmade(key="other", captions=[{"language": "zh", "text": "the one"}], size=(24, 20)))
    shards = [("train", samples[:3]), ("train", []), ("held_out", samples[3:])]
    return write_dataset(tmp_path_factory.mktemp("score") / "dataset", shards)


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> str:
    return written_package(tmp_path_factory.mktemp("score") / "package", loaded_model(dual_config(), seed=4)).uri


def task_of(dataset: Dataset, package: str, **changes: Any) -> Score:
    fields = {"prompts": PROMPTS, "language": "en", "batch_size": 2} | changes
    return Score(dataset=dataset.uri, package=package, **fields)


def score(uri: Path, dataset: Dataset, package: str) -> dict[str, Any]:
    return dict(
        score_dataset(
            str(uri),
            dataset=dataset.uri,
            package=package,
            version=3,
            prompts=PROMPTS,
            language="en",
            settings=ScoreConfig(batch_size=2),
            progress=lambda done, total, what: None,
        )
    )


def test_a_row_has_its_embeddings_their_cosine_and_its_best_class(
    dataset: Dataset, package: str, tmp_path: Path
) -> None:
    ShardWorker(task_of(dataset, package), str(tmp_path))({"shard": ["00002"], "split": ["held_out"]})
    table = pq.read_table(tmp_path / "scores" / "00002.parquet")
    samples = list(Reader(dataset, "held_out"))
    predictor = Predictor(loaded_model(dual_config(), seed=4), 1)
    images = predictor.embed_images(samples)
    texts = predictor.embed_captions([sample.captions[0].text for sample in samples])
    classes = images @ predictor.embed_classes(PROMPTS).T
    assert table["key"].to_pylist() == [sample.key for sample in samples]
    assert (table["split"].to_pylist(), table["row"].to_pylist()) == (["held_out"] * 3, [0, 1, 2])
    np.testing.assert_allclose(table["image_embedding"].to_pylist(), images, atol=1e-3)
    np.testing.assert_allclose(table["similarity"].to_numpy(), (images * texts).sum(1), atol=1e-5)
    assert table["best_class"].to_pylist() == [list(PROMPTS)[best] for best in classes.argmax(1)]
    np.testing.assert_allclose(table["class_similarity"].to_numpy(), classes.max(1), atol=1e-5)


def test_without_prompts_class_columns_are_null(dataset: Dataset, package: str, tmp_path: Path) -> None:
    ShardWorker(task_of(dataset, package, prompts={}), str(tmp_path))({"shard": ["00000"], "split": ["train"]})
    table = pq.read_table(tmp_path / "scores" / "00000.parquet")
    assert table["best_class"].null_count == table["class_similarity"].null_count == 3


def test_a_restarted_job_writes_only_the_missing_shards(
    ray_cluster: None, dataset: Dataset, package: str, tmp_path: Path
) -> None:
    manifest = score(tmp_path, dataset, package)
    assert manifest["totals"]["rows"] == sum(manifest["similarity"]["counts"]) == 6
    assert sum(row["rows"] for row in manifest["classes"]) == 6
    kept, gone = (tmp_path / "scores" / f"{name}.parquet" for name in ("00000", "00002"))
    stamp, data = kept.stat().st_mtime_ns, gone.read_bytes()
    gone.unlink()
    assert score(tmp_path, dataset, package) == manifest
    assert kept.stat().st_mtime_ns == stamp
    assert gone.read_bytes() == data
    pq.write_table(pq.read_table(gone).slice(1), kept)
    with pytest.raises(MmflowError, match=r"00000\.parquet: 2 rows for 3 samples; delete it and rerun"):
        score(tmp_path, dataset, package)
