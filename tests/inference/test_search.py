"""A search finds the rows that a plain comparison of all embeddings finds, says where they are, and names what is
wrong in one line."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from typer.exceptions import TyperException

from mmflow.cli.main import app
from mmflow.core.errors import CorruptArtifactError, MissingArtifactError, MisuseError, MmflowError
from mmflow.dataset.opened import Dataset
from mmflow.dataset.reader import Reader
from mmflow.inference import scores as scores_module
from mmflow.inference import search_index
from mmflow.inference.predict import Predictor
from mmflow.inference.scores import Side, open_scores
from mmflow.inference.search import best_rows, embed_query, read_query
from mmflow.models.package import Package
from tests.dataset.handmade import Handmade, write_dataset
from tests.evaluation.models import captioner_config, dual_config, loaded_model, written_package
from tests.inference.scored import vectors, write_scores

SIDES: tuple[Side, ...] = ("pictures", "captions")
SPLITS = ("train", "train", "held_out")  # of three shards of `SHARD_ROWS`
SHARD_ROWS = 5
DAMAGED, WITHOUT_CAPTION = 7, 3  # rows of the scores: one that could not be read, one that has no caption
MODEL = loaded_model(dual_config(), seed=4)
QUERY = "a red square"


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """15 pictures of noise in three shards."""
    samples = [
        Handmade(key=f"key-{row}", captions=[{"language": "en", "text": f"square {row}"}], size=(24, 20))
        for row in range(3 * SHARD_ROWS)
    ]
    starts = range(0, len(samples), SHARD_ROWS)
    shards = [(split, samples[at : at + SHARD_ROWS]) for split, at in zip(SPLITS, starts, strict=True)]
    return write_dataset(tmp_path_factory.mktemp("search") / "dataset", shards)


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Package:
    return written_package(tmp_path_factory.mktemp("search") / "package", MODEL)


@pytest.fixture(scope="module")
def embeddings(dataset: Dataset) -> dict[Side, list[np.ndarray | None]]:
    """Those of every row, as the scores have them."""
    samples = [sample for split in ("train", "held_out") for sample in Reader(dataset, split)]
    predictor = Predictor(MODEL, 4)
    made: dict[Side, list[np.ndarray | None]] = {
        "pictures": list(predictor.embed_pictures(samples)),
        "captions": list(predictor.embed_texts([sample.captions[0].text for sample in samples])),
    }
    for side in SIDES:
        made[side][DAMAGED] = None
    made["captions"][WITHOUT_CAPTION] = None
    return made


@pytest.fixture(scope="module")
def scores(
    dataset: Dataset,
    package: Package,
    embeddings: dict[Side, list[np.ndarray | None]],
    tmp_path_factory: pytest.TempPathFactory,
) -> str:
    files = []
    for shard, split in enumerate(SPLITS):
        rows = range(shard * SHARD_ROWS, (shard + 1) * SHARD_ROWS)
        columns = {
            "key": [f"key-{row}" for row in rows],
            "split": [split] * SHARD_ROWS,
            "shard": [f"{shard:05d}"] * SHARD_ROWS,
            "row": list(range(SHARD_ROWS)),
            "image_embedding": vectors([embeddings["pictures"][row] for row in rows]),
            "caption_embedding": vectors([embeddings["captions"][row] for row in rows]),
        }
        files.append(("squares", f"{shard:05d}", columns))
    directory = tmp_path_factory.mktemp("search") / "scores"
    return write_scores(directory, files, package, {"squares": dataset.uri})


def output(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What `mmflow search …` prints."""
    app(["search", *arguments], standalone_mode=False)
    return capsys.readouterr().out


