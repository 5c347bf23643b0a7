"""A running average of the weights: often better than the last ones, and less at the mercy of the last batches.

It is one more state of the optimizer, in fp32 beside the master that it follows: sharded where masters are, offloaded
where states are, saved with them, and left as it is by a step that DeepSpeed leaves out.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from mmflow.training.fragments import Fragment

AVERAGE = "average"
STEPS = "average_steps"


def keep_average(optimizer: torch.optim.Optimizer, decay: float) -> None:
    """Have every step move the averages by 1 − decay of the way to the weights, further in the first steps."""

    @torch.no_grad()
    def follow(optimizer: torch.optim.Optimizer, arguments: Any, named: Any) -> None:
        for group in optimizer.param_groups:
            for weights in group["params"]:
                state = optimizer.state[weights]
                if not state:  # no gradient has come to it yet
                    continue
                if AVERAGE not in state:
                    state |= {AVERAGE: weights.detach().clone(), STEPS: torch.tensor(0.0)}
                steps = float(state[STEPS])
                state[AVERAGE].lerp_(weights, 1 - min(decay, (1 + steps) / (10 + steps)))
                state[STEPS] += 1

    optimizer.register_step_post_hook(follow)


def whole_average(engine: Any, parameter: Tensor, places: Mapping[Tensor, tuple[Tensor, Fragment]]) -> Tensor | None:
    """A parameter's average in full; None for one that is not trained. `places` as `places_of` has them. Collective.

    Not by DeepSpeed's `safe_get_full_optimizer_state`, which below ZeRO 3 knows the states of the first parameter group
    alone.
    """
    if parameter not in places:
        average: Tensor | None = engine.basic_optimizer.state.get(parameter, {}).get(AVERAGE)
        return average
    flat, fragment = places[parameter]
    # Before the first step that was not left out, the average is the weights.
    return fragment.whole(engine.basic_optimizer.state[flat].get(AVERAGE, flat), engine.device)


@contextlib.contextmanager
def averages_in_place(engine: Any) -> Iterator[None]:
    """Have the weights be their averages within the block: the two change places, and are bit-equal afterwards.
    Collective; after an error within the block the engine is of no more use."""
    _change_places(engine)
    yield
    _change_places(engine)


@torch.no_grad()
def _change_places(engine: Any) -> None:
    for weights, state in engine.basic_optimizer.state.items():
        if AVERAGE in state:
            kept = weights.detach().clone()
            weights.data.copy_(state[AVERAGE])
            state[AVERAGE].copy_(kept)
    zero, stage = engine.optimizer, engine.zero_optimization_stage()
    if stage == 3:
        zero.checkpoint_event_prologue()  # leaves each rank its part of the parameters that ZeRO keeps whole
        for number in range(len(zero.fp32_partitioned_groups_flat)):
            zero._reassign_or_swap_out_partitioned_parameters(number)
        zero.checkpoint_event_epilogue()
    elif stage > 0:
        zero.update_lp_params()
