"""The runner's order, its deadline, and faults on Ray: whoever is killed, the files are those of an undisturbed run."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from mmflow.core.errors import MmflowError
from mmflow.dataset.opened import Dataset
from mmflow.inference import runner
from mmflow.inference.compute import ResultsJob
from mmflow.inference.prepare import Looks, Prepared, Rows, prepare
from mmflow.inference.result import Stored
from mmflow.inference.runner import FEW_ITEMS, Model, Pool, RayWorker, ahead_of, in_parallel
from mmflow.inference.tasks.embed import ImageEmbeddings
from tests.dataset.handmade import write_dataset
from tests.evaluation.models import dual_config, loaded_model, written_package
from tests.inference.asking import Logged, answers, ask, files, keys_of, logged, squares

ROOT = Path(__file__).parents[2]
SHARDS = (2, 3, 2, 1, 2, 3)


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> str:
    return written_package(tmp_path_factory.mktemp("runner") / "package", loaded_model(dual_config(), seed=4)).uri


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return write_dataset(tmp_path_factory.mktemp("runner") / "dataset", squares(*SHARDS))


@contextlib.contextmanager
def let_go(log: Path) -> Iterator[None]:
    """At the end, let the task continue that waits."""
    try:
        yield
    finally:
        Path(f"{log}.go").touch()


def wait_for(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 240
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.02)


# --- the order --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 1, 3, 9])
def test_items_come_in_order_with_so_many_more_drawn(count: int) -> None:
    drawn = list[int]()

    def items() -> Iterator[int]:
        for number in range(6):
            drawn.append(number)
            yield number

    for number, item in enumerate(ahead_of(items(), count)):
        assert item == number
        assert len(drawn) == min(number + count + 1, 6)
    assert len(drawn) == 6


def test_the_next_batches_are_prepared_while_one_is_computed(
    dataset: Dataset, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the last batch of a shard is computed, the first of the next shard is prepared."""
    began = list[Rows]()

    def watched(rows: Rows, looks: Looks) -> Prepared:
        began.append(rows)
        return prepare(rows, looks)

    monkeypatch.setattr(runner, "prepare", watched)
    log = tmp_path / "log"
    with ThreadPoolExecutor(1) as thread, let_go(log):
        result = Logged(log=str(log), waits_at="green-1")
        done = thread.submit(ask, tmp_path / "results", package, dataset, result, batch_size=1)
        wait_for(lambda: "green-1" in keys_of(log) and len(began) == 3)
    assert done.result().rows == sum(SHARDS)
    assert [(rows.shard, rows.first) for rows in began[:4]] == [(0, 0), (0, 1), (1, 0), (1, 1)]


# --- Ray --------------------------------------------------------------------------------------------------------------


def test_values_come_in_order_and_an_error_is_one_line(ray_cluster: None) -> None:
    def share(number: int) -> float:
        return 60 / number

    numbers = list(range(1, FEW_ITEMS + 2))
    assert list(in_parallel(share, numbers)) == [60 / number for number in numbers]
    with pytest.raises(MmflowError, match=r"^a task: ZeroDivisionError: division by zero; fix the cause and rerun"):
        list(in_parallel(share, [*numbers, 0]))


def test_an_actor_that_is_killed_repeats_its_shard_and_changes_no_file(
    ray_cluster: None, dataset: Dataset, package: str, tmp_path: Path
) -> None:
    """Two results, of pictures and a log of what was asked; the actor dies amid a shard, with others finished."""
    log, last = tmp_path / "log", "blue-2"  # the first row of the second shard
    ask(tmp_path / "here", package, dataset, ImageEmbeddings(), Logged(log=str(tmp_path / "other")))
    results = (ImageEmbeddings(), Logged(log=str(log), waits_at=last))
    with ThreadPoolExecutor(1) as thread, let_go(log):
        done = thread.submit(ask, tmp_path / "ray", package, dataset, *results, pool=Pool(num_workers=2))
        wait_for(lambda: done.done() or (last in keys_of(log) and len(logged(log)) > 1))
        victim = next(line["process"] for line in logged(log) if last in line["keys"])
        assert victim != os.getpid()
        os.kill(victim, signal.SIGKILL)
    assert done.result().rows == sum(SHARDS)
    assert files(tmp_path / "ray") == files(tmp_path / "here")
    rows = [row["key"] for row in answers(tmp_path / "ray", package, dataset, results[1])]
    assert {line["process"] for line in logged(log)} != {victim}
    assert [key for key in rows if keys_of(log).count(key) > 1] == rows[2:4]  # of the batch that it was at


