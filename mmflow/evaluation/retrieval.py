"""Retrieval between pictures and captions: by similarity, by the beginnings of long captions, by the matching head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import Field

from mmflow.core.config import Config
from mmflow.evaluation.examination import (
    NEAREST,
    Captions,
    Embeddings,
    Examination,
    Metrics,
    Outcome,
    Rows,
    Subject,
    spread,
)
from mmflow.inference.result import Gives, Result
from mmflow.inference.tasks.embed import SPACE, AllCaptionEmbeddings, ImageEmbeddings
from mmflow.inference.tasks.pairs import GivenMatches, PairScores
from mmflow.learning.retrieval import QueryRanks, chance_metrics, rank_one, rank_several, retrieval_metrics

# Shapes: A captions, N pictures with a caption, K nearest, W the width of the shared space.

QUERIES = 500  # captions whose nearest pictures are kept for people, evenly spread


def both_ways(text_to_image: QueryRanks, image_to_text: QueryRanks) -> Metrics:
    """Metrics of captions that look for their picture, and of pictures that look for one of their captions."""
    return {"text_to_image": retrieval_metrics(text_to_image), "image_to_text": retrieval_metrics(image_to_text)}


def chance_both_ways(captions: Captions) -> Metrics:
    """What guessing reaches in both directions; {} per direction without a caption."""
    if not captions.texts:
        return {"text_to_image": {}, "image_to_text": {}}
    return {
        "text_to_image": chance_metrics(len(captions.pictures)),
        "image_to_text": chance_metrics(len(captions.texts), np.bincount(captions.picture_of_text)),
    }


def pair_scores(subject: Subject, captions: Captions, max_tokens: int | None = None) -> Embeddings:
    """(A, N): the scores of all pairs, from a model that compares pair by pair."""
    column = subject.column(PairScores.of(captions.texts, max_tokens), "pair_scores").combine_chunks()
    scores_NA: Embeddings = column.flatten().to_numpy().reshape(len(column), -1)[captions.pictures]
    return scores_NA.T


# --- by similarity --------------------------------------------------------------------------------------------------


def _asks(section: None, languages: Sequence[str], gives: Gives) -> tuple[Result, ...]:
    if "embeddings" not in gives:
        return ()
    return ImageEmbeddings(), *(AllCaptionEmbeddings(language=language) for language in languages)


def _asks_pairs(subject: Subject, section: None) -> tuple[Result, ...]:
    if "embeddings" in subject.gives:
        return ()
    return tuple(PairScores.of(captions.texts) for captions in subject.rows.captions.values() if captions.texts)


def _retrieve(subject: Subject, section: None) -> Outcome:
    """Both directions in the first language, text to image in the others; some captions with their nearest pictures."""
    (main, *others) = subject.rows.captions.items()
    text_to_image, image_to_text, queries = _ranks(subject, *main)
    metrics = both_ways(text_to_image, image_to_text)
    metrics["languages"] = {
        language: {"text_to_image": retrieval_metrics(_ranks(subject, language, captions)[0])}
        for language, captions in others
    }
    return Outcome(metrics, {"retrieval": queries})


def _ranks(subject: Subject, language: str, captions: Captions) -> tuple[QueryRanks, QueryRanks, list[dict[str, Any]]]:
    """Ranks of the captions, of the pictures, and some captions with their nearest pictures."""
    if "embeddings" in subject.gives:
        is_main = language == subject.language
        texts = AllCaptionEmbeddings(language=language)
        found = subject.ranks if is_main else subject.ranks_of(captions, subject.caption_embeddings(texts))
        ranks, nearest_AK, scores_AK = found.text_to_image, found.nearest_AK, found.scores_AK
        image_to_text = found.image_to_text
    else:
        similarity_AN = pair_scores(subject, captions)
        ranks = rank_one(similarity_AN, captions.picture_of_text)
        image_to_text = rank_several(similarity_AN.T, captions.picture_of_text)
        nearest_AK = np.argsort(-similarity_AN, axis=1, kind="stable")[:, :NEAREST]
        scores_AK = np.take_along_axis(similarity_AN, nearest_AK, 1)
    queries = [
        _query(subject.rows, captions, query, int(ranks.ranks[query]), nearest_AK[query], scores_AK[query])
        for query in spread(len(captions.texts), QUERIES)
    ]
    return ranks, image_to_text, queries


def _query(
    rows: Rows, captions: Captions, query: int, rank: int, nearest_K: NDArray[np.int64], scores_K: Embeddings
) -> dict[str, Any]:
    right = captions.picture_of_text[query]
    results = [
        {
            **rows.reference(captions.pictures[picture]),
            "caption": captions.texts_of_picture[picture][0],
            "score": round(float(score), 4),
            "correct": bool(picture == right),
        }
        for picture, score in zip(nearest_K, scores_K, strict=True)
    ]
    reference = rows.reference(captions.pictures[right])
    return {"caption": captions.texts[query], **reference, "rank": rank, "results": results}


def _chance(rows: Rows, section: None) -> Metrics:
    others = {
        language: {"text_to_image": chance_metrics(len(captions.pictures))}
        for language, captions in list(rows.captions.items())[1:]
    }
    return {**chance_both_ways(rows.main_captions), "languages": others}


RETRIEVAL = Examination(
    needs=(Gives({"embeddings"}), Gives({"pair_scores"})),
    remedy=SPACE,
    asks=_asks,
    asks_then=_asks_pairs,
    examine=_retrieve,
    chance=_chance,
)


# --- by the beginnings of long captions -----------------------------------------------------------------------------


class LongTextConfig(Config):
    """Retrieval by whole captions against retrieval by their beginnings, by the same model."""

    truncated_tokens: int = Field(77, ge=4)
    """Tokens that the beginning keeps; 77 is what CLIP reads."""


def _beginnings(section: LongTextConfig, language: str) -> AllCaptionEmbeddings:
    return AllCaptionEmbeddings(language=language, max_tokens=section.truncated_tokens)


def _asks_beginnings(section: LongTextConfig, languages: Sequence[str], gives: Gives) -> tuple[Result, ...]:
    return *_asks(None, languages[:1], gives), _beginnings(section, languages[0])


def _truncate(subject: Subject, section: LongTextConfig) -> Outcome:
    captions = subject.rows.main_captions
    cut = subject.ranks_of(captions, subject.caption_embeddings(_beginnings(section, subject.language)))
    found = retrieval_metrics(subject.ranks.text_to_image)["R@10"]
    metrics = both_ways(cut.text_to_image, cut.image_to_text)
    before = metrics["text_to_image"]["R@10"]
    lengths = subject.lengths(captions.texts)
    metrics = {f"{direction}_truncated": values for direction, values in metrics.items()}
    metrics["long_text"] = {
        "R@10_gain": found / before - 1 if before else 0.0,  # no gain can be stated over nothing
        "longer_share": float(np.mean(lengths > section.truncated_tokens)),
        "tokens": float(np.mean(lengths)),
    }
    return Outcome(metrics)


LONG_TEXT = Examination(needs=AllCaptionEmbeddings.needs, remedy=SPACE, asks=_asks_beginnings, examine=_truncate)


# --- by the head `matching` -----------------------------------------------------------------------------------------


class MatchingConfig(Config):
    """Retrieval by the head `matching`, which reads picture and caption together."""

    candidates: int = Field(16, ge=1)
    """The nearest this many by the embeddings are put in order again; a model without embeddings reads every pair."""


def _asks_matching(section: MatchingConfig, languages: Sequence[str], gives: Gives) -> tuple[Result, ...]:
    return _asks(None, languages[:1], gives)


@dataclass(frozen=True)
class _Candidates:
    """The nearest of each caption and of each picture by the embeddings."""

    of_caption_AK: NDArray[np.int64]  # pictures
    of_picture_NK: NDArray[np.int64]  # captions

    @cached_property
    def pairs(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Each pair of picture and caption once, as picture · A + caption, ascending; and where those of the captions,
        then those of the pictures, are among them."""
        captions_A, pictures_N = np.arange(len(self.of_caption_AK)), np.arange(len(self.of_picture_NK))
        of_captions_AK = self.of_caption_AK * len(captions_A) + captions_A[:, None]
        of_pictures_NK = pictures_N[:, None] * len(captions_A) + self.of_picture_NK
        return np.unique(np.concatenate([of_captions_AK.ravel(), of_pictures_NK.ravel()]), return_inverse=True)


