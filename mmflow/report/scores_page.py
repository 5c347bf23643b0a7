"""The HTML page beside scores, for people who score without a recipe: what was computed, and how it looks."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from mmflow.core.artifacts import Artifact
from mmflow.core.storage import write_bytes
from mmflow.inference.scores import open_scores
from mmflow.report.page import data_uri, environment
from mmflow.report.run_page import meter, similarity_chart
from mmflow.report.scores import columns_of, gather_scores

PAGE = "scores.html"


def write_scores_page(artifact: Artifact) -> str:
    """Write the page beside the scores and return its URI."""
    figures, pictures = gather_scores(artifact)
    figures |= {"fingerprint": artifact.fingerprint, "columns": columns_of(open_scores(artifact.uri))}
    target = artifact.file(PAGE)
    write_bytes(target, render_scores(figures, pictures).encode())
    return target


def render_scores(figures: Mapping[str, Any], pictures: Mapping[str, bytes]) -> str:
    """The page as HTML text. A row whose picture is missing shows its key."""
    return (
        environment()
        .get_template("scores_page.html.jinja")
        .render(
            scores=figures,
            similarity=similarity_chart(figures.get("similarity") or {}),
            settings=json.dumps(figures["tasks"], indent=2, ensure_ascii=False),
            picture=lambda name: data_uri(pictures[name]) if name in pictures else "",
            meter=meter,
        )
    )
