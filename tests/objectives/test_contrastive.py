"""InfoNCE equals other people's, whatever is padded and however many ranks share the batch."""

from __future__ import annotations

import datetime
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mmflow.objectives.contrastive import GlobalRows, contrastive_loss, global_rows, similarities
from mmflow.training.collectives import gather_rows

WIDTH = 6


def alone(rows: Tensor) -> Tensor:
    return rows


def unit(rows: int, seed: int) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(rows, WIDTH, generator=random, dtype=torch.float64), dim=1)


def leaves(rows: int, seed: int, scale: float = 20.0) -> tuple[Tensor, Tensor, Tensor]:
    """Images, captions and a logit scale to differentiate by, fp32."""
    values = unit(rows, seed).float(), unit(rows, seed + 1).float(), torch.tensor([scale])
    return tuple(value.clone().requires_grad_() for value in values)  # type: ignore[return-value]


def rows_of(real: Tensor) -> GlobalRows:
    return global_rows(real, alone, rank=0)


def all_real(rows: int) -> GlobalRows:
    return rows_of(torch.ones(rows, dtype=torch.bool))


@pytest.mark.parametrize("rows", [2, 17])
@pytest.mark.parametrize("scale", [1.0, 14.3, 100.0])
def test_loss_and_gradient_equal_those_of_transformers(rows: int, scale: float) -> None:
    from transformers.models.clip.modeling_clip import image_text_contrastive_loss

    seed = torch.seed() % 2**32
    ours, theirs = leaves(rows, seed, scale), leaves(rows, seed, scale)
    loss = contrastive_loss(*ours, all_real(rows), alone)
    expected = image_text_contrastive_loss(theirs[2] * theirs[0] @ theirs[1].T)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(loss, expected, atol=1e-6, rtol=1e-6)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one.grad, other.grad, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.6])
def test_label_smoothing_is_torch_s(smoothing: float) -> None:
    ours, theirs = leaves(9, 3), leaves(9, 3)
    contrastive_loss(*ours, all_real(9), alone, smoothing).backward()
    logits = theirs[2] * theirs[0] @ theirs[1].T
    right = torch.arange(9)
    expected = 0.5 * sum(
        torch.nn.functional.cross_entropy(each, right, label_smoothing=smoothing) for each in (logits, logits.T)
    )
    expected.backward()
    torch.testing.assert_close(contrastive_loss(*ours, all_real(9), alone, smoothing), expected, atol=1e-6, rtol=1e-6)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one.grad, other.grad, atol=1e-6, rtol=1e-5)


@given(
    rows=st.integers(2, 12), padding=st.integers(1, 12), smoothing=st.sampled_from([0.0, 0.2]), seed=st.integers(0, 999)
)
def test_padded_rows_change_nothing(rows: int, padding: int, smoothing: float, seed: int) -> None:
    """Wherever they stand and whatever is in them."""
    places = torch.randperm(rows + padding, generator=torch.Generator().manual_seed(seed))[:rows].sort().values
    real = torch.zeros(rows + padding, dtype=torch.bool)
    real[places] = True
    plain, padded = leaves(rows, seed), leaves(rows + padding, seed + 7)
    with torch.no_grad():
        for short, long in zip(plain[:2], padded[:2], strict=True):
            long[places] = short
    expected = contrastive_loss(*plain, all_real(rows), alone, smoothing)
    loss = contrastive_loss(*padded, rows_of(real), alone, smoothing)
    torch.testing.assert_close(loss, expected, atol=1e-6, rtol=1e-6)
    expected.backward()
    loss.backward()
    torch.testing.assert_close(padded[2].grad, plain[2].grad, atol=1e-6, rtol=1e-5)
    for short, long in zip(plain[:2], padded[:2], strict=True):
        assert long.grad is not None
        torch.testing.assert_close(long.grad[places], short.grad, atol=1e-6, rtol=1e-5)
        assert (long.grad[~real] == 0).all()


def test_columns_of_padding_get_no_probability() -> None:
    real = torch.tensor([True, False, True])
    logits = similarities(unit(3, 0).float(), unit(3, 1).float(), torch.tensor([5.0]), real)
    assert torch.isfinite(logits).all()
    assert (logits.softmax(dim=-1)[:, 1] == 0).all()


