"""The stage writes what each model came to, under the names that gates and the report read; what was computed once is
not computed again, and rows that fail are left out for all models."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmflow.core.errors import MisuseError, MmflowError, RecipeError
from mmflow.core.storage import join, read_json
from mmflow.dataset.format import tar_uri
from mmflow.dataset.opened import Dataset
from mmflow.dataset.reader import Reader
from mmflow.evaluation.evaluate import evaluate_models, metrics_of, metrics_of_package
from mmflow.evaluation.examination import DETAILS, METRICS, SPEED
from mmflow.inference.predict import Batch
from mmflow.models.config import ModelConfig
from tests.dataset.handmade import Handmade, flip_bit, write_dataset
from tests.evaluation.models import (
    COLOURS,
    answerer_config,
    captioner_config,
    captions_of,
    dual_config,
    loaded_model,
    matcher_config,
    quiet,
    ranker_config,
    settings,
    tight_config,
    written_package,
)

ASKS = settings(captions={"search": "greedy", "max_tokens": 4}, attention={"rows": 2})


def samples() -> list[Handmade]:
    """A picture a colour, every other one with two captions."""
    return [
        Handmade(
            key=colour,
            captions=[{"language": "en", "text": text} for text in captions_of(colour)[: 1 + place % 2]],
            size=(24, 20),
        )
        for place, colour in enumerate(COLOURS)
    ]


def write(directory: Path, held_out: list[Handmade], more: tuple[Handmade, ...] = ()) -> Dataset:
    """Split held_out in shards of four samples and the others, and `more`; a split of questions alone."""
    asked = [{"question": "which?", "answers": ["red"]}]
    captions = [{"language": "und", "text": "none"}]
    questions = [Handmade(key="q", captions=captions, metadata={"questions": asked}, size=(24, 20))]
    shards = [("held_out", held_out[:4]), ("held_out", held_out[4:]), ("questions", questions)]
    return write_dataset(directory, [*shards, *([("held_out", more)] if more else [])])


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return write(tmp_path_factory.mktemp("evaluation") / "dataset", samples())


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A captioner and a dual encoder; each is asked for something that only the other gives."""
    directory = tmp_path_factory.mktemp("packages")
    return {
        "teacher": written_package(directory / "teacher", loaded_model(captioner_config(), seed=4)).uri,
        "student": written_package(directory / "student", loaded_model(dual_config(), seed=4)).uri,
    }


def evaluate(uri: Path, dataset: Dataset, packages: dict[str, str], store: Path, **changes: Any) -> dict[str, Any]:
    fields: dict[str, Any] = {"settings": ASKS, "seed": 1, "progress": quiet} | changes
    manifest = evaluate_models(str(uri), dataset=dataset.uri, packages=packages, store=str(store), **fields)
    return dict(manifest)


def files(store: Path) -> dict[str, int]:
    """When each result was written."""
    return {str(path.relative_to(store)): path.stat().st_mtime_ns for path in store.rglob("*.parquet")}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("workspace") / "results"


@pytest.fixture(scope="module")
def evaluation(
    tmp_path_factory: pytest.TempPathFactory, dataset: Dataset, packages: dict[str, str], store: Path
) -> str:
    uri = tmp_path_factory.mktemp("evaluate") / "evaluation"
    evaluate(uri, dataset, packages, store)
    return str(uri)


# --- what is written ------------------------------------------------------------------------------------------------


def test_every_model_has_what_it_gives(evaluation: str) -> None:
    (split,) = read_json(join(evaluation, METRICS)).values()
    assert (split["rows"], split["left_out"]) == (6, 0)
    assert {model: set(metrics) for model, metrics in split["models"].items()} == {
        "chance": {"text_to_image", "image_to_text", "languages", "captions"},
        "teacher": {"captions"},
        "student": {"text_to_image", "image_to_text", "languages"},
        "untrained": {"captions"},
    }
    speed = read_json(join(evaluation, SPEED))
    assert set(speed) == {"teacher", "student"}
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


def test_what_a_model_looked_at_and_wrote_is_kept_for_the_report(evaluation: str) -> None:
    details = read_json(join(evaluation, DETAILS))
    assert [row["key"] for row in details["student"]["held_out"]["attention"]] == ["red", "yellow"]
    assert [row["key"] for row in details["teacher"]["held_out"]["captions"]] == list(COLOURS)
    assert "attention" not in details["untrained"]["held_out"]


