"""What malloc does with memory that is freed, where it is glibc's; another's has no such options, and is left alone."""

from __future__ import annotations

import ctypes

TRIM_THRESHOLD, TOP_PAD, MMAP_THRESHOLD, MMAP_MAX = -1, -2, -3, -4  # of <malloc.h>
KEPT_BYTES = 2**31 - 1  # of an int
MAX_HEAP_BYTES = 32 << 20  # the largest threshold that glibc takes


def keep_freed_memory(*, grows_by: int = 0) -> None:
    """Have this process keep what it frees for its next use. By itself malloc gives a block of half a megabyte back to
    the system and asks for it again a millisecond later, and the system clears its pages each time.

    It keeps blocks of up to 32 MiB; of any size where its heap `grows_by` so many bytes at once.
    """
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is None:
        return
    set_option(TRIM_THRESHOLD, KEPT_BYTES)
    if grows_by:
        set_option(MMAP_MAX, 0)
        set_option(TOP_PAD, grows_by)
    else:
        set_option(MMAP_THRESHOLD, MAX_HEAP_BYTES)
