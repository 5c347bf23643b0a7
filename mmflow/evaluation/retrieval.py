"""Retrieval between pictures and captions: by similarity, by the beginnings of long captions, by the matching head."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from mmflow.core.config import Config
from mmflow.evaluation.examination import Captions, Examination, Gives, Metrics, Outcome, Rows, Subject
from mmflow.learning.retrieval import (
    chance_metrics,
    nearest,
    rank_one,
    rank_several,
    reordered,
    retrieval_metrics,
)

RESULTS = 5  # pictures that are kept for each caption


def both_ways(similarity: NDArray[np.floating], captions: Captions) -> Metrics:
    """Metrics of captions that look for their picture, and of pictures that look for one of their captions."""
    return {
        "text_to_image": retrieval_metrics(rank_one(similarity, captions.picture_of_text)),
        "image_to_text": retrieval_metrics(rank_several(similarity.T, captions.picture_of_text)),
    }


def chance_both_ways(captions: Captions) -> Metrics:
    """What guessing reaches in both directions; {} per direction without a caption."""
    if not captions.texts:
        return {"text_to_image": {}, "image_to_text": {}}
    return {
        "text_to_image": chance_metrics(len(captions.pictures)),
        "image_to_text": chance_metrics(len(captions.texts), np.bincount(captions.picture_of_text)),
    }


# --- by similarity --------------------------------------------------------------------------------------------------


def _retrieve(subject: Subject, section: None) -> Outcome:
    """Both directions in the first language, text to image in the others; every caption with its nearest pictures."""
    captions, others = subject.rows.main_captions, list(subject.rows.captions.items())[1:]
    metrics = both_ways(subject.similarity, captions)
    metrics["languages"] = {
        language: {"text_to_image": retrieval_metrics(rank_one(subject.similarity_to(other), other.picture_of_text))}
        for language, other in others
    }
    return Outcome(metrics, {"retrieval": _queries(subject)})


def _queries(subject: Subject) -> list[dict[str, Any]]:
    rows, captions, similarity = subject.rows, subject.rows.main_captions, subject.similarity
    best = np.argsort(-similarity, axis=1, kind="stable")[:, :RESULTS]
    ranks = rank_one(similarity, captions.picture_of_text).ranks
    queries = []
    for query, (caption, right) in enumerate(zip(captions.texts, captions.picture_of_text, strict=True)):
        results = [
            {
                **rows.reference(captions.pictures[picture]),
                "caption": captions.texts_of_picture[picture][0],
                "score": round(float(similarity[query, picture]), 4),
                "correct": bool(picture == right),
            }
            for picture in best[query]
        ]
        reference = rows.reference(captions.pictures[right])
        queries.append({"caption": caption, **reference, "rank": int(ranks[query]), "results": results})
    return queries


def _chance(rows: Rows, section: None) -> Metrics:
    others = {
        language: {"text_to_image": chance_metrics(len(captions.pictures))}
        for language, captions in list(rows.captions.items())[1:]
    }
    return {**chance_both_ways(rows.main_captions), "languages": others}


RETRIEVAL = Examination(
    needs=(Gives({"embeddings"}), Gives({"pair_scores"})),
    remedy="a text encoder and an embedding_width",
    examine=_retrieve,
    chance=_chance,
)


# --- by the beginnings of long captions -----------------------------------------------------------------------------


class LongTextConfig(Config):
    """Retrieval by whole captions against retrieval by their beginnings, by the same model."""

    truncated_tokens: int = Field(77, ge=4)
    """Tokens that the beginning keeps; 77 is what CLIP reads."""


def _truncate(subject: Subject, section: LongTextConfig) -> Outcome:
    captions = subject.rows.main_captions
    cut = both_ways(subject.similarity_to(captions, section.truncated_tokens), captions)
    whole = retrieval_metrics(rank_one(subject.similarity, captions.picture_of_text))["R@10"]
    before = cut["text_to_image"]["R@10"]
    lengths = subject.model.lengths(captions.texts)
    metrics = {f"{direction}_truncated": values for direction, values in cut.items()}
    metrics["long_text"] = {
        "R@10_gain": whole / before - 1 if before else 0.0,  # no gain can be stated over nothing
        "longer_share": float(np.mean([length > section.truncated_tokens for length in lengths])),
        "tokens": float(np.mean(lengths)),
    }
    return Outcome(metrics)


LONG_TEXT = Examination(
    needs=(Gives({"embeddings"}),), remedy="a text encoder and an embedding_width", examine=_truncate
)


# --- by the head `matching` -----------------------------------------------------------------------------------------


class MatchingConfig(Config):
    """Retrieval by the head `matching`, which reads picture and caption together."""

    candidates: int = Field(16, ge=1)
    """The nearest this many by the embeddings are put in order again; a model without embeddings reads every pair."""


def _match(subject: Subject, section: MatchingConfig) -> Outcome:
    captions = subject.rows.main_captions
    shape = (len(captions.texts), len(captions.pictures))
    # Cosines choose the candidates: a model that scores every pair anyway matches them all.
    similarity = subject.similarity if "embeddings" in subject.model.gives else None
    if similarity is None:
        by_caption = by_picture = np.ones(shape, dtype=np.bool_)
    else:
        by_caption, by_picture = (nearest(similarity, section.candidates, axis) for axis in (1, 0))
    samples = [subject.rows.samples[row] for row in captions.pictures]
    pairs = np.argwhere(by_caption | by_picture)
    odds = np.zeros(shape, dtype=np.float32)
    odds[tuple(pairs.T)] = subject.model.match(samples, captions.texts, pairs)
    # Each direction has only its own candidates: with the other's too it would read more than its settings allow.
    to_image = odds if similarity is None else reordered(similarity, odds, by_caption)
    to_text = odds if similarity is None else reordered(similarity, odds, by_picture)
    return Outcome(
        {
            "matched_text_to_image": retrieval_metrics(rank_one(to_image, captions.picture_of_text)),
            "matched_image_to_text": retrieval_metrics(rank_several(to_text.T, captions.picture_of_text)),
        }
    )


MATCHING = Examination(
    needs=(Gives({"matching_logits"}),),
    remedy="a fusion and the head matching",
    examine=_match,
    chance=lambda rows, section: {
        f"matched_{name}": values for name, values in chance_both_ways(rows.main_captions).items()
    },
)