def _candidates(subject: Subject, section: MatchingConfig) -> _Candidates | None:
    """None where every pair is matched."""
    from mmflow.learning.nearest import nearest_in_tiles

    if "embeddings" not in subject.gives:
        return None
    # Not the subject's own array, which it would hold until it is examined, as all other subjects would.
    texts_AW = subject.caption_embeddings(AllCaptionEmbeddings(language=subject.language))
    images_NW = subject.image_embeddings()[subject.rows.main_captions.pictures]
    of_caption_AK, _ = nearest_in_tiles(texts_AW, [images_NW], section.candidates)
    of_picture_NK, _ = nearest_in_tiles(images_NW, [texts_AW], section.candidates)
    return _Candidates(of_caption_AK, of_picture_NK)


def _given(subject: Subject, candidates: _Candidates | None) -> GivenMatches:
    """What is asked of the head: each picture's candidate captions, or all captions, in their order."""
    rows, captions = subject.rows, subject.rows.main_captions
    texts = {shard.name: [list[str]() for _ in range(shard.samples)] for shard in rows.reader.shards}
    of_row = [texts[rows.reader.shards[shard].name][row] for shard, row in rows.places]
    if candidates is None:
        for row in captions.pictures:
            of_row[row] += captions.texts
    else:
        for picture, caption in zip(*np.divmod(candidates.pairs[0], len(captions.texts)), strict=True):
            of_row[captions.pictures[picture]].append(captions.texts[caption])
    return GivenMatches.of(texts)


