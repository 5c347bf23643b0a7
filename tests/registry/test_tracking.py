"""Every point reaches MLflow once, whatever dies on the way, and the trainer never waits for it."""

import contextlib
import json
import logging
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from mmflow.core.errors import MisuseError, TrackingError
from mmflow.registry.tracking import TrainingRun, admitted, connect, create_run, mirror, tracking_uri
from tests.registry.mlflow_server import free_port, start_server

RUN = TrainingRun(experiment="nightly", name="pretrain", identity="0123456789ab", params={"optimizer": {"lr": 1e-3}})
DRIVER = """
import sys, time
from pathlib import Path
from mmflow.registry.tracking import TrainingRun, mirror
run = TrainingRun(experiment="nightly", name="pretrain", identity="0123456789ab")
with mirror(Path(sys.argv[1]), run, uri=sys.argv[2]) as mirrored:
    while True:
        print(mirrored.num_sent, flush=True)
        time.sleep(0.1)
"""


@pytest.fixture(scope="module")
def template(tmp_path_factory) -> Path:
    """A migrated database to copy: MLflow takes seconds to make one. Made in a workspace, as users' are."""
    workspace = tmp_path_factory.mktemp("workspace")
    uri = tracking_uri(str(workspace))
    assert uri == f"sqlite:///{workspace}/mlflow.db"
    connect(uri).search_experiments()
    assert not (Path.cwd() / "mlruns").exists()
    return workspace / "mlflow.db"


@pytest.fixture
def database(template, tmp_path) -> Path:
    return Path(shutil.copy(template, tmp_path / "mlflow.db"))


