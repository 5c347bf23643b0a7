"""A model's examination on held-out splits: all that the recipe asks and the model gives, on the same rows for every
model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmflow.evaluation import classification
from mmflow.evaluation.answering import accuracy_by_answer, answer_accuracy, answering_metrics, commonest_answer
from mmflow.evaluation.asked import asked_and_given
from mmflow.evaluation.captions import caption_metrics, typical_caption
from mmflow.evaluation.config import EvaluateConfig
from mmflow.evaluation.masked_words import masked_word_metrics
from mmflow.evaluation.perplexity import perplexity_metrics
from mmflow.evaluation.rows import Captions, Rows
from mmflow.evaluation.zero_shot import majority_metrics, zero_shot_metrics
from mmflow.inference.embed import Embeddings, class_embeddings, embed_captions, embed_images
from mmflow.inference.predict import class_scores, matching_scores, pair_scores, token_losses, write_texts
from mmflow.learning.retrieval import (
    Found,
    chance_metrics,
    find_any,
    find_one,
    nearest,
    reordered,
    retrieval_metrics,
)
from mmflow.loading.tokens import tokenise
from mmflow.models.package import LoadedModel

GRID_RESULTS = 5
SHOWN = 24  # written captions and answers that are kept for people to read
CONFUSION_CLASSES = 40  # a table of more is not read by anybody
SEED = 20_190_422  # of the nucleus, the same for every model

Metrics = dict[str, Any]


@dataclass(frozen=True)
class Retrieved:
    """Which pictures came first for each caption of the first language."""

    ranks: NDArray[np.int64]  # of the right picture
    best: NDArray[np.int64]  # (captions, GRID_RESULTS): the nearest pictures, as places in `Captions.pictures`
    scores: NDArray[np.float32]  # their similarities


@dataclass(frozen=True)
class Examination:
    """What came of one model on one split."""

    metrics: Metrics
    retrieved: Retrieved | None = None  # None for a model without a shared space
    details: dict[str, Any] = field(default_factory=dict)  # for people: what was written, what was taken for what


def examine(loaded: LoadedModel, rows: Rows, settings: EvaluateConfig) -> Examination:
    """Every examination of one model on one split; retrieval in both directions in the first language, from text to
    image in the others."""
    sections = asked_and_given(settings, loaded.model.gives)
    metrics: Metrics = {}
    details: dict[str, Any] = {}
    retrieved, similarity = None, None
    first = next(iter(rows.captions.values()))
    if "retrieval" in sections:
        images = None
        if "embeddings" in loaded.model.gives:
            images = embed_images(loaded, rows.samples, settings.batch_size)
        similarity = _similarity(loaded, rows, first, images, settings.batch_size)
        metrics |= _both_ways(similarity, first)
        metrics["languages"] = {
            language: {
                "text_to_image": retrieval_metrics(
                    find_one(_similarity(loaded, rows, captions, images, settings.batch_size), captions.picture_of_text)
                )
            }
            for language, captions in list(rows.captions.items())[1:]
        }
        retrieved = _retrieved(similarity, first)
        if settings.long_text is not None and images is not None:
            cut = _similarity(loaded, rows, first, images, settings.batch_size, settings.long_text.truncated_tokens)
            metrics |= _long_text(loaded, first, metrics, _both_ways(cut, first), settings.long_text.truncated_tokens)
        if settings.zero_shot is not None and images is not None:
            zero_shot = settings.zero_shot
            classes = class_embeddings(loaded, zero_shot.texts, settings.batch_size)
            names = list(zero_shot.prompts)
            metrics["zero_shot"] = zero_shot_metrics(images, classes, names, rows.labels(zero_shot.label))
    if "matching" in sections:
        # What bounds the pairs that are matched are cosines: a model that scores pairs anyway matches them all.
        cosines = similarity if "embeddings" in loaded.model.gives else None
        metrics |= _matched(loaded, rows, first, cosines, settings)
    if "masked_language" in sections:
        pictures = [rows.samples[row] for row in first.pictures]
        metrics["masked_language"] = masked_word_metrics(
            loaded, pictures, first.texts, first.picture_of_text, settings.batch_size
        )
    if "classification" in sections:
        metrics["classification"], details["confusion"] = _classify(loaded, rows, first, settings)
    if "answering" in sections:
        metrics["answering"], found = _answer(loaded, rows, settings)
        details |= found
    if "captions" in sections:
        metrics["captions"], details["captions"] = _caption(loaded, rows, first, settings)
    return Examination(metrics, retrieved, {name: value for name, value in details.items() if value})


def _similarity(
    loaded: LoadedModel,
    rows: Rows,
    captions: Captions,
    images: Embeddings | None,
    batch_size: int,
    max_tokens: int | None = None,
) -> Embeddings:
    """(captions, pictures that have one): cosines with the `images`, or without them the scores of all pairs."""
    if images is None:
        clips = [rows.samples[row] for row in captions.pictures]
        return pair_scores(loaded, clips, captions.texts, batch_size, max_tokens)
    embedded = embed_captions(loaded, captions.texts, batch_size, max_tokens)
    similarity: Embeddings = embedded @ images[captions.pictures].T
    return similarity


def _both_ways(similarity: NDArray[np.floating], captions: Captions) -> Metrics:
    to_image = find_one(similarity, captions.picture_of_text)
    to_text: Found = find_any(similarity.T, captions.picture_of_text)
    return {"text_to_image": retrieval_metrics(to_image), "image_to_text": retrieval_metrics(to_text)}


def _retrieved(similarity: Embeddings, captions: Captions) -> Retrieved:
    best = np.argsort(-similarity, axis=1, kind="stable")[:, :GRID_RESULTS]
    ranks = find_one(similarity, captions.picture_of_text).ranks
    return Retrieved(ranks, best, np.take_along_axis(similarity, best, axis=1))


def _long_text(loaded: LoadedModel, captions: Captions, whole: Metrics, cut: Metrics, tokens: int) -> Metrics:
    lengths = [len(ids) for ids in tokenise(loaded.tokenizer, captions.texts, loaded.config.max_tokens)]
    before, after = cut["text_to_image"]["R@10"], whole["text_to_image"]["R@10"]
    return {f"{direction}_truncated": values for direction, values in cut.items()} | {
        "long_text": {
            # Of nothing there is no gain that could be stated.
            "R@10_gain": after / before - 1 if before else 0.0,
            "longer_share": float(np.mean([length > tokens for length in lengths])),
            "tokens": float(np.mean(lengths)),
        }
    }


def _matched(
    loaded: LoadedModel, rows: Rows, captions: Captions, similarity: Embeddings | None, settings: EvaluateConfig
) -> Metrics:
    assert settings.matching is not None
    shape = (len(captions.texts), len(captions.pictures))
    if similarity is None:
        by_caption = by_picture = np.ones(shape, dtype=np.bool_)
    else:
        by_caption, by_picture = (nearest(similarity, settings.matching.candidates, axis) for axis in (1, 0))
    samples = [rows.samples[row] for row in captions.pictures]
    pairs = np.argwhere(by_caption | by_picture)
    odds = np.zeros(shape, dtype=np.float32)
    odds[tuple(pairs.T)] = matching_scores(loaded, samples, captions.texts, pairs, settings.batch_size)
    # Each direction has the candidates of its own alone: with the other's too it would read more than it was allowed.
    to_image = odds if similarity is None else reordered(similarity, odds, by_caption)
    to_text = odds if similarity is None else reordered(similarity, odds, by_picture)
    return {
        "matched_text_to_image": retrieval_metrics(find_one(to_image, captions.picture_of_text)),
        "matched_image_to_text": retrieval_metrics(find_any(to_text.T, captions.picture_of_text)),
    }


def _classify(
    loaded: LoadedModel, rows: Rows, captions: Captions, settings: EvaluateConfig
) -> tuple[Metrics, dict[str, Any]]:
    assert settings.classification is not None
    # With a fusion a picture is read with its first caption, with nothing where it has none.
    own = dict(zip(captions.pictures.tolist(), captions.texts_of_picture, strict=True))
    texts = [own.get(row, [""])[0] for row in range(len(rows.samples))] if "fused" in loaded.model.gives else None
    scores = class_scores(loaded, rows.samples, texts, settings.batch_size)
    labels = rows.labels(settings.classification.label)
    # A class that the model was not taught is one that it never answers, not one that does not count.
    untaught = sorted({label for label in labels if label is not None} - set(loaded.classes))
    names = [*loaded.classes, *untaught]
    scores = np.pad(scores, ((0, 0), (0, len(untaught))), constant_values=-np.inf)
    metrics, counts = classification.metrics_of(scores, names, labels)
    shown = {"classes": names, "counts": counts.tolist()} if len(names) <= CONFUSION_CLASSES else {}
    return metrics, shown


def _answer(loaded: LoadedModel, rows: Rows, settings: EvaluateConfig) -> tuple[Metrics, dict[str, Any]]:
    assert settings.answering is not None
    asked = rows.questions
    samples = [rows.samples[question.row] for question in asked]
    texts = [question.text for question in asked]
    if "class_logits" in loaded.model.gives:
        answer = classification.predicted(class_scores(loaded, samples, texts, settings.batch_size))
        answers = [loaded.classes[number] if number >= 0 else "" for number in answer]
    else:
        answers = write_texts(loaded, samples, texts, settings.answering, settings.batch_size, SEED)
    people = [question.answers for question in asked]
    shown = [
        {
            "key": samples[place].key,
            "question": texts[place],
            "answer": answers[place],
            "people": list(dict.fromkeys(people[place])),
            "accuracy": answer_accuracy(answers[place], people[place]),
        }
        for place in _spread(len(asked))
    ]
    by_answer = [
        {"answer": answer, "questions": questions, "accuracy": accuracy}
        for answer, questions, accuracy in accuracy_by_answer(answers, people, CONFUSION_CLASSES)
    ]
    return answering_metrics(answers, people), {"answers": shown, "by_answer": by_answer}


def _caption(
    loaded: LoadedModel, rows: Rows, captions: Captions, settings: EvaluateConfig
) -> tuple[Metrics, list[dict[str, Any]]]:
    assert settings.captions is not None
    samples = [rows.samples[row] for row in captions.pictures]
    written = write_texts(loaded, samples, None, settings.captions, settings.batch_size, SEED)
    described = [rows.samples[row] for row in captions.rows]
    losses, tokens = token_losses(loaded, described, captions.texts, settings.batch_size)
    people = captions.texts_of_picture
    shown = [
        {"key": samples[place].key, "caption": written[place], "people": people[place]}
        for place in _spread(len(samples))
    ]
    return caption_metrics(written, people) | perplexity_metrics(losses, tokens), shown


def _spread(count: int) -> list[int]:
    shown = min(SHOWN, count)
    return [number * count // shown for number in range(shown)]


def chance(rows: Rows, settings: EvaluateConfig, sections: frozenset[str]) -> Metrics:
    """What guessing, the commonest class or answer, or one typical caption for all would give on the same rows."""
    metrics: Metrics = {}
    first, *others = rows.captions.values()
    languages = list(rows.captions)[1:]
    to_image = chance_metrics(len(first.pictures)) if len(first.texts) else {}
    to_text = chance_metrics(len(first.texts), np.bincount(first.picture_of_text)) if len(first.texts) else {}
    if "retrieval" in sections:
        metrics |= {
            "text_to_image": to_image,
            "image_to_text": to_text,
            "languages": {
                language: {"text_to_image": chance_metrics(len(captions.pictures))}
                for language, captions in zip(languages, others, strict=True)
            },
        }
    if settings.zero_shot is not None:
        metrics["zero_shot"] = majority_metrics(list(settings.zero_shot.prompts), rows.labels(settings.zero_shot.label))
    if "matching" in sections:
        metrics |= {"matched_text_to_image": to_image, "matched_image_to_text": to_text}
    if settings.classification is not None:
        labels = rows.labels(settings.classification.label)
        names = sorted({label for label in labels if label is not None})
        metrics["classification"] = classification.majority_metrics(names, labels)
    if settings.answering is not None:
        people = [question.answers for question in rows.questions]
        metrics["answering"] = answering_metrics([commonest_answer(people)] * len(people), people)
    if "captions" in sections:
        described = first.texts_of_picture
        metrics["captions"] = caption_metrics([typical_caption(first.texts)] * len(described), described)
    return metrics


def flatten(metrics: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Nested metrics as one level: {"unseen_variants/text_to_image/R@1": 0.61, …}, the names that gates use.

    None, which is written for what is no finite number, is NaN, and no gate lets that pass.
    """
    flat: dict[str, float] = {}
    for name, value in metrics.items():
        path = f"{prefix}/{name}" if prefix else name
        if isinstance(value, Mapping):
            flat |= flatten(value, path)
        else:
            flat[path] = math.nan if value is None else float(value)
    return flat
