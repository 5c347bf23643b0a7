"""Our Ray Jobs client: a stage sent to a cluster runs once, whatever breaks between here and there.

It speaks the REST API of Ray's own client (ray 2.60, dashboard/modules/job/sdk.py) instead of importing it, because
that one waits for ever on a silent head, never retries, and goes where RAY_ADDRESS says rather than where --submit
says. The job brings mmflow's source and the recipe; the cluster's image brings Python, Ray and what mmflow depends on.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import itertools
import os
import re
import time
import zipfile
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import requests

from mmflow.core.errors import ClusterError, MisuseError

CHECK_SECONDS = (3.0, 5.0)  # (connect, answer): a wrong address is told within 8 s
REQUEST_SECONDS = (3.0, 30.0)
OUTAGE_SECONDS = 600.0  # a head that restarts on a new machine takes a few minutes
POLL_SECONDS = (0.5, 10.0)  # first and longest pause between two looks at a job
ALIVE = ("PENDING", "RUNNING")

Answer = TypeVar("Answer")


class _OutageError(Exception):
    """The cluster gave no usable answer to this request; the next one may fare better."""


@dataclass(frozen=True)
class _Cluster:
    address: str
    session: requests.Session
    on_line: Callable[[str], None]
    outage_seconds: float


def submit_stage(
    address: str,
    *,
    stage: str,
    identity: str,
    recipe_text: str,
    code: Path,
    committed: Callable[[], bool],
    on_line: Callable[[str], None],
    outage_seconds: float = OUTAGE_SECONDS,
) -> None:
    """Run `jobs/<stage>.py` on a cluster and return when the stage's manifest is committed.

    `address` is the dashboard's (`http://head:8265`). `code` holds the folders mmflow/, jobs/ and pipelines/ to send.
    `recipe_text` is the resolved recipe. `committed` tells whether the manifest is there: it alone decides success,
    because a job that succeeded can read FAILED (ray#65608) and one that reads SUCCEEDED may have written to another
    workspace. `on_line` gets each line of the job's log, without its line end.

    Submitting again attaches to the running job; after a job that ended without a manifest it starts the next
    attempt. Ctrl-C leaves the job running. A dashboard that is silent for up to `outage_seconds` is waited for.
    Raises MisuseError where nothing could be sent, ClusterError where the cluster refuses or the job ends in vain.
    """
    package_uri, package = pack(code, stage, recipe_text)
    runtime_env = {"working_dir": package_uri, "env_vars": _driver_environment()}
    entrypoint = f"python jobs/{stage}.py recipe.yaml"
    if committed():
        return
    cluster = _Cluster(_base(address), _session(), on_line, outage_seconds)
    _check(cluster)
    for attempt in itertools.count(1):
        job_id = f"{stage}-{identity}-a{attempt}"
        by_hand = f"RAY_ADDRESS={cluster.address} ray job {{}} {job_id}"
        try:
            found = _insist(cluster, _details, job_id)
            if found is not None and found["status"] not in ALIVE:
                continue
            job = {"submission_id": job_id, "entrypoint": entrypoint, "runtime_env": runtime_env}
            attached = found is not None or not _insist(cluster, _start, job, package)
            on_line(f"{'attached to' if attached else 'submitted'} job {job_id} at {cluster.address}")
            status, error = _follow(cluster, job_id)
        except KeyboardInterrupt:
            on_line(
                f"{job_id} runs on if it began; the same command attaches to it; to stop: `{by_hand.format('stop')}`"
            )
            raise
        if committed():
            return
        if status == "SUCCEEDED":
            if attached:
                continue  # it was for another workspace, so ours is the next attempt
            error = "no manifest in the workspace as seen from here; use one that the cluster shares (s3://, gs://)"
        raise ClusterError(f"{stage}: job {job_id} {status}: {error}; whole log: `{by_hand.format('logs')}`")


def pack(code: Path, stage: str, recipe_text: str) -> tuple[str, bytes]:
    """The job's working directory, as Ray's URI for it and a zip: our source without caches, and recipe.yaml.

    The same input gives the same bytes and so the same URI, of which the cluster keeps one copy.
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]*", stage) or not (code / "jobs" / f"{stage}.py").is_file():
        raise MisuseError(f"{code}: no jobs/{stage}.py to submit; run from a checkout of mmflow or name another stage")
    files = {"recipe.yaml": recipe_text.encode()}
    for folder in ("mmflow", "jobs", "pipelines"):
        for path in (code / folder).rglob("*"):
            name = path.relative_to(code)
            if path.is_file() and not any(part == "__pycache__" or part.startswith(".") for part in name.parts):
                files[name.as_posix()] = path.read_bytes()
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for member, body in sorted(files.items()):
            entry = zipfile.ZipInfo(member)  # dated 1980, whatever the file's own time
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, body, zipfile.ZIP_DEFLATED)
    package = buffer.getvalue()
    return f"gcs://_ray_pkg_{hashlib.sha256(package).hexdigest()[:32]}.zip", package


