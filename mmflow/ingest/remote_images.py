"""The images of a recipe's sources that are URLs: fetched before the dataset is built, and what is known of them.

Fetching goes first and apart, because it may go on for days and learn more each night: what is known of a recipe's
URLs is an input of its dataset, as the files of its sources are, and the dataset is built anew when it changed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from mmflow.artifacts import content_hash, exists, join, read_json, write_json
from mmflow.ingest.config import FetchConfig, SourceConfig
from mmflow.ingest.fetch_job import fetch_urls
from mmflow.ingest.fetched import FetchedStore
from mmflow.ingest.reasons import Reason
from mmflow.ingest.sources import read_records
from mmflow.ingest.units import Unit
from mmflow.progress import Report

SCHEMES = "^https?://"
TABLES = ("jsonl", "csv", "parquet", "html")  # kinds whose images may be URLs
RECORDS_AT_ONCE = 2_000_000  # URLs in this process's memory: 200 MB
MAY_PASS = (Reason.fetch_pending, Reason.fetch_failed)


def fetch_images(
    store: str,
    sources: Sequence[SourceConfig],
    units: Sequence[Unit],
    identity: str,
    settings: FetchConfig,
    report: Report,
) -> None:
    """Fetch what the units' URLs lack into the store, and note what is known of them under `identity`.

    `identity` is the sources'. Does nothing where all of them are settled. Ray must be initialised.
    """
    note = _note(store, identity)
    if exists(note) and not read_json(note)["unsettled"]:
        return
    fingerprints: list[str] = []
    num_urls = unsettled = 0
    for group in _groups([unit for unit in units if unit.kind in TABLES]):
        urls = urls_of(group, sources)
        if urls:
            counts = fetch_urls(urls, store, settings, progress=report)
            num_urls += sum(counts.values())
            unsettled += sum(counts.get(str(reason), 0) for reason in MAY_PASS)
            fingerprints.append(FetchedStore(store).fingerprint(urls))
    fingerprint = content_hash(fingerprints) if num_urls else None
    write_json(note, {"urls": num_urls, "unsettled": unsettled, "fingerprint": fingerprint})


def may_have_urls(units: Sequence[Unit]) -> bool:
    """Whether any unit is of a kind whose images may be URLs."""
    return any(unit.kind in TABLES for unit in units)


def known_images(store: str, identity: str) -> str | None:
    """The fingerprint of what is known of the sources' URLs; None where they name none, or nothing was fetched yet."""
    note = _note(store, identity)
    found: str | None = read_json(note)["fingerprint"] if exists(note) else None
    return found


def urls_of(units: Sequence[Unit], sources: Sequence[SourceConfig]) -> list[str]:
    """The distinct URLs that the units' records name as images, sorted."""
    tables = read_records(units, sources).map_batches(_urls, batch_size=None, batch_format="pyarrow")
    found: set[str] = set()
    batch: Any
    for batch in tables.iter_batches(batch_size=None, batch_format="pyarrow"):
        found.update(batch["url"].to_pylist())
    return sorted(found)


def _urls(records: pa.Table) -> pa.Table:
    images = records["images"].combine_chunks().flatten()
    return pa.table({"url": pc.unique(images.filter(pc.match_substring_regex(images, SCHEMES)))})


def _groups(units: Sequence[Unit]) -> Iterator[list[Unit]]:
    group: list[Unit] = []
    size = 0
    for unit in units:
        group.append(unit)
        size += unit.records or RECORDS_AT_ONCE // 10
        if size >= RECORDS_AT_ONCE:
            yield group
            group, size = [], 0
    if group:
        yield group


def _note(store: str, identity: str) -> str:
    return join(store, "sources", f"{identity[:32]}.json")
