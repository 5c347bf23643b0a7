"""One MLflow run per training, fed from a local journal, so that a tracking outage never costs a training step.

The trainer appends to a JSONL file and never waits; a daemon thread on the driver sends the lines when MLflow answers.
Both the run (found by its stage identity) and the sent offset (beside the journal) outlive the driver.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from mmflow.core.errors import MisuseError, MmflowError, TrackingError
from mmflow.core.storage import local_path, read_json, suffixed, write_json

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

log = logging.getLogger(__name__)

IDENTITY_TAG = "mmflow.identity"
# Limits of MLflow's API (mlflow/utils/validation.py); PER_CALL limits params and tags.
METRICS_PER_CALL, PER_CALL, NAME_LENGTH, PARAM_LENGTH = 1000, 100, 250, 6000
POLL_SECONDS = 0.5
LONGEST_PAUSE_SECONDS = 30.0
# By default MLflow retries a dead server for up to 4 minutes a call. Here a call gives up in seconds and the mirror
# retries. Telemetry is off because a training machine should only call servers that its owner named.
ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}
Status = Literal["FINISHED", "FAILED", "KILLED"]


def tracking_uri(workspace: str) -> str:
    """MLFLOW_TRACKING_URI, else a SQLite file in the workspace. Raises MisuseError for a remote workspace."""
    if uri := os.environ.get("MLFLOW_TRACKING_URI"):
        return uri
    path = local_path(workspace)
    if path is None:
        where = without_credentials(workspace)
        raise MisuseError(f"{where}: SQLite needs a local disk; set MLFLOW_TRACKING_URI to your MLflow server")
    return f"sqlite:///{path / 'mlflow.db'}"


def without_credentials(text: str) -> str:
    """The text with *** for the user, password and secret query values of every URI in it."""
    text = re.sub(r"://[^/\s]+@", "://***@", text)
    return re.sub(r"([?&][^=&\s]*(?:key|token|secret|password)[^=&\s]*=)[^&\s]+", r"\1***", text, flags=re.IGNORECASE)


def connect(uri: str) -> MlflowClient:
    """A client of the server or database at `uri`. The first call in a process imports MLflow, which takes 2 s."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from mlflow.tracking import MlflowClient

    for name in ("mlflow", "alembic"):  # table creation and migrations at INFO on a user's first command
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("urllib3.connectionpool").addFilter(quiet_retries)
    return MlflowClient(tracking_uri=uri, registry_uri=os.environ.get("MLFLOW_REGISTRY_URI", uri))


def quiet_retries(record: logging.LogRecord) -> bool:
    """Drops urllib3's warnings about retried calls to MLflow: an outage has one line of our own."""
    return "/mlflow/" not in record.getMessage()


@contextlib.contextmanager
def explained(uri: str, doing: str) -> Iterator[None]:
    """Turn any error of MLflow, its HTTP layer or its database within the block into one TrackingError."""
    try:
        yield
    except MmflowError:
        raise
    except Exception as error:
        remedy = "the file's permissions" if uri.startswith("sqlite:") else "MLFLOW_TRACKING_URI and the server"
        raise TrackingError(f"{without_credentials(uri)}: cannot {doing}: {one_line(error)}; check {remedy}") from error


def one_line(error: Exception) -> str:
    """The first line of an error's message, without credentials, short enough to read."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    if "failed with exception" in line:  # MLflow then quotes four nested exceptions of its HTTP layer
        cause = re.search(r"\[Errno -?\d+\] ([\w ]+)|(timed out)", line)
        line = f"no answer ({(cause[1] or cause[2]) if cause else 'connection failed'})"
    return without_credentials(line)[:300].rstrip(". ")


@dataclass(frozen=True, kw_only=True)
class TrainingRun:
    """What MLflow should know about a training. Each stage `identity` has one run, through all restarts."""

    experiment: str
    name: str
    identity: str
    params: Mapping[str, Any] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)


def admitted(name: str) -> str:
    """A metric or parameter name as MLflow admits it: `R@1` becomes `R_at_1`, other odd characters `_`."""
    plain = re.sub(r"[^\w\-. :/]", "_", name.replace("@", "_at_"), flags=re.ASCII)
    parts = [part for part in plain.split("/") if part.strip(". ")]  # MLflow refuses "a//b", "../a", "/a"
    return "/".join(parts)[:NAME_LENGTH].rstrip("/") or "_"


def flatten(params: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested settings as dotted names and text: `{"optimizer": {"lr": 1e-3}}` gives `{"optimizer.lr": "0.001"}`."""
    flat: dict[str, str] = {}
    for name, value in params.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            text = value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)
            flat[admitted(f"{prefix}{name}")] = text[:PARAM_LENGTH]
    return flat


