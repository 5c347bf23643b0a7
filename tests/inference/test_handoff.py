"""What README shows of reading scores with other tools runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import lance
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmflow.dataset.opened import Dataset
from mmflow.dataset.reader import Reader
from mmflow.inference.lance_export import write_lance
from mmflow.inference.result import embeddings_of
from mmflow.inference.scores import Scores, open_scores
from mmflow.inference.tasks import TASKS
from tests.dataset.handmade import Handmade, flip_bit, write_dataset
from tests.evaluation.models import dual_config, loaded_model, written_package
from tests.inference.scoring import write_scores

README = (Path(__file__).parents[2] / "README.md").read_text()
SECTION = README.partition("## Score anything")[2].partition("\n## ")[0]
PROMPTS = {"square": ["a square"], "circle": ["a circle"]}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """11 samples in two shards; every fourth has no caption."""
    samples = [
        Handmade(
            key=f"key-{number}",
            captions=[{"language": "en", "text": f"a square {number}"}] if number % 4 else [],
            size=(32, 24),
        )
        for number in range(11)
    ]
    return write_dataset(tmp_path_factory.mktemp("handoff") / "data", [("train", samples[:6]), ("train", samples[6:])])


@pytest.fixture(scope="module")
def scores(tmp_path_factory: pytest.TempPathFactory, dataset: Dataset) -> Scores:
    """The first row was damaged when it was scored."""
    folder = tmp_path_factory.mktemp("handoff-scores")
    package = written_package(folder / "package", loaded_model(dual_config())).uri
    flip_bit(Path(dataset.uri) / "shards/00000.tar", 700)
    tasks = {"embed": {}, "zero_shot": {"prompts": PROMPTS}}
    made = open_scores(write_scores(folder / "scores", package, [dataset], tasks).uri)
    flip_bit(Path(dataset.uri) / "shards/00000.tar", 700)
    assert write_lance(made) == f"{made.uri}/scores.lance"
    return made


@pytest.fixture(scope="module")
def table(scores: Scores) -> pa.Table:
    return pq.read_table(f"{scores.uri}/scores")


@pytest.fixture(scope="module")
def shown(ray_cluster: None, scores: Scores, dataset: Dataset) -> dict[str, Any]:
    """What README's lines leave in their variables, with other scores and another dataset in the place of its own."""
    (lines,) = re.findall(r"^scores, dataset = .*?\n(.*?)^```", SECTION, re.MULTILINE | re.DOTALL)
    names: dict[str, Any] = {"scores": scores.uri, "dataset": dataset}
    exec(lines, names)
    return names


def test_pandas_reads_vectors_as_arrays(shown: dict[str, Any], table: pa.Table) -> None:
    expected = embeddings_of(table["image_embedding"])
    np.testing.assert_array_equal(shown["images"], expected[1:])
    assert (shown["images"].dtype, shown["images"].shape) == (np.float16, (10, 8))
    assert np.isnan(expected[0]).all()


def test_polars_groups_rows_by_their_class(shown: dict[str, Any], table: pa.Table) -> None:
    labels = [classes[0] for classes in table["classes"].to_pylist() if classes is not None]
    assert dict(shown["shares"].iter_rows()) == {label: labels.count(label) for label in set(labels)}


def test_duckdb_finds_the_pairs_that_are_least_alike(shown: dict[str, Any], table: pa.Table) -> None:
    pairs = zip(table["similarity"].to_pylist(), table["key"].to_pylist(), strict=True)
    expected = sorted((similarity, key) for similarity, key in pairs if similarity is not None and similarity < 0)
    assert shown["worst"].fetchall() == [(key, similarity) for similarity, key in expected]


def test_ray_data_joins_scores_to_their_dataset(shown: dict[str, Any], dataset: Dataset) -> None:
    rows = {row["key"]: row for row in shown["joined"].take_all()}
    assert len(rows) == 11
    for sample in Reader(dataset, "train"):
        row = rows[sample.key]
        assert row["image"] == sample.image
        assert [caption["text"] for caption in row["captions"]] == [caption.text for caption in sample.captions]
        assert len(row["image_embedding"]) == 8


def test_lance_has_the_rows_of_the_files_and_nulls_for_missing_vectors(
    shown: dict[str, Any], scores: Scores, table: pa.Table
) -> None:
    stored = lance.dataset(write_lance(scores))
    assert stored.version == 1
    assert stored.schema.field("image_embedding").type == pa.list_(pa.float16(), 8)
    for row, wanted in zip(stored.to_table().to_pylist(), table.to_pylist(), strict=True):
        vectors = {name: value for name, value in wanted.items() if name.endswith("_embedding")}
        nulled = {name: None if value[0] is None else value for name, value in vectors.items()}
        assert row == {"dataset": "data"} | wanted | nulled
    found = shown["found"]
    assert found["key"][0].as_py() == "key-1"
    assert len(found) == 10


def test_readme_names_the_columns_of_every_task() -> None:
    cells = [re.findall(r"`(\w+)`", line) for line in SECTION.splitlines() if line.startswith("| `")]
    loaded = loaded_model(dual_config())
    columns = {
        name: [field.name for result in results for field in result.model_construct().fields(loaded)]
        for name, results in TASKS.items()
    }
    columns["embed"].append("similarity")
    assert {task: named for task, *named in cells} == columns
