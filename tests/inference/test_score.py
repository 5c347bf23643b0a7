"""Scores put the results of whole datasets together: every row once, in files that others read, with honest totals."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest

from mmflow.core.errors import MmflowError
from mmflow.dataset.opened import Dataset
from mmflow.inference.config import ScoreConfig, TasksConfig
from mmflow.inference.result import embeddings_of
from mmflow.inference.runner import Model
from mmflow.inference.score import Scored, score
from tests.dataset.handmade import flip_bit, write_dataset
from tests.evaluation.models import (
    COLOURS,
    answerer_config,
    captioner_config,
    loaded_model,
    ranker_config,
    written_package,
)
from tests.inference.asking import files, square, squares, varied

ALL = {"embed": {}, "zero_shot": {"prompts": {colour: [colour] for colour in COLOURS[:3]}, "top": 2}, "match": {}}


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> str:
    return written_package(tmp_path_factory.mktemp("score") / "package", loaded_model(ranker_config(), seed=4)).uri


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Six samples in three shards of two splits, one shard empty, one sample without a caption."""
    (train, first), (_, second) = squares(3, 2)
    shards = [(train, first), ("train", []), ("held_out", [*second, square("silent", captions=[])])]
    return write_dataset(tmp_path_factory.mktemp("score") / "dataset", shards)


