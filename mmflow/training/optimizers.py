"""The optimizers, their learning-rate schedules, and running averages of weights.

Under ZeRO an optimizer steps flat tensors that cut through parameters. Muon's orthogonal matrix and LAMB's norms would
be those of arbitrary pieces, so both look up where the parameters lie and exchange what they need of the other ranks'
pieces: LAMB two numbers a parameter, Muon the matrix. Everything else stays sharded. They step after DeepSpeed has
averaged and clipped the whole batch's gradient. (DeepSpeed's own Muon clips its orthogonal matrices instead of
gradients, at ZeRO 3 makes one of every micro-batch, and compiles itself on a CPU; its LAMB takes the norms of pieces.)
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim.adamw import adamw

from mmflow.training.config import OptimizerConfig
from mmflow.training.zero import Fragment

EPS = 1e-8
MUON = "muon"  # key of a parameter group
MOMENTUM = 0.95  # Muon's authors' https://kellerjordan.github.io/posts/muon/
QUINTIC = (3.4445, -4.7750, 2.0315)  # the same authors' coefficients
ITERATIONS = 5
DECAY_SHARE = 0.2  # of all steps; from a tenth to a fifth matches a cosine (arXiv 2405.18392, section 4)
AVERAGE = "average"
AVERAGE_STEPS = "average_steps"


def build_optimizer(groups: Sequence[dict[str, Any]], config: OptimizerConfig) -> torch.optim.Optimizer:
    """The optimizer that the recipe names. Muon orthogonalises the groups with `muon` True."""
    betas = (0.9, config.beta2)
    if config.name == "adamw":
        # Fused: one pass over memory instead of ten, a quarter of the time on a CPU.
        return torch.optim.AdamW(groups, lr=config.learning_rate, betas=betas, fused=True)
    return {"muon": Muon, "lamb": Lamb}[config.name](groups, config.learning_rate, betas)


class WholeParameterOptimizer(torch.optim.Optimizer):
    """Steps parameters, or under ZeRO the flat tensors that hold fragments of them."""

    def __init__(self, groups: Sequence[dict[str, Any]], learning_rate: float, betas: tuple[float, float]) -> None:
        super().__init__(groups, {"lr": learning_rate, "betas": betas})
        self._fragments: dict[Tensor, list[Fragment]] = {}
        self._device: torch.device | None = None

    def bind(self, places: Iterable[tuple[Tensor, Fragment]], device: torch.device) -> None:
        """Set where parameters lie, once an engine has cut them up, and the device on which ranks exchange tensors."""
        for flat, fragment in places:
            self._fragments.setdefault(flat, []).append(fragment)
        self._device = device

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One step of every parameter that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step(parameter, parameter.grad, self.state[parameter], group)

    def _step(self, parameter: Tensor, gradient: Tensor, state: dict[str, Any], group: Mapping[str, Any]) -> None:
        raise NotImplementedError


class Muon(WholeParameterOptimizer):
    """Orthogonalised momentum (https://kellerjordan.github.io/posts/muon/) for groups of matrices; AdamW for others.

    The update is as long as AdamW's (arXiv 2502.16982, section 2.2), so AdamW's learning rate and decay serve both.
    """

    def _step(self, parameter: Tensor, gradient: Tensor, state: dict[str, Any], group: Mapping[str, Any]) -> None:
        if not group[MUON]:
            _adamw_step(parameter, gradient, state, group)
            return
        if not state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        momentum = state["momentum_buffer"].lerp_(gradient, 1 - MOMENTUM)
        direction = gradient.lerp(momentum, MOMENTUM)  # Nesterov's
        rate = group["lr"]
        parameter.mul_(1 - rate * group["weight_decay"])
        if parameter not in self._fragments:
            parameter.add_(orthogonal(direction), alpha=-rate * _length(parameter.shape))
            return
        assert self._device is not None
        for fragment in self._fragments[parameter]:
            whole = fragment.whole(direction, self._device)
            if fragment.numel:  # every rank must exchange; only those that hold a piece need the update
                update = orthogonal(whole).flatten().narrow(0, fragment.start, fragment.numel)
                fragment.of(parameter).add_(update.to(parameter), alpha=-rate * _length(fragment.shape))


def _length(shape: torch.Size) -> float:
    """0.2 √max(A, B): an orthogonal matrix times this has entries of AdamW's usual size (arXiv 2502.16982, eq. 4)."""
    return 0.2 * math.sqrt(max(shape))


def orthogonal(matrix_AB: Tensor) -> Tensor:
    """The matrix (A, B) with all singular values near 1, in bf16, by a Newton–Schulz iteration with fast coefficients,
    as in `torch.optim.Muon`."""
    a, b, c = QUINTIC
    is_tall = matrix_AB.shape[0] > matrix_AB.shape[1]
    x = matrix_AB.bfloat16()
    x = x.T if is_tall else x
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(ITERATIONS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if is_tall else x


class Lamb(WholeParameterOptimizer):
    """Adam's direction, scaled to the length of the parameter that it changes (LAMB, arXiv 1904.00962, algorithm 2, φ
    the identity). Parameters without decay, norms and biases and scales, keep Adam's length, as in the authors' code.
    """

    def _step(self, parameter: Tensor, gradient: Tensor, state: dict[str, Any], group: Mapping[str, Any]) -> None:
        if not group["weight_decay"]:
            _adamw_step(parameter, gradient, state, group)
            return
        _begin_adam(parameter, state)
        state["step"] += 1
        beta1, beta2 = group["betas"]
        step = float(state["step"])
        state["exp_avg"].lerp_(gradient, 1 - beta1)
        state["exp_avg_sq"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        scale = state["exp_avg_sq"].div(1 - beta2**step).sqrt_().add_(EPS)
        update = state["exp_avg"].div(1 - beta1**step).div_(scale).add_(parameter, alpha=group["weight_decay"])
        pieces = [(parameter, update)]
        if parameter in self._fragments:
            pieces = [(fragment.of(parameter), fragment.of(update)) for fragment in self._fragments[parameter]]
        squares_P2 = torch.stack([torch.stack([tensor.square().sum() for tensor in piece]) for piece in pieces])
        if parameter in self._fragments:
            squares_P2 = squares_P2.to(self._device)
            dist.all_reduce(squares_P2)
        lengths_P, updates_P = squares_P2.sqrt().unbind(1)
        ratios_P = torch.where((lengths_P > 0) & (updates_P > 0), lengths_P / updates_P, 1.0)
        for (weights, change), ratio in zip(pieces, ratios_P.tolist(), strict=True):
            weights.add_(change, alpha=-group["lr"] * ratio)


def _begin_adam(parameter: Tensor, state: dict[str, Any]) -> None:
    if not state:
        state |= {"step": torch.tensor(0.0), "exp_avg": torch.zeros_like(parameter)}
        state["exp_avg_sq"] = torch.zeros_like(parameter)


def _adamw_step(parameter: Tensor, gradient: Tensor, state: dict[str, Any], group: Mapping[str, Any]) -> None:
    _begin_adam(parameter, state)
    beta1, beta2 = group["betas"]
    adamw(
        [parameter],
        [gradient],
        [state["exp_avg"]],
        [state["exp_avg_sq"]],
        [],
        [state["step"]],
        amsgrad=False,
        beta1=beta1,
        beta2=beta2,
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=EPS,
        maximize=False,
    )


# --- learning-rate schedules ----------------------------------------------------------------------------------------

FALLS: dict[str, Callable[[float], float]] = {
    "cosine": lambda progress: 0.5 * (1 + math.cos(math.pi * progress)),
    "linear": lambda progress: 1 - progress,
    # Better than a straight line after a stable stretch (arXiv 2405.18392, section 4).
    "wsd": lambda progress: 1 - math.sqrt(progress),
}
"""Share of the fall's time, from 0 to 1 → share of the peak that is left."""


def learning_rate_schedule(optimizer: OptimizerConfig, total_steps: int) -> Callable[[int], float]:
    """Step → factor of the peak learning rate: a linear warm-up, then one of three ways down."""
    warmup = min(optimizer.warmup_steps, total_steps - 1)
    floor = optimizer.final_learning_rate / optimizer.learning_rate
    begin = warmup
    if optimizer.schedule == "wsd":
        begin = max(warmup, total_steps - round((optimizer.decay_share or DECAY_SHARE) * total_steps))
    fall = FALLS[optimizer.schedule]

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        if step < begin:
            return 1.0
        return floor + (1 - floor) * fall(min(1.0, (step - begin) / max(1, total_steps - begin)))

    return factor


# --- running averages of weights ------------------------------------------------------------------------------------
# An average is often better than the last weights, and depends less on the last batches. It is one more state of the
# optimizer, in fp32 beside its master: sharded, offloaded and saved with the other states, and unchanged by a step that
# DeepSpeed drops.


def keep_average(optimizer: torch.optim.Optimizer, decay: float) -> None:
    """Make every step move the averages by 1 − decay of the way to the weights, and further in the first steps."""

    @torch.no_grad()
    def follow(optimizer: torch.optim.Optimizer, arguments: Any, named: Any) -> None:
        for group in optimizer.param_groups:
            for weights in group["params"]:
                state = optimizer.state[weights]
                if not state:  # it has had no gradient yet
                    continue
                if AVERAGE not in state:
                    state |= {AVERAGE: weights.detach().clone(), AVERAGE_STEPS: torch.tensor(0.0)}
                steps = float(state[AVERAGE_STEPS])
                state[AVERAGE].lerp_(weights, 1 - min(decay, (1 + steps) / (10 + steps)))
                state[AVERAGE_STEPS] += 1

    optimizer.register_step_post_hook(follow)


def whole_average(engine: Any, parameter: Tensor, places: Mapping[Tensor, tuple[Tensor, Fragment]]) -> Tensor | None:
    """A parameter's whole average; None for a parameter that is not trained. `places` come from `places_of`.
    Collective.

    DeepSpeed's `safe_get_full_optimizer_state` knows only the states of the first parameter group below ZeRO 3.
    """
    if parameter not in places:
        average: Tensor | None = engine.basic_optimizer.state.get(parameter, {}).get(AVERAGE)
        return average
    flat, fragment = places[parameter]
    # Before the first step that was taken, the average is the weights.
    return fragment.whole(engine.basic_optimizer.state[flat].get(AVERAGE, flat), engine.device)


@contextlib.contextmanager
def averages_in_place(engine: Any) -> Iterator[None]:
    """Swap the weights with their averages within the block; afterwards both are bit-equal to before. After an error
    within the block the engine cannot be used. Collective."""
    _swap_averages(engine)
    yield
    _swap_averages(engine)


@torch.no_grad()
def _swap_averages(engine: Any) -> None:
    for weights, state in engine.basic_optimizer.state.items():
        if AVERAGE in state:
            before = weights.detach().clone()
            weights.data.copy_(state[AVERAGE])
            state[AVERAGE].copy_(before)
    zero, stage = engine.optimizer, engine.zero_optimization_stage()
    if stage == 3:
        zero.checkpoint_event_prologue()  # leaves each rank its part of the parameters that ZeRO keeps whole
        for number in range(len(zero.fp32_partitioned_groups_flat)):
            zero._reassign_or_swap_out_partitioned_parameters(number)
        zero.checkpoint_event_epilogue()
    elif stage > 0:
        zero.update_lp_params()