def _asked(subject: Subject, section: MatchingConfig) -> tuple[GivenMatches, _Candidates | None]:
    """What is asked of the head, and why; once for each subject."""
    if "matching" not in subject.found:
        candidates = _candidates(subject, section)
        subject.found["matching"] = _given(subject, candidates), candidates
    asked: tuple[GivenMatches, _Candidates | None] = subject.found["matching"]
    return asked


def _asks_candidates(subject: Subject, section: MatchingConfig) -> tuple[Result, ...]:
    return _asked(subject, section)[:1]


def _match(subject: Subject, section: MatchingConfig) -> Outcome:
    """A query's candidates come first, in the order of their odds, and behind them all others as they were. Each
    direction has only its own candidates: with the other's too it would read more than its settings allow."""
    from mmflow.learning.tiled_ranks import reranked

    captions, (given, candidates) = subject.rows.main_captions, _asked(subject, section)
    of_row = subject.column(given, "given_matches").combine_chunks()
    odds = of_row.take(pa.array(captions.pictures)).flatten().to_numpy()
    if candidates is None:
        odds_NA = odds.reshape(len(captions.pictures), -1)
        ranks = rank_one(odds_NA.T, captions.picture_of_text), rank_several(odds_NA, captions.picture_of_text)
    else:
        of_caption_AK, of_picture_NK = candidates.of_caption_AK, candidates.of_picture_NK
        own = odds[candidates.pairs[1]]
        found = reranked(
            subject.ranks,
            of_caption_AK,
            own[: of_caption_AK.size].reshape(of_caption_AK.shape),
            of_picture_NK,
            own[of_caption_AK.size :].reshape(of_picture_NK.shape),
        )
        ranks = found.text_to_image, found.image_to_text
    return Outcome({f"matched_{name}": values for name, values in both_ways(*ranks).items()})


MATCHING = Examination(
    needs=GivenMatches.needs,
    remedy=GivenMatches.remedy,
    asks=_asks_matching,
    asks_then=_asks_candidates,
    examine=_match,
    chance=lambda rows, section: {
        f"matched_{name}": values for name, values in chance_both_ways(rows.main_captions).items()
    },
)
