"""Files that are deleted only while nobody reads them, by locks that the kernel drops with their process."""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from pathlib import Path


class Copy:
    """An open file. The shared lock on it, which keeps it from deletion, ends with the last reference."""

    __slots__ = ("descriptor", "used")

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self.used = time.time()
        self._touch()

    def __del__(self) -> None:
        self._touch()
        os.close(self.descriptor)

    def _touch(self) -> None:
        with contextlib.suppress(OSError):  # another user's file counts as longer unread than it is
            os.utime(self.descriptor, (self.used, self.used))


def is_at(descriptor: int, path: Path) -> bool:
    """Whether the open file is the one that has this name."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def size_of(path: Path) -> int:
    """In bytes; 0 for a file that is gone."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def delete_unheld(path: Path) -> bool:
    """Delete a file unless somebody holds a lock on it; whether it is gone."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if is_at(descriptor, path):  # else this name is another's by now
            path.unlink()
        return True
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)