def scores(
    folder: Path,
    package: str,
    datasets: Mapping[str, Dataset],
    tasks: Mapping[str, Any] = ALL,
    splits: tuple[str, ...] | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """The manifest of scores in `folder`, whose results are in `folder`/results."""
    scored = Scored(
        model=Model(package=package),
        datasets=tuple((name, dataset.uri) for name, dataset in datasets.items()),
        tasks=TasksConfig.model_validate(tasks),
        splits=splits,
    )
    config = ScoreConfig.model_validate({"batch_size": 2, "max_errors": 1, **settings})
    return dict(score(str(folder), str(folder / "results"), scored, config, lambda done, total, note: None))


def test_every_row_of_all_splits_stands_once_with_its_place(dataset: Dataset, package: str, tmp_path: Path) -> None:
    manifest = scores(tmp_path, package, {"data": dataset})
    table = pyarrow.dataset.dataset(tmp_path / "scores").to_table().sort_by("key")
    assert table.select(["key", "split", "shard", "row"]).to_pylist() == [
        {"key": "black-4", "split": "held_out", "shard": "00002", "row": 1},
        {"key": "blue-2", "split": "train", "shard": "00000", "row": 2},
        {"key": "green-1", "split": "train", "shard": "00000", "row": 1},
        {"key": "red-0", "split": "train", "shard": "00000", "row": 0},
        {"key": "silent", "split": "held_out", "shard": "00002", "row": 2},
        {"key": "yellow-3", "split": "held_out", "shard": "00002", "row": 0},
    ]
    assert all(field.metadata[b"description"] for field in pq.read_schema(tmp_path / "scores" / "00000.parquet"))
    assert manifest["totals"] == {"rows": 6, "errors": 0, "bytes": sum(file["bytes"] for file in manifest["files"])}
    assert [(file["name"], file["rows"]) for file in manifest["files"]] == [("00000", 3), ("00002", 3)]
    assert manifest["datasets"] == [
        {"name": "data", "uri": dataset.uri, "fingerprint": dataset.fingerprint, "rows": 6, "errors": 0}
    ]


def test_the_similarity_is_the_cosine_and_its_spread_and_ends_are_in_the_manifest(
    dataset: Dataset, package: str, tmp_path: Path
) -> None:
    manifest = scores(tmp_path, package, {"data": dataset})
    table = pyarrow.dataset.dataset(tmp_path / "scores").to_table()
    images, captions = (embeddings_of(table[f"{side}_embedding"]) for side in ("image", "caption"))
    cosines = np.array([np.nan if cosine is None else cosine for cosine in table["similarity"].to_pylist()])
    np.testing.assert_allclose(cosines, (images * captions).sum(1), atol=1e-6)
    assert np.isnan(cosines).sum() == 1
    by_key = dict(zip(table["key"].to_pylist(), cosines, strict=True))
    del by_key["silent"]
    ordered = sorted(by_key, key=lambda key: -by_key[key])
    assert [pair["key"] for pair in manifest["best"]] == ordered
    assert [pair["key"] for pair in manifest["worst"]] == ordered[::-1]
    edges = manifest["similarity"]["edges"]
    assert manifest["similarity"]["counts"] == np.histogram(list(by_key.values()), edges)[0].tolist()
    best = [classes[0] for classes in table["classes"].to_pylist()]
    assert {count["name"]: count["rows"] for count in manifest["classes"]} == {name: best.count(name) for name in best}


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_vectors_are_cut_to_a_width_at_unit_length(dataset: Dataset, package: str, tmp_path: Path, dtype: str) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    scores(whole, package, {"data": dataset}, {"embed": {"dtype": "float32"}})
    scores(cut, package, {"data": dataset}, {"embed": {"dtype": dtype, "width": 3}})
    before, after = (pq.read_table(folder / "scores" / "00002.parquet") for folder in (whole, cut))
    for side in ("image_embedding", "caption_embedding"):
        vectors = embeddings_of(before[side])[:, :3]
        expected = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        assert after.schema.field(side).type.list_size == 3
        np.testing.assert_allclose(embeddings_of(after[side]), expected, atol=1e-6 if dtype == "float32" else 1e-3)
    assert after["similarity"].null_count == 1


def test_a_captioner_s_and_an_answerer_s_scores_have_no_embeddings(tmp_path: Path) -> None:
    dataset = varied(tmp_path / "dataset")
    models = {
        "captioner": loaded_model(captioner_config()),
        "answerer": loaded_model(answerer_config(heads=["classes"]), COLOURS),
    }
    tasks = {"captioner": {"caption": {"max_tokens": 4}, "perplexity": {}}, "answerer": {"answer": {}, "classify": {}}}
    columns = {
        "captioner": ["written_captions", "caption_nats", "caption_tokens"],
        "answerer": ["labels", "label_odds", "questions", "answers"],
    }
    for name, loaded in models.items():
        package = written_package(tmp_path / name, loaded).uri
        manifest = scores(tmp_path / f"{name}-scores", package, {"data": dataset}, tasks[name])
        table = pq.read_table(tmp_path / f"{name}-scores" / "scores")
        assert table.column_names == ["key", "split", "shard", "row", *columns[name], "error"]
        assert "similarity" not in manifest
        assert set(manifest["tasks"]) == set(tasks[name])
    assert sum(count["rows"] for count in manifest["labels"]) == 5


def test_several_datasets_stand_in_folders_that_readers_of_parquet_know(
    dataset: Dataset, package: str, tmp_path: Path
) -> None:
    other = write_dataset(tmp_path / "other", squares(2, first=9))
    manifest = scores(tmp_path, package, {"first": dataset, "2024": other}, {"embed": {}})
    assert [(entry["name"], entry["rows"]) for entry in manifest["datasets"]] == [("first", 6), ("2024", 2)]
    table = pyarrow.dataset.dataset(tmp_path / "scores", partitioning="hive").to_table()
    assert sorted(table["dataset"].to_pylist()) == ["2024"] * 2 + ["first"] * 6
    assert pq.read_table(tmp_path / "scores").num_rows == len(set(table["key"].to_pylist())) == 8


def test_splits_are_chosen(dataset: Dataset, package: str, tmp_path: Path) -> None:
    manifest = scores(tmp_path, package, {"data": dataset}, splits=("held_out",))
    assert [file["name"] for file in manifest["files"]] == ["00002"]
    assert len(files(tmp_path / "results")) == 4


def test_a_grown_dataset_and_another_task_reuse_what_is_there(package: str, tmp_path: Path) -> None:
    small = write_dataset(tmp_path / "small", squares(3, 2))
    grown = write_dataset(tmp_path / "grown", [*squares(3, 2), *squares(2, first=5)])
    scores(tmp_path, package, {"data": small}, {"embed": {}})
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "results").rglob("*.parquet")}
    os.rename(tmp_path / "scores", tmp_path / "before")
    scores(tmp_path, package, {"data": grown}, {"embed": {}, "match": {}})
    now = {path: path.stat().st_mtime_ns for path in (tmp_path / "results").rglob("*.parquet")}
    assert (len(stamps), len(now)) == (4, 9)
    assert stamps.items() <= now.items()
    both = [pq.read_table(tmp_path / folder / "00000.parquet") for folder in ("before", "scores")]
    assert both[1].select(both[0].column_names).equals(both[0])


