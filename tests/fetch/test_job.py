"""URLs of images are fetched once, temporary failures again, and a recipe knows when all its URLs are settled."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmflow.core.artifacts import content_hash
from mmflow.fetch import job
from mmflow.fetch.config import FetchConfig
from mmflow.fetch.job import fetch_images, is_settled, known_images, may_have_urls, urls_of
from mmflow.fetch.store import FetchedStore
from mmflow.sources.config import SourceConfig
from mmflow.sources.sources import list_units
from tests.fetch.webserver import Server, in_turn, no_progress, respond

pytestmark = pytest.mark.usefixtures("ray_cluster")


class Recipe:
    """A JSONL file of URLs and the store for their bodies."""

    def __init__(self, folder: Path, urls: Sequence[str]) -> None:
        lines = [json.dumps({"url": url, "caption": "x"}) for url in (*urls, "beside.jpg")]
        (folder / "pairs.jsonl").write_text("\n".join(lines))
        self.sources = [SourceConfig(uri=str(folder / "pairs.jsonl"))]
        self.store = str(folder / "store")
        self.identity = content_hash([unit.fingerprint for unit in list_units(self.sources)])

    def fetch(self, **settings: Any) -> str | None:
        """One run. Returns the fingerprint of the known images."""
        fetched = FetchConfig(loopback=True, retries=0, num_tasks=1, **settings)
        if not is_settled(self.store, self.identity, fetched):
            fetch_images(self.store, self.sources, list_units(self.sources), self.identity, fetched, no_progress)
        return known_images(self.store, self.identity)


def test_ray_reads_the_same_urls_of_a_long_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = Recipe(tmp_path, [f"https://a.example/{number % 150}.jpg" for number in range(300)])
    units = list_units(recipe.sources)
    urls = urls_of(units, recipe.sources)
    assert len(urls) == 150
    monkeypatch.setattr(job, "RECORDS_READ_HERE", 0)
    assert urls_of(units, recipe.sources) == urls


def test_urls_are_fetched_once_and_failed_urls_again(server: Server, tmp_path: Path) -> None:
    server.routes["/a"] = respond(200, b"A")
    server.routes["/b"] = in_turn(respond(500), respond(500), respond(200, b"B"))
    recipe = Recipe(tmp_path, [server.url("/a"), server.url("/b"), server.url("/a"), server.url("/gone")])
    assert known_images(recipe.store, recipe.identity) is None
    first = recipe.fetch()
    assert first is not None
    assert recipe.fetch() == first  # /b failed again, so nothing changed
    assert (server.counts["/a"], server.counts["/b"], server.counts["/gone"]) == (1, 2, 1)

    third = recipe.fetch()
    assert third not in (None, first)
    opened = FetchedStore(recipe.store)
    assert [opened.load(server.url(path)) for path in ("/a", "/b")] == [b"A", b"B"]
    num_hits = len(server.hits)
    assert recipe.fetch() == third  # all are settled
    assert len(server.hits) == num_hits
    assert server.counts["/a"] == 1


def test_a_settled_recipe_is_not_read_again(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server.routes["/a"] = respond(200, b"A")
    recipe = Recipe(tmp_path, [server.url("/a")])
    known = recipe.fetch()
    monkeypatch.setattr(job, "urls_of", None)
    assert recipe.fetch(max_bytes=FetchConfig().max_bytes + 1) == known  # none was too large


def test_a_raised_size_limit_fetches_only_the_bodies_that_were_too_large(server: Server, tmp_path: Path) -> None:
    server.routes["/large"], server.routes["/small"] = respond(200, b"L" * 5000), respond(200, b"S")
    recipe = Recipe(tmp_path, [server.url("/large"), server.url("/small")])
    small = recipe.fetch(max_bytes=1000)
    for bound in (1000, 500):
        assert recipe.fetch(max_bytes=bound) == small
    assert (server.counts["/large"], server.counts["/small"]) == (1, 1)

    assert recipe.fetch(max_bytes=6000) != small
    assert (server.counts["/large"], server.counts["/small"]) == (2, 1)
    assert FetchedStore(recipe.store).load(server.url("/large")) == b"L" * 5000


def test_a_refresh_requests_every_url_and_unchanged_bodies_change_nothing(server: Server, tmp_path: Path) -> None:
    server.routes["/same"] = in_turn(respond(200, b"same", ETag='"v1"'), respond(304))
    server.routes["/new"] = in_turn(respond(200, b"old"), respond(200, b"old"), respond(200, b"new"))
    recipe = Recipe(tmp_path, [server.url("/same"), server.url("/new")])
    known = recipe.fetch()
    assert recipe.fetch(refresh=True) == known
    assert [hit.headers.get("if-none-match") for hit in server.hits if hit.path == "/same"] == [None, '"v1"']
    newer = recipe.fetch(refresh=True)
    assert newer != known
    assert server.counts["/same"] == 3
    opened = FetchedStore(recipe.store)
    assert [opened.load(server.url(path)) for path in ("/same", "/new")] == [b"same", b"new"]
    assert recipe.fetch() == newer
    assert server.counts["/new"] == 3


def test_a_refresh_is_not_part_of_the_dumped_recipe() -> None:
    assert FetchConfig(refresh=True).model_dump() == FetchConfig().model_dump()


def test_a_table_of_bodies_is_not_read_for_urls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pq.write_table(pa.table({"image": [b"J"], "caption": ["x"]}), tmp_path / "a.parquet")
    sources = [SourceConfig(uri=str(tmp_path / "a.parquet"))]
    units = list_units(sources)
    assert may_have_urls(units)
    monkeypatch.setattr(job, "urls_of", None)
    fetch_images(str(tmp_path / "store"), sources, units, "id", FetchConfig(), no_progress)
    assert known_images(str(tmp_path / "store"), "id") is None
