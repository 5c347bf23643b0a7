"""Every distillation loss on two ranks: the mean of the ranks' losses and gradients is that of one process."""

from __future__ import annotations

import datetime
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from mmflow.learning.rows import ALONE, Ranks, all_ranks
from mmflow.learning.student import Student, Teacher
from tests.learning.teaching import FUSED, attending, batch, loaded, student_of
from tests.learning.test_student import EVERYTHING

ROWS, RANKS = 8, 2
REALS = {
    "all real": torch.ones(ROWS, dtype=torch.bool),
    "padding here and there": torch.arange(ROWS) % 3 != 1,
    "last rank all padding": torch.arange(ROWS) < 4,
    "no row at all": torch.zeros(ROWS, dtype=torch.bool),
}


Found = dict[str, tuple[Tensor, list[Tensor]]]


def student(ranks: Ranks = ALONE) -> Student:
    teachers = [
        Teacher(weight=weight, loaded=loaded(attending(width=12, **FUSED), seed))
        for seed, weight in ((3, 1.0), (4, 2.0))
    ]
    return student_of(attending(layers=1), EVERYTHING, *teachers, ranks=ranks)


def losses_and_gradients(module: Student, real: str, mine: slice) -> Found:
    """By loss; zeros for weights without a gradient."""
    whole = batch(ROWS, real=REALS[real])
    _, parts = module(replace(whole.map_tensors(lambda tensor: tensor[mine]), keys=whole.keys[mine]), 0)
    weights = list(module.parameters())
    results = {}
    for loss in EVERYTHING:
        gradients = torch.autograd.grad(parts[loss], weights, retain_graph=True, allow_unused=True)
        results[loss] = (
            parts[loss].detach(),
            [
                torch.zeros_like(weight) if tensor is None else tensor
                for weight, tensor in zip(weights, gradients, strict=True)
            ],
        )
    return results


def one_of_two(rank: int, directory: str) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{directory}/store", RANKS)
    timeout = datetime.timedelta(seconds=120)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS, timeout=timeout)
    mine = slice(rank * ROWS // RANKS, (rank + 1) * ROWS // RANKS)
    try:
        module = student(all_ranks())
        results = {real: losses_and_gradients(module, real, mine) for real in REALS}
        torch.save(results, f"{directory}/{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def alone() -> dict[str, Found]:
    module = student()
    return {real: losses_and_gradients(module, real, slice(None)) for real in REALS}


@pytest.fixture(scope="module")
def of_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Found]]:
    directory = tmp_path_factory.mktemp("taught")
    mp.spawn(one_of_two, args=(str(directory),), nprocs=RANKS)
    return [torch.load(Path(directory) / f"{rank}.pt", weights_only=True) for rank in range(RANKS)]


@pytest.mark.parametrize("real", REALS)
@pytest.mark.parametrize("loss", EVERYTHING)
def test_mean_over_ranks_equals_one_process(
    of_ranks: list[dict[str, Found]], alone: dict[str, Found], loss: str, real: str
) -> None:
    """DeepSpeed averages so; a rank with only padding adds no NaN."""
    expected, expected_gradients = alone[real][loss]
    by_rank = [rank[real][loss] for rank in of_ranks]
    torch.testing.assert_close(torch.stack([loss for loss, _ in by_rank]).mean(), expected, atol=1e-6, rtol=1e-5)
    for number, gradient in enumerate(expected_gradients):
        mean = torch.stack([gradients[number] for _, gradients in by_rank]).mean(0)
        assert torch.isfinite(mean).all()
        torch.testing.assert_close(mean, gradient, atol=1e-5, rtol=1e-4)
