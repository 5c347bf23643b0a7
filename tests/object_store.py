"""An object store as a process of its own: moto's server, which answers as S3 does."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator

from tests.registry.mlflow_server import free_port

BUCKET = "bucket"
START_SECONDS = 60.0
CREDENTIALS = {"AWS_ACCESS_KEY_ID": "any", "AWS_SECRET_ACCESS_KEY": "any"}


@contextlib.contextmanager
def object_store() -> Iterator[str]:
    """The URI of a workspace in a bucket of an empty store, for processes that have `CREDENTIALS`."""
    port = free_port()
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(
        command, env=os.environ | CREDENTIALS, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    make = urllib.request.Request(f"http://127.0.0.1:{port}/{BUCKET}", method="PUT")
    ask = urllib.request.build_opener(urllib.request.ProxyHandler({})).open
    deadline = time.monotonic() + START_SECONDS
    try:
        while True:
            assert server.poll() is None, "the server ended"
            try:
                ask(make, timeout=5).close()
            except OSError:
                assert time.monotonic() < deadline, "no answer"
                time.sleep(0.1)
            else:
                break
        yield f"s3://{BUCKET}/workspace?endpoint_override=127.0.0.1:{port}&scheme=http&region=us-east-1"
    finally:
        server.kill()
        server.wait()