def test_perfect_pairs_approach_zero_and_equal_embeddings_the_logarithm_of_the_batch() -> None:
    same = torch.eye(WIDTH)
    assert contrastive_loss(same, same, torch.tensor([100.0]), all_real(WIDTH), alone) < 1e-6
    collapsed = unit(1, 0).float().repeat(8, 1)
    loss = contrastive_loss(collapsed, collapsed, torch.tensor([100.0]), all_real(8), alone)
    torch.testing.assert_close(loss, torch.tensor(8.0).log(), atol=1e-4, rtol=1e-4)


# --- three ranks ----------------------------------------------------------------------------------------------------

RANKS, PER_RANK = 3, 4
REALS = {
    "all real": torch.ones(RANKS * PER_RANK, dtype=torch.bool),
    "last rank short": torch.arange(RANKS * PER_RANK) < 2 * PER_RANK + 1,
    "last rank all padding": torch.arange(RANKS * PER_RANK) < 2 * PER_RANK,
    "one row in all": torch.arange(RANKS * PER_RANK) < 1,
}
SMOOTHINGS = (0.0, 0.1)


def rank_of_three(rank: int, directory: str) -> None:
    """What a rank computes: for each case its loss and its gradients, and what the collectives gave it."""
    torch.set_num_threads(1)
    store = dist.FileStore(f"{directory}/store", RANKS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS, timeout=datetime.timedelta(seconds=60))
    try:
        mine = slice(rank * PER_RANK, (rank + 1) * PER_RANK)
        found = {}
        for name, real in REALS.items():
            for smoothing in SMOOTHINGS:
                image, text, scale = leaves(RANKS * PER_RANK, 11)
                rows = global_rows(real[mine], gather_rows, rank)
                assert torch.equal(rows.real_N, real)
                loss = contrastive_loss(image[mine], text[mine], scale, rows, gather_rows, smoothing)
                loss.backward()
                found[name, smoothing] = (loss.detach(), image.grad, text.grad, scale.grad)
        gathered = gather_rows(torch.full((2, 3), rank))
        torch.save({"found": found, "gathered": gathered}, f"{directory}/{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[tuple[str, float], tuple[Tensor, ...]]]]:
    directory = tmp_path_factory.mktemp("ranks")
    mp.spawn(rank_of_three, args=(str(directory),), nprocs=RANKS)
    return [torch.load(Path(directory) / f"{rank}.pt", weights_only=True) for rank in range(RANKS)]


@pytest.mark.parametrize("smoothing", SMOOTHINGS)
@pytest.mark.parametrize("name", REALS)
def test_mean_over_ranks_equals_one_process(ranks: list[dict[str, dict]], name: str, smoothing: float) -> None:
    """Loss and gradients, as DeepSpeed averages them; a rank whose rows are all padding has no NaN to add."""
    real = REALS[name]
    plain = leaves(RANKS * PER_RANK, 11)
    expected = contrastive_loss(*plain, rows_of(real), alone, smoothing)
    expected.backward()
    found = [rank["found"][name, smoothing] for rank in ranks]
    losses, *gradients = (torch.stack(values) for values in zip(*found, strict=True))
    assert all(torch.isfinite(each).all() for each in (losses, *gradients))
    torch.testing.assert_close(losses.mean(), expected.detach(), atol=1e-6, rtol=1e-6)
    for gradient, leaf in zip(gradients, plain, strict=True):
        torch.testing.assert_close(gradient.mean(0), leaf.grad, atol=1e-6, rtol=1e-5)


def test_gathered_rows_are_those_of_all_ranks_in_their_order(ranks: list[dict[str, Tensor]]) -> None:
    expected = torch.arange(RANKS).repeat_interleave(2)[:, None].expand(-1, 3)
    assert all(torch.equal(rank["gathered"], expected) for rank in ranks)


def test_gathering_without_a_group_is_the_identity() -> None:
    rows = torch.randn(3, 2)
    assert gather_rows(rows) is rows
