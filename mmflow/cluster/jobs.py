"""A client of Ray's jobs that runs a stage on a cluster exactly once, whatever fails between here and there.

It speaks the REST API of Ray's own client (ray 2.60, dashboard/modules/job/sdk.py). That client has no timeouts, never
retries, reports a duplicate job only as the text of an HTTP 500, and RAY_ADDRESS overrides the address it is given.

The job brings mmflow's source and the recipe. The cluster's image brings Python, Ray and mmflow's dependencies.
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
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import requests

from mmflow.core.errors import ClusterError, MisuseError

CHECK_SECONDS = (3.0, 5.0)  # (connect, answer): a wrong address is reported within 8 s
REQUEST_SECONDS = (3.0, 30.0)
OUTAGE_SECONDS = 600.0  # a head that restarts on a new machine takes a few minutes
POLL_SECONDS = (0.5, 10.0)  # first and longest pause between two looks at a job
ALIVE = ("PENDING", "RUNNING")
OLDEST_RAY = (2, 60)  # that mmflow is tested with

Answer = TypeVar("Answer")


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

    Submitting again attaches to the running job; after a job that ended without a manifest, it starts the next attempt.
    Ctrl-C leaves the job running. Raises MisuseError if nothing could be sent, ClusterError if the cluster refuses the
    job or it ends without a manifest.

    Args:
        address: of the dashboard, such as `http://head:8265`.
        code: the folder with mmflow/, jobs/ and pipelines/, which are sent.
        committed: whether the manifest is there. This alone decides success: a job that succeeded can read FAILED
            (ray#65608), and one that reads SUCCEEDED may have written to another workspace.
        on_line: receives each line of the job's log, without its line end.
        outage_seconds: how long a silent dashboard is waited for.
    """
    if not (code / "jobs" / f"{stage}.py").is_file():
        raise MisuseError(f"{code}: there is no jobs/{stage}.py to submit; run mmflow from a checkout")
    package_uri, package = pack(code, recipe_text)
    runtime_env = {"working_dir": package_uri, "env_vars": _driver_environment()}
    if committed():
        return
    cluster = Cluster(address, on_line, outage_seconds)
    cluster.check()
    for attempt in itertools.count(1):
        job_id = f"{stage}-{identity}-a{attempt}"
        job = {
            "submission_id": job_id,
            "entrypoint": f"python jobs/{stage}.py recipe.yaml",
            "runtime_env": runtime_env,
        }
        ray_job = f"`RAY_ADDRESS={cluster.address} ray job {{}} {job_id}`"
        try:
            details = cluster.insist(cluster.details, job_id)
            if details is not None and details["status"] not in ALIVE:
                continue
            attached = details is not None or not cluster.insist(cluster.start, job, package)
            on_line(f"{'attached to' if attached else 'submitted'} job {job_id} at {cluster.address}")
            status, error = cluster.follow(job_id)
        except KeyboardInterrupt:
            on_line(f"{job_id} keeps running; the same command attaches to it; stop it with {ray_job.format('stop')}")
            raise
        if committed():
            return
        if status == "SUCCEEDED":
            if attached:
                continue  # it was for another workspace, so ours is the next attempt
            error = "no manifest in the workspace as seen from here; use one that the cluster shares (s3://, gs://)"
        raise ClusterError(f"{stage}: job {job_id} {status}: {error}; whole log: {ray_job.format('logs')}")


def pack(code: Path, recipe_text: str) -> tuple[str, bytes]:
    """The job's working directory, as Ray's URI and a zip: our source without caches, and recipe.yaml.

    The same input gives the same bytes and URI, so the cluster keeps one copy.
    """
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
        raise MisuseError(f"MLFLOW_TRACKING_URI contains a password, which the Ray dashboard would show; {advice}")
    return {"MLFLOW_TRACKING_URI": uri} if uri else {}


def _base(address: str) -> str:
    url = address if "://" in address else f"http://{address}"
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.password:
        shown = "…@" + url.rpartition("@")[2] if "@" in url else address  # keeps a password out of terminals and logs
        raise MisuseError(f"{shown}: not a dashboard's address; use http://HEAD:8265, with the token in RAY_AUTH_TOKEN")
    return url.rstrip("/")


