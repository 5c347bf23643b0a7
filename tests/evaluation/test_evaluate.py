"""A model is examined in what the recipe asks for and the model gives, no more and no less."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from mmflow.core.errors import MisuseError
from mmflow.evaluation.config import EXAMINATIONS, EvaluateConfig
from mmflow.evaluation.evaluate import chance, examine
from mmflow.evaluation.examination import Captions, Subject, flatten
from mmflow.inference.predict import Predictor
from mmflow.learning.retrieval import rank_several
from tests.evaluation.models import (
    COLOURS,
    answerer_config,
    captioner_config,
    classifier_config,
    dual_config,
    matcher_config,
    predictor,
    ranker_config,
    rows,
    tight_config,
)


def settings(**sections: Any) -> EvaluateConfig:
    return EvaluateConfig.model_validate({"splits": ["held_out"], "batch_size": 4, **sections})


ALL = settings(
    zero_shot={"label": "colour", "prompts": {colour: [colour] for colour in COLOURS}},
    classification={"label": "colour"},
    answering={},
    captions={"max_tokens": 4},
    long_text={"truncated_tokens": 5},
    matching={"candidates": 2},
    masked_language={},
    attention={"rows": 2},
)
BOTH_WAYS = {"text_to_image", "image_to_text", "languages"}


@pytest.mark.parametrize(
    ("model", "metrics", "details"),
    [
        (
            predictor(dual_config()),
            {*BOTH_WAYS, "zero_shot", "text_to_image_truncated", "image_to_text_truncated", "long_text"},
            {"retrieval", "attention"},
        ),
        (predictor(tight_config()), BOTH_WAYS, {"retrieval", "attention"}),
        (predictor(matcher_config()), {"matched_text_to_image", "matched_image_to_text"}, {"attention"}),
        (predictor(captioner_config()), {"captions"}, {"captions"}),
        (predictor(classifier_config(), COLOURS), {"classification"}, {"confusion"}),
        (
            predictor(answerer_config(heads=["classes"]), COLOURS),
            {"classification", "answering"},
            {"confusion", "answers", "by_answer"},
        ),
        (
            predictor(answerer_config(decoder={"memory": "fused", "width": 16, "layers": 1, "heads": 2})),
            {"answering"},
            {"answers", "by_answer"},
        ),
        (predictor(answerer_config(heads=["masked_language"])), {"masked_language"}, set()),
    ],
)
def test_each_model_is_examined_in_what_it_gives(model: Predictor, metrics: set[str], details: set[str]) -> None:
    outcome = examine(model, rows(), ALL)
    assert set(outcome.metrics) == metrics
    assert set(outcome.details) == details
    assert set(examine(model, rows(), ALL, only_metrics=True).details) == details - {"attention"}
    if "answering" in metrics:
        assert {answer["accuracy"] for answer in outcome.details["answers"]} <= {0.0, 1.0, 2 / 3, 1 / 3, 0.5}
        asked = sum(row["questions"] for row in outcome.details["by_answer"])
        assert asked == outcome.metrics["answering"]["rows"] == len(outcome.details["answers"])
    if "captions" in metrics:
        assert outcome.metrics["captions"]["perplexity"] > 1
    if "masked_language" in metrics:
        found = outcome.metrics["masked_language"]
        texts = rows().main_captions.texts
        assert found["tokens"] == sum(len(model.loaded.tokenizer.encode(text).ids) - 2 for text in texts)
        assert found["perplexity"] == pytest.approx(np.exp(found["token_loss"]))


def told_apart(monkeypatch: pytest.MonkeyPatch, colours: dict[str, int]) -> Predictor:
    """A dual encoder that sees colours as given and reads each caption as the colour that it names."""

    def images(self: Predictor, samples: Any) -> np.ndarray:
        return np.eye(8, dtype=np.float32)[[colours[sample.key] for sample in samples]]

    def captions(self: Predictor, texts: Any, max_tokens: int | None = None) -> np.ndarray:
        named = [next(place for place, colour in enumerate(COLOURS) if colour in text) for text in texts]
        # Some captions lose their colour when they are cut.
        short = [max_tokens is not None and "one on the left" in text for text in texts]
        return np.eye(8, dtype=np.float32)[[7 if cut else place for place, cut in zip(named, short, strict=True)]]

    monkeypatch.setattr(Predictor, "embed_images", images)
    monkeypatch.setattr(Predictor, "embed_captions", captions)
    return predictor(dual_config())


RIGHT = {colour: place for place, colour in enumerate(COLOURS)}


def test_every_caption_is_a_query_and_a_picture_is_found_by_any_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    perfect = examine(told_apart(monkeypatch, RIGHT), rows(), settings())
    assert flatten({"s": perfect.metrics})["s/text_to_image/R@1"] == 1.0
    assert perfect.metrics["image_to_text"] == pytest.approx(
        {"R@1": 1.0, "R@5": 1.0, "R@10": 1.0, "mAP": 1.0, "mean_rank": 1.0, "median_rank": 1.0}
    )
    queries = perfect.details["retrieval"]
    assert [query["rank"] for query in queries] == [1] * 10
    assert {len(query["results"]) for query in queries} == {5}
    # Red seen as green: its three captions of ten find a wrong picture, and it finds none of them.
    blind = examine(told_apart(monkeypatch, RIGHT | {"red": 1}), rows(), settings()).metrics
    assert blind["text_to_image"]["R@1"] == pytest.approx(6 / 10)
    assert blind["image_to_text"]["R@1"] == pytest.approx(5 / 6)


def test_a_model_that_compares_pairs_is_ranked_by_its_scores() -> None:
    model, held_out = predictor(tight_config()), rows()
    captions = held_out.main_captions
    scores = model.score_pairs(held_out.samples, captions.texts)
    right = scores[np.arange(len(scores)), captions.picture_of_text]
    ranks = [query["rank"] for query in examine(model, held_out, settings()).details["retrieval"]]
    np.testing.assert_array_equal(ranks, (scores >= right[:, None] - 1e-6).sum(1))


def test_whole_captions_are_compared_with_their_beginnings(monkeypatch: pytest.MonkeyPatch) -> None:
    metrics = examine(told_apart(monkeypatch, RIGHT), rows(), settings(long_text={"truncated_tokens": 5})).metrics
    assert metrics["text_to_image"]["R@1"] == 1.0
    assert metrics["text_to_image_truncated"]["R@1"] == pytest.approx(8 / 10)
    assert metrics["long_text"]["longer_share"] == pytest.approx(2 / 10)
    assert metrics["long_text"]["R@10_gain"] == pytest.approx(0.0)  # all six pictures are among the first ten


def test_matching_reads_the_nearest_of_each_direction_and_every_pair_without_embeddings(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[np.ndarray] = []

    def match(self: Predictor, samples: Any, captions: Any, pairs: np.ndarray) -> np.ndarray:
        asked.append(pairs)
        return np.ones(len(pairs), np.float32)

    monkeypatch.setattr(Predictor, "match", match)
    metrics = examine(predictor(ranker_config()), rows(), settings(matching={"candidates": 2})).metrics
    captions, pictures = np.bincount(asked[0][:, 0]), np.bincount(asked[0][:, 1])
    assert (captions.min(), pictures.min()) >= (2, 2)
    assert len(asked[0]) == len(np.unique(asked[0], axis=0)) <= 10 * 2 + 6 * 2
    assert set(metrics) >= {"text_to_image", "matched_text_to_image", "matched_image_to_text"}
    examine(predictor(matcher_config()), rows(), settings(matching={"candidates": 2}))
    assert len(asked[1]) == 10 * 6


def test_a_direction_reorders_only_its_own_candidates(monkeypatch: pytest.MonkeyPatch) -> None:
    """A head that knows every pair puts what is among a query's candidates first, and nothing else."""
    right = rows().main_captions.picture_of_text

    def match(self: Predictor, samples: Any, captions: Any, pairs: np.ndarray) -> np.ndarray:
        return np.where(right[pairs[:, 0]] == pairs[:, 1], 5.0, -5.0).astype(np.float32)

    monkeypatch.setattr(Predictor, "match", match)
    outcome = examine(predictor(ranker_config()), rows(), settings(matching={"candidates": 2}))
    ranks = np.array([query["rank"] for query in outcome.details["retrieval"]])
    assert 0 < (ranks > 2).sum() < 10
    matched = np.where(ranks <= 2, 1, ranks)
    assert outcome.metrics["matched_text_to_image"]["R@1"] == pytest.approx((matched == 1).mean())
    assert outcome.metrics["matched_text_to_image"]["mean_rank"] == pytest.approx(matched.mean())
    similarity = Subject(predictor(ranker_config()), rows()).similarity
    ranks = rank_several(similarity.T, right).ranks
    matched = np.where(ranks <= 2, 1, ranks)
    assert outcome.metrics["matched_image_to_text"]["mean_rank"] == pytest.approx(matched.mean())