def found(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = json.loads(output(capsys, *arguments, "--json"))["found"]
    return entries


# --- exact search -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", SIDES)
def test_rows_come_in_the_order_of_a_plain_comparison(
    scores: str,
    side: Side,
    embeddings: dict[Side, list[np.ndarray | None]],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(scores_module, "BLOCK_ROWS", 2)
    query_W = Predictor(MODEL, 1).embed_texts([QUERY])[0]
    similar = {row: float(made @ query_W) for row, made in enumerate(embeddings[side]) if made is not None}
    expected = sorted(similar, key=lambda row: -similar[row])
    hits = found(capsys, scores, QUERY, "--in", side, "--top", "20")
    assert [hit["key"] for hit in hits] == [f"key-{row}" for row in expected]
    np.testing.assert_allclose([hit["score"] for hit in hits], [similar[row] for row in expected], atol=2e-3)
    assert found(capsys, scores, QUERY, "--in", side, "--top", "3") == hits[:3]
    row = expected[0]
    assert hits[0] == hits[0] | {
        "rank": 1,
        "dataset": "squares",
        "split": SPLITS[row // SHARD_ROWS],
        "shard": f"{row // SHARD_ROWS:05d}",
        "row": row % SHARD_ROWS,
        "captions": [f"square {row}"],
    }


@pytest.mark.parametrize("format", ["PNG", "GIF", "TIFF", "JPEG"])
def test_a_picture_in_any_format_finds_itself(
    scores: str, dataset: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str], format: str
) -> None:
    stored = Reader(dataset, "held_out").read(0, 2).image
    file = tmp_path / "no-extension"
    if format == "JPEG":
        file.write_bytes(stored)
    else:
        Image.open(io.BytesIO(stored)).save(file, format)
    first, second = found(capsys, scores, str(file), "--top", "2")
    assert first["key"] == "key-12"
    assert first["score"] == pytest.approx(1, abs=2e-3 if format != "GIF" else 0.05)
    assert first["score"] > second["score"]


@pytest.mark.parametrize("seed", range(20))
def test_the_first_of_equal_rows_comes_first_whatever_the_blocks(seed: int) -> None:
    random = np.random.default_rng(seed)
    rows = random.standard_normal((4, 24)).astype(np.float16)[random.integers(0, 4, 200)]
    rows[random.integers(0, 200, 3)] = np.nan
    query_W = random.standard_normal(24).astype(np.float32)
    blocks = np.split(np.arange(200), np.sort(random.integers(1, 200, 5)))
    top = int(random.integers(1, 220))
    best = best_rows(((block, rows[block]) for block in blocks if len(block)), query_W, top)
    similar = rows.astype(np.float64) @ query_W
    expected = np.argsort(-similar.round(9), kind="stable")
    assert best.positions_K.tolist() == expected[np.isfinite(similar[expected])][:top].tolist()
    np.testing.assert_allclose(best.scores_K, similar[best.positions_K], rtol=1e-5, atol=1e-6)


def test_several_datasets_are_searched_and_named(
    dataset: Dataset, package: Package, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = np.eye(8, dtype=np.float32)
    columns = {"key": ["key-0"], "split": ["train"], "shard": ["00000"], "row": [0]}
    files = [(name, "00000", {**columns, "image_embedding": vectors([rows[at]])}) for at, name in enumerate("ab")]
    uri = write_scores(tmp_path / "workspace" / "score" / "1", files, package, {"a": dataset.uri, "b": "nowhere"})
    (tmp_path / "workspace" / "score" / "latest.json").write_text(json.dumps({"uri": uri}))
    app(["search", str(tmp_path / "workspace"), QUERY], standalone_mode=False)
    printed = capsys.readouterr()
    head, *lines = [line.split("\t") for line in printed.out.splitlines()]
    assert head == ["rank", "score", "dataset", "split", "key", "caption"]
    assert sorted(line[2:] for line in lines) == [
        ["a", "train", "key-0", "square 0"],
        ["b", "train", "key-0", "-"],
    ]
    assert len(printed.err.splitlines()) == 1
    assert "nowhere: no manifest.json" in printed.err


def test_a_query_is_cut_to_the_width_of_the_scores(scores: str) -> None:
    opened, query = open_scores(scores), read_query(QUERY)
    whole_W, cut_W = embed_query(opened, query, 8), embed_query(opened, query, 5)
    np.testing.assert_allclose(cut_W, whole_W[:5] / np.linalg.norm(whole_W[:5]), rtol=1e-5)


def test_rows_that_are_no_longer_where_they_were_are_shown_without_captions(
    dataset: Dataset, package: Package, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    columns = {"key": ["key-0", "key-9"], "split": ["train"] * 2, "shard": ["00000"] * 2, "row": [0, 900]}
    columns["key"][0] = "other"
    files = [("squares", "00000", {**columns, "image_embedding": vectors(list(np.eye(8, dtype=np.float32)[:2]))})]
    uri = write_scores(tmp_path / "scores", files, package, {"squares": dataset.uri})
    app(["search", uri, QUERY], standalone_mode=False)
    printed = capsys.readouterr()
    assert [line.rsplit("\t", 1)[1] for line in printed.out.splitlines()] == ["caption", "-", "-"]
    assert "other is no longer row 0 of shard 00000" in printed.err


def test_the_time_of_an_exact_search_of_many_rows_is_told(
    scores: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search_index, "WORTHWHILE_ROWS", 10)
    index = ("--index", str(tmp_path / "index"), "--top", "4")
    app(["search", scores, QUERY, "--top", "4"], standalone_mode=False)
    told = capsys.readouterr()
    assert told.err.startswith("compared 15 rows in 0 s; --index DIRECTORY")
    app(["search", scores, QUERY, *index], standalone_mode=False)
    assert capsys.readouterr() == (told.out, "")


# --- what is wrong ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("query", "error", "message"),
    [
        ("  ", MisuseError, "the query is empty"),
        ("nowhere.JPG", MissingArtifactError, "nowhere.JPG: no such file"),
        ("{text}", MisuseError, "text.txt: no picture to search for: no image header"),
        ("{bomb}", MisuseError, "bomb.png: no picture to search for: 12000×12000 pixels"),
        ("{cut}", MisuseError, "cut.jpg: the picture is damaged"),
    ],
)
def test_a_query_that_cannot_be_read_is_named(
    scores: str, dataset: Dataset, tmp_path: Path, query: str, error: type[MmflowError], message: str
) -> None:
    files = {name: tmp_path / file for name, file in (("text", "text.txt"), ("bomb", "bomb.png"), ("cut", "cut.jpg"))}
    files["text"].write_text("two red kites")
    Image.new("1", (12_000, 12_000)).save(files["bomb"])
    files["cut"].write_bytes(Reader(dataset, "train").read(0, 0).image[:-100])
    with pytest.raises(error, match=message) as raised:
        app(["search", scores, query.format(**files)], standalone_mode=False)
    assert "\n" not in str(raised.value)


def drop_embeddings(scores: Path) -> None:
    for file in (scores / "scores").iterdir():
        pq.write_table(pq.read_table(file).drop_columns(["image_embedding"]), file)


def edit_model(scores: Path, **fields: str) -> None:
    manifest = json.loads((scores / "manifest.json").read_text())
    manifest["model"] |= fields
    (scores / "manifest.json").write_text(json.dumps(manifest))


def captioner(scores: Path) -> None:
    made = written_package(scores / "captioner", loaded_model(captioner_config()))
    edit_model(scores, package=made.uri, digest=made.digest)


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (lambda scores: (scores / "manifest.json").unlink(), MissingArtifactError, "nothing was committed here"),
        (
            lambda scores: (scores / "manifest.json").write_text('{"format": 1, "kind": "dataset"}'),
            MisuseError,
            "a dataset",
        ),
        (lambda scores: (scores / "manifest.json").write_text('{"format": 1, "kind": "scores"}'), MmflowError, "model"),
        (drop_embeddings, MisuseError, "no column image_embedding; score the dataset with task embed"),
        (captioner, MisuseError, "its model gives no embeddings"),
        (lambda scores: edit_model(scores, package="gone"), MissingArtifactError, "the package of its model is gone"),
        (lambda scores: edit_model(scores, digest="f" * 64), CorruptArtifactError, "was made by ffffffffffffffff"),
        (lambda scores: (scores / "scores" / "00001.parquet").unlink(), MissingArtifactError, "00001.parquet: no such"),
        (lambda scores: (scores / "scores" / "00001.parquet").write_text("no"), CorruptArtifactError, "cannot be read"),
    ],
)
def test_scores_that_cannot_be_searched_are_named(
    scores: str, tmp_path: Path, damage: Callable[[Path], object], error: type[MmflowError], message: str
) -> None:
    copied = tmp_path / "scores"
    shutil.copytree(scores, copied)
    damage(copied)
    with pytest.raises(error, match=message) as raised:
        app(["search", str(copied), QUERY], standalone_mode=False)
    assert "\n" not in str(raised.value)


def test_at_least_one_row_is_asked_for(scores: str) -> None:
    with pytest.raises(TyperException) as raised:
        app(["search", scores, QUERY, "--top", "0"], standalone_mode=False)
    assert raised.value.exit_code == 2
    assert "'--top'" in raised.value.format_message()
