"""Workers: results in the order of their tasks, from threads and processes alike; no death or error goes unseen."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Literal

import numpy as np
import psutil
import pytest
import torch
from numpy.typing import NDArray

from mmflow.core.errors import CorruptArtifactError, TrainingError
from mmflow.loading.batches import Loaded
from mmflow.loading.plan import Slots
from mmflow.loading.workers import NAME, Load, Processes, Task, Workers, start

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


def echo(slots: Slots, pixels: NDArray[np.uint8]) -> Loaded:
    """Rows named and coloured by their number; the lower the number, the later they come."""
    time.sleep(0.02 * max(0, 5 - int(slots.row[0])))
    pixels[:] = slots.row[:, None, None, None, None]
    keys = [str(row) for row in slots.row.tolist()]
    return Loaded(
        keys=keys, tokens=[[row] for row in slots.row.tolist()], real=[True] * len(keys), frames=[1] * len(keys)
    )


def cores(slots: Slots, pixels: NDArray[np.uint8]) -> Loaded:
    return Loaded(keys=[str(torch.get_num_threads())])


def pid(slots: Slots, pixels: NDArray[np.uint8]) -> Loaded:
    """Who does it."""
    return Loaded(keys=[str(os.getpid())])


def stuck(slots: Slots, pixels: NDArray[np.uint8]) -> Loaded:
    if slots.row[0]:
        time.sleep(600)
    return pid(slots, pixels)


def corrupt(slots: Slots, pixels: NDArray[np.uint8]) -> Loaded:
    raise CorruptArtifactError("shards/00001.tar: image of row 3 (cat) is not what was written")


def buggy(slots: Slots, pixels: NDArray[np.uint8]) -> Loaded:
    return Loaded(keys=[["cat"][int(slots.row[0])]])


@contextmanager
def working(kind: Kind, count: int, load: Load) -> Iterator[Workers]:
    with closing(start(kind, count, load, SHAPE)) as workers:
        yield workers
    assert [thread for thread in threading.enumerate() if thread.name.startswith(NAME)] == []
    assert processes() == []


def processes() -> list[int]:
    """The worker processes of this one."""
    server = [child for child in psutil.Process().children() if "multiprocessing.forkserver" in str(child.cmdline())]
    return [worker.pid for each in server for worker in each.children()]


@each_kind
@pytest.mark.parametrize("count", [1, 3])
def test_rows_come_in_the_order_of_their_tasks(kind: Kind, count: int) -> None:
    with working(kind, count, echo) as workers:
        for number in range(2):
            workers.submit(Task("epoch 0", buffer=number, first=0, slots=slots(*range(6))))
            workers.submit(Task("epoch 0", buffer=number, first=6, slots=slots(*range(6, 9))))
            workers.submit(Task("epoch 0", buffer=number, first=9, slots=slots(9, 10, 11)))
        found = [workers.result() for _ in range(6)]
        assert [len(rows.keys) for rows in found] == 2 * [6, 3, 3]
        assert [key for rows in found for key in rows.keys] == 2 * [str(row) for row in range(12)]
        assert workers.ring[:, :, 0, 0, 0, 0].tolist() == 2 * [list(range(12))]


@each_kind
def test_an_error_arrives_with_its_own_message(kind: Kind) -> None:
    with working(kind, 2, corrupt) as workers:
        workers.submit(task(0, 3))
        with pytest.raises(CorruptArtifactError, match=r"^shards/00001.tar: image of row 3 \(cat\) is not what was"):
            workers.result()


def test_a_fault_of_the_program_in_a_process_tells_where() -> None:
    with working("processes", 1, buggy) as workers:
        workers.submit(task(14, 1))
        with pytest.raises(TrainingError) as caught:
            workers.result()
    assert "rows 0 to 0 of the batch at epoch 0, position 14: IndexError: list index out of range" in str(caught.value)
    assert "in buggy" in caught.value.__notes__[0]


def test_a_killed_process_is_named_within_seconds_with_what_it_had_in_hand() -> None:
    with working("processes", 2, stuck) as workers:
        workers.submit(task(0, 0))
        workers.submit(task(0, 0))
        workers.submit(task(7, 1, 2, 3))
        victims = {int(workers.result().keys[0]) for _ in range(2)} or set()
        assert victims <= set(processes())
        assert isinstance(workers, Processes)
        busy = next(each.process.pid for each in workers._workers if each.tasks)
        assert busy is not None
        threading.Timer(0.3, os.kill, (busy, signal.SIGKILL)).start()
        began = time.monotonic()
        with pytest.raises(TrainingError) as caught:
            workers.result()
        assert time.monotonic() - began < 5
    assert f"loader worker process {busy} was ended by SIGKILL with rows 0 to 2 of the batch at" in str(caught.value)
    assert "epoch 0, position 7 in hand; out of memory, most often: lower loader.workers.count" in str(caught.value)


def test_a_process_that_died_with_nothing_to_do_is_named_too() -> None:
    def more(workers: Workers) -> None:
        for _ in range(10):
            workers.submit(task(0, 0))
            workers.result()

    with working("processes", 2, stuck) as workers:
        workers.submit(task(0, 0))
        victim = int(workers.result().keys[0])
        os.kill(victim, signal.SIGKILL)
        with pytest.raises(TrainingError, match=f"loader worker process {victim} was ended by SIGKILL"):
            more(workers)


def test_what_cannot_be_sent_to_a_process_is_told_at_once() -> None:
    with pytest.raises(Exception, match="pickle"):
        start("processes", 1, lambda slots, pixels: echo(slots, pixels), SHAPE)
    assert processes() == []


@each_kind
def test_closing_gives_up_what_is_under_way(kind: Kind) -> None:
    began = time.monotonic()
    with working(kind, 2, echo) as workers:
        for _ in range(400):
            workers.submit(task(0, 0))
        workers.result()
    assert time.monotonic() - began < 10  # all of it would take 20


def test_a_stuck_process_is_killed_when_the_loading_ends() -> None:
    with working("processes", 1, stuck) as workers:
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
        with working(kind, 2, cores) as workers:
            for _ in range(4):
                workers.submit(task(0, 0))
            assert [workers.result().keys for _ in range(4)] == 4 * [["1"]]
            assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


ORPHANS = """
import os, sys, time
from tests.loading.test_workers import SHAPE, pid, task
from mmflow.loading.workers import start
if __name__ == "__main__":
    workers = start("processes", 2, pid, SHAPE)
    for number in range(8):
        workers.submit(task(0, 0))
    print(*{workers.result().keys[0] for number in range(8)}, flush=True)
    time.sleep(600)
"""


def test_processes_end_with_the_one_that_started_them() -> None:
    """Killed, it can close nothing: the pipe's end is what tells them."""
    with subprocess.Popen([sys.executable, "-c", ORPHANS], cwd=ROOT, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pids = [int(each) for each in parent.stdout.readline().split()]
        assert pids
        parent.kill()
    deadline = time.monotonic() + 20
    while any(psutil.pid_exists(each) for each in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert [each for each in pids if psutil.pid_exists(each)] == []
