"""The stage writes what each model came to, under the names that gates and the report read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mmflow.core.errors import MisuseError
from mmflow.core.storage import join, read_json
from mmflow.dataset.opened import Dataset
from mmflow.dataset.reader import Reader
from mmflow.evaluation.config import EvaluateConfig
from mmflow.evaluation.evaluate import evaluate_models, metrics_of, metrics_of_package
from mmflow.evaluation.examination import DETAILS, METRICS, SPEED
from tests.dataset.handmade import Handmade, write_dataset
from tests.evaluation.models import COLOURS, captioner_config, captions_of, dual_config, loaded_model, written_package

SETTINGS = EvaluateConfig.model_validate(
    {
        "splits": ["held_out"],
        "captions": {"search": "greedy", "max_tokens": 4},
        "attention": {"rows": 2},
        "batch_size": 4,
    }
)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """A picture a colour, every other one with two captions, in a split; a shard of questions alone in another."""
    held_out = [
        Handmade(
            key=colour,
            captions=[{"language": "en", "text": text} for text in captions_of(colour)[: 1 + place % 2]],
            size=(24, 20),
        )
        for place, colour in enumerate(COLOURS)
    ]
    asked = [{"question": "which?", "answers": ["red"]}]
    captions = [{"language": "und", "text": "none"}]
    questions = [Handmade(key="q", captions=captions, metadata={"questions": asked}, size=(24, 20))]
    shards = [("held_out", held_out[:4]), ("held_out", held_out[4:]), ("questions", questions)]
    return write_dataset(tmp_path_factory.mktemp("evaluation") / "dataset", shards)


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A captioner and a dual encoder; each is asked for something that only the other gives."""
    directory = tmp_path_factory.mktemp("packages")
    return {
        "teacher": written_package(directory / "teacher", loaded_model(captioner_config(), seed=4)).uri,
        "student": written_package(directory / "student", loaded_model(dual_config(), seed=4)).uri,
    }


def evaluate(uri: Path, dataset: Dataset, packages: dict[str, str]) -> dict[str, Any]:
    return dict(
        evaluate_models(
            str(uri),
            dataset=dataset.uri,
            packages=packages,
            settings=SETTINGS,
            seed=1,
            progress=lambda done, total, what: None,
        )
    )


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory: pytest.TempPathFactory, dataset: Dataset, packages: dict[str, str]) -> str:
    uri = tmp_path_factory.mktemp("evaluate") / "evaluation"
    evaluate(uri, dataset, packages)
    return str(uri)


def test_every_model_has_what_it_gives(evaluation: str) -> None:
    (split,) = read_json(join(evaluation, METRICS)).values()
    assert split["rows"] == 6
    assert {model: set(metrics) for model, metrics in split["models"].items()} == {
        "chance": {"text_to_image", "image_to_text", "languages", "captions"},
        "teacher": {"captions"},
        "student": {"text_to_image", "image_to_text", "languages"},
        "untrained": {"captions"},
    }
    speed = read_json(join(evaluation, SPEED))
    assert set(speed) == {"teacher", "student", "untrained"}
    assert all(model["latency_ms"] > 0 and model["pictures_per_second"] > 0 for model in speed.values())


def test_every_caption_is_a_query_that_names_its_picture(evaluation: str, dataset: Dataset) -> None:
    queries = read_json(join(evaluation, DETAILS))["student"]["held_out"]["retrieval"]
    expected = [colour for place, colour in enumerate(COLOURS) for _ in range(1 + place % 2)]
    assert [query["key"] for query in queries] == expected
    reader = Reader(dataset, "held_out")
    ordinals = {shard.name: ordinal for ordinal, shard in enumerate(reader.shards)}
    for query in queries:
        assert [result["correct"] for result in query["results"]].count(True) == (query["rank"] <= 5)
        assert sum(result["correct"] and result["key"] == query["key"] for result in query["results"]) <= 1
        for named in (query, *query["results"]):
            assert reader.read(ordinals[named["shard"]], named["row"]).key == named["key"]


def test_a_gate_reads_the_same_metrics_of_a_package_as_of_the_evaluation(
    evaluation: str, dataset: Dataset, packages: dict[str, str]
) -> None:
    for model, uri in packages.items():
        assert metrics_of_package(uri, dataset.uri, SETTINGS) == pytest.approx(metrics_of(evaluation, model))
    assert metrics_of(evaluation, "student")["held_out/text_to_image/R@10"] == 1.0


def test_what_a_model_looked_at_and_wrote_is_kept_for_the_report(evaluation: str) -> None:
    details = read_json(join(evaluation, DETAILS))
    assert [row["key"] for row in details["student"]["held_out"]["attention"]] == ["red", "yellow"]
    assert [row["key"] for row in details["teacher"]["held_out"]["captions"]] == list(COLOURS)
    assert "attention" not in details["untrained"]["held_out"]


def test_the_same_models_come_to_the_same_fingerprint(
    tmp_path: Path, dataset: Dataset, packages: dict[str, str]
) -> None:
    first, again = (evaluate(tmp_path / name, dataset, packages)["fingerprint"] for name in ("first", "again"))
    assert first == again


def test_a_split_without_captions_is_refused_only_where_they_are_read(
    tmp_path: Path, dataset: Dataset, packages: dict[str, str]
) -> None:
    settings = SETTINGS.model_copy(update={"splits": ["questions"]})
    with pytest.raises(MisuseError, match=r"evaluate\.languages: no caption in 'en' in split 'questions'"):
        metrics_of_package(packages["student"], dataset.uri, settings)
