"""Batches prepared ahead by a thread, and copied to the device while the step before them computes."""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator
from contextlib import closing
from typing import TypeVar

import torch

from mmflow.loading.batches import Batch
from mmflow.loading.workers import NAME

Item = TypeVar("Item")

POLL_SECONDS = 0.1
JOIN_SECONDS = 10.0  # a read from an object store can take as long; the thread is a daemon and does not outlive us


def prefetch(source: Generator[Item, None, None], depth: int) -> Generator[Item, None, None]:
    """The same items, made ahead by a thread: `depth` of them, and one in its hand.

    Its error is raised here. When the consumer ends, the source is closed and the thread ends.
    """
    ready: queue.Queue[Item | _End] = queue.Queue(maxsize=depth)
    stopped = threading.Event()

    def offer(item: Item | _End) -> bool:
        while not stopped.is_set():
            try:
                ready.put(item, timeout=POLL_SECONDS)
            except queue.Full:
                continue
            return True
        return False

    def produce() -> None:
        try:
            with closing(source):
                for item in source:
                    if not offer(item):
                        return
            offer(_End(None))
        except BaseException as error:  # whatever it is belongs to the consumer, who would otherwise wait for ever
            offer(_End(error))

    thread = threading.Thread(target=produce, name=NAME, daemon=True)
    thread.start()
    try:
        while True:
            item = ready.get()
            if isinstance(item, _End):
                if item.error is not None:
                    raise item.error
                return
            yield item
    finally:
        stopped.set()
        thread.join(JOIN_SECONDS)


class _End:
    def __init__(self, error: BaseException | None) -> None:
        self.error = error


def on_device(source: Generator[Batch, None, None], device: torch.device) -> Generator[Batch, None, None]:
    """The batches on `device`, one of them ahead. To a GPU they are copied from pinned memory, on a stream of its own,
    by the thread that makes them; the consumer's stream waits for the copy, its host does not.
    """
    if device.type != "cuda":
        yield from prefetch(source, 1)
        return
    side: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def copies() -> Generator[tuple[Batch, torch.cuda.Event], None, None]:
        # A thread begins on the first device, on which every rank's pinning would otherwise take its memory.
        with torch.cuda.device(device), closing(source):
            for batch in source:
                with torch.cuda.stream(side):
                    copy = batch.map_tensors(lambda tensor: tensor.pin_memory().to(device, non_blocking=True))
                yield copy, side.record_event()

    with closing(prefetch(copies(), 1)) as ready:
        for batch, copied in ready:
            current = torch.cuda.current_stream(device)
            current.wait_event(copied)
            # Its memory belongs to the side stream, which would use it again while the step still reads it.
            batch.map_tensors(lambda tensor: _in_use(tensor, current))  # noqa: B023 — called at once
            yield batch


def _in_use(tensor: torch.Tensor, stream: torch.cuda.Stream) -> torch.Tensor:
    tensor.record_stream(stream)
    return tensor
