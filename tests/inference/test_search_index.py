"""An index finds nearly all that an exact search finds, and a dataset that has grown costs only its new shards."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from mmflow.core.errors import CorruptArtifactError, MisuseError
from mmflow.inference import search_index
from mmflow.inference.scores import Scores, open_scores
from mmflow.inference.search import search
from mmflow.inference.search_index import open_index
from mmflow.models.package import Package
from tests.inference.scored import vectors, write_scores

WIDTH, FILE_ROWS = 32, 1000
PACKAGE = Package("package", {"digest": "d" * 64})


def quiet(done: int, total: int, what: str) -> None:
    pass


def unit(rows: np.ndarray) -> np.ndarray:
    return (rows / np.linalg.norm(rows, axis=-1, keepdims=True)).astype(np.float32)


def clustered(num_rows: int) -> np.ndarray:
    """Unit vectors around 60 centres."""
    random = np.random.default_rng(0)
    centres = unit(random.standard_normal((60, WIDTH)))
    return unit(centres[random.integers(0, 60, num_rows)] + 0.8 * unit(random.standard_normal((num_rows, WIDTH))))


ROWS = clustered(8 * FILE_ROWS)


def scores_of(directory: Path, num_files: int) -> Scores:
    """Of the first rows; every tenth row has no embedding."""
    files = []
    for number in range(num_files):
        rows = range(number * FILE_ROWS, (number + 1) * FILE_ROWS)
        embeddings = vectors([None if row % 10 == 0 else ROWS[row] for row in rows])
        columns = {"key": [f"{row}" for row in rows], "image_embedding": embeddings}
        files.append(("squares", f"{number:05d}", columns))
    return open_scores(write_scores(directory, files, PACKAGE, {"squares": "dataset"}))


@pytest.fixture(scope="module")
def scores(tmp_path_factory: pytest.TempPathFactory) -> Scores:
    return scores_of(tmp_path_factory.mktemp("index") / "scores", 6)


@pytest.fixture(scope="module")
def built(scores: Scores, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A built index. Tests that change it work on a copy."""
    directory = tmp_path_factory.mktemp("index") / "index"
    open_index(str(directory), scores, "pictures", WIDTH, quiet)
    return directory


def queries(count: int) -> np.ndarray:
    random = np.random.default_rng(1)
    return unit(ROWS[random.integers(0, 6 * FILE_ROWS, count)] + 0.4 * unit(random.standard_normal((count, WIDTH))))


def recall(directory: Path, scores: Scores) -> float:
    """The share of the exact top 10 that the index finds."""
    index = open_index(str(directory), scores, "pictures", WIDTH, quiet)
    found = 0
    for query_W in queries(30):
        exact, near = search(scores, "pictures", query_W, 10, quiet), index.search(query_W, 10)
        found += len(set(exact.positions_K) & set(near.positions_K))
        shared = np.isin(near.positions_K, exact.positions_K)
        np.testing.assert_array_equal(near.scores_K[shared][0], exact.scores_K[0])
    return found / 300


def test_an_index_finds_95_percent_of_the_exact_top_10_in_an_eighth_of_the_lists(built: Path, scores: Scores) -> None:
    assert recall(built, scores) >= 0.95
    index = open_index(str(built), scores, "pictures", WIDTH, quiet)
    assert len(index.quantizer_LW) == 64
    assert len(index.vectors_NW) == 0.9 * scores.rows


def test_more_lists_are_searched_for_more_rows_than_an_eighth_holds(built: Path, scores: Scores) -> None:
    index = open_index(str(built), scores, "pictures", WIDTH, quiet)
    best = index.search(queries(1)[0], scores.rows)
    exact = search(scores, "pictures", queries(1)[0], scores.rows, quiet)
    assert best.positions_K.tolist() == exact.positions_K.tolist()


def test_scores_of_a_grown_dataset_compare_only_their_new_files(built: Path, scores: Scores, tmp_path: Path) -> None:
    directory = tmp_path / "index"
    shutil.copytree(built, directory)
    before = {path: path.stat().st_mtime_ns for path in directory.rglob("*.npy")}
    grown = scores_of(tmp_path / "scores", 8)
    assert recall(directory, grown) >= 0.95
    kept = {path for path, time in before.items() if path.exists() and path.stat().st_mtime_ns == time}
    assert {path.name for path in kept} == {"quantizer.npy", *(f"{file.sha256}.npy" for file in scores.files)}
    new = {path.name for path in directory.rglob("*.npy")} - {path.name for path in kept}
    assert new == {"vectors.npy", "positions.npy", "starts.npy", *(f"{file.sha256}.npy" for file in grown.files[6:])}
    assert len(list(directory.rglob("vectors.npy"))) == 1


@pytest.mark.parametrize("name", ["quantizer.npy", "vectors.npy", "positions.npy", "starts.npy"])
@pytest.mark.parametrize("damage", ["gone", "cut", "pickled"])
def test_a_damaged_index_is_built_again(
    built: Path, scores: Scores, tmp_path: Path, name: str, damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tmp_path / "index"
    shutil.copytree(built, directory)
    file = next(directory.rglob(name))
    if damage == "gone":
        file.unlink()
    elif damage == "cut":
        file.write_bytes(file.read_bytes()[:-100])
    else:
        np.save(file, np.array([print, None], dtype=object), allow_pickle=True)
    monkeypatch.setattr(search_index, "ITERATIONS", 3)
    assert recall(directory, scores) >= 0.9


def test_a_file_that_changed_since_it_was_scored_is_named(tmp_path: Path) -> None:
    scores = scores_of(tmp_path / "scores", 2)
    shutil.copy(scores.files[0].uri, scores.files[1].uri)
    with pytest.raises(CorruptArtifactError, match=r"00001\.parquet: changed since it was committed"):
        open_index(str(tmp_path / "index"), scores, "pictures", WIDTH, quiet)


def test_what_cannot_be_indexed_is_named(scores: Scores, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MisuseError, match="name a directory on this machine"):
        open_index("s3://bucket/index", scores, "pictures", WIDTH, quiet)
    files = [("squares", "00000", {"key": ["0", "1"], "image_embedding": vectors([ROWS[1], None])})]
    few = open_scores(write_scores(tmp_path / "few", files, PACKAGE, {"squares": "dataset"}))
    with pytest.raises(MisuseError, match="1 embeddings are too few for an index"):
        open_index(str(tmp_path / "index"), few, "pictures", WIDTH, quiet)
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(MisuseError, match=r"pip install 'mmflow\[search\]'"):
        open_index(str(tmp_path / "index"), scores, "pictures", WIDTH, quiet)
