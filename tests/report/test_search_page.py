"""The page of a search is one file that shows what was found, and lets no text of the data act in a browser."""

from __future__ import annotations

import re

import pytest

from mmflow.core.errors import MissingArtifactError
from mmflow.dataset.reader import Caption, Sample
from mmflow.inference.scores import Scores
from mmflow.inference.search import Hit, Query
from mmflow.report.search_page import render
from tests.dataset.handmade import picture
from tests.report.test_report import HOSTILE, Page


def page_of(text: str, *, by_picture: bool = False) -> str:
    """The page of three hits, the last of a sample that is gone; `text` is in every place where data may have some."""
    scores = Scores(
        uri=text,
        fingerprint="f",
        package="package",
        digest="d" * 64,
        name=text,
        version=3,
        datasets={text: "a", "b": "b"},
        files=(),
    )
    hits = [
        Hit(rank=rank, score=0.5 - rank / 8, dataset=text, split=text, shard="00000", row=rank, key=f"{text}{rank}")
        for rank in (1, 2, 3)
    ]
    captions = tuple(Caption(f"{text} number {number}", "en") for number in range(4))
    samples = [Sample(text, picture(seed, (80, 60)), "jpg", captions, {}) for seed in range(2)]
    query = Query(text, samples[0] if by_picture else None)
    return render(scores, query, "pictures", hits, [*samples, MissingArtifactError(f"{text}: gone")])


def test_each_hit_has_its_picture_score_captions_and_key() -> None:
    parsed = Page(page_of("red kite"))
    assert parsed.open == []
    for number in range(2):
        assert f"red kite number {number}" in parsed.text
    for shown in ("0.375", "0.250", "+2", "red kite1", "version 3", "red kite: gone"):
        assert shown in parsed.text
    assert "red kite number 2" not in parsed.text
    assert [tag for tag, _ in parsed.elements].count("img") == 2
    assert [tag for tag, _ in Page(page_of("red kite", by_picture=True)).elements].count("img") == 3


@pytest.mark.parametrize("by_picture", [False, True])
def test_no_text_of_the_data_acts_and_nothing_is_loaded_from_outside(by_picture: bool) -> None:
    html = page_of(HOSTILE, by_picture=by_picture)
    for tag, attrs in Page(html).elements:
        assert tag not in ("script", "link", "iframe", "object", "base")
        assert not [name for name in attrs if name.startswith("on")]
        assert (attrs.get("src") or "data:image/").startswith("data:image/")
        assert "href" not in attrs
    assert not re.search(r"@import|url\(", html)
