"""Is the gradient that the workers descend that of one process? Shown on the machines that will train, by the recipe's
objectives, number of workers, ZeRO stage and micro-batches, with a model small enough to take no time."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mmflow.learning.config import MatchingConfig, ObjectivesConfig
from mmflow.learning.learner import ALONE, Learner, Ranks
from mmflow.learning.outputs import MaskingTokens
from mmflow.learning.rows import gather_rows, pass_on
from mmflow.loading.batches import Batch
from mmflow.loading.plan import LoaderState
from mmflow.models.config import ModelConfig
from mmflow.models.model import build
from mmflow.training.engine import descend, engine_settings, prepare_deepspeed, rows_of, whole_state

TOLERANCE = 1e-4  # of the largest gradient; a factor or a row that is missing is an error of a tenth and more
RATE = 1024.0  # of plain gradient descent: a weight moves far enough for its gradient to be read off to six digits
ROWS, TOKENS, ANSWER_TOKENS, CLASSES, VOCABULARY, PIXELS = 4, 10, 5, 3, 64, 16
SPECIAL = MaskingTokens(mask=4, ids=(0, 1, 2, 3, 4), vocabulary_size=VOCABULARY)

_TRANSFORMER = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
_NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


@dataclass(frozen=True, kw_only=True)
class GradientCheck:
    """What is checked; plain data, so that it travels to other machines."""

    model: ModelConfig  # the small one
    objectives: ObjectivesConfig
    zero_stage: int
    micro_batch_size: int | None
    offload_optimizer: bool


@dataclass(frozen=True)
class Compared:
    """The gradient of one objective over all weights."""

    objective: str
    error: float  # the largest difference
    largest: float  # entry of one process's gradient

    @property
    def equal(self) -> bool:
        """Whether it is the same but for rounding, and there is one."""
        return self.largest > 0 and self.error <= TOLERANCE * self.largest


def small_check(
    model: ModelConfig,
    objectives: ObjectivesConfig,
    *,
    zero_stage: int,
    in_micro_batches: bool,
    offload_optimizer: bool,
) -> GradientCheck:
    """A check of a training section, its model replaced by the smallest with the same parts."""
    return GradientCheck(
        model=_small(model),
        objectives=objectives,
        zero_stage=zero_stage,
        micro_batch_size=ROWS // 2 if in_micro_batches else None,
        offload_optimizer=offload_optimizer,
    )


def _small(model: ModelConfig) -> ModelConfig:
    """Stills in place of clips, whose frames an image encoder has made one vector of before any worker asks."""
    small: dict[str, Any] = {
        "image": {"type": "vit", "options": {**_TRANSFORMER, **_NO_DROPOUT, "patch_size": PIXELS // 2}},
        "embedding_width": None if model.embedding_width is None else 8,
        "image_pixels": PIXELS,
        "max_tokens": TOKENS,
        "vocabulary_size": VOCABULARY,
        "temperature": model.temperature,
        "bias": model.bias,
        "heads": model.heads,
    }
    if model.text is not None:
        small["text"] = {"type": "bert", "options": {**_TRANSFORMER, **_NO_DROPOUT, "max_position_embeddings": TOKENS}}
    if model.fusion is not None:
        attention = {"layers": 1, "heads": 2} if model.fusion.layers is not None else {}
        small["fusion"] = {"kind": model.fusion.kind, "width": 16, "dropout": 0.0, **attention}
    if model.decoder is not None:
        small["decoder"] = {"memory": model.decoder.memory, "width": 16, "layers": 1, "heads": 2, "dropout": 0.0}
    return ModelConfig.model_validate(small)


def compare_gradients(check: GradientCheck) -> list[Compared]:
    """Each objective on its own, on this rank as one of all. Collective; rank 0 has the result, the others nothing."""
    prepare_deepspeed()
    return [found for name in check.objectives.named if (found := _compare(check, name)) is not None]


def _compare(check: GradientCheck, name: str) -> Compared | None:
    import deepspeed

    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    model = build("model", check.model, VOCABULARY, seed=0, num_classes=CLASSES)
    learner = Learner(
        model, check.model, _alone(check.objectives, name), SPECIAL, seed=0, ranks=Ranks(rank, gather_rows, pass_on)
    )
    one_process = copy.deepcopy(learner)
    one_process.ranks = ALONE
    engine, *_ = deepspeed.initialize(
        model=learner,
        optimizer=torch.optim.SGD(learner.parameters(), lr=RATE),
        config=engine_settings(
            zero_stage=check.zero_stage,
            precision="fp32",
            rows_per_rank=ROWS,
            gradient_clipping=0.0,
            micro_batch_size=check.micro_batch_size,
            offload_optimizer=check.offload_optimizer,
        ),
        dist_init_required=False,
    )
    batch = _random_batch(num_ranks * ROWS).map_tensors(lambda each: each.to(engine.device))
    before = whole_state(model)
    own = slice(rank * ROWS, (rank + 1) * ROWS)
    descend(engine, rows_of(batch, own), 1)
    engine.step()
    after = whole_state(model)
    if rank > 0:
        return None
    one_process.to(engine.device)
    one_process(batch, 1)[0].backward()
    return _largest_difference(name, before, after, one_process)


def _largest_difference(name: str, before: dict[str, Tensor], after: dict[str, Tensor], one: Learner) -> Compared:
    errors, sizes = [], []
    for key, parameter in one.model.named_parameters():
        expected = torch.zeros_like(before[key]) if parameter.grad is None else parameter.grad.cpu()
        errors.append(((before[key] - after[key]) / RATE - expected).abs().max())
        sizes.append(expected.abs().max())
    return Compared(name, float(torch.stack(errors).max()), float(torch.stack(sizes).max()))


def _alone(objectives: ObjectivesConfig, name: str) -> ObjectivesConfig:
    """One objective of weight 1. Partners from a rank's own rows would be others in one process: drawn from all."""
    section = objectives.named[name].model_copy(update={"weight": 1.0})
    if isinstance(section, MatchingConfig):
        section = section.model_copy(update={"pool": "batch"})
    return objectives.model_copy(update={other: section if other == name else None for other in objectives.named})


def _random_batch(rows: int) -> Batch:
    """A global batch whose texts differ in length; the last row is padding."""
    random = torch.Generator().manual_seed(0)
    lengths = torch.randint(3, TOKENS + 1, (rows, 1), generator=random)
    answer_lengths = torch.randint(2, ANSWER_TOKENS + 1, (rows, 1), generator=random)
    return Batch(
        keys=tuple(f"sample {number}" for number in range(rows)),
        pixels=torch.randint(0, 256, (rows, 3, PIXELS, PIXELS), generator=random, dtype=torch.uint8),
        token_ids=torch.randint(5, VOCABULARY, (rows, TOKENS), generator=random),
        token_mask=(torch.arange(TOKENS) < lengths).long(),
        real=torch.arange(rows) < rows - 1,
        targets={
            "label": torch.randint(-1, CLASSES, (rows,), generator=random),
            "answer": torch.randint(-1, CLASSES, (rows,), generator=random),
            "answer_scores": torch.rand(rows, CLASSES, generator=random),
            "answer_ids": torch.randint(5, VOCABULARY, (rows, ANSWER_TOKENS), generator=random),
            "answer_mask": (torch.arange(ANSWER_TOKENS) < answer_lengths).long(),
        },
        state=LoaderState(),
    )
