"""Scores written by hand, for tests of what reads them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mmflow.core.artifacts import commit
from mmflow.core.storage import file_sha256
from mmflow.inference.result import vectors_of
from mmflow.models.package import Package

Columns = Mapping[str, Sequence[Any]]


def vectors(rows: Sequence[np.ndarray | None]) -> pa.Array:
    width = next(len(row) for row in rows if row is not None)
    missing = np.array([row is None for row in rows])
    return vectors_of(np.stack([np.zeros(width) if row is None else row for row in rows]), "float16", missing)


def write_scores(
    directory: Path, files: Sequence[tuple[str, str, Columns]], package: Package, datasets: Mapping[str, str]
) -> str:
    """Commit scores of (dataset, name, columns); those of several datasets are in folders."""
    entries = []
    for dataset, name, columns in files:
        folder = directory / "scores" / (f"dataset={dataset}" if len(datasets) > 1 else "")
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / f"{name}.parquet"
        pq.write_table(pa.table(dict(columns)), file)
        rows, sha256 = len(columns["key"]), file_sha256(str(file))
        entries.append({"dataset": dataset, "name": name, "rows": rows, "sha256": sha256})
    model = {"name": "tiny", "version": 2, "digest": package.digest, "package": package.uri}
    named = [{"name": name, "uri": uri} for name, uri in datasets.items()]
    commit(str(directory), "scores", {"fingerprint": "0", "model": model, "datasets": named, "files": entries})
    return str(directory)
