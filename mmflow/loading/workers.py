"""Who loads the rows of a batch beside the step that consumes them: threads of this process, or processes of its own.

Both take tasks in order and give their results back in that order, pixels in a ring of buffers that they share with
the caller. Processes are forked from a server that has imported torch and done nothing else: a fork of the caller can
hang beside the threads of Ray or gloo, and importing torch anew takes each process seconds. Each has a pipe of its own:
one that dies closes it, which is seen at once, where a queue that all share can be left locked or half written.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import multiprocessing
import os
import queue
import signal
import tempfile
import threading
import traceback
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from multiprocessing.reduction import DupFd, ForkingPickler
from threading import Barrier
from typing import Any, Literal, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from mmflow.core.errors import MmflowError, TrainingError
from mmflow.core.memory import keep_freed_memory
from mmflow.loading.batches import Batch, Loaded
from mmflow.loading.plan import Slots

NAME = "mmflow-loader"
QUEUED = 2  # tasks that a process holds: the one at work and the next, so that it never waits for the caller
STOP_SECONDS = 5.0  # a process that has not ended by itself by then is killed

Ring = NDArray[np.uint8]  # (buffers, rows, frames, side, side, 3)
Load = Callable[[Slots, NDArray[np.uint8]], Loaded]
"""(slots (n,), the pixels to fill (n, frames, side, side, 3)) → what else there is of the rows."""


@dataclass(frozen=True)
class Task:
    """Some rows of a batch."""

    batch: str  # in words, for errors
    buffer: int
    first: int  # row of the buffer
    slots: Slots

    def __str__(self) -> str:
        return f"rows {self.first} to {self.first + len(self.slots.row) - 1} of the batch at {self.batch}"


class Workers(Protocol):
    """What fills the slots of tasks, in the order of the tasks."""

    ring: Ring

    def submit(self, task: Task) -> None:
        """Have the task done; returns at once."""

    def result(self) -> Loaded:
        """The rows of the oldest task not yet asked for, once they are there. Raises what its worker raised."""

    def close(self) -> None:
        """End; what is under way is given up."""


def start(kind: Literal["threads", "processes"], count: int, load: Load, shape: tuple[int, ...]) -> Workers:
    """`count` workers and a ring of `shape`. Processes get a copy of `load`, which must pickle."""
    # A tenth of a sample's time in two runs of three; of the caller too, who makes floats of the pixels.
    keep_freed_memory()
    return Threads(load, count, shape) if kind == "threads" else Processes(load, count, shape)


class Threads:
    """Threads of this process: they start at once, and take turns at the interpreter's lock between C calls."""

    def __init__(self, load: Load, count: int, shape: tuple[int, ...]) -> None:
        self.ring: Ring = np.empty(shape, np.uint8)
        self._load = load
        self._pool = ThreadPoolExecutor(count, thread_name_prefix=NAME)
        self._futures: deque[Future[Loaded]] = deque()
        self._use_one_core_each(count)

    def _use_one_core_each(self, count: int) -> None:
        """Without this each thread's torch operations would start as many threads again as the machine has cores."""
        num_threads = torch.get_num_threads()
        all_here = Barrier(count)

        def settle() -> None:
            torch.get_num_threads()  # settles this thread's number, as its first operation would do later on
            torch.set_num_threads(1)  # of this thread, and of those that are yet to settle
            all_here.wait()

        for future in [self._pool.submit(settle) for _ in range(count)]:
            future.result()
        torch.set_num_threads(num_threads)

    def submit(self, task: Task) -> None:
        self._futures.append(self._pool.submit(_run, self._load, self.ring, task))

    def result(self) -> Loaded:
        return self._futures.popleft().result()

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)


@dataclass
class _Worker:
    process: BaseProcess
    connection: Connection
    tasks: dict[int, Task] = field(default_factory=dict)  # sent, not answered


