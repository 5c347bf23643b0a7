"""The nearest samples of another scored dataset, against a comparison of all pairs."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from mmflow.core.artifacts import Artifact
from mmflow.core.errors import MisuseError, MmflowError
from mmflow.dataset.opened import Dataset
from mmflow.inference.mapped import mapped
from mmflow.inference.result import embeddings_of
from mmflow.inference.scores import open_scores
from mmflow.inference.tasks.neighbours import Neighbours
from mmflow.models.package import Package, read_package
from tests.dataset.handmade import Handmade, flip_bit, write_dataset
from tests.evaluation.models import captioner_config, dual_config, loaded_model, written_package
from tests.inference.scoring import write_scores

PLACE = ("neighbour_keys", "neighbour_datasets", "neighbour_shards", "neighbour_rows")


def samples(prefix: str, numbers: Sequence[int]) -> list[Handmade]:
    """Every third without a caption; their pictures depend on the number and not on the prefix."""
    return [
        Handmade(
            key=f"{prefix}{number}",
            captions=[{"language": "en", "text": "a red square"[: 5 + number]}] if number % 3 else [],
            size=(24 + number, 32),
        )
        for number in numbers
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("neighbours")


@pytest.fixture(scope="module")
def package(folder: Path) -> Package:
    return written_package(folder / "package", loaded_model(dual_config()))


@pytest.fixture(scope="module")
def datasets(folder: Path) -> list[Dataset]:
    """Three datasets: what is searched for, and two that are searched. The second has a damaged row."""
    made = [
        write_dataset(folder / "own", [("train", samples("own-", range(7)))]),
        write_dataset(folder / "one", [("train", samples("one-", range(9))), ("dev", samples("dev-", range(9, 14)))]),
        write_dataset(folder / "two", [("train", samples("two-", range(20, 23)))]),
    ]
    flip_bit(folder / "one/shards/00000.tar", 700)
    return made


@pytest.fixture(scope="module")
def others(folder: Path, package: Package, datasets: list[Dataset]) -> Artifact:
    return write_scores(folder / "others", package.uri, datasets[1:], {"embed": {}})


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the node's copies, fresh for each test."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path


def expected(own: np.ndarray[Any, Any], others: Artifact, column: str, top: int) -> list[dict[str, Any]]:
    """For each row of unit vectors: places and cosines of the nearest rows, by a sort of all."""
    places, theirs = [], []
    for entry in others.manifest["files"]:
        table = pq.read_table(
            f"{others.uri}/scores/dataset={entry['dataset']}/{entry['name']}.parquet", partitioning=None
        )
        for row, vector in zip(table.to_pylist(), table[column].to_pylist(), strict=True):
            if vector[0] is not None:
                places.append((row["key"], entry["dataset"], row["shard"], row["row"]))
                theirs.append(vector)
    cosines = own @ np.array(theirs, np.float32).T
    order = np.argsort(-cosines, axis=1, kind="stable")[:, :top]
    return [
        dict(zip(PLACE, zip(*(places[place] for place in best), strict=True), strict=True)) | {"cosines": row[best]}
        for best, row in zip(order, cosines, strict=True)
    ]


@pytest.mark.parametrize(("of", "column"), [("pictures", "image_embedding"), ("captions", "caption_embedding")])
@pytest.mark.parametrize("top", [3, 100])
@pytest.mark.parametrize("stored", [True, False])
def test_neighbours_are_those_of_all_pairs(
    tmp_path: Path,
    package: Package,
    datasets: list[Dataset],
    others: Artifact,
    of: str,
    column: str,
    top: int,
    stored: bool,
) -> None:
    store = tmp_path / "results"
    embedded = write_scores(tmp_path / "embedded", package.uri, datasets[:1], {"embed": {}}, store if stored else None)
    tasks = {"neighbours": {"scores": others.uri, "of": of, "top": top}}
    scores = write_scores(tmp_path / "scores", package.uri, datasets[:1], tasks, store)
    own = embeddings_of(pq.read_table(f"{embedded.uri}/scores/00000.parquet")["image_embedding"])
    table = pq.read_table(f"{scores.uri}/scores/00000.parquet")
    wanted = expected(own / np.linalg.norm(own, axis=1, keepdims=True), others, column, top)
    for row, best in zip(table.to_pylist(), wanted, strict=True):
        assert {name: tuple(row[name]) for name in PLACE} == {name: best[name] for name in PLACE}
        np.testing.assert_allclose(row["neighbour_similarity"], best["cosines"], atol=1e-6)
    if of == "pictures":
        assert "one-0" not in {key for keys in table["neighbour_keys"].to_pylist() for key in keys}  # the damaged row
        assert len(table["neighbour_keys"][0]) == min(top, 16)


def test_vectors_that_were_cut_are_compared_with_the_same_part_of_a_picture(
    tmp_path: Path, package: Package, datasets: list[Dataset]
) -> None:
    others = write_scores(tmp_path / "others", package.uri, datasets[1:], {"embed": {"width": 3, "dtype": "float32"}})
    own = write_scores(tmp_path / "own", package.uri, datasets[:1], {"embed": {}, "neighbours": {"scores": others.uri}})
    table = pq.read_table(f"{own.uri}/scores/00000.parquet")
    cut = embeddings_of(table["image_embedding"])[:, :3]
    wanted = expected(cut / np.linalg.norm(cut, axis=1, keepdims=True), others, "image_embedding", 5)
    np.testing.assert_allclose(
        table["neighbour_similarity"].to_pylist(), [best["cosines"] for best in wanted], atol=2e-3
    )


def test_where_the_scores_lie_does_not_matter_and_what_they_are_does(
    tmp_path: Path, package: Package, datasets: list[Dataset], others: Artifact
) -> None:
    moved = write_scores(tmp_path / "moved", package.uri, datasets[1:], {"embed": {}})
    other = write_scores(tmp_path / "other", package.uri, datasets[:1], {"embed": {}})
    first, same, different = (Neighbours(scores=artifact.uri).settings for artifact in (others, moved, other))
    assert first == same
    assert first != different


def test_scores_of_another_model_or_without_embeddings_are_refused(
    tmp_path: Path, package: Package, datasets: list[Dataset], others: Artifact
) -> None:
    Neighbours(scores=others.uri).check(package.digest)
    with pytest.raises(MisuseError, match=f"by model {package.digest[:12]}, not by this one"):
        Neighbours(scores=others.uri).check("0" * 64)
    captioner = written_package(tmp_path / "captioner", loaded_model(captioner_config()))
    written = write_scores(tmp_path / "written", captioner.uri, datasets[:1], {"caption": {}})
    with pytest.raises(MisuseError, match="no column image_embedding; score the dataset with task embed"):
        Neighbours(scores=written.uri).check(read_package(captioner.uri).digest)


def test_all_of_a_node_share_one_copy_and_the_next_scores_take_its_place(
    temporary: Path, package: Package, datasets: list[Dataset], others: Artifact
) -> None:
    opened = open_scores(others.uri)
    with ThreadPoolExecutor(2) as pool:  # the locks of two threads are as those of two processes
        first, second = pool.map(lambda _: mapped(opened, "pictures"), range(2))
    assert os.path.samestat(os.fstat(first.held.fileno()), os.fstat(second.held.fileno()))
    captions = mapped(opened, "captions")
    first.held.close()
    second.held.close()
    other = write_scores(temporary / "other", package.uri, datasets[:1], {"embed": {}})
    mapped(open_scores(other.uri), "pictures")
    kept = {path.name for path in temporary.glob("*/*.arrow")}
    assert kept == {f"{others.fingerprint[:32]}-captions.arrow", f"{other.fingerprint[:32]}-pictures.arrow"}
    assert captions.rows.num_rows == 11


def test_a_full_disk_says_where_room_is_needed(
    small_disk: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, others: Artifact
) -> None:
    disk = small_disk("16k")
    monkeypatch.setattr("tempfile.tempdir", str(disk))
    (disk / "full").write_bytes(bytes(1 << 14))
    with pytest.raises(MmflowError, match=r"No space left on device; .* set TMPDIR to a folder with room for"):
        mapped(open_scores(others.uri), "pictures")
    assert not list(disk.glob("*/part"))
