"""An examination is what the recipe asks and the model gives, no more and no less, under the names that gates use."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from mmflow.core.errors import MisuseError
from mmflow.evaluation import evaluate
from mmflow.evaluation.asked import asked_and_given
from mmflow.evaluation.config import EvaluateConfig, ZeroShotConfig
from mmflow.evaluation.evaluate import chance, examine, flatten
from mmflow.evaluation.rows import Captions
from mmflow.models.package import LoadedModel
from tests.evaluation.models import (
    COLOURS,
    answerer_config,
    captioner_config,
    classifier_config,
    dual_config,
    loaded_model,
    matcher_config,
    rows,
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
)


def test_each_model_is_examined_in_what_it_gives() -> None:
    found = {
        "dual": examine(loaded_model(dual_config()), rows(), ALL),
        "matcher": examine(loaded_model(matcher_config()), rows(), ALL),
        "captioner": examine(loaded_model(captioner_config()), rows(), ALL),
        "classifier": examine(loaded_model(classifier_config(), COLOURS), rows(), ALL),
        "answerer": examine(
            loaded_model(answerer_config(heads=["classes"]), COLOURS),
            rows(),
            ALL.model_copy(update={"classification": None}),
        ),
    }
    truncated = {"text_to_image_truncated", "image_to_text_truncated", "long_text"}
    assert {name: set(each.metrics) for name, each in found.items()} == {
        "dual": {"text_to_image", "image_to_text", "languages", "zero_shot", *truncated},
        "matcher": {"matched_text_to_image", "matched_image_to_text"},
        "captioner": {"captions"},
        "classifier": {"classification"},
        "answerer": {"answering"},
    }
    assert {name for name, each in found.items() if each.retrieved is not None} == {"dual"}
    assert {name: set(each.details) for name, each in found.items()} == {
        "dual": set(),
        "matcher": set(),
        "captioner": {"captions"},
        "classifier": {"confusion"},
        "answerer": {"answers", "by_answer"},
    }
    assert found["captioner"].metrics["captions"]["perplexity"] > 1
    assert len(found["answerer"].details["answers"]) == 6
    by_answer = found["answerer"].details["by_answer"]
    assert sum(row["questions"] for row in by_answer) == found["answerer"].metrics["answering"]["rows"]
    assert {answer["accuracy"] for answer in found["answerer"].details["answers"]} <= {0.0, 1.0, 2 / 3, 1 / 3, 0.5}


def told_apart(monkeypatch: pytest.MonkeyPatch, colours: dict[str, int]) -> LoadedModel:
    """A dual encoder that sees colours as given and reads each caption as the colour that it names."""

    def images(loaded: object, samples: Any, batch_size: int) -> np.ndarray:
        return np.eye(8, dtype=np.float32)[[colours[sample.key] for sample in samples]]

    def captions(loaded: object, texts: Any, batch_size: int, max_tokens: int | None = None) -> np.ndarray:
        named = [next(place for place, colour in enumerate(COLOURS) if colour in text) for text in texts]
        # What is cut after its first words does not come to the colour of some.
        short = [max_tokens is not None and "one on the left" in text for text in texts]
        return np.eye(8, dtype=np.float32)[[7 if cut else place for place, cut in zip(named, short, strict=True)]]

    monkeypatch.setattr(evaluate, "embed_images", images)
    monkeypatch.setattr(evaluate, "embed_captions", captions)
    return loaded_model(dual_config())


def test_every_caption_is_a_query_and_a_picture_is_found_by_any_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    right = {colour: place for place, colour in enumerate(COLOURS)}
    perfect = examine(told_apart(monkeypatch, right), rows(), settings())
    assert len(perfect.metrics["text_to_image"]) == 6
    assert flatten({"s": perfect.metrics})["s/text_to_image/R@1"] == 1.0
    assert perfect.metrics["image_to_text"] == pytest.approx(
        {"R@1": 1.0, "R@5": 1.0, "R@10": 1.0, "mAP": 1.0, "mean_rank": 1.0, "median_rank": 1.0}
    )
    assert perfect.retrieved is not None
    assert perfect.retrieved.ranks.tolist() == [1] * 10
    assert perfect.retrieved.best.shape == (10, 5)
    # Red seen as green: its three captions of ten find a wrong picture, and it finds none of them.
    blind = examine(told_apart(monkeypatch, right | {"red": 1}), rows(), settings()).metrics
    assert blind["text_to_image"]["R@1"] == pytest.approx(6 / 10)
    assert blind["image_to_text"]["R@1"] == pytest.approx(5 / 6)


def test_whole_captions_are_held_against_their_beginnings(monkeypatch: pytest.MonkeyPatch) -> None:
    right = {colour: place for place, colour in enumerate(COLOURS)}
    asked = settings(long_text={"truncated_tokens": 5})
    metrics = examine(told_apart(monkeypatch, right), rows(), asked).metrics
    assert metrics["text_to_image"]["R@1"] == 1.0
    assert metrics["text_to_image_truncated"]["R@1"] == pytest.approx(8 / 10)
    assert metrics["long_text"]["longer_share"] == pytest.approx(2 / 10)
    assert metrics["long_text"]["R@10_gain"] == pytest.approx(0.0)  # of six pictures, all are among the first ten


def ranker() -> LoadedModel:
    """A dual encoder with a head that reads pairs."""
    fields = {"fusion": {"kind": "single_stream", "width": 16, "layers": 1, "heads": 2}, "heads": ["matching"]}
    return loaded_model(dual_config().model_validate(dual_config().model_dump() | fields))


def test_matching_reads_the_nearest_of_each_direction_and_every_pair_without_embeddings(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[np.ndarray] = []

    def score(loaded: object, samples: Any, captions: Any, pairs: np.ndarray, batch_size: int) -> np.ndarray:
        asked.append(pairs)
        return np.ones(len(pairs), np.float32)

    monkeypatch.setattr(evaluate, "matching_scores", score)
    metrics = examine(ranker(), rows(), settings(matching={"candidates": 2})).metrics
    captions, pictures = np.bincount(asked[0][:, 0]), np.bincount(asked[0][:, 1])
    assert (captions.min(), pictures.min()) >= (2, 2)
    assert len(asked[0]) == len(np.unique(asked[0], axis=0)) <= 10 * 2 + 6 * 2
    assert set(metrics) >= {"text_to_image", "matched_text_to_image", "matched_image_to_text"}
    examine(loaded_model(matcher_config()), rows(), settings(matching={"candidates": 2}))
    assert len(asked[1]) == 10 * 6


def test_a_direction_reorders_its_own_candidates_and_gains_nothing_by_the_other_s(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A head that knows every pair lifts what is among a query's candidates to the first place, and nothing else."""
    right = rows().captions["en"].picture_of_text

    def score(loaded: object, samples: Any, captions: Any, pairs: np.ndarray, batch_size: int) -> np.ndarray:
        return np.where(right[pairs[:, 0]] == pairs[:, 1], 5.0, -5.0).astype(np.float32)

    monkeypatch.setattr(evaluate, "matching_scores", score)
    loaded = ranker()
    found = examine(loaded, rows(), settings(matching={"candidates": 2}))
    assert found.retrieved is not None
    ranks = np.where(found.retrieved.ranks <= 2, 1, found.retrieved.ranks)
    assert 0 < (found.retrieved.ranks > 2).sum() < 10
    assert found.metrics["matched_text_to_image"]["R@1"] == pytest.approx((ranks == 1).mean())
    assert found.metrics["matched_text_to_image"]["mean_rank"] == pytest.approx(ranks.mean())
    assert found.metrics["matched_image_to_text"]["R@10"] == found.metrics["image_to_text"]["R@10"]


