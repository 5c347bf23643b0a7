"""Workers: rows in the order of their tasks from threads and processes. Deaths and errors are reported by name."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Generator
from contextlib import closing, nullcontext
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import psutil
import pytest
import torch
from numpy.typing import NDArray

from mmflow.core.errors import CorruptArtifactError, TrainingError
from mmflow.loading import workers as module
from mmflow.loading.batches import Row
from mmflow.loading.plan import Slots
from mmflow.loading.workers import Task, on_device, prefetch, start
from tests.loading.conftest import worker_processes

pytestmark = pytest.mark.usefixtures("no_worker_is_left")

ROOT = Path(__file__).parents[2]
SHAPE = (2, 12, 1, 2, 2, 3)  # two buffers of twelve rows
Kind = Literal["threads", "processes"]
each_kind = pytest.mark.parametrize("kind", ["threads", "processes"])


def slots(*rows: int) -> Slots:
    row = np.array(rows)
    zeros = np.zeros_like(row)
    return Slots(zeros, zeros, row, zeros, np.ones(len(row), np.bool_))


def task(number: int, *rows: int) -> Task:
    return Task(f"epoch 0, position {number}", buffer=number % 2, first=0, slots=slots(*rows))


def rows_of(*keys: object) -> list[Row]:
    return [Row(place=(0, 0, 0, 0), real=True, key=str(key)) for key in keys]


# What workers do in these tests, by name, so that it pickles.


def echo(slots: Slots, pixels: NDArray[np.uint8]) -> list[Row]:
    """Name and colour each row by its number; lower numbers take longer."""
    time.sleep(0.02 * max(0, 5 - int(slots.row[0])))
    pixels[:] = slots.row[:, None, None, None, None]
    return rows_of(*slots.row.tolist())


def cores(slots: Slots, pixels: NDArray[np.uint8]) -> list[Row]:
    return rows_of(torch.get_num_threads())


def pid(slots: Slots, pixels: NDArray[np.uint8]) -> list[Row]:
    return rows_of(os.getpid())


def stuck(slots: Slots, pixels: NDArray[np.uint8]) -> list[Row]:
    if slots.row[0]:
        time.sleep(600)
    return pid(slots, pixels)


def corrupt(slots: Slots, pixels: NDArray[np.uint8]) -> list[Row]:
    raise CorruptArtifactError("shards/00001.tar: image of row 3 (cat) is damaged")


def buggy(slots: Slots, pixels: NDArray[np.uint8]) -> list[Row]:
    return rows_of(["cat"][int(slots.row[0])])


@each_kind
@pytest.mark.parametrize("count", [1, 3])
def test_rows_come_in_the_order_of_their_tasks(kind: Kind, count: int) -> None:
    with closing(start(kind, count, echo, SHAPE)) as workers:
        for buffer in range(2):
            for first, last in ((0, 6), (6, 9), (9, 12)):
                workers.submit(Task("epoch 0", buffer, first, slots(*range(first, last))))
        rows = [workers.result() for _ in range(6)]
        assert [len(part) for part in rows] == 2 * [6, 3, 3]
        assert [row.key for part in rows for row in part] == 2 * [str(row) for row in range(12)]
        assert workers.ring[:, :, 0, 0, 0, 0].tolist() == 2 * [list(range(12))]


@each_kind
def test_an_error_arrives_with_its_own_message(kind: Kind) -> None:
    with closing(start(kind, 2, corrupt, SHAPE)) as workers:
        workers.submit(task(0, 3))
        with pytest.raises(CorruptArtifactError, match=r"^shards/00001.tar: image of row 3 \(cat\) is damaged"):
            workers.result()


def test_a_bug_in_a_process_is_reported_with_its_rows_and_traceback() -> None:
    with closing(start("processes", 1, buggy, SHAPE)) as workers:
        workers.submit(task(14, 1))
        with pytest.raises(TrainingError) as caught:
            workers.result()
    assert "rows 0 to 0 of the batch at epoch 0, position 14: IndexError: list index out of range" in str(caught.value)
    assert "in buggy" in caught.value.__notes__[0]


def test_a_killed_process_is_named_within_seconds_with_the_rows_it_was_loading() -> None:
    with closing(start("processes", 1, stuck, SHAPE)) as workers:
        workers.submit(task(0, 0))
        workers.submit(task(7, 1, 2, 3))
        victim = int(workers.result()[0].key)
        assert [victim] == worker_processes()
        threading.Timer(0.3, os.kill, (victim, signal.SIGKILL)).start()
        began = time.monotonic()
        with pytest.raises(TrainingError) as caught:
            workers.result()
        assert time.monotonic() - began < 5
    assert f"loader worker process {victim} was killed by SIGKILL while loading rows 0 to 2" in str(caught.value)
    assert "epoch 0, position 7; most often it ran out of memory: lower loader.workers.count" in str(caught.value)


def test_a_process_that_died_while_idle_is_named_too() -> None:
    with closing(start("processes", 2, pid, SHAPE)) as workers:
        workers.submit(task(0, 0))
        victim = int(workers.result()[0].key)
        os.kill(victim, signal.SIGKILL)
        with pytest.raises(TrainingError, match=f"loader worker process {victim} was killed by SIGKILL"):  # noqa: PT012
            for _ in range(10):
                workers.submit(task(0, 0))
                workers.result()


def test_a_function_that_does_not_pickle_is_refused_at_once() -> None:
    with pytest.raises(Exception, match="pickle"):
        start("processes", 1, lambda slots, pixels: echo(slots, pixels), SHAPE)


@each_kind
def test_closing_drops_the_tasks_that_wait(kind: Kind) -> None:
    began = time.monotonic()
    with closing(start(kind, 2, echo, SHAPE)) as workers:
        for _ in range(400):
            workers.submit(task(0, 0))
        workers.result()
    assert time.monotonic() - began < 10  # all of them would take 20


def test_a_stuck_process_is_killed_on_closing() -> None:
    with closing(start("processes", 1, stuck, SHAPE)) as workers:
        workers.submit(task(0, 0))
        workers.result()
        workers.submit(task(0, 1))
        began = time.monotonic()
    assert time.monotonic() - began < 8


@each_kind
def test_a_worker_uses_one_core_and_leaves_the_caller_its_own(kind: Kind) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with closing(start(kind, 2, cores, SHAPE)) as workers:
            for _ in range(4):
                workers.submit(task(0, 0))
            assert [workers.result()[0].key for _ in range(4)] == 4 * ["1"]
            assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


ORPHANS = """
import time
from tests.loading.test_workers import SHAPE, pid, task
from mmflow.loading.workers import start
if __name__ == "__main__":
    workers = start("processes", 2, pid, SHAPE)
    for number in range(8):
        workers.submit(task(0, 0))
    print(*{workers.result()[0].key for number in range(8)}, flush=True)
    time.sleep(600)