class Processes:
    """Processes; a dead one ends the loading with a TrainingError that names it and what it had in hand."""

    def __init__(self, load: Load, count: int, shape: tuple[int, ...]) -> None:
        # Through shared memory and not through the pipe: a start would block there until its process reads, so that
        # one process would begin only when the one before had.
        program = ForkingPickler.dumps(load)
        ring_bytes = math.prod(shape)
        self._file = _anonymous_file(ring_bytes + len(program))
        memory = mmap.mmap(self._file, 0)
        memory[ring_bytes:] = program
        self.ring: Ring = np.frombuffer(memory, np.uint8, ring_bytes).reshape(shape)
        self._queue: deque[tuple[int, Task]] = deque()
        self._answers: dict[int, Loaded | BaseException] = {}
        self._submitted = self._taken = 0
        self._workers: list[_Worker] = []
        try:
            for _ in range(count):
                self._workers.append(self._start(shape))
        except BaseException:
            self.close()
            raise

    def _start(self, shape: tuple[int, ...]) -> _Worker:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["__main__", __name__])
        here, there = context.Pipe()
        with there:
            arguments = (there, _Descriptor(self._file), shape)
            process = context.Process(target=_serve, args=arguments, name=NAME, daemon=True)
            process.start()
        return _Worker(process, here)

    def submit(self, task: Task) -> None:
        self._queue.append((self._submitted, task))
        self._submitted += 1
        self._feed()

    def result(self) -> Loaded:
        while self._taken not in self._answers:
            self._receive()
        answer = self._answers.pop(self._taken)
        self._taken += 1
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def _feed(self) -> None:
        while self._queue:
            worker = min(self._workers, key=lambda each: len(each.tasks))
            if len(worker.tasks) == QUEUED:
                return
            number, task = self._queue.popleft()
            worker.tasks[number] = task
            try:
                worker.connection.send((number, task))
            except OSError as error:
                raise _death(worker) from error

    def _receive(self) -> None:
        """Wait for an answer or a death."""
        ready = set(wait([each for worker in self._workers for each in (worker.connection, worker.process.sentinel)]))
        for worker in self._workers:
            if worker.connection in ready:
                try:
                    number, answer = worker.connection.recv()
                except (EOFError, OSError) as error:
                    raise _death(worker) from error
                del worker.tasks[number]
                self._answers[number] = answer
            elif worker.process.sentinel in ready:
                raise _death(worker)
        self._feed()

    def close(self) -> None:
        for worker in self._workers:
            worker.connection.close()  # its end: it reads the end of the file, or cannot write
        for worker in self._workers:
            worker.process.join(STOP_SECONDS)
            if worker.process.is_alive():
                worker.process.kill()
                worker.process.join()
            worker.process.close()
        self._workers.clear()
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


def _death(worker: _Worker) -> TrainingError:
    worker.process.join(STOP_SECONDS)
    code = worker.process.exitcode
    how = f"was ended by {signal.Signals(-code).name}" if code is not None and code < 0 else f"ended with code {code}"
    doing = str(next(iter(worker.tasks.values()))) if worker.tasks else "no task"
    hint = "; out of memory, most often: lower loader.workers.count" if code == -signal.SIGKILL else ""
    return TrainingError(f"loader worker process {worker.process.pid} {how} with {doing} in hand{hint}")


def _anonymous_file(size: int) -> int:
    """A descriptor of memory that any number of processes can map, and that goes with the last of them.

    Not /dev/shm: containers give it 64 MiB unless told, and a process that writes past that is killed by a bus error.
    """
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create(NAME)
    else:  # macOS
        with tempfile.TemporaryFile() as file:
            descriptor = os.dup(file.fileno())
    os.ftruncate(descriptor, size)
    return descriptor


class _Descriptor:
    """A file descriptor as an argument of a process."""

    def __init__(self, number: int) -> None:
        self._number = number

    def __reduce__(self) -> tuple[Any, ...]:
        return _open_descriptor, (DupFd(self._number),)


def _open_descriptor(duplicate: Any) -> int:
    return int(duplicate.detach())


# --- in a worker ----------------------------------------------------------------------------------------------------


def _run(load: Load, ring: Ring, task: Task) -> Loaded:
    return load(task.slots, ring[task.buffer, task.first : task.first + len(task.slots.row)])


def _serve(connection: Connection, descriptor: int, shape: tuple[int, ...]) -> None:
    """A worker process: one task after the other, until the pipe is closed or its other end is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal's Ctrl-C is the caller's to answer
    torch.set_num_threads(1)  # it would start a thread for every core of the machine, and so would tokenizers
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    keep_freed_memory()
    memory = mmap.mmap(descriptor, 0)
    ring_bytes = math.prod(shape)
    ring: Ring = np.frombuffer(memory, np.uint8, ring_bytes).reshape(shape)
    load: Load = ForkingPickler.loads(memory[ring_bytes:])
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            number, task = connection.recv()
            connection.send((number, _attempt(load, ring, task)))


def _attempt(load: Load, ring: Ring, task: Task) -> Loaded | BaseException:
    try:
        return _run(load, ring, task)
    except MmflowError as error:
        return error
    except BaseException as error:  # a fault of the program: the caller's traceback would end at the pipe
        told = TrainingError(f"loader worker process {os.getpid()}, {task}: {type(error).__name__}: {error}")
        told.add_note(traceback.format_exc())
        return told


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
