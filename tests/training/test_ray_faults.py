"""Trainings on a Ray cluster of several nodes with workers, drivers and nodes that are killed: they end at the weights
of a training without faults."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, TextIO

import psutil
import pytest

from mmflow.core.storage import read_json
from mmflow.registry.tracking import connect
from mmflow.training.journal import curves, journal_at
from mmflow.training.workers import COLLECTIVE_TIMEOUT, limited_exchanges
from tests.registry.mlflow_server import free_port, start_server
from tests.training.faulty_ranks import halted, let_go
from tests.training.ranks import ROOT, assert_bit_equal
from tests.training.ray_driver import RUN
from tests.training.trainings import STAGES, STEPS, Trainings, assert_each_sample_once_an_epoch, largest_difference

pytestmark = pytest.mark.timeout(1200)

PATIENCE = 240.0  # seconds
KINDS = ("worker", "driver", "node")
AFTER = {"same": 2, "fewer": 1, "more": 3}
"""Workers after the fault; there are two before it."""


class Nodes:
    """A cluster: a head, which drivers connect to, and nodes beside it with a CPU each."""

    def __init__(self, log: TextIO) -> None:
        command = [sys.executable, "-m", "tests.training.ray_nodes"]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        self._keeper = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
        )
        self.address = self._answer()
        self._raylets: list[int] = []

    def _answer(self) -> str:
        assert self._keeper.stdout
        line = self._keeper.stdout.readline()
        assert line, "the cluster ended"
        return line.strip()

    def _ask(self, command: str) -> str:
        assert self._keeper.stdin
        self._keeper.stdin.write(command + "\n")
        self._keeper.stdin.flush()
        return self._answer()

    def have(self, number: int) -> None:
        """Add nodes until there are this many beside the head."""
        while len(self._raylets) < number:
            self._raylets.append(int(self._ask("add")))

    def one_of(self, ranks: dict[int, dict[str, int]]) -> int:
        """The raylet beside the head that one of the ranks is on."""
        return next(each["raylet"] for each in ranks.values() if each["raylet"] in self._raylets)

    def kill(self, raylet: int) -> None:
        """Kill it and its children, which would live for seconds: as when a machine is lost."""
        self._raylets.remove(raylet)
        with contextlib.suppress(psutil.NoSuchProcess):  # a drained one may be gone by itself
            process = psutil.Process(raylet)
            for each in (process, *process.children(recursive=True)):
                with contextlib.suppress(psutil.NoSuchProcess):
                    each.kill()

    def drain(self, raylet: int, seconds: int) -> None:
        assert self._ask(f"drain {raylet} {seconds}") == "True"

    def close(self) -> None:
        assert self._keeper.stdin
        self._keeper.stdin.close()
        try:
            self._keeper.wait(60)
        finally:
            self._keeper.kill()


class Driver:
    """A driver's process, and the ranks of its training."""

    def __init__(self, nodes: Nodes, trainings: Trainings, plan: dict[str, Any], uri: str | None = None) -> None:
        self.here = trainings.directory / plan["name"]
        self.here.mkdir(exist_ok=True)
        self.log = self.here / "driver.log"
        fields = {"dataset": trainings.dataset.uri, "tokenizer": str(trainings.tokenizer), **plan}
        environment = os.environ | {"RAY_ADDRESS": nodes.address, "OMP_NUM_THREADS": "1"}
        environment.pop("MLFLOW_TRACKING_URI", None)
        command = [sys.executable, "-m", "tests.training.ray_driver", str(trainings.directory), json.dumps(fields)]
        with self.log.open("a") as log:
            self._process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=environment | ({"MLFLOW_TRACKING_URI": uri} if uri else {}),
                stdout=log,
                stderr=log,
            )

    def wait_for(self, happened: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE
        while not happened():
            assert self._process.poll() is None, self.log.read_text()[-5000:]
            assert time.monotonic() < deadline, self.log.read_text()[-5000:]
            time.sleep(0.05)

    def ranks_at(self, step: int, num_ranks: int = 2) -> dict[int, dict[str, int]]:
        """The ranks that halt before a step, once all have reached it."""
        files = {rank: self.here / halted(step, rank) for rank in range(num_ranks)}
        self.wait_for(lambda: all(file.exists() for file in files.values()))
        return {rank: read_json(str(file)) for rank, file in files.items()}

    def let_go(self, step: int) -> None:
        (self.here / let_go(step)).touch()

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def end(self) -> int:
        """Wait for its end; the exit code."""
        return self._process.wait(PATIENCE)


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    with (tmp_path_factory.mktemp("nodes") / "log").open("w") as log:
        try:
            nodes = Nodes(log)
        except AssertionError:  # a node has 30 s to start, which a loaded machine can miss
            nodes = Nodes(log)
        try:
            yield nodes
        finally:
            nodes.close()


def assert_same_weights(trainings: Trainings, name: str, stage: int) -> None:
    assert_bit_equal(trainings.weights(f"straight-{stage}"), trainings.weights(name))


# --- nodes that are lost and added -----------------------------------------------------------------------------------
# Before any driver is killed: Ray keeps its reservation for three minutes, and a group that may shrink waits for it.


@pytest.mark.slow
def test_remaining_nodes_resume_from_the_checkpoint_saved_before_a_node_is_taken_away(
    trainings: Trainings, nodes: Nodes
) -> None:
    """No other checkpoint is written, and the tracking server is down throughout."""
    training = {"zero_stage": 3, "num_workers": [1, 2], "checkpoint_every_steps": STEPS + 1, "log_every_steps": 1}
    drained, gone = 5, 9
    plan = {"name": "drained", "training": training, "halts": [drained, gone]}
    nodes.have(1)
    driver = Driver(nodes, trainings, plan, uri=f"http://127.0.0.1:{free_port()}")
    raylet = nodes.one_of(driver.ranks_at(drained))
    seconds = 60
    deadline = time.time() + seconds
    nodes.drain(raylet, seconds)
    driver.wait_for(lambda: "preemption detected" in driver.log.read_text())
    driver.let_go(drained)
    driver.ranks_at(gone)
    nodes.kill(raylet)
    driver.let_go(gone)
    assert driver.end() == 0, driver.log.read_text()[-5000:]

    (saved,) = trainings.events("drained", "checkpoint")
    assert (saved["reason"], drained <= saved["step"] < gone) == ("preemption", True)
    assert saved["time"] < deadline
    started = [(line["step"], line["workers"]) for line in trainings.events("drained", "started")]
    assert started == [(0, 2), (saved["step"], 1)]
    assert largest_difference(trainings.weights("straight-3"), trainings.weights("drained")) < 1e-5
    assert_each_sample_once_an_epoch(trainings.seen("drained"))
    losses = curves(journal_at(str(driver.here / "journal.jsonl")))["loss"]
    assert [step for step, _ in losses] == list(range(1, STEPS + 1))
    assert "points could not be sent and stay in" in driver.log.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_a_lost_node_shrinks_the_group_and_a_new_one_grows_it(trainings: Trainings, nodes: Nodes, stage: int) -> None:
    name, draw = f"nodes-{stage}", random.Random(stage)
    lost, alone = draw.randint(5, 8), draw.randint(9, STEPS)
    nodes.have(1)
    plan = {"name": name, "training": {"zero_stage": stage, "num_workers": [1, 2]}, "halts": [lost, alone]}
    driver = Driver(nodes, trainings, plan)
    nodes.kill(nodes.one_of(driver.ranks_at(lost)))
    driver.let_go(lost)
    driver.ranks_at(alone, num_ranks=1)
    nodes.have(1)
    assert driver.end() == 0, driver.log.read_text()[-5000:]
    assert [line["workers"] for line in trainings.events(name, "started")] == [2, 1, 2]
    assert largest_difference(trainings.weights(f"straight-{stage}"), trainings.weights(name)) < 1e-5
    assert_each_sample_once_an_epoch(trainings.seen(name))


# --- everything at once ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def survivor(trainings: Trainings, nodes: Nodes, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A training that loses a worker, a node and its driver, at seeded steps, and the tracking server from the first
    of these to the last; its name, and the server's database."""
    draw = random.Random(0)
    first, second, third = sorted(draw.sample(range(5, STEPS + 1), 3))
    plan = {
        "name": "survivor",
        "training": {"zero_stage": 2, "num_workers": 2, "log_every_steps": 1},
        "halts": [first, second, third],
    }
    database, port = tmp_path_factory.mktemp("mlflow") / "mlflow.db", free_port()
    uri = f"http://127.0.0.1:{port}"
    servers = [start_server(database, port, wait=False)]
    nodes.have(1)
    try:
        driver = Driver(nodes, trainings, plan, uri)
        ranks = driver.ranks_at(first)
        driver.wait_for(lambda: (driver.here / "journal.jsonl.sent").exists())
        servers[0].kill()
        os.kill(ranks[draw.randrange(2)]["process"], signal.SIGKILL)
        driver.let_go(first)

        nodes.kill(nodes.one_of(driver.ranks_at(second)))
        driver.let_go(second)
        nodes.have(1)

        driver.ranks_at(third)
        driver.kill()
        servers.append(start_server(database, port))
        driver = Driver(nodes, trainings, plan, uri)
        assert driver.end() == 0, driver.log.read_text()[-5000:]
    finally:
        for server in servers:
            server.kill()
    return "survivor", f"sqlite:///{database}"


def test_a_training_that_loses_a_worker_a_node_and_its_driver_ends_at_the_same_weights(
    trainings: Trainings, survivor: tuple[str, str]
) -> None:
    name, _ = survivor
    assert_same_weights(trainings, name, stage=2)
    started = trainings.events(name, "started")
    assert [line["workers"] for line in started] == [2] * 4
    assert min(line["step"] for line in started[1:]) > 0


def test_its_samples_are_seen_once_an_epoch(trainings: Trainings, survivor: tuple[str, str]) -> None:
    assert_each_sample_once_an_epoch(trainings.seen(survivor[0]))


def test_its_journal_is_complete_in_one_run_although_the_server_was_down(
    trainings: Trainings, survivor: tuple[str, str]
) -> None:
    name, uri = survivor
    client = connect(uri)
    (run,) = client.search_runs([client.get_experiment_by_name(RUN.experiment).experiment_id])
    assert run.info.status == "FINISHED"
    losses = curves(journal_at(str(trainings.directory / name / "journal.jsonl")))["loss"]
    assert [step for step, _ in losses] == list(range(1, STEPS + 1))
    assert sorted((each.step, each.value) for each in client.get_metric_history(run.info.run_id, "loss")) == losses


# --- the sweep -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stage", STAGES)
def test_a_kill_at_any_step_changes_nothing_for_any_number_of_workers(
    trainings: Trainings, nodes: Nodes, stage: int, kind: str, seed: int
) -> None:
    """Three seeds combine each stage and kind of kill with each number of workers after it."""
    draw = random.Random(f"{stage} {kind} {seed}")
    step = draw.randint(2, STEPS)
    after = list(AFTER)[(stage + KINDS.index(kind) + seed) % len(AFTER)]
    name = f"{kind}-{stage}-{seed}"
    restarts = 3 if after == "same" and kind != "driver" else 0
    training = {"zero_stage": stage, "num_workers": 2, "max_restarts": restarts}
    nodes.have(1)
    driver = Driver(nodes, trainings, {"name": name, "training": training, "halts": [step]})
    ranks = driver.ranks_at(step)
    if kind == "worker":
        os.kill(ranks[draw.randrange(2)]["process"], signal.SIGKILL)
    elif kind == "node":
        nodes.kill(nodes.one_of(ranks))
    else:
        driver.kill()
    if kind != "driver":
        driver.let_go(step)
    nodes.have(AFTER[after] - 1)
    if not restarts:
        assert driver.end() != 0
        driver = Driver(nodes, trainings, {"name": name, "training": {**training, "num_workers": AFTER[after]}})
    assert driver.end() == 0, driver.log.read_text()[-5000:]
    started = trainings.events(name, "started")
    assert [line["workers"] for line in started] == [2, AFTER[after]]
    assert (started[-1]["step"] > 0) == (step > 4)
    if after == "same":
        assert_same_weights(trainings, name, stage)
    assert largest_difference(trainings.weights(f"straight-{stage}"), trainings.weights(name)) < 1e-5
    assert_each_sample_once_an_epoch(trainings.seen(name))


# --- time limits of exchanges ----------------------------------------------------------------------------------------


def test_a_training_limits_ray_s_exchanges_unless_the_environment_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(COLLECTIVE_TIMEOUT, raising=False)
    for seconds in (5.0, 7.0):
        with limited_exchanges(seconds):
            assert os.environ[COLLECTIVE_TIMEOUT] == str(seconds)
        assert COLLECTIVE_TIMEOUT not in os.environ
    monkeypatch.setenv(COLLECTIVE_TIMEOUT, "3")
    with limited_exchanges(5.0):
        assert os.environ[COLLECTIVE_TIMEOUT] == "3"
    assert os.environ[COLLECTIVE_TIMEOUT] == "3"
