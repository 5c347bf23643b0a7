"""Datasets that a recipe names and that are not there are named by its keys."""

from __future__ import annotations

from pathlib import Path

import pytest

from mmflow.core.errors import MissingArtifactError, MisuseError
from mmflow.dataset.opened import Dataset
from mmflow.loading.config import LoaderConfig
from mmflow.loading.opening import open_readers


def mixed(*datasets: dict[str, str]) -> LoaderConfig:
    return LoaderConfig.model_validate({"mixture": {"datasets": datasets}})


def test_a_split_that_is_not_there_is_named_by_its_key(small_dataset: Dataset) -> None:
    with pytest.raises(MisuseError, match=r"^loader\.split: .* has no split 'trian'; there are dev, train$"):
        open_readers(LoaderConfig(split="trian"), small_dataset)
    here = {"uri": small_dataset.uri}
    with pytest.raises(MisuseError, match=r"^loader\.mixture\.datasets\.1\.split: .* has no split 'test'; there are"):
        open_readers(mixed(here, here | {"split": "test"}), small_dataset)


def test_a_mixed_dataset_that_is_not_there_is_named_by_its_key(small_dataset: Dataset, tmp_path: Path) -> None:
    with pytest.raises(MissingArtifactError, match=rf"^loader\.mixture\.datasets\.0\.uri: {tmp_path}/nowhere"):
        open_readers(mixed({"uri": str(tmp_path / "nowhere")}), small_dataset)
