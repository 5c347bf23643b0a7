"""Parallel loading: threads or processes that load rows, and a thread that prepares batches and copies them to the GPU.

Workers return the rows of tasks in order and write pixels into a ring of buffers that they share with the caller.
Processes are forked from a server that has only imported torch: a fork of the caller can hang because of the threads of
Ray or gloo, and importing torch takes each new process seconds. Each process has its own pipe. When one dies its pipe
closes, which is noticed at once, while a shared queue can stay locked or half written. torch's DataLoader shares one:
after a kill -9 it needed five seconds, and named neither the rows nor, in one case of four, the process.
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
from multiprocessing.reduction import ForkingPickler, recv_handle, send_handle
from threading import Barrier
from typing import Literal, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from mmflow.core.errors import MmflowError, TrainingError
from mmflow.core.memory import keep_freed_memory
from mmflow.loading.batches import Batch, Row
from mmflow.loading.plan import Slots

NAME = "mmflow-loader"
QUEUED = 4  # tasks per process. With 2, processes waited for the caller on a busy machine: 1,190 samples/s, not 2,150.
STOP_SECONDS = 5.0  # a process that has not ended by then is killed
STOP_SECONDS = 0.1  # how soon a thread that waits with an item notices that nobody wants it
JOIN_SECONDS = 10.0  # how long closing waits for a batch under way: a read from an object store can take that long

Ring = NDArray[np.uint8]  # (buffers, rows, frames, side, side, 3)
Load = Callable[[Slots, NDArray[np.uint8]], list[Row]]
"""(slots (n,), the pixels to fill (n, frames, side, side, 3)) → their rows."""
Item = TypeVar("Item")


@dataclass(frozen=True)
class Task:
    """Some rows of a batch."""

    batch: str  # in words, for errors
    buffer: int
    first: int  # row of the buffer
    slots: Slots

    def __str__(self) -> str:
        return f"rows {self.first} to {self.first + len(self.slots) - 1} of the batch at {self.batch}"


def start(kind: Literal["threads", "processes"], count: int, load: Load, shape: tuple[int, ...]) -> Workers:
    """`count` workers and a ring of `shape`. Processes get a copy of `load`, which must pickle."""
    # Saves a tenth of a sample's time in two runs of three, also for the caller, who converts the pixels to floats.
    keep_freed_memory()
    return Threads(load, count, shape) if kind == "threads" else Processes(load, count, shape)


class Threads:
    """Threads of this process. They start at once, and share the interpreter's lock between C calls."""

    def __init__(self, load: Load, count: int, shape: tuple[int, ...]) -> None:
        self.ring: Ring = np.empty(shape, np.uint8)
        self._load = load
        self._pool = ThreadPoolExecutor(count, thread_name_prefix=NAME)
        self._futures: deque[Future[list[Row]]] = deque()
        # One core each: otherwise torch operations in each thread would start as many threads as the machine has cores.
        num_threads = torch.get_num_threads()
        all_here = Barrier(count)

        def settle() -> None:
            torch.get_num_threads()  # fixes this thread's number, as its first operation would do later
            torch.set_num_threads(1)  # for this thread, and for threads without a number yet
            all_here.wait()

        for future in [self._pool.submit(settle) for _ in range(count)]:
            future.result()
        torch.set_num_threads(num_threads)

    def submit(self, task: Task) -> None:
        """Start the task; returns at once."""
        self._futures.append(self._pool.submit(_run, self._load, self.ring, task))

    def result(self) -> list[Row]:
        """The rows of the oldest task. Raises what its worker raised."""
        return self._futures.popleft().result()

    def close(self) -> None:
        """Drop the tasks that have not begun, and end."""
        self._pool.shutdown(cancel_futures=True)


@dataclass
class _Worker:
    process: BaseProcess
    connection: Connection
    tasks: dict[int, Task] = field(default_factory=dict)  # sent, not answered


class Processes:
    """Processes, used as `Threads`. `result` and `submit` raise a TrainingError that names a process that died."""

    def __init__(self, load: Load, count: int, shape: tuple[int, ...]) -> None:
        # `load` travels in the shared memory. In a pipe, each start would block until the process reads it, so that
        # the processes would start one after another.
        program = ForkingPickler.dumps(load)
        ring_bytes = math.prod(shape)
        self._file = _anonymous_file(ring_bytes + len(program))
        memory = mmap.mmap(self._file, 0)
        memory[ring_bytes:] = program
        self.ring: Ring = np.frombuffer(memory, np.uint8, ring_bytes).reshape(shape)
        self._queue: deque[tuple[int, Task]] = deque()
        self._answers: dict[int, list[Row] | BaseException] = {}
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
            process = context.Process(target=_serve, args=(there, shape), name=NAME, daemon=True)
            process.start()
        with contextlib.suppress(OSError):  # already dead: that is reported with its first task
            send_handle(here, self._file, process.pid)
        return _Worker(process, here)

    def submit(self, task: Task) -> None:
        self._queue.append((self._submitted, task))
        self._submitted += 1
        self._feed()

    def result(self) -> list[Row]:
        while self._taken not in self._answers:
            self._receive()
        answer = self._answers.pop(self._taken)
        self._taken += 1
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def _feed(self) -> None:
        while self._queue:
            worker = min(self._workers, key=lambda worker: len(worker.tasks))
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
        ready = wait([source for worker in self._workers for source in (worker.connection, worker.process.sentinel)])
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
            worker.connection.close()  # ends the process at its next read or write
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


