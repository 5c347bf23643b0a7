"""A real Ray head with token authentication, beside whatever Ray the tests' own process embeds."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import requests

START_SECONDS = 60  # Ray gives a node 30 s to start, and a loaded machine needs a second try


def free_ports(number: int) -> list[int]:
    """Ports that nobody listens on now; all are held until the last is found, so no two are the same."""
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(number)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def start_head(token: str, temp_dir: str) -> tuple[subprocess.Popen[bytes], str]:
    """`ray start --head --block` in a session of its own, and its dashboard's address once that answers."""
    gcs, dashboard, agent, client = free_ports(4)
    ray_keys = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_AUTH_TOKEN_PATH", "RAY_JOB_CONFIG_JSON_ENV_VAR")
    environment = {name: value for name, value in os.environ.items() if name not in ray_keys}
    environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"  # a job's `python` is this one
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--num-cpus=2"]
    command += [f"--port={gcs}", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}"]
    command += [f"--dashboard-agent-listen-port={agent}", f"--ray-client-server-port={client}"]
    command += ["--min-worker-port=0", "--max-worker-port=0", "--node-ip-address=127.0.0.1"]
    command += [f"--temp-dir={temp_dir}", f"--object-store-memory={100 << 20}", "--disable-usage-stats"]
    with open(Path(temp_dir) / "head.log", "wb") as log:
        head = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    address = f"http://127.0.0.1:{dashboard}"
    signed = {"Authorization": f"Bearer {token}"}
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and head.poll() is None:
        with contextlib.suppress(requests.RequestException):
            # The version alone answers before there is an agent to run jobs.
            if requests.get(f"{address}/api/jobs/", headers=signed, timeout=2).status_code == 200:
                return head, address
        time.sleep(0.2)
    stop_head(head)
    raise TimeoutError(f"no Ray head within {START_SECONDS} s: {(Path(temp_dir) / 'head.log').read_text()[-2000:]}")


def stop_head(head: subprocess.Popen[bytes]) -> None:
    """End the head and its children, each by its own process id: `ray stop` would end every Ray on the machine."""
    with contextlib.suppress(psutil.NoSuchProcess):
        for process in [*psutil.Process(head.pid).children(recursive=True), psutil.Process(head.pid)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()  # asked politely, it takes more than 5 s, and nothing of it is kept
    head.wait(timeout=10)


@pytest.fixture(scope="session")
def ray_head() -> Iterator[tuple[str, str]]:
    """(dashboard address, token) of a head with two CPUs. Its environment reaches its own processes only."""
    token = secrets.token_hex(16)
    temp_dir = tempfile.mkdtemp(prefix="rh", dir="/tmp")  # short: a socket's path may have 107 characters
    try:
        try:
            head, address = start_head(token, temp_dir)
        except TimeoutError:
            head, address = start_head(token, temp_dir)
        try:
            yield address, token
        finally:
            stop_head(head)
    finally:
        shutil.rmtree(temp_dir, ignore_errors=True)
