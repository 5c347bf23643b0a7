"""Stages sent to a real Ray head with token authentication, and to a scripted dashboard for the faults of networks."""

from __future__ import annotations

import http.server
import io
import json
import re
import socket
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import requests

from mmflow.cluster import jobs
from mmflow.core.errors import ClusterError, MisuseError

Submit = Callable[..., list[str]]

RECIPE = "workspace: {workspace}\n"
# Each job notes its start in a file, so that a test can count how often it really ran.
NOTE = """\
import os, pathlib, sys, time
workspace = pathlib.Path(open(sys.argv[1]).read().split()[1])
with open(workspace / "runs", "a") as runs:
    runs.write("run\\n")
"""
JOBS = {
    "shard": """\
import mmflow
print("mmflow from", "working_dir" if "working_dir_files" in mmflow.__file__ else mmflow.__file__)
print("tracking", os.environ["MLFLOW_TRACKING_URI"])
(workspace / "manifest.json").touch()
""",
    "pretrain": """\
print("ready", flush=True)
while not (workspace / "go").exists():
    time.sleep(0.1)
(workspace / "manifest.json").touch()
""",
    "distill": """\
print("ready", flush=True)
if (workspace / "runs").read_text() == "run\\n":
    time.sleep(600)
raise ValueError("teacher.digest: no such model")
""",
}


@pytest.fixture
def code(tmp_path: Path) -> Path:
    """A checkout in small."""
    for name, body in JOBS.items():
        path = tmp_path / "code" / "jobs" / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(NOTE + body)
    package = tmp_path / "code" / "mmflow"
    (package / "__pycache__").mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "__pycache__" / "old.pyc").write_text("stale")
    (tmp_path / "workspace").mkdir()
    return tmp_path / "code"


