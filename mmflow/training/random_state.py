"""What dropout draws from, kept and set again: after a restart, and where a forward pass must drop the same units."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def random_state(device: torch.device) -> dict[str, Tensor]:
    """By kind of device: on an accelerator dropout draws its own numbers, not the CPU's."""
    found = {"cpu": torch.get_rng_state()}
    return found | ({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def set_random_state(device: torch.device, state: Mapping[str, Tensor]) -> None:
    """Go on from a state of a device of the same kind."""
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)
