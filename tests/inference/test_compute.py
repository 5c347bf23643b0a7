"""Results are computed once and are the same files whatever else is computed; rows that fail keep their neighbours."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
import pytest
import torch

from mmflow.core.errors import CorruptArtifactError, MmflowError
from mmflow.dataset.opened import Dataset
from mmflow.inference import compute as compute_module
from mmflow.inference.result import Columns, Gives, Result, Stored, column
from mmflow.inference.runner import Model
from mmflow.inference.tasks.embed import CaptionEmbeddings, ImageEmbeddings
from mmflow.inference.tasks.match import Match
from mmflow.inference.tasks.zero_shot import ZeroShot
from tests.dataset.handmade import write_dataset
from tests.evaluation.models import COLOURS, dual_config, loaded_model, ranker_config, written_package
from tests.inference.asking import Logged, answers, ask, files, keys_of, square, squares

ZERO_SHOT = ZeroShot(prompts={colour: [colour] for colour in COLOURS[:3]})
RESULTS = (ImageEmbeddings(), CaptionEmbeddings(), ZERO_SHOT, Match())


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> str:
    return written_package(tmp_path_factory.mktemp("compute") / "package", loaded_model(ranker_config(), seed=4)).uri


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "log"


def image_of(dataset: Dataset, key: str) -> tuple[Path, int]:
    """The tar of a sample and where its picture begins."""
    for shard in dataset.shards("train"):
        for row in dataset.index(shard).to_pylist():
            if row["key"] == key:
                return Path(dataset.tar_uri(shard)), row["image_offset"]
    raise KeyError(key)


def flip(dataset: Dataset, key: str, past: int = 100) -> bytes:
    """Change a byte of a sample's picture; the tar as it was."""
    tar, offset = image_of(dataset, key)
    whole = tar.read_bytes()
    tar.write_bytes(whole[: offset + past] + bytes([whole[offset + past] ^ 1]) + whole[offset + past + 1 :])
    return whole


def assert_close(row: dict[str, Any], expected: dict[str, Any]) -> None:
    """Equal but for the rounding of a batch with other rows."""
    for name, value in expected.items():
        numeric = np.asarray(value).dtype.kind == "f"
        assert row[name] == (pytest.approx(value, abs=1e-3) if numeric else value), name


# --- once -------------------------------------------------------------------------------------------------------------


def test_a_grown_dataset_costs_its_new_shards(package: str, log: Path, tmp_path: Path) -> None:
    result = Logged(log=str(log))
    dataset = write_dataset(tmp_path / "one", squares(3, 0, 2))
    done = ask(tmp_path, package, dataset, result)
    assert (done.rows, keys_of(log)) == (5, [row["key"] for row in answers(tmp_path, package, dataset, result)])
    grown = write_dataset(tmp_path / "two", [*squares(3, 0, 2), *squares(4, first=5)])
    done = ask(tmp_path, package, grown, result)
    assert (done.rows, len(keys_of(log)), len(set(keys_of(log)))) == (4, 9, 9)
    assert ask(tmp_path, package, grown, result).rows == 0


def test_shards_that_datasets_share_are_computed_once(package: str, log: Path, tmp_path: Path) -> None:
    (shard,), (other,) = squares(2), squares(3, first=2)
    one = write_dataset(tmp_path / "one", [shard, other, shard])
    two = write_dataset(tmp_path / "two", [other])
    result = Logged(log=str(log))
    assert ask(tmp_path, package, [one, two], result).rows == 5
    assert len(keys_of(log)) == len(set(keys_of(log))) == 5
    assert len(answers(tmp_path, package, one, result)) == 7


def test_another_model_task_or_setting_is_another_result(package: str, tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path / "dataset", squares(2))
    other = written_package(tmp_path / "other", loaded_model(ranker_config(), seed=5)).uri
    store = tmp_path / "results"
    asked = [ImageEmbeddings(), ImageEmbeddings(dtype="float32"), CaptionEmbeddings(), CaptionEmbeddings(language="zh")]
    for count, (uri, result) in enumerate([*((package, result) for result in asked), (other, asked[0])], 1):
        assert ask(store, uri, dataset, result).rows == 2
        assert len(files(store)) == count


