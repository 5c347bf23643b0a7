"""InfoNCE in strips compared with the whole matrix: peak memory and time of forward and backward."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import psutil

from tests.benchmarks.measure import SHARE, call, high_water_mark, rounds
from tests.benchmarks.table import Row, bounded, faster

BATCHES, WIDTH = (32_768, 16_384, 8_192), 512
MATRICES = 6  # that the dense loss holds at once, with room to spare
MOST_MEMORY_PERCENT, MOST_TIME = 10.0, 1.3
SMALL_BATCH = 256
PEERS = ()
VERSIONS = ("torch", "transformers")


def run() -> list[Row]:
    """Batches as large as the machine can hold densely, and one as small as recipes have."""
    available = psutil.virtual_memory().available
    largest = next((each for each in BATCHES if MATRICES * 4 * each**2 < 0.8 * available), BATCHES[-1])
    batch = round(SHARE * largest)
    note = f"{batch:,} × {WIDTH}, fp32" + ("" if largest == BATCHES[0] else "; the largest that fits densely here")
    found: dict[str, list[Any]] = {"ours": [], "dense": []}
    names = {"ours": "in_strips", "dense": "dense"}

    def contestant(name: str, batch: int) -> Callable[[], float]:
        def measured() -> float:
            result = call(f"tests.benchmarks.tiled:{names[name]}", batch=batch)
            found[name].append(result)
            return batch / result["seconds"]

        return measured

    rates = rounds({name: contestant(name, batch) for name in names})
    for ours, dense in zip(found["ours"], found["dense"], strict=True):
        assert abs(ours["loss"] - dense["loss"]) < 1e-5 * dense["loss"], (ours, dense)
        assert abs(ours["gradient"] - dense["gradient"]) < 1e-4 * dense["gradient"], (ours, dense)
    shares = [100 * ours["bytes"] / dense["bytes"] for ours, dense in zip(found["ours"], found["dense"], strict=True)]
    small = rounds({f"{name}, {SMALL_BATCH}": contestant(name, SMALL_BATCH) for name in names})
    peer, goal = "transformers' CLIP loss", round(1 / MOST_TIME, 2)
    return [
        bounded("InfoNCE: peak memory, share of the dense", shares, unit="%", most=MOST_MEMORY_PERCENT, note=note),
        faster("InfoNCE: forward and backward", rates["ours"], peer, rates["dense"], unit="pairs/s", goal=goal,
               note=note),
        faster("InfoNCE: forward and backward", small[f"ours, {SMALL_BATCH}"], peer, small[f"dense, {SMALL_BATCH}"],
               unit="pairs/s", note=f"{SMALL_BATCH} × {WIDTH}, fp32"),
    ]  # fmt: skip


# --- contestants, each called in a process of its own ---------------------------------------------------------------


def in_strips(batch: int, device: str = "cpu") -> dict[str, float]:
    """`contrastive_loss`, of one rank."""
    import torch

    from mmflow.learning.objectives.contrastive import contrastive_loss
    from mmflow.learning.rows import ALONE, global_rows

    rows = global_rows(torch.ones(batch, dtype=torch.bool, device=device))
    return _measured(batch, lambda image, text, scale: contrastive_loss(image, text, scale, rows, ALONE.gather), device)


def dense(batch: int, device: str = "cpu") -> dict[str, float]:
    """transformers' loss on one matrix, both directions of it."""
    from transformers.models.clip.modeling_clip import image_text_contrastive_loss

    return _measured(batch, lambda image, text, scale: image_text_contrastive_loss((scale * text) @ image.T), device)


def _measured(batch: int, loss_of: Callable[..., Any], device: str) -> dict[str, float]:
    """Seconds of a forward and a backward pass, the mean of a second's worth; the memory that they reach above what
    was there before; the loss and the gradient's norm."""
    import torch

    torch.manual_seed(0)
    leaves = [
        torch.nn.functional.normalize(torch.randn(batch, WIDTH, device=device), dim=1).requires_grad_()
        for _ in range(2)
    ]
    scale = torch.tensor([14.3], requires_grad=True, device=device)
    (leaves[0][:64] @ leaves[1][:64].T).sum().backward()  # what kernels and autograd set up once is not the loss's
    leaves[0].grad = leaves[1].grad = None
    before = torch.cuda.memory_allocated() if device == "cuda" else psutil.Process().memory_info().rss
    seconds, passes, measured = 0.0, 0, {}
    while seconds < 1:
        began = time.perf_counter()
        loss = loss_of(*leaves, scale)
        loss.backward()
        value = loss.item()  # waits for the device
        seconds, passes = seconds + time.perf_counter() - began, passes + 1
        if not measured:
            reached = torch.cuda.max_memory_allocated() if device == "cuda" else high_water_mark()
            gradient = leaves[0].grad
            assert gradient is not None
            measured = {"bytes": reached - before, "loss": value, "gradient": gradient.norm().item()}
    return {"seconds": seconds / passes, **measured}