def _driver_environment() -> dict[str, str]:
    """What the job inherits from here: the tracking server's address, and no credentials."""
    uri = os.environ.get("MLFLOW_TRACKING_URI", "")
    if urlsplit(uri).password:
        advice = "take it out and set MLFLOW_TRACKING_USERNAME and _PASSWORD on the cluster's nodes"
        raise MisuseError(f"MLFLOW_TRACKING_URI carries a password, which the Ray dashboard would show; {advice}")
    return {"MLFLOW_TRACKING_URI": uri} if uri else {}


def _base(address: str) -> str:
    url = address if "://" in address else f"http://{address}"
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.password:
        shown = "…@" + url.rpartition("@")[2] if "@" in url else address  # a password stays out of terminals and logs
        raise MisuseError(f"{shown}: not a dashboard's address; use http://HEAD:8265, with the token in RAY_AUTH_TOKEN")
    return url.rstrip("/")


def _session() -> requests.Session:
    session, token = requests.Session(), _token()

    def sign(request: requests.PreparedRequest) -> requests.PreparedRequest:
        request.headers["Authorization"] = f"Bearer {token}"
        return request

    session.auth = sign if token else None  # not as a header, which requests lets ~/.netrc overwrite
    return session


def _token() -> str:
    """The token of Ray's own places in Ray's own order: variable, file named by a variable, ~/.ray/auth_token.

    RAY_AUTH_MODE=disabled is about this machine's Ray: it hides that Ray's file, not a token given for the cluster.
    """
    token, named = os.environ.get("RAY_AUTH_TOKEN", "").strip(), os.environ.get("RAY_AUTH_TOKEN_PATH", "")
    default = Path.home() / ".ray" / "auth_token"
    if not token and (named or (os.environ.get("RAY_AUTH_MODE", "").lower() != "disabled" and default.is_file())):
        path = Path(named).expanduser() if named else default
        try:
            token = path.read_text().strip()
        except OSError as error:
            raise MisuseError(f"{path}: {error.strerror}; point RAY_AUTH_TOKEN_PATH at the cluster's token") from error
    if re.search(r"[^!-~]", token):  # requests would quote the whole token in its own error
        raise MisuseError("the Ray token holds white space or a control character; export RAY_AUTH_TOKEN anew")
    return token


def _call(
    cluster: _Cluster, method: str, path: str, seconds: tuple[float, float] = REQUEST_SECONDS, **body: Any
) -> requests.Response:
    """One bounded request. Raises _OutageError where none came back, ClusterError where the token is refused."""
    body |= {"timeout": seconds, "allow_redirects": False}  # a login page would answer 200 in the dashboard's place
    try:
        answer = cluster.session.request(method, cluster.address + path, **body)
    except requests.RequestException as error:
        root: BaseException = error  # requests wraps the system's plain words in three layers of its own
        while (inner := root.__cause__ or root.__context__) is not None:
            root = inner
        slow = f"no answer within {sum(seconds):.0f} s" if isinstance(error, requests.Timeout) else None
        raise _OutageError(slow or getattr(root, "strerror", None) or str(root)) from error
    if answer.status_code in (401, 403):
        seen = "asks for a token (HTTP 401)" if answer.status_code == 401 else "refuses this token (HTTP 403)"
        raise ClusterError(f"{cluster.address}: it {seen}; `export RAY_AUTH_TOKEN=…` with this cluster's token")
    return answer


def _check(cluster: _Cluster) -> None:
    try:
        answer = _call(cluster, "GET", "/api/version", seconds=CHECK_SECONDS)
        version = str(answer.json()["ray_version"])
        numbers = tuple(int(number) for number in version.split(".")[:2])
    except _OutageError as outage:
        advice = "check the address, or bring the dashboard to this machine with `ray dashboard cluster.yaml`"
        raise ClusterError(f"{cluster.address}: no Ray dashboard answers ({outage}); {advice}") from outage
    except (ValueError, KeyError, TypeError) as error:
        seen = f"what answers (HTTP {answer.status_code}) is no Ray dashboard"
        raise ClusterError(f"{cluster.address}: {seen}; give the dashboard's port, 8265 unless changed") from error
    if numbers < (2, 60):  # the oldest that mmflow is tested with
        raise ClusterError(f"{cluster.address}: the cluster runs Ray {version}, mmflow needs 2.60 or newer there")


