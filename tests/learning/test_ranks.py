"""Every objective on two and three ranks: the mean of the ranks' losses and gradients is that of one process."""

from __future__ import annotations

import datetime
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from mmflow.learning import pair_losses
from mmflow.learning.objectives import ObjectivesConfig, total
from mmflow.learning.rows import all_ranks, gather_rows, global_rows, ring_shift
from tests.learning.tiny import TinyModel, batch, gradients, outputs_of, rows_of

ROWS = 12
OBJECTIVE_CASES: dict[str, dict[str, Any]] = {
    "contrastive": {"contrastive": {}},
    "contrastive, smoothed": {"contrastive": {"label_smoothing": 0.2}},
    "sigmoid": {"sigmoid": {}},
    "matching": {"matching": {}},
    "matching, uniform": {"matching": {"negatives": "uniform"}},
    "masked language": {"masked_language": {"share": 0.5}},
    "masked image": {"masked_image": {"square_pixels": 4}},
    "captioning": {"captioning": {"label_smoothing": 0.1}},
    "answering": {"answering": {}},
    "answering, scores": {"answering": {"targets": "scores"}},
    "answering, generation": {"answering": {"by": "generation"}},
    "classification": {"classification": {"label_smoothing": 0.1}},
    "all at once": {name: {"weight": 0.5} for name in ObjectivesConfig.model_fields},
}
REALS = {
    "all real": torch.ones(ROWS, dtype=torch.bool),
    "last rank short": torch.arange(ROWS) < 9,
    "last rank all padding": torch.arange(ROWS) < 4,
    "padding here and there": torch.arange(ROWS) % 3 != 1,
    "one row in all": torch.arange(ROWS) == 1,
    "no row at all": torch.zeros(ROWS, dtype=torch.bool),
}


def cases() -> Iterator[tuple[str, str]]:
    return ((objective, real) for objective in OBJECTIVE_CASES for real in REALS)


def loss_and_gradients(
    objective: str, real: str, rank: int, world_size: int
) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """Of one rank's rows, with texts padded to the longest of that rank."""
    model, whole = TinyModel(), batch(ROWS)
    mine = slice(rank * ROWS // world_size, (rank + 1) * ROWS // world_size)
    longest = int(whole["token_mask"][mine].sum(1).max())
    arguments = {name: value[mine] for name, value in whole.items() if name != "targets"}
    arguments |= {name: arguments[name][:, :longest] for name in ("token_ids", "token_mask")}
    arguments["targets"] = {name: value[mine] for name, value in whole["targets"].items()}
    rows = global_rows(REALS[real][mine], all_ranks())
    outputs = outputs_of(model, arguments, rows, ranks=all_ranks())
    loss, parts = total(outputs, ObjectivesConfig.model_validate(OBJECTIVE_CASES[objective]).named, step=0)
    return loss.detach(), {name: part.detach() for name, part in parts.items()}, gradients(loss, model)


def one_of_many(rank: int, world_size: int, directory: str) -> None:
    torch.set_num_threads(1)
    pair_losses.STRIP_ELEMENTS = 16  # several strips a rank
    store = dist.FileStore(f"{directory}/store", world_size)
    timeout = datetime.timedelta(seconds=120)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=timeout)
    try:
        results = {case: loss_and_gradients(*case, rank, world_size) for case in cases()}
        passed = ring_shift(torch.full((2, 3), rank))
        gathered = gather_rows(torch.full((2, 3), rank))
        torch.save({"found": results, "passed": passed, "gathered": gathered}, f"{directory}/{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module", params=[2, 3])
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    directory = tmp_path_factory.mktemp("ranks")
    mp.spawn(one_of_many, args=(request.param, str(directory)), nprocs=request.param)
    return [torch.load(Path(directory) / f"{rank}.pt", weights_only=True) for rank in range(request.param)]


@pytest.mark.parametrize("real", REALS)
@pytest.mark.parametrize("objective", OBJECTIVE_CASES)
def test_mean_over_ranks_equals_one_process(ranks: list[dict[str, Any]], objective: str, real: str) -> None:
    """DeepSpeed averages so; a rank with only padding adds no NaN."""
    by_rank = [rank["found"][objective, real] for rank in ranks]
    model = TinyModel()
    config = ObjectivesConfig.model_validate(OBJECTIVE_CASES[objective])
    expected, expected_parts = total(outputs_of(model, batch(ROWS), rows_of(REALS[real])), config.named, step=0)
    assert torch.isfinite(expected)
    torch.testing.assert_close(torch.stack([loss for loss, _, _ in by_rank]).mean(), expected.detach())
    for name, part in expected_parts.items():
        torch.testing.assert_close(torch.stack([parts[name] for _, parts, _ in by_rank]).mean(), part.detach())
    for name, gradient in gradients(expected, model).items():
        gradients_of_ranks = torch.stack([of_rank[name] for _, _, of_rank in by_rank])
        assert torch.isfinite(gradients_of_ranks).all()
        torch.testing.assert_close(gradients_of_ranks.mean(0), gradient, atol=1e-6, rtol=1e-5)


def test_ring_shift_receives_from_the_rank_before(ranks: list[dict[str, Any]]) -> None:
    for number, rank in enumerate(ranks):
        assert (rank["passed"] == (number - 1) % len(ranks)).all()


def test_gathered_rows_are_those_of_all_ranks_in_their_order(ranks: list[dict[str, Any]]) -> None:
    expected = torch.arange(len(ranks)).repeat_interleave(2)[:, None].expand(-1, 3)
    assert all(torch.equal(rank["gathered"], expected) for rank in ranks)


def test_without_a_group_nothing_moves() -> None:
    rows = torch.randn(3, 2)
    assert gather_rows(rows) is rows
    assert ring_shift(rows) is rows
