"""The page beside scores shows pictures of the datasets that were scored, and what the model says of them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from mmflow.core.artifacts import Artifact
from mmflow.dataset.opened import Dataset
from mmflow.inference.scores import open_scores
from mmflow.report.scores import columns_of, gather_scores
from mmflow.report.scores_page import write_scores_page
from tests.dataset.handmade import Handmade, flip_bit, write_dataset
from tests.evaluation.models import (
    COLOURS,
    answerer_config,
    captioner_config,
    dual_config,
    loaded_model,
    written_package,
)
from tests.inference.scoring import write_scores
from tests.report.test_report import HOSTILE, Page

QUESTION = {"question": "what colour is it?", "answers": ["red"]}
PROMPTS = {"square": ["a square"], "circle": ["a circle"]}


def dataset(folder: Path, prefix: str = "", rows: int = 12) -> Dataset:
    """Two shards; the second caption is an attack."""
    samples = [
        Handmade(
            key=f"{prefix}key-{number}",
            captions=[{"language": "en", "text": HOSTILE if number == 1 else f"caption {prefix}{number}"}],
            metadata={"questions": [QUESTION]} if number % 2 else {},
            size=(32, 24),
        )
        for number in range(rows)
    ]
    return write_dataset(folder, [("train", samples[: rows // 2]), ("dev", samples[rows // 2 :])])


@pytest.fixture(scope="module")
def dual(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """Scores of two datasets with neighbours in a third; a row of the first is damaged."""
    folder = tmp_path_factory.mktemp("scores-page")
    package = written_package(folder / "package", loaded_model(dual_config())).uri
    datasets = [dataset(folder / name, f"{name}-") for name in ("one", "two", "third")]
    flip_bit(folder / "one/shards/00000.tar", 700)
    others = write_scores(folder / "others", package, datasets[2:], {"embed": {}})
    tasks = {"embed": {}, "zero_shot": {"prompts": PROMPTS}, "neighbours": {"scores": others.uri, "top": 3}}
    return write_scores(folder / "scores", package, datasets[:2], tasks)


def page_of(scores: Artifact) -> Page:
    uri = write_scores_page(scores)
    assert uri == f"{scores.uri}/scores.html"
    return Page(Path(uri).read_text())


def test_figures_pairs_and_examples_are_those_of_the_files(dual: Artifact) -> None:
    figures, pictures = gather_scores(dual)
    assert (figures["rows"], figures["errors"], figures["files"], figures["rows_per_second"]) == (24, 1, 4, 48)
    assert sum(share["rows"] for share in figures["classes"]) == sum(figures["similarity"]["counts"]) == 23
    similarities = [pair["similarity"] for pair in figures["best"]]
    assert similarities == sorted(similarities, reverse=True)
    assert figures["worst"][0]["similarity"] < similarities[-1]
    shown = [*figures["best"], *figures["worst"], *figures["examples"]]
    assert {row["dataset"] for row in shown} == {"one", "two"}
    for row in shown:
        number = row["key"].removeprefix(f"{row['dataset']}-key-")
        assert row["caption"] == (HOSTILE if number == "1" else f"caption {row['dataset']}-{number}")
        assert pictures[row["picture"]].startswith(b"\xff\xd8\xff")
    for row in figures["examples"]:
        assert {said["of"] for said in row["says"]} == {"nearest classes", "similarity"}
        assert [neighbour["caption"] for neighbour in row["neighbours"] if neighbour["caption"] != HOSTILE]
        assert {neighbour["dataset"] for neighbour in row["neighbours"]} == {"third"}
        assert all(neighbour["picture"] in pictures for neighbour in row["neighbours"])


def test_the_page_stands_alone_and_lets_no_caption_act(dual: Artifact) -> None:
    parsed = page_of(dual)
    assert parsed.open == []
    assert not [tag for tag, _ in parsed.elements if tag in ("script", "link", "iframe")]
    assert all((attrs.get("src") or "data:image/").startswith("data:image/") for _, attrs in parsed.elements)
    assert {attrs["href"].removeprefix("#") for tag, attrs in parsed.elements if tag == "a"} == parsed.ids()  # type: ignore[union-attr]
    assert "1 row failed" in parsed.text
    assert "image of row 0 (one-key-0) is not what was written" in parsed.text


def test_every_column_is_described(dual: Artifact) -> None:
    columns = {column["name"]: column for column in columns_of(open_scores(dual.uri))}
    assert all(column["description"] for column in columns.values())
    assert columns["image_embedding"]["type"] == "8 × float16"
    assert columns["neighbour_rows"]["type"] == "list of int32"
    text = page_of(dual).text
    for name, column in columns.items():
        assert f"{name} {column['type']} {column['description']}" in text


@pytest.mark.parametrize(
    ("config", "classes", "tasks", "said"),
    [
        (
            captioner_config(),
            (),
            {"caption": {"max_tokens": 3}, "perplexity": {}},
            {"writes", "perplexity of its caption"},
        ),
        (
            answerer_config(heads=["classes"]),
            COLOURS,
            {"answer": {}, "classify": {}},
            {"what colour is it?", "classes"},
        ),
        (answerer_config(heads=["matching"]), (), {"match": {}}, {"caption belongs"}),
    ],
)
def test_examples_of_other_tasks(
    tmp_path: Path, config: Any, classes: tuple[str, ...], tasks: dict[str, Any], said: set[str]
) -> None:
    loaded = loaded_model(config, classes)
    package = written_package(tmp_path / "package", loaded).uri
    scores = write_scores(tmp_path / "scores", package, [dataset(tmp_path / "dataset")], tasks)
    figures, _ = gather_scores(scores)
    assert figures["examples"]
    assert all({line["of"] for line in row["says"]} == said for row in figures["examples"])
    text = page_of(scores).text
    assert all(line["text"][:150] in text for row in figures["examples"] for line in row["says"])


def test_a_dataset_that_is_gone_costs_the_page_its_pictures(tmp_path: Path) -> None:
    package = written_package(tmp_path / "package", loaded_model(dual_config())).uri
    scores = write_scores(tmp_path / "scores", package, [dataset(tmp_path / "dataset")], {"embed": {}})
    shutil.rmtree(tmp_path / "dataset")
    parsed = page_of(scores)
    assert not [tag for tag, _ in parsed.elements if tag == "img"]
    assert "key-3" in parsed.text