def test_the_untrained_model_is_the_first_one_with_other_weights(evaluation: str) -> None:
    models = read_json(join(evaluation, METRICS))["held_out"]["models"]
    assert models["untrained"]["captions"]["tokens"] == models["teacher"]["captions"]["tokens"]
    assert models["untrained"]["captions"]["perplexity"] != models["teacher"]["captions"]["perplexity"]


# --- once ------------------------------------------------------------------------------------------------------------


def test_what_was_computed_is_not_computed_again_by_whoever_asks(
    evaluation: str, dataset: Dataset, packages: dict[str, str], store: Path, tmp_path: Path
) -> None:
    before = files(store)
    assert len(before) == 2 * (2 + 2 + 2)  # of two shards: what teacher, student and the untrained one were asked
    again = evaluate(tmp_path / "again", dataset, packages, store)
    for model, uri in packages.items():  # as a gate looks at them
        found = metrics_of_package(uri, dataset.uri, ASKS, str(store), quiet)
        assert found == pytest.approx(metrics_of(evaluation, model))
    assert files(store) == before
    elsewhere = evaluate(tmp_path / "elsewhere", dataset, packages, tmp_path / "results")
    assert elsewhere["fingerprint"] == again["fingerprint"]


def test_of_a_dataset_that_grew_only_the_new_shard_is_computed(
    evaluation: str, packages: dict[str, str], store: Path, tmp_path: Path
) -> None:
    before = files(store)
    new = [replace(sample, key=f"{sample.key}-2") for sample in samples()[:3]]
    grown = write(tmp_path / "grown", samples(), tuple(new))
    evaluate(tmp_path / "evaluation", grown, packages, store)
    metrics, after = read_json(str(tmp_path / "evaluation" / METRICS)), files(store)
    assert metrics["held_out"]["rows"] == 9
    assert {name: after[name] for name in before} == before
    (added,) = {Path(name).stem for name in after.keys() - before.keys()}
    assert added == grown.shards("held_out")[-1].checksum
    assert len(after) == len(before) * 3 // 2


# --- rows that fail --------------------------------------------------------------------------------------------------

EXAMINED: dict[str, tuple[ModelConfig, dict[str, Any]]] = {
    "dual": (dual_config(), {"robustness": {"pictures": ["blur"]}, "long_text": {"truncated_tokens": 5}}),
    "ranker": (ranker_config(), {"matching": {"candidates": 2}}),
    "tight": (tight_config(), {}),
    "matcher": (matcher_config(), {"matching": {}}),
    "captioner": (captioner_config(), {"captions": {"search": "greedy", "max_tokens": 4}}),
    "guesser": (answerer_config(heads=["masked_language"]), {"masked_language": {}}),
}


def undecodable(number: int) -> list[Handmade]:
    return [replace(sample, body=b"no JPEG") if row == number else sample for row, sample in enumerate(samples())]


@pytest.mark.parametrize("model", EXAMINED)
def test_a_row_that_fails_counts_for_nothing(model: str, tmp_path: Path) -> None:
    config, sections = EXAMINED[model]
    asks = settings(max_errors=0.2, **sections)
    package = written_package(tmp_path / "package", loaded_model(config, seed=4)).uri
    bad = write(tmp_path / "bad", undecodable(1))
    # As if it were not there. Shards and batches begin at the same rows.
    kept = [sample for row, sample in enumerate(samples()) if row != 1]
    shards = [("held_out", kept[:3]), ("held_out", kept[3:])]
    without = write_dataset(tmp_path / "without", shards)
    evaluate(tmp_path / "evaluation", bad, {"teacher": package}, tmp_path / "results", settings=asks)
    split = read_json(str(tmp_path / "evaluation" / METRICS))["held_out"]
    assert (split["rows"], split["left_out"]) == (5, 1)
    found = metrics_of(str(tmp_path / "evaluation"), "teacher")
    expected = metrics_of_package(package, without.uri, asks, str(tmp_path / "others"), quiet)
    assert found == pytest.approx(expected, rel=1e-4)