def create_run(uri: str, run: TrainingRun) -> str:
    """The MLflow run id of this stage identity: the run of an earlier attempt reopened, or a new one.

    Raises TrackingError if MLflow refuses or cannot be reached. The next call repairs what a kill left half done.
    """
    with explained(uri, f"open the run {run.name!r}"):
        client = connect(uri)  # before any other import of MLflow, which reads the environment
        from mlflow.entities import Param, RunTag

        experiment = client.get_experiment_by_name(run.experiment)
        database = re.match(r"sqlite:///(.+)/[^/]+$", uri)  # MLflow's own choice would be ./mlruns, wherever "." is
        artifacts = f"file://{database[1]}/mlflow-artifacts" if database else None
        experiment_id = experiment.experiment_id if experiment else client.create_experiment(run.experiment, artifacts)
        earlier = client.search_runs([experiment_id], f"tags.`{IDENTITY_TAG}` = '{run.identity}'", max_results=1)
        own = {IDENTITY_TAG: run.identity}
        opened = earlier[0] if earlier else client.create_run(experiment_id, tags=own, run_name=run.name)
        run_id, known = str(opened.info.run_id), opened.data.params
        client.update_run(run_id, status="RUNNING")  # an earlier attempt may have ended it
        flat = flatten(run.params)
        params = [Param(name, value) for name, value in flat.items() if name not in known]
        # A parameter is immutable in MLflow. One that changed between attempts stays visible as a tag.
        changed = {f"resumed.{name}": value for name, value in flat.items() if known.get(name, value) != value}
        tags = [RunTag(name, value) for name, value in {**run.tags, **changed}.items()]
        for start in range(0, max(len(params), len(tags)), PER_CALL):
            client.log_batch(run_id, params=params[start : start + PER_CALL], tags=tags[start : start + PER_CALL])
        return run_id


class Point(NamedTuple):
    """One value of one metric; `time` in milliseconds since 1970, as MLflow keeps it."""

    name: str
    value: float
    time: int
    step: int


def read_points(journal: Path, offset: int, limit: int = METRICS_PER_CALL) -> tuple[list[Point], int]:
    """The points of the whole lines from byte `offset` on, about `limit` of them, and the offset after them.

    A last line without its newline is still being written and waits for the next call. A line that is no point, such as
    one cut short by a killed writer, is skipped: it would block all that follow.
    """
    points: list[Point] = []
    with contextlib.suppress(FileNotFoundError), journal.open("rb") as stream:
        stream.seek(offset)
        while len(points) < limit and (line := stream.readline()).endswith(b"\n"):
            offset += len(line)
            with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError, OverflowError):
                entry = json.loads(line)
                step, moment = int(entry["step"]), round(entry["time"] * 1000)
                values = [(name, value) for name, value in entry["metrics"].items() if isinstance(value, int | float)]
                points += [Point(admitted(name), float(value), moment, step) for name, value in values]
    return points, offset


