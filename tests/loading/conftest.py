"""The small dataset of tests/dataset, and a check that loaders leave no worker behind."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import psutil
import pytest

from mmflow.loading.workers import NAME
from tests.dataset.handmade import small_dataset

__all__ = ["small_dataset"]


def worker_processes() -> list[int]:
    """The loader worker processes of this process."""
    servers = [child for child in psutil.Process().children() if "multiprocessing.forkserver" in str(child.cmdline())]
    return [worker.pid for server in servers for worker in server.children()]


@pytest.fixture
def no_worker_is_left() -> Iterator[None]:
    yield
    assert [thread for thread in threading.enumerate() if thread.name.startswith(NAME)] == []
    assert worker_processes() == []