def test_zero_shot_after_embed_reads_no_picture(package: str, tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path / "dataset", squares(3))
    ask(tmp_path / "apart", package, dataset, ImageEmbeddings())
    flip(dataset, "red-0")
    assert ask(tmp_path / "apart", package, dataset, ZERO_SHOT).errors == 0
    assert ask(tmp_path / "alone", package, dataset, ZERO_SHOT).errors == 1
    rows, alone = (answers(tmp_path / store, package, dataset, ZERO_SHOT) for store in ("apart", "alone"))
    assert rows[1:] == alone[1:]


# --- the same files ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def troubled(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """A shard with a picture that cannot be decoded, a silent sample, and one whose model's output is broken."""
    samples = [square("red"), square("noise", body=b"no picture"), square("silent", captions=[]), square("blue")]
    return write_dataset(tmp_path_factory.mktemp("troubled") / "dataset", [("train", samples)])


def test_a_result_is_the_same_file_whatever_is_there_already(package: str, troubled: Dataset, tmp_path: Path) -> None:
    """As after a kill between two of them."""
    done = ask(tmp_path / "whole", package, troubled, *RESULTS)
    assert (done.rows, done.errors) == (4, 1)
    whole = files(tmp_path / "whole")
    assert len(whole) == len(RESULTS)
    for count in (1, len(RESULTS) - 1):
        for number, first in enumerate(combinations(RESULTS, count)):
            store = tmp_path / f"{count}-{number}"
            ask(store, package, troubled, *first)
            assert files(store).items() < whole.items()
            ask(store, package, troubled, *RESULTS)
            assert files(store) == whole


