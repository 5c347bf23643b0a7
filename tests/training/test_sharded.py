"""On two ranks, by real DeepSpeed engines: every ZeRO stage takes the unsharded optimizer's step, and micro-batches
have the gradient of the whole batch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.training.sharded import MICRO_ROWS, OBJECTIVES, OF_EACH_KIND, OFFLOADED, RESTARTED, SHARDED

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("sharded")
    command = [sys.executable, "-m", "tests.training.sharded"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen([*command, rank, str(directory)], cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
        for rank in ("0", "1")
    ]
    said = [each.communicate(timeout=560)[1] for each in ranks]
    assert [each.returncode for each in ranks] == [0, 0], "\n".join(each[-3000:] for each in said)
    return directory


def found(directory: Path, act: str) -> dict[Any, Any]:
    return dict(torch.load(directory / f"{act}.pt", weights_only=True))


def furthest(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """The largest difference of any weight."""
    assert one.keys() == other.keys()
    return max(float((one[name].double() - other[name].double()).abs().max()) for name in one)


@pytest.mark.parametrize(("name", "stage"), SHARDED)
def test_a_sharded_optimizer_takes_the_step_of_the_whole_one(directory: Path, name: str, stage: int) -> None:
    by_case = found(directory, "optimizers")
    whole, sharded = by_case[name, 0, False], by_case[name, stage, False]
    assert sharded["losses"] == pytest.approx(whole["losses"], rel=1e-4)
    assert furthest(sharded["last"], whole["last"]) < 1e-4  # a hundredth of a step; Muon computes in bf16
    assert furthest(sharded["average"], whole["average"]) < 1e-4
    assert furthest(whole["last"], whole["average"]) > 1e-3


@pytest.mark.parametrize(("name", "stage"), OFFLOADED)
def test_offloaded_states_take_the_same_step(directory: Path, name: str, stage: int) -> None:
    offloaded, here = (found(directory, "optimizers")[name, stage, offload] for offload in (True, False))
    assert furthest(offloaded["last"], here["last"]) < 1e-5
    assert furthest(offloaded["average"], here["average"]) < 1e-5


def test_optimizers_differ(directory: Path) -> None:
    by_case = found(directory, "optimizers")
    for one, other in (("adamw", "muon"), ("muon", "lamb")):
        assert furthest(by_case[one, 2, False]["last"], by_case[other, 2, False]["last"]) > 1e-3


@pytest.mark.parametrize("stage", RESTARTED)
def test_weights_and_averages_after_a_restart_are_those_of_an_unbroken_run(directory: Path, stage: int) -> None:
    by_case = found(directory, "restarts")
    for kind in ("last", "average"):
        assert furthest(by_case[stage, "straight"][kind], by_case[stage, "restarted"][kind]) == 0.0


@pytest.mark.parametrize(
    ("objective", "stage"),
    [*((name, 2) for name in OBJECTIVES), *((name, stage) for name in OF_EACH_KIND for stage in (0, 1, 3))],
)
def test_micro_batches_have_the_gradient_of_the_whole_batch(directory: Path, objective: str, stage: int) -> None:
    error, largest, equal = found(directory, "gradients")[objective, stage, True]
    assert largest > 1e-2
    assert error < 1e-6 * largest
    assert equal


def test_the_selfcheck_finds_a_gather_that_loses_its_gradient(directory: Path) -> None:
    by_case = found(directory, "broken")
    assert not by_case["contrastive", 2, False][2]
    assert by_case["classification", 2, False][2]


def test_micro_batches_report_the_losses_of_the_whole_batch(directory: Path) -> None:
    by_size = found(directory, "together")
    whole, steps, parts = by_size[None]
    micro, micro_steps, micro_parts = by_size[MICRO_ROWS]
    assert (steps, parts) == (3, 1)
    assert (micro_steps, micro_parts) == (3, 3)  # five rows by twos
    for one, other in zip(micro, whole, strict=True):
        assert one == pytest.approx(other, rel=1e-4)
    assert set(whole[0]) == {"loss", *OBJECTIVES, "logit_scale", "logit_bias"}


def test_what_is_dropped_in_the_first_pass_is_dropped_in_the_second(directory: Path) -> None:
    result = found(directory, "dropout")
    largest = max(float(each.abs().max()) for each in result["expected"].values())
    assert furthest(result["found"], result["expected"]) < 1e-6 * largest


def test_micro_batches_keep_less(directory: Path) -> None:
    most = found(directory, "memory")
    assert most[4] < 0.2 * most[None]  # an eighth of the rows, and the loss's own