class mirror:  # noqa: N801 — used as `with mirror(…):`
    """Send a growing journal to the MLflow run of `run.identity` from a daemon thread, while the block trains.

    Each line of the journal is `{"step": int, "time": seconds since 1970, "metrics": {name: value}}`; the file may not
    exist yet. The block never waits for MLflow and no error of it is raised, except that the end of the block may take
    `last_attempt_seconds`. The run ends FINISHED, FAILED (an exception) or KILLED (KeyboardInterrupt, SystemExit). An
    empty block sends what an outage left.

    How much was sent is written beside the journal, or beside the URI that it is a temporary `copy_of`.
    """

    def __init__(
        self,
        journal: Path,
        run: TrainingRun,
        *,
        uri: str,
        copy_of: str | None = None,
        last_attempt_seconds: float = 15.0,
    ) -> None:
        self.journal, self.run, self.uri, self.where = journal, run, uri, without_credentials(uri)
        self.kept_in = copy_of or str(journal)
        self.sent_uri = suffixed(self.kept_in, ".sent")
        self.last_attempt_seconds = last_attempt_seconds
        self.run_id: str | None = None  # until MLflow has answered once
        self.offset = 0  # bytes of the journal that MLflow has
        self.last_step: dict[str, int] = {}  # of each metric that MLflow has
        self.num_sent = 0  # points, by this process
        self.num_unsent = 0  # points, known when the block has ended
        self.outage: float | None = None  # when it began
        self.status: Status | None = None  # known when the block has ended
        self.ended, self.abandoned = threading.Event(), threading.Event()
        self.thread = threading.Thread(target=self._follow, name="mlflow-mirror", daemon=True)

    def __enter__(self) -> mirror:
        self.thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.status = "FINISHED" if kind is None else "FAILED" if issubclass(kind, Exception) else "KILLED"
        self.ended.set()
        self.thread.join(self.last_attempt_seconds)
        self.abandoned.set()
        self.num_unsent = len(self._unsent(read_points(self.journal, self.offset, limit=sys.maxsize)[0]))
        if self.num_unsent:
            log.warning("%s: %d points could not be sent and stay in %s", self.where, self.num_unsent, self.kept_in)

    def _follow(self) -> None:
        """Send what is new until the block ends; then once more, and close the run."""
        pause, status = 0.0, None
        while status is None:
            self.ended.wait(pause)
            status = self.status  # read before sending, so that the last points are sent before the run is closed
            try:
                self._send()
                if self.outage is not None:
                    seconds, self.outage = time.monotonic() - self.outage, None
                    log.warning("%s: takes metrics again after %.0f s", self.where, seconds)
                if status is not None and self.run_id is not None and not self.abandoned.is_set():
                    connect(self.uri).set_terminated(self.run_id, status)
                pause = POLL_SECONDS
            except Exception as error:  # whatever it is, training continues and the journal keeps the points
                pause = min(2 * pause + POLL_SECONDS, LONGEST_PAUSE_SECONDS)
                if getattr(error, "error_code", None) == "RESOURCE_DOES_NOT_EXIST":
                    self.run_id = None  # the server came back with another database: start again there
                if self.outage is None:
                    self.outage = time.monotonic()
                    log.warning("%s: metrics wait in %s: %s", self.where, self.kept_in, one_line(error))

    def _send(self) -> None:
        """Send all whole lines of the journal. Raises what MLflow raises; what was sent before that stays counted."""
        run_id = self.run_id or self._open()
        client = connect(self.uri)
        from mlflow.entities import Metric

        while not self.abandoned.is_set():
            points, offset = read_points(self.journal, self.offset)
            fresh = self._unsent(points)
            for start in range(0, len(fresh), METRICS_PER_CALL):
                batch = fresh[start : start + METRICS_PER_CALL]
                client.log_batch(run_id, metrics=[Metric(*point) for point in batch])
                self.last_step |= {point.name: point.step for point in batch}
                self.num_sent += len(batch)
            if offset == self.offset:
                return
            self.offset = offset
            # If killed before this line, the next process sends the batch again: MLflow's primary key drops repeats.
            write_json(self.sent_uri, {"run_id": run_id, "offset": offset, "last_step": self.last_step})

    def _open(self) -> str:
        """Find or create the run, and continue where an earlier process stopped sending to it."""
        run_id = create_run(self.uri, self.run)
        self.offset, self.last_step = 0, {}
        with contextlib.suppress(MmflowError, OSError, KeyError, TypeError):
            state = read_json(self.sent_uri)
            if state["run_id"] == run_id and state["offset"] <= self.journal.stat().st_size:
                self.offset, self.last_step = int(state["offset"]), dict(state["last_step"])
        self.run_id = run_id
        return run_id

    def _unsent(self, points: list[Point]) -> list[Point]:
        """The points that are later than those that MLflow has of their metric.

        A training resumed from a checkpoint repeats some steps and appends them again; MLflow keeps the first.
        """
        last, fresh = dict(self.last_step), []
        for point in points:
            if point.step > last.get(point.name, point.step - 1):
                last[point.name] = point.step
                fresh.append(point)
        return fresh