def test_a_killed_worker_repeats_the_shard_that_it_was_at(
    package: str, log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = write_dataset(tmp_path / "dataset", squares(2, 3, 2))
    results = (Logged(log=str(log)), Logged(log=str(log), looks=False))
    ask(tmp_path / "whole", package, dataset, *results)
    log.unlink()
    publish, left = compute_module.publish, iter([True] * 3)

    def killed(uri: str) -> Any:
        if not next(left, False):
            raise KeyboardInterrupt
        return publish(uri)

    monkeypatch.setattr(compute_module, "publish", killed)
    with pytest.raises(KeyboardInterrupt):
        ask(tmp_path / "killed", package, dataset, *results)
    monkeypatch.undo()
    assert len(files(tmp_path / "killed")) == 3
    ask(tmp_path / "killed", package, dataset, *results)
    assert files(tmp_path / "killed") == files(tmp_path / "whole")
    repeated = [keys_of(log).count(row["key"]) for row in answers(tmp_path / "killed", package, dataset, results[0])]
    assert repeated == [2, 2, 3, 3, 3, 2, 2]  # twice each, by two results; one of those of the second shard again


def test_a_full_disk_costs_no_finished_result(package: str, tmp_path: Path, small_disk: Callable[[str], Path]) -> None:
    dataset = write_dataset(tmp_path / "dataset", squares(3, 3, 3))
    ask(tmp_path / "whole", package, dataset, *RESULTS)
    store = small_disk("24k") / "results"
    with pytest.raises(OSError, match="No space left on device"):
        ask(store, package, dataset, *RESULTS)
    whole, kept = files(tmp_path / "whole"), files(store)
    assert 0 < len(kept) < len(whole)
    assert kept.items() <= whole.items()
    small_disk("1m")
    ask(store, package, dataset, *RESULTS)
    assert files(store) == whole


# --- rows that fail ---------------------------------------------------------------------------------------------------


def test_a_flipped_byte_costs_its_row_until_the_shard_is_restored(package: str, tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path / "dataset", squares(3, 2))
    ask(tmp_path / "whole", package, dataset, *RESULTS)
    whole = flip(dataset, "green-1")
    done = ask(tmp_path / "results", package, dataset, *RESULTS)
    assert (done.rows, done.errors) == (5, 1)
    for result in RESULTS:
        rows, expected = (answers(tmp_path / store, package, dataset, result) for store in ("results", "whole"))
        if isinstance(result, CaptionEmbeddings):  # it read no picture
            assert rows == expected
            continue
        tar, _ = image_of(dataset, "green-1")
        assert rows[1].pop("error") == f"{tar}: image of row 1 (green-1) is not what was written"
        assert (rows[1].pop("key"), rows[1].pop("row")) == ("green-1", 1)
        assert all(value is None or not any(value) for value in rows[1].values())
        for row, same in zip(rows[:1] + rows[2:], expected[:1] + expected[2:], strict=True):
            assert_close(row, same)
    damaged = {path for path in files(tmp_path / "results") if ".damaged" in path}
    assert len(damaged) == 3
    # Others put the shard back, as another file.
    restored = tmp_path / "restored"
    restored.write_bytes(whole)
    os.replace(restored, image_of(dataset, "green-1")[0])
    assert ask(tmp_path / "results", package, dataset, *RESULTS).rows == 3
    found = {path: data for path, data in files(tmp_path / "results").items() if path not in damaged}
    assert found == files(tmp_path / "whole")
    assert answers(tmp_path / "results", package, dataset, RESULTS[0])[1]["error"] is None


def test_a_sample_whose_texts_are_damaged_has_the_error_in_every_result(package: str, tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path / "dataset", squares(3))
    ask(tmp_path / "results", package, dataset, ImageEmbeddings())
    tar, _ = image_of(dataset, "green-1")
    offset = dataset.index(dataset.shards("train")[0])["json_offset"][1].as_py()
    data = bytearray(tar.read_bytes())
    data[offset] ^= 1
    tar.write_bytes(data)
    assert ask(tmp_path / "results", package, dataset, *RESULTS).errors == 1
    for result in RESULTS[1:]:
        errors = [row["error"] for row in answers(tmp_path / "results", package, dataset, result)]
        assert errors == [None, f"{tar}: json of row 1 (green-1) is not what was written", None]


def test_a_shard_that_is_cut_short_ends_the_job(package: str, tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path / "dataset", squares(2))
    tar, _ = image_of(dataset, "red-0")
    tar.write_bytes(tar.read_bytes()[:-512])
    with pytest.raises(CorruptArtifactError, match=rf"^{tar}: \d+ bytes, the manifest says \d+.*mmflow verify"):
        ask(tmp_path / "results", package, dataset, ImageEmbeddings())
    assert files(tmp_path / "results") == {}


class Numbers(Result):
    """A number for each row, alone or in lists; one row has one that is not finite."""

    task: ClassVar[str] = "numbers"
    needs: ClassVar[tuple[Gives, ...]] = (Gives(),)
    remedy: ClassVar[str] = ""
    form: Literal["number", "vector", "list", "vectors"]
    wrong: str

    def fields(self, loaded: Any) -> list[pa.Field]:
        vector = pa.list_(pa.float16(), 2)
        kinds = {"number": pa.float32(), "vector": vector, "list": pa.list_(pa.float32()), "vectors": pa.list_(vector)}
        return [column("numbers", kinds[self.form], ""), column("text", pa.string(), "")]

    def run(self, batch: Any, started: Any) -> Columns:
        values = [{"wrong": float(self.wrong), "none": 2.0}.get(sample.key, 1.0) for sample in batch.samples]
        whole = {
            "number": [None if value == 2 else value for value in values],
            "vector": [[1.0, value] for value in values],
            "list": [[value] * row for row, value in enumerate(values, 1)],
            "vectors": [[[value, 1.0]] * row for row, value in enumerate(values, 1)],
        }
        kind = self.fields(None)[0].type
        return {"numbers": pa.array(whole[self.form], kind), "text": pa.array(["x"] * len(values))}


@pytest.mark.parametrize("form", ["number", "vector", "list", "vectors"])
@pytest.mark.parametrize("wrong", ["nan", "inf", "-inf"])
def test_a_row_with_an_output_that_is_not_finite_is_an_error(
    package: str, tmp_path: Path, form: Any, wrong: str
) -> None:
    samples = [square(key) for key in ("red", "none", "noise", "wrong", "blue")]
    samples[2] = square("noise", body=b"no picture")
    dataset = write_dataset(tmp_path / "dataset", [("train", samples)])
    result = Numbers(form=form, wrong=wrong)
    assert ask(tmp_path / "results", package, dataset, result, batch_size=4).errors == 2
    rows = answers(tmp_path / "results", package, dataset, result)
    assert rows[2]["error"].startswith("a .jpg of 10 bytes cannot be decoded")
    assert rows[3]["error"] == "the model's output is not finite"
    assert [row["error"] for row in rows if row["key"] in ("red", "none", "blue")] == [None] * 3
    assert [row["text"] for row in rows] == ["x", "x", None, None, "x"]
    for row in rows[2:4]:
        assert row["numbers"] is None or not any(row["numbers"])


def test_a_model_that_overflows_fails_in_every_result_alike(tmp_path: Path) -> None:
    loaded = loaded_model(dual_config(), seed=4)
    with torch.no_grad():
        next(iter(loaded.model.image.parameters())).fill_(float("nan"))
    package = written_package(tmp_path / "package", loaded).uri
    dataset = write_dataset(tmp_path / "dataset", squares(3))
    results = (ImageEmbeddings(), CaptionEmbeddings(), ZERO_SHOT)
    assert ask(tmp_path / "together", package, dataset, *results).errors == 3
    for result in results:
        ask(tmp_path / "apart", package, dataset, result)
    assert files(tmp_path / "apart") == files(tmp_path / "together")
    errors = [{row["error"] for row in answers(tmp_path / "apart", package, dataset, result)} for result in results]
    assert errors == [{"the model's output is not finite"}, {None}, {"the model's output is not finite"}]


def test_more_errors_than_are_allowed_of_all_rows_end_the_job(package: str, tmp_path: Path) -> None:
    noise = ("train", [square("noise", body=b"no picture"), square("red")])
    dataset = write_dataset(tmp_path / "dataset", [*squares(4), *squares(4, first=4), noise])
    with pytest.raises(MmflowError) as raised:
        ask(tmp_path / "results", package, dataset, ImageEmbeddings(), max_errors=0.05)
    assert str(raised.value).startswith(
        "1 of 10 rows failed, the first: 00002, row 0: a .jpg of 10 bytes cannot be decoded"
    )
    assert "more than max_errors=0.05: run `mmflow verify` on the dataset, or allow more" in str(raised.value)
    # Half of the rows that a grown dataset has more, a tenth of all.
    before = write_dataset(tmp_path / "before", squares(8))
    grown = write_dataset(tmp_path / "grown", [*squares(8), noise])
    ask(tmp_path / "grown-results", package, before, ImageEmbeddings())
    assert ask(tmp_path / "grown-results", package, grown, ImageEmbeddings(), max_errors=0.1).errors == 1


# --- what stands in a result's place ----------------------------------------------------------------------------------


def test_a_dataset_in_another_s_place_is_not_taken_for_it(package: str, tmp_path: Path) -> None:
    place = tmp_path / "dataset"
    for samples in (squares(3), squares(2, first=3)):
        shutil.rmtree(place, ignore_errors=True)
        dataset = write_dataset(place, samples)
        ask(tmp_path / "results", package, dataset, CaptionEmbeddings())
        elsewhere = write_dataset(tmp_path / f"elsewhere-{len(samples[0][1])}", samples)
        ask(tmp_path / "expected", package, elsewhere, CaptionEmbeddings())
    assert files(tmp_path / "results") == files(tmp_path / "expected")


def test_a_result_that_is_cut_short_is_named(package: str, tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path / "dataset", squares(3))
    ask(tmp_path, package, dataset, ImageEmbeddings())
    stored = Stored(str(tmp_path), Model(package=package).digest, ImageEmbeddings())
    (shard,) = dataset.shards("train")
    path = Path(stored.uri(shard))
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(CorruptArtifactError, match=rf"^{path}: not a result .*; delete it and run again$"):
        stored.read(shard)


def test_columns_are_described(package: str, troubled: Dataset, tmp_path: Path) -> None:
    ask(tmp_path, package, troubled, *RESULTS)
    for result in RESULTS:
        stored = Stored(str(tmp_path), Model(package=package).digest, result)
        table = stored.read(troubled.shards("train")[0])
        assert all(field.metadata[b"description"] for field in table.schema)
