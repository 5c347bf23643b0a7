"""MLflow's server as a process that tests may kill and start again."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

SERVER = """
import os, sys
uri, artifacts, port = sys.argv[1:]
os.environ |= {"_MLFLOW_SERVER_FILE_STORE": uri, "_MLFLOW_SERVER_REGISTRY_STORE": uri}
os.environ |= {"_MLFLOW_SERVER_ARTIFACT_ROOT": artifacts, "MLFLOW_DISABLE_TELEMETRY": "true"}
from werkzeug.serving import run_simple
from mlflow.server import app
run_simple("127.0.0.1", int(port), app, threaded=True)
"""


def start_server(database: Path, port: int, *, wait: bool = True) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", SERVER, f"sqlite:///{database}", str(database.parent / "artifacts"), str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while wait:
        assert process.poll() is None, "the server ended"
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1)
        except OSError:
            time.sleep(0.1)
        else:
            wait = False
    return process


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
