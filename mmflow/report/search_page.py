"""The page of a search: what was searched for, and the pictures that were found with their captions."""

from __future__ import annotations

from collections.abc import Sequence

from mmflow.core.errors import MmflowError
from mmflow.core.storage import write_bytes
from mmflow.dataset.reader import Sample
from mmflow.inference.scores import Scores, Side
from mmflow.inference.search import Hit, Query
from mmflow.report import page

QUERY_PIXELS = 320
HIT_PIXELS = 224


def write_page(
    uri: str, scores: Scores, query: Query, side: Side, hits: Sequence[Hit], samples: Sequence[Sample | MmflowError]
) -> None:
    """Write the page, one self-contained file, to a path or URI. `samples` are those of the hits."""
    write_bytes(uri, render(scores, query, side, hits, samples).encode())


def render(
    scores: Scores, query: Query, side: Side, hits: Sequence[Hit], samples: Sequence[Sample | MmflowError]
) -> str:
    """The page as HTML text."""
    found, pictures = [], {}
    for hit, sample in zip(hits, samples, strict=True):
        if isinstance(sample, MmflowError):
            found.append({"hit": hit, "captions": [], "more": 0, "problem": str(sample)})
            continue
        captions = [{"language": caption.language, "text": caption.text} for caption in sample.captions[:2]]
        found.append({"hit": hit, "captions": captions, "more": len(sample.captions) - len(captions)})
        pictures[hit.rank] = page.thumbnail(sample.image, HIT_PIXELS)
    if query.picture is not None:
        pictures[0] = page.thumbnail(query.picture.image, QUERY_PIXELS)
    template = page.environment().get_template("search_page.html.jinja")
    return template.render(
        scores=scores,
        query=query,
        side=side,
        found=found,
        picture=lambda rank: page.data_uri(pictures.get(rank) or b""),
    )
