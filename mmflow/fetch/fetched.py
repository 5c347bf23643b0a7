"""What was fetched, for its readers: the bytes of a URL, or the reason why there are none, by what is known last."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from mmflow.core.errors import CorruptArtifactError
from mmflow.core.storage import filesystem, join
from mmflow.fetch.client import Validators
from mmflow.fetch.known import KNOWN, Keys, list_tables, url_hashes, xxh3
from mmflow.sources.reasons import Reason, Rejected

OK = "ok"
OPEN_PACKS = 32  # file handles kept by a reader

Rows = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Entry:
    """Where a URL's body lies."""

    pack: str
    offset: int
    size: int  # bytes
    xxh3: bytes


class FetchedStore:
    """A reader of what was known when it was opened; about 80 bytes of memory a URL. Picklable: it opens again."""

    def __init__(self, uri: str, *, validators: bool = False) -> None:
        self.uri = uri
        self._with_validators = validators
        self._packs: OrderedDict[str, Any] = OrderedDict()
        table = _newest(read_known(uri, validators=validators))
        # Apart, because searching a column of a wider array copies all of it each time.
        self._high, self._low = (np.ascontiguousarray(half) for half in _keys_of(table["url_hash"]).T)
        self._xxh3 = _keys_of(table["xxh3"])
        self._offset: Rows = table["offset"].to_numpy()
        self._bytes: Rows = table["bytes"].to_numpy()
        self._pack = table["pack"].combine_chunks().dictionary_encode()
        self._detail = table["detail"].combine_chunks().dictionary_encode()
        reason = table["reason"].fill_null(OK).combine_chunks().dictionary_encode()
        self._verdicts: list[str] = [*reason.dictionary.to_pylist(), str(Reason.fetch_pending)]
        # One more, so that row -1, which stands for an unknown URL, reads as pending.
        self._verdict: Rows = np.append(reason.indices.to_numpy(), len(self._verdicts) - 1).astype(np.int64)
        self._etag = table["etag"] if validators else None
        self._last_modified = table["last_modified"] if validators else None

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, (self.uri, self._with_validators)

    def __len__(self) -> int:
        return len(self._high)

    def load(self, url: str) -> bytes:
        """The bytes of a URL. Raises Rejected with fetch_pending for an unknown URL, else with what is known of it.

        Raises CorruptArtifactError where the bytes are no longer those that were fetched.
        """
        entry = self.entry(url)
        name = join(self.uri, "packs", entry.pack)
        try:
            body = bytes(self._open(name).read_at(entry.size, entry.offset))
        except FileNotFoundError:
            body = b""
        if len(body) != entry.size or xxh3(body) != entry.xxh3:
            table = entry.pack.replace(".pack", ".parquet")
            raise CorruptArtifactError(
                f"{name}: {entry.size} bytes at {entry.offset} are damaged; delete it and known/{table}, fetch again"
            )
        return body

    def entry(self, url: str) -> Entry:
        """Where the body lies. Raises Rejected where there is none."""
        row = int(self._find(url_hashes([url]))[0])
        if row < 0:
            raise Rejected(Reason.fetch_pending, "not fetched yet")
        verdict = self._verdicts[int(self._verdict[row])]
        if verdict != OK:
            raise Rejected(Reason(verdict), self._detail[row].as_py() or "")
        offset, size = int(self._offset[row]), int(self._bytes[row])
        return Entry(self._pack[row].as_py(), offset, size, self._xxh3[row].tobytes())

    def verdict(self, url: str) -> str:
        """`ok`, or the reason why there are no bytes; fetch_pending for an unknown URL."""
        return self._verdicts[int(self._verdict[self._find(url_hashes([url]))[0]])]

    def validators(self, url: str) -> Validators | None:
        """For a conditional request, where the URL's bytes are here. The store must be opened with `validators`."""
        if self._etag is None or self._last_modified is None or self.verdict(url) != OK:
            return None
        row = int(self._find(url_hashes([url]))[0])
        return Validators(self._etag[row].as_py(), self._last_modified[row].as_py())

    def counts(self, urls: Sequence[str]) -> dict[str, int]:
        """How many distinct URLs have each verdict, `ok` among them."""
        found = self._verdict[self._find(_unique(url_hashes(urls)))]
        counts = Counter({self._verdicts[code]: int(number) for code, number in enumerate(np.bincount(found))})
        return {verdict: number for verdict, number in sorted(counts.items()) if number}

    def pending(self, urls: Sequence[str], *, max_bytes: int) -> list[str]:
        """Those of which a fetch may learn something new: unknown, failed for now, or too large for a lower bound."""
        rows = self._find(url_hashes(urls))
        verdicts = self._verdict[rows]
        wanted = np.isin(verdicts, self._codes(Reason.fetch_pending, Reason.fetch_failed))
        wanted |= np.isin(verdicts, self._codes(Reason.fetch_too_large)) & (np.append(self._bytes, 0)[rows] < max_bytes)
        return [urls[index] for index in np.flatnonzero(wanted).tolist()]

    def fingerprint(self, urls: Iterable[str]) -> str:
        """sha256 (hex) over (URL, verdict, xxh3 of the body), whatever their order: what a dataset of them rests on."""
        keys = _unique(url_hashes(urls))
        rows = self._find(keys)
        verdicts = url_hashes(self._verdicts)
        digest = sha256(keys.tobytes())
        digest.update(verdicts[self._verdict[rows]].tobytes())
        digest.update(np.append(self._xxh3, np.zeros((1, 2), np.uint64), axis=0)[rows].tobytes())
        return digest.hexdigest()

    def _codes(self, *verdicts: str) -> list[int]:
        return [code for code, verdict in enumerate(self._verdicts) if verdict in verdicts]

    def _find(self, keys: Keys) -> Rows:
        """The row of each key, -1 where there is none, (keys,)."""
        rows = np.full(len(keys), -1, dtype=np.int64)
        at = np.searchsorted(self._high, keys[:, 0]).astype(np.int64)
        left = np.arange(len(keys))
        while len(left):  # once, but for keys whose first halves are the same
            left = left[at[left] < len(self._high)]
            left = left[self._high[at[left]] == keys[left, 0]]
            found = self._low[at[left]] == keys[left, 1]
            rows[left[found]] = at[left[found]]
            left = left[~found]
            at[left] += 1
        return rows

    def _open(self, name: str) -> Any:
        handle = self._packs.get(name)
        if handle is None:
            system, path = filesystem(name)
            handle = self._packs[name] = system.open_input_file(path)
            if len(self._packs) > OPEN_PACKS:
                self._packs.popitem(last=False)
        self._packs.move_to_end(name)
        return handle