def test_a_fused_classifier_reads_each_picture_with_its_first_caption(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    plain = evaluate.class_scores

    def score(loaded: Any, samples: Any, texts: Any, batch_size: int) -> np.ndarray:
        asked.append(texts)
        return plain(loaded, samples, texts, batch_size)

    monkeypatch.setattr(evaluate, "class_scores", score)
    captions = rows().captions["en"]  # of which the last picture has one, and shall have none
    split = replace(rows(), captions={"en": Captions(captions.texts[:-1], captions.rows[:-1])})
    loaded = loaded_model(answerer_config(heads=["classes"]), COLOURS)
    metrics = examine(loaded, split, settings(classification={"label": "colour"})).metrics
    assert asked == [[*(f"a {colour} square" for colour in COLOURS[:-1]), ""]]
    assert metrics["classification"]["rows"] == 6.0


def test_a_class_that_the_model_was_never_taught_counts_as_wrong() -> None:
    loaded = loaded_model(classifier_config(), COLOURS[:3])
    metrics = examine(loaded, rows(), settings(classification={"label": "colour"})).metrics["classification"]
    assert metrics["rows"] == 6.0
    assert metrics["accuracy"] <= 0.5


def test_questions_without_answers_are_refused_by_the_key() -> None:
    silent = rows()
    for sample in silent.samples:
        sample.metadata.pop("questions")
    with pytest.raises(MisuseError, match=r"evaluate\.answering: no answered question in split 'held_out'"):
        _ = silent.questions


def test_chance_has_what_the_models_have() -> None:
    dual = loaded_model(dual_config())
    guessed = chance(rows(), ALL, asked_and_given(ALL, dual.model.gives))
    assert guessed["text_to_image"]["R@1"] == pytest.approx(1 / 6)
    # Two pictures of six have three captions of ten.
    assert guessed["image_to_text"]["R@1"] == pytest.approx((4 * 1 / 10 + 2 * 3 / 10) / 6)
    assert guessed["classification"]["accuracy"] == pytest.approx(1 / 6)
    assert guessed["answering"]["accuracy"] == pytest.approx(6 * (1 / 3 * 0 + 2 / 3 * 1 / 2) / 6)


def test_templates_multiply_the_prompts() -> None:
    config = ZeroShotConfig(label="k", prompts={"cat": ["cat", "kitten"], "dog": ["dog"]}, templates=["{}", "a {}."])
    assert config.texts == {"cat": ["cat", "kitten", "a cat.", "a kitten."], "dog": ["dog", "a dog."]}
    assert ZeroShotConfig(label="k", prompts={"a": ["x"], "b": ["y"]}).texts == {"a": ["x"], "b": ["y"]}
    with pytest.raises(ValueError, match=r"has no \{\}"):
        ZeroShotConfig(label="k", prompts={"a": ["x"], "b": ["y"]}, templates=["a photo"])


def test_names_that_gates_use_stay() -> None:
    flat = flatten({"unseen": examine(loaded_model(dual_config()), rows(), ALL).metrics})
    assert {
        "unseen/text_to_image/R@1",
        "unseen/image_to_text/R@10",
        "unseen/text_to_image/mean_rank",
        "unseen/zero_shot/accuracy",
        "unseen/zero_shot/mean_class_accuracy",
    } <= set(flat)
    assert all(isinstance(value, float) for value in flat.values())
