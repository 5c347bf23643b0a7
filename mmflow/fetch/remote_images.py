"""The images of a recipe's sources that are URLs: fetched before the dataset is built, and what is known of them.

Fetching goes first and apart, because it may go on for days and learn more each night: what is known of a recipe's
URLs is an input of its dataset, as the files of its sources are, and the dataset is built anew when it changed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from mmflow.core.artifacts import content_hash
from mmflow.core.progress import Report
from mmflow.core.storage import exists, join, read_json, write_json
from mmflow.fetch.config import FetchConfig
from mmflow.fetch.fetched import FetchedStore
from mmflow.fetch.job import fetch_urls
from mmflow.sources.config import SourceConfig
from mmflow.sources.reasons import Reason
from mmflow.sources.records import Unit, rows_of_chunks
from mmflow.sources.sources import KINDS, PREPARE_CPUS, read_chunks, read_unit

SCHEMES = "^https?://"
RECORDS_AT_ONCE = 2_000_000  # URLs in this process's memory: 200 MB
RECORDS_READ_HERE = 20_000  # in 3 s, which is what a Ray Data job costs before it has read one
MAY_PASS = (Reason.fetch_pending, Reason.fetch_failed)


def fetch_images(
    store: str,
    sources: Sequence[SourceConfig],
    units: Sequence[Unit],
    identity: str,
    settings: FetchConfig,
    report: Report,
) -> None:
    """Fetch what the units' URLs lack into the store, and note what is known of them under `identity`, the sources'.

    Ray must be initialised.
    """
    fingerprints: list[str] = []
    num_urls = unsettled = too_large = 0
    for group in _groups([unit for unit in units if _may_have_urls(unit, sources[unit.source])]):
        urls = urls_of(group, sources)
        if urls:
            counts = fetch_urls(urls, store, settings, progress=report, refresh=settings.refresh)
            num_urls += sum(counts.values())
            unsettled += sum(counts.get(str(reason), 0) for reason in MAY_PASS)
            too_large += counts.get(str(Reason.fetch_too_large), 0)
            fingerprints.append(FetchedStore(store).fingerprint(urls))
    fingerprint = content_hash(fingerprints) if num_urls else None
    found = {"urls": num_urls, "unsettled": unsettled, "too_large": too_large, "max_bytes": settings.max_bytes}
    write_json(_note(store, identity), {**found, "fingerprint": fingerprint})


def is_settled(store: str, identity: str, settings: FetchConfig) -> bool:
    """Whether fetching would learn nothing: all URLs were answered for good, and no `refresh` asks them again.

    A body that was too large is settled as long as the bound is not raised.
    """
    note = _note(store, identity)
    if settings.refresh or not exists(note):
        return False
    found = read_json(note)
    raised = settings.max_bytes > found.get("max_bytes", 0)  # a note of before bounds were noted does not say
    return not found["unsettled"] and not (raised and found.get("too_large", 1))


def may_have_urls(units: Sequence[Unit]) -> bool:
    """Whether any unit is of a kind whose images may be URLs."""
    return any(KINDS[unit.kind].may_name_urls for unit in units)


def _may_have_urls(unit: Unit, source: SourceConfig) -> bool:
    kind = KINDS[unit.kind]
    return kind.may_name_urls and not kind.holds_bodies(unit, source.fields)


def known_images(store: str, identity: str) -> str | None:
    """The fingerprint of what is known of the sources' URLs; None where they name none, or nothing was fetched yet."""
    note = _note(store, identity)
    found: str | None = read_json(note)["fingerprint"] if exists(note) else None
    return found


def urls_of(units: Sequence[Unit], sources: Sequence[SourceConfig]) -> list[str]:
    """The distinct URLs that the units' records name as images, sorted."""
    found: set[str] = set()
    if sum(RECORDS_AT_ONCE if unit.records is None else unit.records for unit in units) <= RECORDS_READ_HERE:
        for unit in units:
            for records in read_unit(unit, sources[unit.source]):
                found.update(_urls(records).to_pylist())
        return sorted(found)
    tables = read_chunks(units, sources).map_batches(
        _urls_of_chunks, batch_size=None, batch_format="pyarrow", zero_copy_batch=True, num_cpus=PREPARE_CPUS
    )
    batch: Any
    for batch in tables.iter_batches(batch_size=None, batch_format="pyarrow"):
        found.update(*batch["urls"].to_pylist())
    return sorted(found)


def _urls(records: pa.Table) -> pa.Array:
    images = records["images"].combine_chunks().flatten()
    return pc.unique(images.filter(pc.match_substring_regex(images, SCHEMES)))


def _urls_of_chunks(chunks: pa.Table) -> pa.Table:
    urls = _urls(rows_of_chunks(chunks))
    return pa.table({"urls": pa.LargeListArray.from_arrays([0, len(urls)], urls)})


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