def test_a_row_that_one_model_fails_at_is_left_out_for_all(
    dataset: Dataset, packages: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    plain = Batch.embed_images

    def embed(self: Batch, change: str = "") -> np.ndarray:
        green = np.array([sample.key == "green" for sample in self.samples])
        return np.where(green[:, None], np.nan, plain(self, change))

    monkeypatch.setattr(Batch, "embed_images", embed)
    asks = ASKS.model_copy(update={"max_errors": 0.2})
    evaluate(tmp_path, dataset, packages, tmp_path / "results", settings=asks)
    split = read_json(str(tmp_path / METRICS))["held_out"]
    assert (split["rows"], split["left_out"]) == (5, 1)
    written = read_json(str(tmp_path / DETAILS))["teacher"]["held_out"]["captions"]
    assert [row["key"] for row in written] == [colour for colour in COLOURS if colour != "green"]
    # A gate examines the other model on the rows that it reads itself.
    found = metrics_of_package(packages["teacher"], dataset.uri, ASKS, str(tmp_path / "results"), quiet)
    assert found["held_out/captions/tokens"] > split["models"]["teacher"]["captions"]["tokens"]


def test_too_many_rows_that_fail_are_an_error_now_and_later(tmp_path: Path, packages: dict[str, str]) -> None:
    bad, asks = write(tmp_path / "bad", undecodable(5)), ASKS.model_copy(update={"max_errors": 0.1})
    for attempt in ("first", "second, when all results are there"):
        with pytest.raises(MmflowError, match=r"of .* rows .*failed.*more than .*max_errors=0\.1"):
            evaluate(tmp_path / attempt, bad, packages, tmp_path / "results", settings=asks)
        assert not (tmp_path / attempt).exists()
    asks = ASKS.model_copy(update={"max_errors": 0.2})
    evaluate(tmp_path / "allowed", bad, packages, tmp_path / "results", settings=asks)
    assert read_json(str(tmp_path / "allowed" / METRICS))["held_out"]["left_out"] == 1


@pytest.mark.parametrize("member", ["image", "json"])
def test_a_damaged_row_is_left_out_until_its_shard_is_restored(
    member: str, tmp_path: Path, packages: dict[str, str]
) -> None:
    damaged, asks = write(tmp_path / "dataset", samples()), ASKS.model_copy(update={"max_errors": 0.2})
    tar = Path(tar_uri(str(tmp_path / "dataset"), "00000"))
    whole = tar.read_bytes()
    needle = b"\xff\xd8" if member == "image" else b'{"captions"'
    flip_bit(tar, whole.index(needle) + 20)
    evaluate(tmp_path / "damaged", damaged, packages, tmp_path / "results", settings=asks)
    split = read_json(str(tmp_path / "damaged" / METRICS))["held_out"]
    assert (split["rows"], split["left_out"]) == (5, 1)
    tar.write_bytes(whole)
    restored = evaluate(tmp_path / "restored", damaged, packages, tmp_path / "results", settings=asks)
    assert (
        restored["fingerprint"]
        == evaluate(tmp_path / "fresh", damaged, packages, tmp_path / "fresh results")["fingerprint"]
    )


# --- refused ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asks", "error", "message"),
    [
        (
            {"languages": ["en", "fr"]},
            MisuseError,
            r"evaluate\.languages: no caption in 'fr' in split 'held_out' of .*",
        ),
        ({"splits": ["held_out", "questions"]}, MisuseError, r"evaluate\.languages: no caption in 'en' in split 'que"),
        ({"splits": ["train"]}, MisuseError, r"train"),
        ({"answering": {}}, RecipeError, r"evaluate\.answering: teacher and student cannot be examined in it"),
    ],
)
def test_the_impossible_is_refused_before_anything_is_computed(
    asks: dict[str, Any],
    error: type[MmflowError],
    message: str,
    tmp_path: Path,
    dataset: Dataset,
    packages: dict[str, str],
) -> None:
    with pytest.raises(error, match=message):
        evaluate(
            tmp_path / "evaluation", dataset, packages, tmp_path / "results", settings=settings(captions={}, **asks)
        )
    assert not (tmp_path / "results").exists()


def test_questions_that_nobody_answered_are_refused_before_anything_is_computed(
    tmp_path: Path, dataset: Dataset
) -> None:
    config = answerer_config(decoder={"memory": "fused", "width": 16, "layers": 1, "heads": 2})
    package = written_package(tmp_path / "package", loaded_model(config)).uri
    with pytest.raises(MisuseError, match=r"^evaluate\.answering: no answered question in split 'held_out'"):
        evaluate(tmp_path, dataset, {"teacher": package}, tmp_path / "results", settings=settings(answering={}))
    assert not (tmp_path / "results").exists()
    only_questions = settings(answering={}, splits=["questions"])  # without captions
    found = metrics_of_package(package, dataset.uri, only_questions, str(tmp_path / "results"), quiet)
    assert found["questions/answering/rows"] == 1.0