def read_known(uri: str, *, validators: bool = False) -> pa.Table:
    """All rows of all tables, without the URLs themselves; the validators where asked for."""
    import pyarrow.dataset

    left_out = {"url", "status"} | (set() if validators else {"etag", "last_modified"})
    columns = [name for name in KNOWN.names if name not in left_out]
    system, files = list_tables(uri)
    if not files:
        return KNOWN.empty_table().select(columns)
    return pyarrow.dataset.dataset(files, KNOWN, format="parquet", filesystem=system).to_table(columns=columns)


def _newest(table: pa.Table) -> pa.Table:
    """One row a URL, in the order of their keys."""
    keys = _keys_of(table["url_hash"])
    order = np.lexsort((table["time"].to_numpy(), table["run"].to_numpy(), keys[:, 1], keys[:, 0]))
    return table.take(pa.array(order[_last_of_each(keys[order])]))


def _unique(keys: Keys) -> Keys:
    ordered: Keys = keys[np.lexsort((keys[:, 1], keys[:, 0]))]
    return ordered[_last_of_each(ordered)]


def _last_of_each(ordered: Keys) -> npt.NDArray[np.bool_]:
    return np.append((ordered[1:] != ordered[:-1]).any(axis=1), True)[: len(ordered)]


def _keys_of(column: pa.ChunkedArray) -> Keys:
    """A column of hashes as integers, (rows, 2)."""
    array = column.combine_chunks()
    if not len(array):
        return np.empty((0, 2), dtype=np.uint64)
    return np.frombuffer(array.buffers()[1], "<u8", 2 * len(array), 16 * array.offset).reshape(-1, 2)


def _reopen(uri: str, validators: bool) -> FetchedStore:
    return FetchedStore(uri, validators=validators)