def _insist(cluster: _Cluster, request: Callable[..., Answer], *arguments: Any) -> Answer:
    """The answer of `request(cluster, …)`, asked again with growing pauses until the outage lasts too long."""
    pause, longest = POLL_SECONDS
    began = time.monotonic()
    while True:
        try:
            return request(cluster, *arguments)
        except _OutageError as outage:
            if time.monotonic() - began > cluster.outage_seconds:
                seen = f"no usable answer for {cluster.outage_seconds:.0f} s ({outage})"
                advice = "a job there runs on, and the same command attaches to it once the dashboard answers"
                raise ClusterError(f"{cluster.address}: {seen}; {advice}") from outage
            if pause == POLL_SECONDS[0]:
                cluster.on_line(f"{cluster.address} does not answer ({outage}); trying again")
        time.sleep(pause)
        pause = min(2 * pause, longest)


def _details(cluster: _Cluster, job_id: str) -> dict[str, Any] | None:
    """What Ray knows of a job; None where it knows no such job."""
    answer = _call(cluster, "GET", f"/api/jobs/{job_id}")
    if answer.status_code == 404:
        return None
    if answer.status_code != 200:
        raise _OutageError(f"HTTP {answer.status_code}")
    return dict(answer.json())


def _start(cluster: _Cluster, job: dict[str, Any], package: bytes) -> bool:
    """Upload the package where it is new and start the job; False where the id turned out to be taken."""
    stored = "/api/packages/" + job["runtime_env"]["working_dir"].replace("://", "/")
    if _call(cluster, "GET", stored).status_code != 200:
        upload = _call(cluster, "PUT", stored, data=package)
        if upload.status_code != 200:
            raise _OutageError(f"HTTP {upload.status_code} to the upload of {len(package)} bytes of code")
    answer = _call(cluster, "POST", "/api/jobs/", json=job)
    if answer.status_code == 200:
        return True
    # A taken id answers HTTP 500 like any other fault: someone was faster, or our first request got through and only
    # its answer was lost. Either way the job is there.
    if _details(cluster, job["submission_id"]) is not None:
        return False
    seen = f"HTTP {answer.status_code}: {_last_error(answer.text.splitlines())}"
    if answer.status_code >= 500:
        raise _OutageError(seen)
    raise ClusterError(f"{cluster.address}: the cluster refuses job {job['submission_id']} ({seen})")


def _follow(cluster: _Cluster, job_id: str) -> tuple[str, str]:
    """Pass the job's log on until it ends; its status, and the line that best explains a failure.

    Polls, because a followed log can end cleanly while its job goes on (ray#60665).
    """
    first, longest = POLL_SECONDS
    tail: deque[str] = deque(maxlen=50)
    seen, pause = 0, first
    while True:
        if (details := _insist(cluster, _details, job_id)) is None:
            raise ClusterError(f"{job_id}: the cluster forgot this job, its head was replaced; run the command again")
        ended = details["status"] not in ALIVE
        asked = time.monotonic()
        log = _log(cluster, job_id, seen, tries=3 if ended else 1)
        cost = time.monotonic() - asked
        end = len(log) if ended else log.rfind("\n") + 1  # half a line waits for its other half
        lines = log[seen:end].removesuffix("\n").split("\n") if end > seen else []
        for line in lines:
            shown = line.rstrip("\r").rpartition("\r")[2]  # of a progress bar, what a terminal would show last
            tail.append(shown)
            cluster.on_line(shown)
        if ended:
            return details["status"], _last_error(tail) or _last_error((details.get("message") or "").split("\n"))
        seen = max(seen, end)
        pause = first if lines else min(1.5 * pause, longest)
        time.sleep(max(pause, min(9 * cost, 60)))  # Ray sends the whole log each time: a tenth of the time at most


def _log(cluster: _Cluster, job_id: str, seen: int, tries: int) -> str:
    """The job's whole log so far; empty where more than what was seen cannot be had, which says nothing of the job."""
    for number in range(tries):
        time.sleep(min(number, 1))
        with contextlib.suppress(_OutageError):
            answer = _call(cluster, "GET", f"/api/jobs/{job_id}/logs")
            if answer.status_code == 200 and len(log := str(answer.json()["logs"])) >= seen:
                return log  # Ray answers 200 and an empty log while the job's node is out of reach
    return ""


def _last_error(lines: Iterable[str]) -> str:
    """The last line that reads like an error, else the last line with anything on it."""
    spoken = [line.strip() for line in lines if line.strip()]
    errors = [line for line in spoken if re.search(r"(Error|Exception|error)\b.{0,40}:", line)]
    return (errors or spoken or [""])[-1]
