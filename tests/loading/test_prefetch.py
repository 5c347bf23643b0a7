"""Items made ahead by a thread: the same ones, in order, no more than asked, and nothing left behind."""

from __future__ import annotations

import threading
import time
from collections.abc import Generator, Iterator
from contextlib import nullcontext
from itertools import islice
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mmflow.loading import workers as module
from mmflow.loading.workers import NAME, on_device, prefetch


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    assert [thread for thread in threading.enumerate() if thread.name == NAME] == []


def counting(made: list[int], closed: list[bool]) -> Generator[int, None, None]:
    try:
        while True:
            made.append(len(made))
            yield made[-1]
    finally:
        closed.append(True)


def test_items_come_in_order_and_a_consumer_that_stops_closes_the_source() -> None:
    closed: list[bool] = []
    ready = prefetch(counting([], closed), 2)
    assert list(islice(ready, 50)) == list(range(50))
    assert closed == []
    ready.close()
    assert closed == [True]


def test_no_more_is_made_ahead_than_the_depth() -> None:
    made: list[int] = []
    ready = prefetch(counting(made, []), 3)
    next(ready)
    time.sleep(0.3)
    assert len(made) == 5  # one taken, three waiting, one in the producer's hand
    ready.close()


def test_the_source_s_error_is_raised_after_the_items_before_it() -> None:
    def failing() -> Generator[int, None, None]:
        yield 1
        yield 2
        raise ZeroDivisionError("in the thread")

    ready = prefetch(failing(), 5)
    assert list(islice(ready, 2)) == [1, 2]
    with pytest.raises(ZeroDivisionError, match="in the thread"):
        next(ready)


def test_a_source_that_ends_ends() -> None:
    assert list(prefetch((number for number in range(3)), 1)) == [0, 1, 2]


def test_items_are_made_while_the_consumer_works() -> None:
    second = threading.Event()

    def source() -> Generator[int, None, None]:
        yield 1
        second.set()
        yield 2

    ready = prefetch(source(), 2)
    assert next(ready) == 1
    assert second.wait(10)  # though nobody has asked for it
    ready.close()


def test_the_copying_thread_works_on_its_rank_s_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread begins on the first device, and pinning there would take memory of it for every rank."""
    current: dict[str, int] = {}  # by thread, as CUDA has it

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
    monkeypatch.setattr(module, "torch", SimpleNamespace(cuda=cuda, device=torch.device))
    used: list[Any] = []

    class Copied:
        def map_tensors(self, change: Any) -> Copied:
            used.append(current.get(threading.current_thread().name))
            return self

    batches = (Copied() for _ in range(2))
    assert len(list(on_device(batches, torch.device("cuda", 3)))) == 2  # type: ignore[arg-type]
    assert used.count(3) == 2  # each was copied on the thread's device; the consumer's own it leaves alone
    assert used.count(None) == 2