@pytest.fixture(autouse=True)
def no_tracking_server(monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def append(journal: Path, steps: range, **extra: float) -> None:
    with journal.open("a") as stream:
        for step in steps:
            metrics = {"loss": 1 / (step + 1), "valid/R@1": step / 100, **extra}
            stream.write(json.dumps({"step": step, "time": 1.8e9 + step, "metrics": metrics}) + "\n")


def stored(database: Path, name: str) -> list[tuple[int, float]]:
    """(step, value) of every row that MLflow keeps of a metric, over all runs: a point sent twice shows twice."""
    with sqlite3.connect(database) as connection:
        rows = connection.execute("select step, value from metrics where key = ? order by step", [name]).fetchall()
    return [(int(step), float(value)) for step, value in rows]


@pytest.fixture
def port() -> int:
    return free_port()


def test_server_killed_in_mid_stream_costs_no_point_and_no_time(database, port, tmp_path, caplog):
    caplog.set_level(logging.WARNING, logger="mmflow")
    journal, uri = tmp_path / "journal.jsonl", f"http://127.0.0.1:{port}"
    server = start_server(database, port)
    waits: list[float] = []
    try:
        with mirror(journal, RUN, uri=uri) as mirrored:
            step = 0
            while step < 900:
                before = time.monotonic()
                append(journal, range(step, step + 1))
                waits.append(time.monotonic() - before)
                step += 1
                time.sleep(0.005)
                if step == 300:
                    deadline = time.monotonic() + 60
                    while not mirrored.num_sent and time.monotonic() < deadline:
                        time.sleep(0.05)
                    server.send_signal(signal.SIGKILL)
                    server.wait()
                if step == 600:
                    sent = mirrored.num_sent
                    assert 0 < sent < 1200
                    assert mirrored.outage is not None
                    server = start_server(database, port)
                    append(journal, range(600))  # as a training does that resumes from an early checkpoint
        assert mirrored.num_unsent == 0
        assert stored(database, "loss") == [(step, 1 / (step + 1)) for step in range(900)]
        assert stored(database, "valid/R_at_1") == [(step, step / 100) for step in range(900)]
        run = connect(uri).get_run(mirrored.run_id)
        assert run.info.status == "FINISHED"
        assert run.data.params == {"optimizer.lr": "0.001"}
        # Two hiccups of the operating system are let pass; a wait for the server would show in hundreds of steps.
        assert sorted(waits)[-3] < 0.1
        messages = [record.getMessage() for record in caplog.records]
        assert len(messages) == 2, messages
        assert "metrics wait in" in messages[0]
        assert "takes metrics again" in messages[1]
    finally:
        server.kill()
        server.wait()


def test_killed_driver_goes_on_in_the_same_run_without_repeating_a_point(database, tmp_path):
    journal, uri = tmp_path / "journal.jsonl", f"sqlite:///{database}"
    append(journal, range(50))
    command = [sys.executable, "-c", DRIVER, str(journal), uri]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as driver:
        assert driver.stdout
        while int(driver.stdout.readline()) < 100 or not Path(f"{journal}.sent").exists():
            pass
        driver.kill()
    with journal.open("a") as stream:
        stream.write('{"step": 50, "time": 18000')  # the killed trainer's last line, cut short
    with journal.open("a") as stream:
        stream.write("\n")
    append(journal, range(40, 80))  # resumed from a checkpoint: ten steps run again
    with mirror(journal, RUN, uri=uri) as mirrored:
        pass
    assert (mirrored.num_sent, mirrored.num_unsent) == (60, 0)
    assert stored(database, "loss") == [(step, 1 / (step + 1)) for step in range(80)]
    client = connect(uri)
    experiment = client.get_experiment_by_name("nightly")
    assert [run.info.run_id for run in client.search_runs([experiment.experiment_id])] == [mirrored.run_id]
    assert client.get_run(mirrored.run_id).info.status == "FINISHED"
    assert experiment.artifact_location == f"file://{tmp_path}/mlflow-artifacts"

    Path(f"{journal}.sent").unlink()  # sent, and killed before it was written down
    with mirror(journal, RUN, uri=uri) as again:
        pass
    assert again.run_id == mirrored.run_id
    assert stored(database, "loss") == [(step, 1 / (step + 1)) for step in range(80)]


def test_dead_server_lets_training_end_and_an_empty_block_sends_the_rest(database, port, tmp_path, caplog):
    caplog.set_level(logging.WARNING, logger="mmflow")
    journal = tmp_path / "journal.jsonl"
    started = time.monotonic()
    with mirror(journal, RUN, uri=f"http://user:hunter2@127.0.0.1:{port}") as mirrored:
        append(journal, range(20))
        time.sleep(2)
    assert time.monotonic() - started < 2 + 15
    assert (mirrored.run_id, mirrored.num_sent, mirrored.num_unsent) == (None, 0, 40)
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 2, messages
    assert f"40 points could not be sent and stay in {journal}" in messages[1]
    assert "hunter2" not in "".join(messages)
    with mirror(journal, RUN, uri=f"sqlite:///{database}") as mirrored:
        pass
    assert (mirrored.num_sent, mirrored.num_unsent) == (40, 0)
    assert len(stored(database, "loss")) == 20


def test_server_that_never_answers_holds_the_end_for_the_stated_seconds_only(tmp_path):
    with socket.socket() as silent:  # accepts connections and says nothing, as a stuck proxy does
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        append(tmp_path / "journal.jsonl", range(3))
        uri = f"http://127.0.0.1:{silent.getsockname()[1]}"
        started = time.monotonic()
        with mirror(tmp_path / "journal.jsonl", RUN, uri=uri, last_attempt_seconds=1.0) as mirrored:
            assert time.monotonic() - started < 0.1
        assert time.monotonic() - started < 3
        assert mirrored.num_unsent == 6


@pytest.mark.parametrize(
    ("error", "status"),
    [(None, "FINISHED"), (ValueError, "FAILED"), (KeyboardInterrupt, "KILLED"), (SystemExit, "KILLED")],
)
def test_run_ends_with_the_true_status_and_reopens(database, tmp_path, error, status):
    uri = f"sqlite:///{database}"
    with (
        pytest.raises(error) if error else contextlib.nullcontext(),
        mirror(tmp_path / "journal.jsonl", RUN, uri=uri) as mirrored,
    ):
        append(tmp_path / "journal.jsonl", range(2))
        if error:
            raise error
    assert mirrored.run_id
    assert connect(uri).get_run(mirrored.run_id).info.status == status
    assert len(stored(database, "loss")) == 2
    changed = TrainingRun(**{**vars(RUN), "params": {"optimizer": {"lr": 1e-3}, "workers": 2}})
    assert create_run(uri, changed) == mirrored.run_id
    run = connect(uri).get_run(mirrored.run_id)
    assert (run.info.status, run.data.params["workers"]) == ("RUNNING", "2")
    create_run(uri, TrainingRun(**{**vars(RUN), "params": {"workers": 8}}))
    assert connect(uri).get_run(mirrored.run_id).data.tags["resumed.workers"] == "8"


@pytest.mark.parametrize("name", ["R@1", "a//b", "/a", "../a", ".", "", "größe %", "a" * 400, "a/" * 200, "x\ny"])
def test_every_metric_name_is_made_admissible(database, tmp_path, name):
    append(tmp_path / "journal.jsonl", range(1), **{name: float("nan")})
    with mirror(tmp_path / "journal.jsonl", RUN, uri=f"sqlite:///{database}") as mirrored:
        pass
    assert mirrored.num_unsent == 0
    assert len(stored(database, admitted(name))) == 1
    assert admitted("unseen_variants/text_to_image/R@1") == "unseen_variants/text_to_image/R_at_1"


def test_more_points_than_one_call_takes_arrive_in_order(database, tmp_path):
    append(tmp_path / "journal.jsonl", range(3), **{f"layer/{layer}": 1.0 for layer in range(1100)})
    with mirror(tmp_path / "journal.jsonl", RUN, uri=f"sqlite:///{database}", last_attempt_seconds=60) as mirrored:
        pass
    assert mirrored.num_sent == 3 * 1102
    assert stored(database, "layer/1099") == [(step, 1.0) for step in range(3)]


def test_remote_workspace_needs_a_server(monkeypatch):
    with pytest.raises(MisuseError, match="MLFLOW_TRACKING_URI"):
        tracking_uri("s3://key:hunter2@bucket/workspace")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow:5000")
    assert tracking_uri("s3://bucket/workspace") == "http://mlflow:5000"


def test_unreachable_server_is_one_line_without_the_password(port):
    with pytest.raises(TrackingError) as raised:
        create_run(f"http://user:hunter2@127.0.0.1:{port}", RUN)
    message = str(raised.value)
    assert message == (
        f"http://***@127.0.0.1:{port}: cannot open the run 'pretrain': no answer (Connection refused); "
        "check MLFLOW_TRACKING_URI and the server"
    )


def test_importing_the_registry_does_not_import_mlflow():
    code = "import sys, mmflow.registry.versions, mmflow.registry.gate; assert 'mlflow' not in sys.modules"
    subprocess.run(
        [sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    )


def test_no_thread_is_left_behind(database, tmp_path):
    with mirror(tmp_path / "journal.jsonl", RUN, uri=f"sqlite:///{database}"):
        pass
    assert not [thread for thread in threading.enumerate() if thread.name == "mlflow-mirror" and thread.is_alive()]