@pytest.fixture
def submit(code: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Submit:
    """Submit a stage of `code`, identity unique to the test; the lines that arrived."""
    monkeypatch.setattr(jobs, "POLL_SECONDS", (0.1, 0.3))
    workspace = tmp_path / "workspace"
    identity = f"{time.time_ns():x}"[-12:]

    def submit(address: str, stage: str, lines: list[str] | None = None, **other: Any) -> list[str]:
        lines = [] if lines is None else lines
        arguments: dict[str, Any] = {
            "identity": identity,
            "recipe_text": RECIPE.format(workspace=workspace),
            "code": code,
            "committed": (workspace / "manifest.json").exists,
            "on_line": lines.append,
        }
        jobs.submit_stage(address, stage=stage, **{**arguments, **other})
        return lines

    return submit


@pytest.fixture
def head(ray_head: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> str:
    """The real head's address, with its token in this test's environment."""
    monkeypatch.setenv("RAY_AUTH_TOKEN", ray_head[1])
    return ray_head[0]


def wait_for(condition: Callable[[], bool], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "not in time"
        time.sleep(0.05)


def runs(tmp_path: Path) -> int:
    return len((tmp_path / "workspace" / "runs").read_text().split())


def message(error: pytest.ExceptionInfo[Exception]) -> str:
    """The error's text, which must be one line."""
    assert "\n" not in str(error.value)
    return str(error.value)


# --- a real head ----------------------------------------------------------------------------------------------------


def test_job_runs_with_our_source_and_its_lines_arrive(
    head: str, submit: Submit, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:9")  # Ray's own client would go there instead
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://tracking:5000")
    lines = submit(head, "shard")
    assert lines[0].startswith("submitted job shard-")
    assert [line for line in lines if line.startswith(("mmflow", "tracking"))] == [
        "mmflow from working_dir",
        "tracking http://tracking:5000",
    ]


def test_submitting_twice_attaches_and_runs_once(head: str, submit: Submit, tmp_path: Path) -> None:
    first: list[str] = []
    second: list[str] = []
    with ThreadPoolExecutor(2) as pool:
        running = [pool.submit(submit, head, "pretrain", first)]
        wait_for(lambda: "ready" in first)
        running += [pool.submit(submit, head, "pretrain", second)]
        wait_for(lambda: "ready" in second)
        (tmp_path / "workspace" / "go").touch()
        for each in running:
            each.result(timeout=30)
    assert first[0].startswith("submitted")
    assert second[0].startswith("attached")
    assert submit(head, "pretrain") == [], "a committed stage is not submitted again"
    assert runs(tmp_path) == 1


def test_taken_id_counts_as_started(head: str, submit: Submit, code: Path) -> None:
    """Ray answers HTTP 500 to a taken id, which must not read as a fault of the cluster."""
    uri, package = jobs.pack(code, "a: b\n")
    job = {"submission_id": f"taken-{time.time_ns()}", "entrypoint": "true", "runtime_env": {"working_dir": uri}}
    cluster = jobs.Cluster(head, print, 0)
    assert cluster.start(job, package) is True
    assert cluster.start(job, package) is False


def test_stopped_and_failed_jobs_are_one_line_each_and_numbered_attempts(
    ray_head: tuple[str, str], head: str, submit: Submit, tmp_path: Path
) -> None:
    lines: list[str] = []

    def stop() -> None:
        wait_for(lambda: "ready" in lines)
        signed = {"Authorization": f"Bearer {ray_head[1]}"}
        requests.post(f"{head}/api/jobs/{lines[0].split()[2]}/stop", headers=signed, timeout=10).raise_for_status()

    with ThreadPoolExecutor(1) as pool:
        stopping = pool.submit(stop)
        with pytest.raises(ClusterError, match=r"^distill: job distill-\w+-a1 STOPPED: ") as error:
            submit(head, "distill", lines)
        stopping.result()
    message(error)
    with pytest.raises(ClusterError) as error:
        submit(head, "distill")
    assert "-a2 FAILED: ValueError: teacher.digest: no such model; whole log: `RAY_ADDRESS=" in message(error)
    assert runs(tmp_path) == 2


@pytest.mark.parametrize(("token", "seen"), [("wrong", "refuses this token (HTTP 403)"), ("", "asks for a token")])
def test_wrong_or_missing_token_is_told_in_one_line(
    head: str,
    token: str,
    seen: str,
    submit: Submit,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", token)
    monkeypatch.setenv("HOME", str(tmp_path))  # where no ~/.ray/auth_token of this machine is found
    with pytest.raises(ClusterError, match=re.escape(seen)) as error:
        submit(head, "shard")
    assert "export RAY_AUTH_TOKEN=…" in message(error)


# --- a scripted dashboard -------------------------------------------------------------------------------------------


class Dashboard:
    """Answers from `statuses` and `logs`, one entry a request and the last for ever; an int is an HTTP status."""

    def __init__(self) -> None:
        self.version: object = {"ray_version": "2.60.0"}
        self.statuses: list[str | int] = ["SUCCEEDED"]
        self.logs: list[str | int] = [""]
        self.jobs: dict[str, dict[str, Any]] = {}
        self.tokens: set[str | None] = set()
        self.address = ""

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, object]:
        if path == "/api/version":
            return 200, self.version
        if path.startswith("/api/packages/"):
            return 200 if method == "PUT" else 404, {}
        if method == "POST":
            job = json.loads(body)
            self.jobs[job["submission_id"]] = job
            return 200, {}
        if path.split("/")[3] not in self.jobs:
            return 404, {}
        script = self.logs if path.endswith("/logs") else self.statuses
        entry = script.pop(0) if len(script) > 1 else script[0]
        if isinstance(entry, int):
            return entry, {}
        return 200, {"logs": entry} if path.endswith("/logs") else {"status": entry}


@pytest.fixture
def dashboard() -> Iterator[Dashboard]:
    """A local HTTP server in a thread."""
    script = Dashboard()

    class Handler(http.server.BaseHTTPRequestHandler):
        def respond(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            script.tokens.add(self.headers.get("Authorization"))
            status, value = script.answer(self.command, self.path, body)
            self.send_response(status)
            self.end_headers()
            self.wfile.write(json.dumps(value).encode())

        do_GET = do_PUT = do_POST = respond

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    script.address = f"http://127.0.0.1:{server.server_port}"
    yield script
    server.shutdown()
    server.server_close()


def answers(*values: bool) -> Callable[[], bool]:
    """A function that returns the values in turn, and then True."""
    remaining = iter(values)
    return lambda: next(remaining, True)


def test_outage_of_the_dashboard_costs_no_line(dashboard: Dashboard, submit: Submit) -> None:
    dashboard.statuses = ["PENDING", "RUNNING", 503, 502, "RUNNING", "RUNNING", "SUCCEEDED"]
    dashboard.logs = ["", "one\ntw", 500, "one\ntwo\n 1%\r 9%\r", "", "one\ntwo\n 1%\r 9%\r10%\nend"]
    lines = submit(dashboard.address, "shard", committed=answers(False))
    assert "submitted job" in lines[0]
    assert lines[1:] == ["one", f"{dashboard.address} does not answer (HTTP 503); trying again", "two", "10%", "end"]


@pytest.mark.parametrize(
    ("status", "reason"), [(503, r"no usable answer for 0 s \(HTTP 503\)"), (404, "forgot this job")]
)
def test_a_job_that_cannot_be_followed_ends_in_one_line(
    status: int, reason: str, dashboard: Dashboard, submit: Submit
) -> None:
    dashboard.statuses = ["RUNNING", status]
    with pytest.raises(ClusterError, match=reason) as error:
        submit(dashboard.address, "shard", outage_seconds=0.3)
    message(error)


@pytest.mark.parametrize("status", ["SUCCEEDED", "FAILED"])
def test_committed_manifest_decides_whatever_the_status(status: str, dashboard: Dashboard, submit: Submit) -> None:
    dashboard.statuses = [status]
    submit(dashboard.address, "shard", committed=answers(False, True))
    with pytest.raises(ClusterError, match="-a2 SUCCEEDED: no manifest" if status == "SUCCEEDED" else "-a2 FAILED"):
        submit(dashboard.address, "shard")


def test_job_of_another_workspace_is_followed_by_one_of_ours(dashboard: Dashboard, submit: Submit) -> None:
    dashboard.jobs["shard-1234-a1"] = {}
    dashboard.statuses = ["RUNNING", "SUCCEEDED"]
    lines = submit(dashboard.address, "shard", identity="1234", committed=answers(False, False))
    assert [line.split(" at ")[0] for line in lines] == ["attached to job shard-1234-a1", "submitted job shard-1234-a2"]


def test_ctrl_c_leaves_the_job_and_says_how_to_stop_it(dashboard: Dashboard, submit: Submit) -> None:
    dashboard.statuses, dashboard.logs = ["RUNNING"], ["one\n"]
    lines: list[str] = []

    def interrupt_at_one(line: str) -> None:
        lines.append(line)
        if line == "one":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        submit(dashboard.address, "shard", identity="1234", on_line=interrupt_at_one)
    assert f"`RAY_ADDRESS={dashboard.address} ray job stop shard-1234-a1`" in lines[-1]


def test_submission_carries_no_secret(dashboard: Dashboard, submit: Submit, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "dGhlIHRva2Vu")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "hunter2")
    lines = submit(dashboard.address, "shard", committed=answers(False))
    assert dashboard.tokens == {"Bearer dGhlIHRva2Vu"}
    assert "dGhlIHRva2Vu" not in json.dumps(dashboard.jobs) + "".join(lines)
    assert "hunter2" not in json.dumps(dashboard.jobs)
    assert all(job["runtime_env"]["env_vars"] == {} for job in dashboard.jobs.values())
    dashboard.tokens.clear()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://ada:hunter2@tracking")
    with pytest.raises(MisuseError, match="MLFLOW_TRACKING_URI contains a password") as error:
        submit(dashboard.address, "shard")
    assert "hunter2" not in message(error)
    assert not dashboard.tokens, "refused before anything is sent"


@pytest.mark.parametrize(
    ("version", "reason"),
    [
        ({"ray_version": "2.40.0"}, "the cluster runs Ray 2.40.0, mmflow needs 2.60 or newer"),
        ({"detail": "hello"}, "no Ray dashboard; give the dashboard's port"),
        ("<html>", "no Ray dashboard; give the dashboard's port"),
    ],
)
def test_wrong_version_or_server_is_one_line(
    version: object, reason: str, dashboard: Dashboard, submit: Submit
) -> None:
    dashboard.version = version
    with pytest.raises(ClusterError, match=re.escape(reason)) as error:
        submit(dashboard.address, "shard")
    message(error)
    assert not dashboard.jobs


def test_unreachable_address_is_reported_within_ten_seconds(submit: Submit, monkeypatch: pytest.MonkeyPatch) -> None:
    assert sum(jobs.CHECK_SECONDS) < 10
    monkeypatch.setattr(jobs, "CHECK_SECONDS", (1.0, 1.0))
    with socket.socket() as silent, socket.socket() as closed:
        silent.bind(("127.0.0.1", 0))
        silent.listen()  # accepts and never answers
        closed.bind(("127.0.0.1", 0))
        for listener, reason in ((closed, "Connection refused"), (silent, "no answer within 2 s")):
            began = time.monotonic()
            with pytest.raises(ClusterError, match=rf"no Ray dashboard answers \({reason}\)"):
                submit(f"127.0.0.1:{listener.getsockname()[1]}", "shard")
            assert time.monotonic() - began < 3


@pytest.mark.parametrize("address", ["ray://head:10001", "https://ada:hunter2@head:8265", "http://"])
def test_address_of_another_kind_is_misuse(address: str, submit: Submit) -> None:
    with pytest.raises(MisuseError, match="use http://HEAD:8265") as error:
        submit(address, "shard")
    assert "hunter2" not in message(error)


def test_package_is_reproducible_and_holds_source_only(code: Path) -> None:
    uri, package = jobs.pack(code, "a: b\n")
    (code / "mmflow" / "__init__.py").touch()
    assert jobs.pack(code, "a: b\n") == (uri, package)
    assert jobs.pack(code, "a: c\n")[0] != uri
    with zipfile.ZipFile(io.BytesIO(package)) as archive:
        names = archive.namelist()
        assert archive.read("recipe.yaml") == b"a: b\n"
    assert names == [*sorted(f"jobs/{name}.py" for name in JOBS), "mmflow/__init__.py", "recipe.yaml"]