Workers = Threads | Processes


def _death(worker: _Worker) -> TrainingError:
    worker.process.join(STOP_SECONDS)
    code = worker.process.exitcode
    cause = f"was killed by {signal.Signals(-code).name}" if code and code < 0 else f"ended with code {code}"
    doing = str(next(iter(worker.tasks.values()))) if worker.tasks else "no task"
    hint = "; most often it ran out of memory: lower loader.workers.count" if code == -signal.SIGKILL else ""
    return TrainingError(f"loader worker process {worker.process.pid} {cause} while loading {doing}{hint}")


def _anonymous_file(size: int) -> int:
    """A descriptor of memory that processes can share; the last one that closes it frees it.

    Not /dev/shm: containers limit it to 64 MiB by default, and a process that writes past that dies of a bus error.
    """
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create(NAME)
    else:  # macOS
        with tempfile.TemporaryFile() as file:
            descriptor = os.dup(file.fileno())
    os.ftruncate(descriptor, size)
    return descriptor


# --- in a worker ------------------------------------------------------------------------------------------------------


def _run(load: Load, ring: Ring, task: Task) -> list[Row]:
    return load(task.slots, ring[task.buffer, task.first : task.first + len(task.slots)])


def _serve(connection: Connection, shape: tuple[int, ...]) -> None:
    """A worker process: one task after another, until the pipe is closed at either end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the caller answers the terminal's Ctrl-C
    torch.set_num_threads(1)  # otherwise a thread for every core of the machine, and tokenizers would do the same
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    keep_freed_memory()
    with contextlib.suppress(EOFError, ConnectionError):
        memory = mmap.mmap(recv_handle(connection), 0)
        ring_bytes = math.prod(shape)
        ring: Ring = np.frombuffer(memory, np.uint8, ring_bytes).reshape(shape)
        load: Load = ForkingPickler.loads(memory[ring_bytes:])
        while True:
            number, task = connection.recv()
            answer: list[Row] | BaseException
            try:
                answer = _run(load, ring, task)
            except MmflowError as error:
                answer = error
            except BaseException as error:  # a bug: its traceback would otherwise be lost at the pipe
                answer = TrainingError(f"loader worker process {os.getpid()}, {task}: {type(error).__name__}: {error}")
                answer.add_note(traceback.format_exc())
            connection.send((number, answer))


# --- one batch ahead --------------------------------------------------------------------------------------------------


def prefetch(source: Generator[Item, None, None]) -> Generator[Item, None, None]:
    """The same items, made ahead by a thread: one that waits and one under way.

    Raises the source's error in its place. When the consumer ends, the thread closes the source and ends too. It is a
    daemon, because the interpreter would wait without limit for one that is stuck in a read.
    """
    ahead: queue.Queue[Item | BaseException | None] = queue.Queue(1)
    stopped = threading.Event()

    def put(item: Item | BaseException | None) -> bool:
        while not stopped.is_set():
            with contextlib.suppress(queue.Full):
                ahead.put(item, timeout=STOP_SECONDS)
                return True
        return False

    def make() -> None:
        try:
            with closing(source):
                if all(put(item) for item in source):
                    put(None)
        except BaseException as error:
            put(error)

    thread = threading.Thread(target=make, name=f"{NAME}-ahead", daemon=True)
    thread.start()
    try:
        while (item := ahead.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stopped.set()
        thread.join(JOIN_SECONDS)


def on_device(source: Generator[Batch, None, None], device: torch.device) -> Generator[Batch, None, None]:
    """The batches on `device`, made one ahead. Copies to a GPU go from pinned memory on a stream of their own.

    The consumer's stream waits for a copy, its host does not.
    """
    if device.type != "cuda":
        yield from prefetch(source)
        return
    side: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def copies() -> Generator[tuple[Batch, torch.cuda.Event], None, None]:
        # A new thread uses the first device, where the pinning of every rank would otherwise take memory.
        with torch.cuda.device(device), closing(source):
            for batch in source:
                with torch.cuda.stream(side):
                    copy = batch.map_tensors(lambda tensor: tensor.pin_memory().to(device, non_blocking=True))
                yield copy, side.record_event()

    with closing(prefetch(copies())) as ready:
        for batch, copied in ready:
            current = torch.cuda.current_stream(device)
            current.wait_event(copied)

            def mark_used(tensor: torch.Tensor, stream: torch.cuda.Stream = current) -> torch.Tensor:
                # The memory belongs to the side stream, which would reuse it while the step still reads it.
                tensor.record_stream(stream)
                return tensor

            batch.map_tensors(mark_used)
            yield batch
