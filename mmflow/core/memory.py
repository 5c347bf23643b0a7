"""The memory of this process: the most that was in use, and what malloc does with freed blocks."""

from __future__ import annotations

import contextlib
import ctypes
import threading
from collections.abc import Callable, Iterator

SAMPLE_SECONDS = 1.0

TRIM_THRESHOLD, TOP_PAD, MMAP_THRESHOLD, MMAP_MAX = -1, -2, -3, -4  # of glibc's <malloc.h>
NEVER = -1  # as a threshold: free memory at the heap's end is never returned
MAX_HEAP_BYTES = 32 << 20  # the largest threshold that glibc takes


@contextlib.contextmanager
def watch_memory() -> Iterator[Callable[[], int]]:
    """Sample the memory of this process and its children while the block runs; the function returns the peak in
    bytes."""
    peak = 0
    ended = threading.Event()

    def watch() -> None:
        nonlocal peak
        while True:
            peak = max(peak, _memory_in_use())
            if ended.wait(SAMPLE_SECONDS):
                return

    thread = threading.Thread(target=watch, name="memory-watch", daemon=True)
    thread.start()
    try:
        yield lambda: peak
    finally:
        ended.set()
        thread.join()


def _memory_in_use() -> int:
    """Bytes. Shared memory (libraries, Ray's object store) counts once: a sum of resident sizes would count it for
    every process, and the exact figure, PSS, costs a tenth of a core to read."""
    import psutil

    this = psutil.Process()
    private, shared = 0, 0
    for process in [this, *this.children(recursive=True)]:
        with contextlib.suppress(psutil.Error):
            memory = process.memory_info()
            mapped = getattr(memory, "shared", 0)  # only Linux reports it
            private += memory.rss - mapped
            shared = max(shared, mapped)
    return private + shared


def keep_freed_memory(*, grows_by: int = 0) -> None:
    """Have malloc keep freed memory for its next use. By default glibc returns a block of half a megabyte to the system
    and asks for it again a millisecond later, and the system clears its pages each time.

    The heap's end is never returned: a threshold of 2 GiB, the largest that an int holds, was just exceeded by every
    step of a training, whose pages the system then cleared in every step. Blocks of up to 32 MiB are kept; with
    `grows_by`, blocks of any size, and the heap grows by that many bytes at once.
    Does nothing where malloc is not glibc's.
    """
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is None:
        return
    set_option(TRIM_THRESHOLD, NEVER)
    if grows_by:
        set_option(MMAP_MAX, 0)
        set_option(TOP_PAD, grows_by)
    else:
        set_option(MMAP_THRESHOLD, MAX_HEAP_BYTES)
