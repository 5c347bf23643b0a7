"""The lines of a corpus that a writer makes: there whole, or not at all."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

RECORDS = "records.jsonl"


@contextmanager
def record_lines(directory: Path) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """What writes a line of `directory/records.jsonl`, which appears when the block has ended well: a directory with it
    is a complete corpus."""
    staged = directory / f"{RECORDS}.staged"
    with staged.open("w", encoding="utf-8") as lines:
        yield lambda record: print(json.dumps(record, ensure_ascii=False, sort_keys=True), file=lines)
    staged.replace(directory / RECORDS)
