"""What a restart needs: DeepSpeed's state, the loader's position and each rank's random state, in one directory.

Each rank writes its own part into a directory of its own; whoever calls merges them and publishes the merged directory.
"""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mmflow.errors import CorruptArtifactError
from mmflow.loading.plan import LoaderState
from mmflow.training.collectives import average_buffers

TAG = "state"


def write_checkpoint(engine: Any, directory: Path, step: int, state: LoaderState) -> None:
    """Write this rank's part. Collective: every rank must call it, each with a directory of its own or a shared one."""
    average_buffers(engine.module)
    engine.save_checkpoint(
        str(directory), tag=TAG, client_state={"step": step, "loader": asdict(state)}, save_latest=False
    )
    torch.save(_random_state(engine.device), directory / f"random-{dist.get_rank()}.pt")


def read_checkpoint(engine: Any, directory: Path) -> tuple[int, LoaderState]:
    """Restore engine and random state from a merged directory; (steps done, loader state).

    DeepSpeed can start from scratch in silence when it does not find what it expects (DeepSpeed#6691), so what it says
    it loaded is checked. Raises CorruptArtifactError.
    """
    not_whole = f"{directory}: not a whole checkpoint ({sorted(os.listdir(directory))}); delete it"
    try:
        found, client_state = engine.load_checkpoint(str(directory), tag=TAG)
        random_state = torch.load(directory / f"random-{dist.get_rank()}.pt", weights_only=True)
    except Exception as error:  # a file gone, cut short, of another world size: DeepSpeed raises what it trips over
        raise CorruptArtifactError(f"{not_whole} ({' '.join(str(error).split())[:300]})") from error
    if found is None or "step" not in client_state or engine.global_steps != client_state["step"]:
        raise CorruptArtifactError(not_whole)
    torch.set_rng_state(random_state["cpu"])
    if engine.device.type == "cuda":
        torch.cuda.set_rng_state(random_state["cuda"], engine.device)
    return int(client_state["step"]), LoaderState(**client_state["loader"])


def _random_state(device: torch.device) -> dict[str, Tensor]:
    """What dropout draws from: on an accelerator its own numbers, not the CPU's."""
    found = {"cpu": torch.get_rng_state()}
    return found | ({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})