def _token() -> str:
    """The token from Ray's own places in Ray's own order: variable, file named by a variable, ~/.ray/auth_token.

    RAY_AUTH_MODE=disabled is about this machine's Ray: it hides that Ray's file, not a token given for the cluster.
    """
    token, file = os.environ.get("RAY_AUTH_TOKEN", "").strip(), os.environ.get("RAY_AUTH_TOKEN_PATH", "")
    path = Path(file).expanduser() if file else Path.home() / ".ray" / "auth_token"
    if not token and (file or (os.environ.get("RAY_AUTH_MODE", "").lower() != "disabled" and path.is_file())):
        try:
            token = path.read_text().strip()
        except OSError as error:
            raise MisuseError(f"{path}: {error.strerror}; point RAY_AUTH_TOKEN_PATH at the cluster's token") from error
    if re.search(r"[^!-~]", token):  # requests would quote the whole token in its own error
        raise MisuseError("the Ray token contains white space or a control character; export RAY_AUTH_TOKEN again")
    return token


class _OutageError(Exception):
    """The cluster gave no usable answer to this request; the next one may get one."""


class Cluster:
    """The jobs API of one Ray dashboard."""

    def __init__(self, address: str, on_line: Callable[[str], None], outage_seconds: float) -> None:
        self.address, self.on_line, self.outage_seconds = _base(address), on_line, outage_seconds
        self.session, token = requests.Session(), _token()

        def sign(request: requests.PreparedRequest) -> requests.PreparedRequest:
            request.headers["Authorization"] = f"Bearer {token}"
            return request

        self.session.auth = sign if token else None  # not as a header, which requests lets ~/.netrc overwrite

    def call(
        self, method: str, path: str, seconds: tuple[float, float] = REQUEST_SECONDS, **body: Any
    ) -> requests.Response:
        """One request with a timeout. Raises _OutageError without an answer, ClusterError if the token is refused."""
        body |= {"timeout": seconds, "allow_redirects": False}  # a login page would answer 200 for the dashboard
        try:
            answer = self.session.request(method, self.address + path, **body)
        except requests.RequestException as error:
            root: BaseException = error  # requests wraps the system's plain message in three layers
            while (inner := root.__cause__ or root.__context__) is not None:
                root = inner
            slow = f"no answer within {sum(seconds):.0f} s" if isinstance(error, requests.Timeout) else None
            raise _OutageError(slow or getattr(root, "strerror", None) or str(root)) from error
        if answer.status_code in (401, 403):
            reason = "asks for a token (HTTP 401)" if answer.status_code == 401 else "refuses this token (HTTP 403)"
            raise ClusterError(f"{self.address}: it {reason}; `export RAY_AUTH_TOKEN=…` with this cluster's token")
        return answer

    def insist(self, request: Callable[..., Answer], *arguments: Any) -> Answer:
        """The result of `request`, repeated with growing pauses until the outage lasts too long."""
        pause, longest = POLL_SECONDS
        began = time.monotonic()
        while True:
            try:
                return request(*arguments)
            except _OutageError as outage:
                if time.monotonic() - began > self.outage_seconds:
                    reason = f"no usable answer for {self.outage_seconds:.0f} s ({outage})"
                    advice = "a job there keeps running; the same command attaches to it once the dashboard answers"
                    raise ClusterError(f"{self.address}: {reason}; {advice}") from outage
                if pause == POLL_SECONDS[0]:
                    self.on_line(f"{self.address} does not answer ({outage}); trying again")
            time.sleep(pause)
            pause = min(2 * pause, longest)

    def check(self) -> None:
        """Raise ClusterError if no dashboard answers or its Ray is too old."""
        try:
            answer = self.call("GET", "/api/version", seconds=CHECK_SECONDS)
            version = str(answer.json()["ray_version"])
            numbers = tuple(int(number) for number in version.split(".")[:2])
        except _OutageError as outage:
            advice = "check the address, or bring the dashboard to this machine with `ray dashboard cluster.yaml`"
            raise ClusterError(f"{self.address}: no Ray dashboard answers ({outage}); {advice}") from outage
        except (ValueError, KeyError, TypeError) as error:
            reason = f"the server there (HTTP {answer.status_code}) is no Ray dashboard"
            raise ClusterError(f"{self.address}: {reason}; give the dashboard's port, 8265 unless changed") from error
        if numbers < OLDEST_RAY:
            raise ClusterError(f"{self.address}: the cluster runs Ray {version}, mmflow needs 2.60 or newer there")

    def details(self, job_id: str) -> dict[str, Any] | None:
        """What Ray knows about a job; None if there is no such job."""
        answer = self.call("GET", f"/api/jobs/{job_id}")
        if answer.status_code == 404:
            return None
        if answer.status_code != 200:
            raise _OutageError(f"HTTP {answer.status_code}")
        return dict(answer.json())

    def start(self, job: dict[str, Any], package: bytes) -> bool:
        """Upload the package if it is new and start the job; False if the id is taken already."""
        stored = "/api/packages/" + job["runtime_env"]["working_dir"].replace("://", "/")
        if self.call("GET", stored).status_code != 200:
            upload = self.call("PUT", stored, data=package)
            if upload.status_code != 200:
                raise _OutageError(f"HTTP {upload.status_code} to the upload of {len(package)} bytes of code")
        answer = self.call("POST", "/api/jobs/", json=job)
        if answer.status_code == 200:
            return True
        # A taken id answers HTTP 500 like any other fault: another submitter was faster, or the answer to our first
        # request was lost.
        if self.details(job["submission_id"]) is not None:
            return False
        reason = f"HTTP {answer.status_code}: {_last_error(answer.text.splitlines())}"
        if answer.status_code >= 500:
            raise _OutageError(reason)
        raise ClusterError(f"{self.address}: the cluster refuses job {job['submission_id']} ({reason})")

    def follow(self, job_id: str) -> tuple[str, str]:
        """Pass the job's log on until it ends; its status, and the line that best explains a failure.

        Polls, because a followed log can end cleanly while its job continues (ray#60665).
        """
        first, longest = POLL_SECONDS
        tail: deque[str] = deque(maxlen=50)
        seen, pause = 0, first
        while True:
            if (details := self.insist(self.details, job_id)) is None:
                raise ClusterError(
                    f"{job_id}: the cluster forgot this job, its head was replaced; run the command again"
                )
            ended = details["status"] not in ALIVE
            asked = time.monotonic()
            log = self._log(job_id, seen, tries=3 if ended else 1)
            cost = time.monotonic() - asked
            end = len(log) if ended else log.rfind("\n") + 1  # half a line waits for its other half
            lines = log[seen:end].removesuffix("\n").split("\n") if end > seen else []
            for line in lines:
                shown = line.rstrip("\r").rpartition("\r")[2]  # of a progress bar, what a terminal would show last
                tail.append(shown)
                self.on_line(shown)
            if ended:
                return details["status"], _last_error(tail) or _last_error((details.get("message") or "").split("\n"))
            seen = max(seen, end)
            pause = first if lines else min(1.5 * pause, longest)
            time.sleep(max(pause, min(9 * cost, 60)))  # Ray sends the whole log each time: a tenth of the time at most

    def _log(self, job_id: str, seen: int, tries: int) -> str:
        """The job's whole log so far; empty if it is not longer than what was seen."""
        for number in range(tries):
            time.sleep(min(number, 1))
            with contextlib.suppress(_OutageError):
                answer = self.call("GET", f"/api/jobs/{job_id}/logs")
                if answer.status_code == 200 and len(log := str(answer.json()["logs"])) >= seen:
                    return log  # Ray answers 200 and an empty log while the job's node is out of reach
        return ""


def _last_error(lines: Iterable[str]) -> str:
    """The last line that reads like an error, else the last line with text."""
    filled = [line.strip() for line in lines if line.strip()]
    errors = [line for line in filled if re.search(r"(Error|Exception|error)\b.{0,40}:", line)]
    return (errors or filled or [""])[-1]