def test_a_fused_classifier_reads_each_picture_with_its_first_caption(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    plain = Predictor.class_scores

    def score(self: Predictor, samples: Any, texts: Any) -> np.ndarray:
        asked.append(texts)
        return plain(self, samples, texts)

    monkeypatch.setattr(Predictor, "class_scores", score)
    captions = rows().main_captions
    without_last = replace(rows(), captions={"en": Captions(captions.texts[:-1], captions.rows[:-1])})
    model = predictor(answerer_config(heads=["classes"]), COLOURS)
    metrics = examine(model, without_last, settings(classification={"label": "colour"})).metrics
    assert asked == [[*(f"a {colour} square" for colour in COLOURS[:-1]), ""]]
    assert metrics["classification"]["rows"] == 6.0


def test_a_class_that_the_model_was_never_taught_counts_as_wrong() -> None:
    model = predictor(classifier_config(), COLOURS[:3])
    metrics = examine(model, rows(), settings(classification={"label": "colour"})).metrics["classification"]
    assert metrics["rows"] == 6.0
    assert metrics["accuracy"] <= 0.5


def test_questions_without_answers_are_refused_by_the_key() -> None:
    silent = rows()
    for sample in silent.samples:
        sample.metadata.pop("questions")
    with pytest.raises(MisuseError, match=r"evaluate\.answering: no answered question in split 'held_out'"):
        _ = silent.questions


def test_chance_by_hand() -> None:
    guessed = chance(rows(), ALL, set(EXAMINATIONS))
    assert guessed["text_to_image"]["R@1"] == guessed["matched_text_to_image"]["R@1"] == pytest.approx(1 / 6)
    # Two pictures of six have three captions of ten.
    assert guessed["image_to_text"]["R@1"] == pytest.approx((4 * 1 / 10 + 2 * 3 / 10) / 6)
    assert guessed["classification"]["accuracy"] == guessed["zero_shot"]["accuracy"] == pytest.approx(1 / 6)
    assert guessed["answering"]["accuracy"] == pytest.approx(6 * (1 / 3 * 0 + 2 / 3 * 1 / 2) / 6)
    assert guessed["captions"]["distinct"] == 0.0


def test_names_that_gates_use_stay() -> None:
    flat = flatten({"unseen": examine(predictor(dual_config()), rows(), ALL).metrics})
    assert {
        "unseen/text_to_image/R@1",
        "unseen/image_to_text/R@10",
        "unseen/text_to_image/mean_rank",
        "unseen/zero_shot/accuracy",
        "unseen/zero_shot/mean_class_accuracy",
    } <= set(flat)
    assert all(isinstance(value, float) for value in flat.values())
