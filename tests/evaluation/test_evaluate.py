"""A model is examined in what the recipe asks for and the model gives, no more and no less; retrieval and matching
against plain definitions over whole matrices."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from numpy.typing import NDArray

from mmflow.core.errors import MisuseError
from mmflow.dataset.opened import Dataset
from mmflow.evaluation import retrieval
from mmflow.evaluation.config import EXAMINATIONS
from mmflow.evaluation.evaluate import chance, examine
from mmflow.evaluation.examination import flatten, read_rows
from mmflow.inference.predict import Batch, Predictor
from mmflow.learning.retrieval import rank_one, rank_several, retrieval_metrics
from mmflow.models.package import LoadedModel
from tests.evaluation.alone import Alone
from tests.evaluation.models import (
    COLOURS,
    answerer_config,
    asked,
    captioner_config,
    classifier_config,
    dual_config,
    loaded_model,
    matcher_config,
    ranker_config,
    settings,
    squares,
    tight_config,
    write_squares,
)

ALL = settings(
    zero_shot={"label": "colour", "prompts": {colour: [colour] for colour in COLOURS}},
    classification={"label": "colour"},
    answering={},
    captions={"max_tokens": 4},
    long_text={"truncated_tokens": 5},
    matching={"candidates": 2},
    masked_language={},
    robustness={"pictures": ["grey"], "captions": ["typos"]},
    slices={"label": "colour"},
    attention={"rows": 2},
)
BOTH_WAYS = {"text_to_image", "image_to_text", "languages"}
TRUNCATED = {"text_to_image_truncated", "image_to_text_truncated", "long_text"}
FUSED_DECODER = {"memory": "fused", "width": 16, "layers": 1, "heads": 2}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return write_squares(tmp_path_factory.mktemp("squares") / "dataset")


@pytest.mark.parametrize(
    ("loaded", "metrics", "details"),
    [
        (
            loaded_model(dual_config()),
            {*BOTH_WAYS, *TRUNCATED, "zero_shot", "robustness", "slices"},
            {"retrieval", "attention"},
        ),
        (loaded_model(tight_config()), BOTH_WAYS, {"retrieval", "attention"}),
        (loaded_model(matcher_config()), {"matched_text_to_image", "matched_image_to_text"}, {"attention"}),
        (loaded_model(captioner_config()), {"captions"}, {"captions"}),
        (loaded_model(classifier_config(), COLOURS), {"classification"}, {"confusion"}),
        (
            loaded_model(answerer_config(heads=["classes"]), COLOURS),
            {"classification", "answering"},
            {"confusion", "answers", "by_answer"},
        ),
        (loaded_model(answerer_config(decoder=FUSED_DECODER)), {"answering"}, {"answers", "by_answer"}),
        (loaded_model(answerer_config(heads=["masked_language"])), {"masked_language"}, set()),
    ],
)
def test_each_model_is_examined_in_what_it_gives(
    loaded: LoadedModel, metrics: set[str], details: set[str], dataset: Dataset, tmp_path: Path
) -> None:
    subject = asked(tmp_path, dataset, loaded, ALL)
    outcome = examine(subject, ALL)
    assert set(outcome.metrics) == metrics
    assert set(outcome.details) == details
    assert set(examine(subject, ALL, only_metrics=True).details) == details - {"attention"}


# --- by similarity --------------------------------------------------------------------------------------------------


def ranked(similarity_AN: NDArray[np.floating], picture_of_text_A: NDArray[np.int64]) -> dict[str, dict[str, float]]:
    """Metrics of both directions from all similarities."""
    return {
        "text_to_image": retrieval_metrics(rank_one(similarity_AN, picture_of_text_A)),
        "image_to_text": retrieval_metrics(rank_several(similarity_AN.T, picture_of_text_A)),
    }


def test_every_caption_is_a_query_and_a_picture_is_found_by_any_of_its_own(dataset: Dataset, tmp_path: Path) -> None:
    asks = settings(languages=["en", "de"])
    loaded = loaded_model(dual_config(), seed=4)
    alone, outcome = Alone(loaded, dataset), examine(asked(tmp_path, dataset, loaded, asks), asks)
    texts, rows = alone.captions()
    similarity_AN = alone.texts(texts) @ alone.images().T
    # German has captions for the first three pictures alone: the others are no candidates.
    german, german_rows = alone.captions("de")
    in_german = ranked(alone.texts(german) @ alone.images()[:3].T, german_rows)
    assert outcome.metrics == {
        **{way: pytest.approx(metrics) for way, metrics in ranked(similarity_AN, rows).items()},
        "languages": {"de": {"text_to_image": pytest.approx(in_german["text_to_image"])}},
    }
    ranks = rank_one(similarity_AN, rows).ranks
    for query, text, row, rank, scores in zip(
        outcome.details["retrieval"], texts, rows, ranks, similarity_AN, strict=True
    ):
        assert (query["caption"], query["key"], query["rank"]) == (text, COLOURS[row], rank)
        nearest = np.argsort(-scores, kind="stable")[:5]
        assert [result["key"] for result in query["results"]] == [COLOURS[place] for place in nearest]
        assert [result["score"] for result in query["results"]] == pytest.approx(scores[nearest], abs=1e-4)
        assert [result["correct"] for result in query["results"]] == (nearest == row).tolist()


def test_of_many_captions_some_evenly_spread_are_kept_for_people(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(retrieval, "QUERIES", 4)
    loaded = loaded_model(dual_config(), seed=4)
    queries = examine(asked(tmp_path, dataset, loaded, settings()), settings()).details["retrieval"]
    texts, _ = Alone(loaded, dataset).captions()
    assert [query["caption"] for query in queries] == [texts[place] for place in (0, 2, 5, 7)]


def test_a_model_that_compares_pairs_is_ranked_by_its_scores(tmp_path: Path) -> None:
    clips = [replace(sample, num_frames=1 + number % 3) for number, sample in enumerate(squares())]
    dataset, loaded = write_squares(tmp_path / "dataset", clips), loaded_model(tight_config())
    alone, outcome = Alone(loaded, dataset), examine(asked(tmp_path, dataset, loaded, settings()), settings())
    texts, rows = alone.captions()
    with torch.inference_mode():
        pooled = torch.cat([alone.text(text).pooled_BW for text in texts])
        scores = [loaded.model.score_pairs(pooled, alone.image(sample))[:, 0] for sample in alone.samples]
    similarity_AN = torch.stack(scores, dim=1).numpy()
    for way, metrics in ranked(similarity_AN, rows).items():
        assert outcome.metrics[way] == pytest.approx(metrics)
    found = [query["rank"] for query in outcome.details["retrieval"]]
    np.testing.assert_array_equal(found, rank_one(similarity_AN, rows).ranks)


def tell_apart(monkeypatch: pytest.MonkeyPatch, colours: dict[str, int]) -> LoadedModel:
    """A dual encoder that sees colours as given and reads each caption as the colour that it names."""

    def images(self: Batch, change: str = "") -> np.ndarray:
        return np.eye(8, dtype=np.float32)[[colours[sample.key] for sample in self.samples]]

    def captions(self: Predictor, texts: Any, max_tokens: int | None = None) -> np.ndarray:
        named = [next(place for place, colour in enumerate(COLOURS) if colour in text) for text in texts]
        # Some captions lose their colour when they are cut.
        short = [max_tokens is not None and "one on the left" in text for text in texts]
        return np.eye(8, dtype=np.float32)[[7 if cut else place for place, cut in zip(named, short, strict=True)]]

    monkeypatch.setattr(Batch, "embed_images", images)
    monkeypatch.setattr(Predictor, "embed_texts", captions)
    return loaded_model(dual_config())


RIGHT = {colour: place for place, colour in enumerate(COLOURS)}


def test_a_picture_that_is_taken_for_another_is_found_by_none_of_its_captions(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    perfect = examine(asked(tmp_path / "1", dataset, tell_apart(monkeypatch, RIGHT), settings()), settings())
    assert perfect.metrics["text_to_image"]["R@1"] == perfect.metrics["image_to_text"]["mAP"] == 1.0
    # Red seen as green: its three captions of ten find a wrong picture, and it finds none of them.
    blind = tell_apart(monkeypatch, RIGHT | {"red": 1})
    metrics = examine(asked(tmp_path / "2", dataset, blind, settings()), settings()).metrics
    assert metrics["text_to_image"]["R@1"] == pytest.approx(6 / 10)
    assert metrics["image_to_text"]["R@1"] == pytest.approx(5 / 6)


def test_whole_captions_are_compared_with_their_beginnings(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asks, loaded = settings(long_text={"truncated_tokens": 5}), tell_apart(monkeypatch, RIGHT)
    metrics = examine(asked(tmp_path, dataset, loaded, asks), asks).metrics
    assert metrics["text_to_image"]["R@1"] == 1.0
    assert metrics["text_to_image_truncated"]["R@1"] == pytest.approx(8 / 10)
    assert metrics["long_text"]["longer_share"] == pytest.approx(2 / 10)
    assert metrics["long_text"]["R@10_gain"] == pytest.approx(0.0)  # all six pictures are among the first ten
    lengths = [min(12, len(loaded.tokenizer.encode(text).ids)) for text in Alone(loaded, dataset).captions()[0]]
    assert metrics["long_text"]["tokens"] == pytest.approx(np.mean(lengths))


def test_beginnings_are_those_that_the_model_reads(dataset: Dataset, tmp_path: Path) -> None:
    asks, loaded = settings(long_text={"truncated_tokens": 4}), loaded_model(dual_config(), seed=4)
    metrics = examine(asked(tmp_path, dataset, loaded, asks), asks).metrics
    alone = Alone(loaded, dataset)
    texts, rows = alone.captions()
    for way, expected in ranked(alone.texts(texts, 4) @ alone.images().T, rows).items():
        assert metrics[f"{way}_truncated"] == pytest.approx(expected)


# --- by the head `matching` -----------------------------------------------------------------------------------------


def candidates_first(
    similarity_QC: NDArray[np.floating], odds_QC: NDArray[np.floating], candidates: int
) -> NDArray[np.float64]:
    """Scores in the order in which each query finds: its nearest by their odds, then the others by similarity."""
    scores_QC = np.zeros(similarity_QC.shape)
    for query, (similarity, odds) in enumerate(zip(similarity_QC, odds_QC, strict=True)):
        order = sorted(range(len(similarity)), key=lambda place, own=similarity: -own[place])
        first = sorted(order[:candidates], key=lambda place, own=odds: -own[place])
        scores_QC[query, [*first, *order[candidates:]]] = -np.arange(len(order))
    return scores_QC


@pytest.mark.parametrize("candidates", [1, 2, 3, 100])
def test_each_query_s_candidates_come_first_by_their_odds(candidates: int, dataset: Dataset, tmp_path: Path) -> None:
    asks, loaded = settings(matching={"candidates": candidates}), loaded_model(ranker_config(), seed=2)
    alone = Alone(loaded, dataset)
    metrics = examine(asked(tmp_path, dataset, loaded, asks), asks).metrics
    texts, rows = alone.captions()
    similarity_AN = alone.texts(texts) @ alone.images().T
    odds_AN = np.array([[alone.match(text, sample) for sample in alone.samples] for text in texts])
    to_image = rank_one(candidates_first(similarity_AN, odds_AN, candidates), rows)
    to_text = rank_several(candidates_first(similarity_AN.T, odds_AN.T, candidates), rows)
    assert metrics["matched_text_to_image"] == pytest.approx(retrieval_metrics(to_image))
    assert metrics["matched_image_to_text"] == pytest.approx(retrieval_metrics(to_text))
    assert (metrics["matched_text_to_image"] != metrics["text_to_image"]) == (candidates > 1)
    # The head reads the candidates of either direction, each pair once.
    of_captions = np.argsort(-similarity_AN, axis=1)[:, :candidates]
    of_pictures = np.argsort(-similarity_AN.T, axis=1)[:, :candidates]
    pairs = {(text, picture) for text, own in enumerate(of_captions) for picture in own}
    pairs |= {(text, picture) for picture, own in enumerate(of_pictures) for text in own}
    files = (tmp_path / "results").glob("*/given_matches-*/*.parquet")
    assert sum(len(row) for file in files for row in pq.read_table(file)["given_matches"].to_pylist()) == len(pairs)


def test_a_matcher_without_embeddings_reads_every_pair(dataset: Dataset, tmp_path: Path) -> None:
    asks, loaded = settings(matching={"candidates": 2}), loaded_model(matcher_config(), seed=2)
    alone = Alone(loaded, dataset)
    metrics = examine(asked(tmp_path, dataset, loaded, asks), asks).metrics
    texts, rows = alone.captions()
    odds_AN = np.array([[alone.match(text, sample) for sample in alone.samples] for text in texts])
    assert metrics == {f"matched_{way}": pytest.approx(found) for way, found in ranked(odds_AN, rows).items()}


# --- chance, names, what is not there -------------------------------------------------------------------------------


def test_chance_by_hand(dataset: Dataset) -> None:
    guessed = chance(read_rows(dataset, "held_out", ["en"]), ALL, set(EXAMINATIONS))
    assert guessed["text_to_image"]["R@1"] == guessed["matched_text_to_image"]["R@1"] == pytest.approx(1 / 6)
    # Two pictures of six have three captions of ten.
    assert guessed["image_to_text"]["R@1"] == pytest.approx((4 * 1 / 10 + 2 * 3 / 10) / 6)
    assert guessed["classification"]["accuracy"] == guessed["zero_shot"]["accuracy"] == pytest.approx(1 / 6)
    assert guessed["answering"]["accuracy"] == pytest.approx(6 * (1 / 3 * 0 + 2 / 3 * 1 / 2) / 6)
    assert guessed["captions"]["distinct"] == 0.0


def test_names_that_gates_use_stay(dataset: Dataset, tmp_path: Path) -> None:
    asks = settings(zero_shot={"label": "colour", "prompts": {colour: [colour] for colour in COLOURS}})
    subject = asked(tmp_path, dataset, loaded_model(dual_config()), asks)
    flat = flatten({"unseen": examine(subject, asks).metrics})
    assert {
        "unseen/text_to_image/R@1",
        "unseen/image_to_text/R@10",
        "unseen/text_to_image/mean_rank",
        "unseen/zero_shot/accuracy",
        "unseen/zero_shot/mean_class_accuracy",
    } <= set(flat)
    assert all(isinstance(value, float) for value in flat.values())


def test_questions_without_answers_are_refused_by_the_key(tmp_path: Path) -> None:
    dataset = write_squares(tmp_path / "dataset", [replace(sample, metadata={}) for sample in squares()])
    with pytest.raises(MisuseError, match=r"evaluate\.answering: no answered question in split 'held_out'"):
        _ = read_rows(dataset, "held_out", ["en"]).questions
