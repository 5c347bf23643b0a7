"""Tiny models' scores of handmade datasets, committed without Ray or a registry."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmflow.core.artifacts import BUILD, Artifact, commit
from mmflow.core.storage import join, write_json
from mmflow.dataset.opened import Dataset
from mmflow.inference.config import ScoreConfig, TasksConfig
from mmflow.inference.runner import Model
from mmflow.inference.score import Scored, score


def write_scores(
    uri: Path,
    package: str,
    datasets: Sequence[Dataset],
    tasks: Mapping[str, Any],
    store: Path | None = None,
    batch_size: int = 4,
) -> Artifact:
    """The scores of whole datasets, named after their folders. Results are kept in `store`, or beside."""
    model = Model(package=package)
    named = tuple((Path(dataset.uri).name, dataset.uri) for dataset in datasets)
    scored = Scored(model=model, datasets=named, tasks=TasksConfig.model_validate(tasks), splits=None)
    settings = ScoreConfig(batch_size=batch_size, max_errors=1)
    fields = score(str(uri), str(store or uri / "results"), scored, settings, lambda done, total, note: None)
    write_json(join(str(uri), BUILD), {"started": 0.0, "seconds": 0.5, "peak_memory_bytes": 1 << 20})
    named_model = {"name": None, "version": None, "digest": model.digest, "package": package}
    return commit(str(uri), "scores", {"model": named_model, **fields})