# --- errors and interruptions -----------------------------------------------------------------------------------------


@pytest.fixture
def troubled(tmp_path: Path) -> Dataset:
    """Two shards; a picture of the second cannot be decoded, one of the first is flipped."""
    samples = [*squares(3), ("train", [square("noise", body=b"no picture"), square("blue")])]
    dataset = write_dataset(tmp_path / "troubled", samples)
    flip_bit(Path(dataset.tar_uri(dataset.shards("train")[0])), flipped(dataset))
    return dataset


def flipped(dataset: Dataset) -> int:
    """A byte of the picture of the second row."""
    return int(dataset.index(dataset.shards("train")[0])["image_offset"][1].as_py()) + 100


def test_totals_balance_and_failed_rows_are_named(package: str, troubled: Dataset, tmp_path: Path) -> None:
    manifest = scores(tmp_path, package, {"data": troubled})
    assert (manifest["totals"]["rows"], manifest["totals"]["errors"]) == (5, 2)
    assert (manifest["datasets"][0]["rows"], manifest["datasets"][0]["errors"]) == (5, 2)
    assert [(row["key"], row["shard"], row["row"]) for row in manifest["failed"]] == [
        ("green-1", "00000", 1),
        ("noise", "00001", 0),
    ]
    table = pyarrow.dataset.dataset(tmp_path / "scores").to_table()
    failed = {row["key"] for row in table.to_pylist() if row["error"] is not None}
    assert failed == {"green-1", "noise"}
    assert sum(manifest["similarity"]["counts"]) == table.num_rows - len(failed)
    assert sum(count["rows"] for count in manifest["classes"]) == table.num_rows - len(failed)
    assert {pair["key"] for pair in manifest["best"]}.isdisjoint(failed)


def test_too_many_errors_are_refused_again_although_all_is_computed(
    package: str, troubled: Dataset, tmp_path: Path
) -> None:
    flip_bit(Path(troubled.tar_uri(troubled.shards("train")[0])), flipped(troubled))  # whole again
    for _ in range(2):
        with pytest.raises(MmflowError) as raised:
            scores(tmp_path, package, {"data": troubled}, max_errors=0.1)
        assert "\n" not in str(raised.value)
        assert str(raised.value).startswith("1 of 5 rows failed, the first: 00001, row 0: a .jpg of 10 bytes cannot be")
    stamps = [path.stat().st_mtime_ns for path in sorted((tmp_path / "results").rglob("*.parquet"))]
    assert scores(tmp_path, package, {"data": troubled}, max_errors=0.2)["totals"]["errors"] == 1
    assert [path.stat().st_mtime_ns for path in sorted((tmp_path / "results").rglob("*.parquet"))] == stamps


def test_what_a_killed_run_has_left_is_kept_unless_its_shard_was_damaged(
    package: str, troubled: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores(tmp_path, package, {"data": troubled})  # and no manifest was committed
    left = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "scores").iterdir()}
    flip_bit(Path(troubled.tar_uri(troubled.shards("train")[0])), flipped(troubled))  # whole again
    manifest = scores(tmp_path, package, {"data": troubled})
    assert [row["key"] for row in manifest["failed"]] == ["noise"]
    whole = scores(tmp_path / "whole", package, {"data": troubled})
    assert manifest["fingerprint"] == whole["fingerprint"]
    assert files(tmp_path / "scores") == files(tmp_path / "whole" / "scores")
    stamp = (tmp_path / "scores" / "00000.parquet").stat().st_mtime_ns
    assert left["00000.parquet"] < stamp
    assert scores(tmp_path, package, {"data": troubled}) == manifest
    assert (tmp_path / "scores" / "00000.parquet").stat().st_mtime_ns == stamp