"""


def test_processes_end_when_their_parent_is_killed() -> None:
    """A killed parent closes nothing itself: the end of the pipe tells them."""
    with subprocess.Popen([sys.executable, "-c", ORPHANS], cwd=ROOT, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pids = [int(word) for word in parent.stdout.readline().split()]
        assert pids
        parent.kill()
    deadline = time.monotonic() + 20
    while any(map(psutil.pid_exists, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(psutil.pid_exists, pids))


# --- one batch ahead --------------------------------------------------------------------------------------------------


def counting(made: list[int], closed: list[bool]) -> Generator[int, None, None]:
    try:
        while True:
            made.append(1 + len(made))
            yield made[-1]
    finally:
        closed.append(True)


def test_items_come_in_order_and_a_consumer_that_stops_closes_the_source() -> None:
    assert list(prefetch(number for number in range(1, 4))) == [1, 2, 3]
    closed: list[bool] = []
    source = counting([], closed)  # held here: otherwise its deletion would close it
    ready = prefetch(source)
    assert list(islice(ready, 50)) == list(range(1, 51))
    assert closed == []
    ready.close()
    assert closed == [True]


def test_one_item_waits_and_one_is_under_way_while_the_consumer_works() -> None:
    made: list[int] = []
    ready = prefetch(counting(made, []))
    next(ready)
    deadline = time.monotonic() + 10
    while len(made) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.2)
    assert len(made) == 3
    ready.close()


def test_the_source_s_error_is_raised_after_the_items_before_it() -> None:
    def failing() -> Generator[int, None, None]:
        yield 1
        yield 2
        raise ZeroDivisionError("in the thread")

    ready = prefetch(failing())
    assert list(islice(ready, 2)) == [1, 2]
    with pytest.raises(ZeroDivisionError, match="in the thread"):
        next(ready)


def test_the_copying_thread_works_on_its_rank_s_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """A new thread uses the first device, where pinning would take memory for every rank."""
    current: dict[str, int] = {}  # by thread, as in CUDA

    class Device(nullcontext[None]):
        def __init__(self, device: torch.device) -> None:
            super().__init__()
            current[threading.current_thread().name] = device.index

    stream = SimpleNamespace(record_event=lambda: None, wait_event=lambda event: None)
    cuda = SimpleNamespace(
        Stream=lambda device: stream,
        device=Device,
        stream=lambda side: nullcontext(),
        current_stream=lambda device: stream,
    )
    monkeypatch.setattr(module, "torch", SimpleNamespace(cuda=cuda, device=torch.device, Tensor=torch.Tensor))
    used: list[Any] = []

    class Copied:
        def map_tensors(self, change: Any) -> Copied:
            used.append(current.get(threading.current_thread().name))
            return self

    batches = (Copied() for _ in range(2))
    assert len(list(on_device(batches, torch.device("cuda", 3)))) == 2  # type: ignore[arg-type]
    assert used.count(3) == 2  # each was copied on the thread's device; the consumer's device is left alone
    assert used.count(None) == 2