@pytest.mark.slow
def test_a_driver_that_is_killed_goes_on_from_the_finished_shards(
    dataset: Dataset, package: str, tmp_path: Path
) -> None:
    log, last = tmp_path / "log", "black-4"  # the last row of the second shard
    result = Logged(log=str(log))
    ask(tmp_path / "here", package, dataset, ImageEmbeddings(), Logged(log=str(tmp_path / "other")))
    store = str(tmp_path / "ray")
    command = [sys.executable, "-m", "tests.inference.ask_on_ray", store, package, dataset.uri, str(log), last]
    settings: dict[str, Any] = {"cwd": ROOT, "env": os.environ | {"PYTHONPATH": str(ROOT)}}
    with (tmp_path / "output").open("w") as output:
        driver = subprocess.Popen(command, stdout=output, stderr=output, **settings)
    finished = Stored(store, Model(package=package).digest, result)
    shards = dataset.shards("train")
    try:
        wait_for(lambda: driver.poll() is not None or (last in keys_of(log) and finished.has(shards[2])))
    finally:
        driver.kill()
        driver.wait()
    whole = [number for number, shard in enumerate(shards) if finished.has(shard)]
    assert 2 in whole, (tmp_path / "output").read_text()
    assert 1 not in whole
    Path(f"{log}.go").touch()
    done = subprocess.run(command, capture_output=True, text=True, **settings)
    assert done.returncode == 0, done.stderr
    assert files(tmp_path / "ray") == files(tmp_path / "here")
    for number, shard in enumerate(shards):
        counts = {keys_of(log).count(key) for key in dataset.index(shard)["key"].to_pylist()}
        assert counts == {1} if number in whole else counts <= {1, 2}


def test_what_ends_a_worker_is_one_line(ray_cluster: None, package: str, tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path / "dataset", squares(2, 2))
    tar = Path(dataset.tar_uri(dataset.shards("train")[1]))
    tar.unlink()
    with pytest.raises(MmflowError) as raised:
        ask(tmp_path / "ray", package, dataset, ImageEmbeddings(), pool=Pool(num_workers=2))
    assert str(raised.value) == (
        f"a worker: MissingArtifactError: {tar}: no such file; fix the cause and rerun: finished shards are kept"
    )


def stuck(started: Path, times: int) -> Callable[[Rows, Looks], Prepared]:
    """`prepare` that does not come back from its first calls, each of which writes its process into a file."""

    def stuck_prepare(rows: Rows, looks: Looks) -> Prepared:
        with started.open("a") as log:
            log.write(f"{os.getpid()}\n")
        if len(started.read_text().splitlines()) <= times:
            time.sleep(3600)
        return prepare(rows, looks)

    return stuck_prepare


@pytest.mark.parametrize(("times", "seconds"), [(1, 6.0), (2, 2.0)])
def test_rows_that_cannot_be_read_in_time_are_tried_once_more_elsewhere(
    ray_cluster: None, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, times: int, seconds: float
) -> None:
    dataset = write_dataset(tmp_path / "dataset", squares(3))
    started = tmp_path / "started"
    rows = Rows(dataset.uri, dataset.fingerprint, "train", 0, 0, 3)
    looks = Looks(16, changes=("",))
    many = [rows] * (FEW_ITEMS + 1)
    assert len(list(in_parallel(lambda rows: prepare(rows, looks), many))) == len(many)  # so Ray's processes are up
    monkeypatch.setattr(runner, "prepare", stuck(started, times))
    monkeypatch.setattr(runner, "PREPARE_SECONDS", seconds)
    job = ResultsJob(
        model=Model(package=package),
        dataset=dataset.uri,
        fingerprint=dataset.fingerprint,
        split="train",
        shards=dataset.shards("train"),
        results=(ImageEmbeddings(),),
        store=str(tmp_path / "results"),
        batch_size=4,
    )
    worker = RayWorker([job], accelerated=False, ahead=2)
    calls = {"calls": np.array([[[0, 0]]])}
    if times == 1:
        assert worker(calls)["rows"] == [3]
        assert len(answers(tmp_path / "results", package, dataset, ImageEmbeddings())) == 3
    else:
        with pytest.raises(MmflowError, match=r"rows 0 to 2 of shard 0 of split train could not be read in 2 s, twice"):
            worker(calls)
    processes = list(map(int, started.read_text().split()))
    wait_for(lambda: not any(map(psutil.pid_exists, processes[:times])))  # they hold no core and no file any more
    assert len(set(processes)) == len(processes)
