"""A check that the gradient on several workers equals that of one process, on the machines that will train: with the
recipe's objectives, workers, ZeRO stage and micro-batches, and a model small enough to take no time."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from mmflow.learning.learner import Learner
from mmflow.learning.objectives import ObjectivesConfig
from mmflow.learning.outputs import MaskingTokens
from mmflow.learning.rows import ALONE, all_ranks
from mmflow.loading.batches import Batch
from mmflow.loading.plan import LoaderState
from mmflow.models.config import ModelConfig
from mmflow.models.model import build
from mmflow.training.config import TrainingConfig
from mmflow.training.engine import descend, engine_settings, prepare_deepspeed, rows_of, whole_state

TOLERANCE = 1e-4  # of the largest gradient; a missing factor or row is an error of a tenth and more
RATE = 1024.0  # of plain gradient descent: a weight moves far enough to read its gradient to six digits
ROWS, TOKENS, ANSWER_TOKENS, CLASSES, VOCABULARY, PIXELS = 4, 10, 5, 3, 64, 16
SPECIAL = MaskingTokens(mask=4, ids=(0, 1, 2, 3, 4), vocabulary_size=VOCABULARY)

_TRANSFORMER = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
_NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


@dataclass(frozen=True)
class GradientCheck:
    """What is checked, as plain data that travels to other machines."""

    model: ModelConfig  # the small one
    objectives: ObjectivesConfig
    training: TrainingConfig


@dataclass(frozen=True)
class Compared:
    """One objective's gradient over all weights."""

    objective: str
    error: float  # the largest difference
    largest: float  # entry of one process's gradient

    @property
    def equal(self) -> bool:
        """Whether the gradients are equal up to rounding, and not zero."""
        return self.largest > 0 and self.error <= TOLERANCE * self.largest


def small_check(model: ModelConfig, objectives: ObjectivesConfig, training: TrainingConfig) -> GradientCheck:
    """A check of a training section, with the smallest model that has the same parts."""
    changes: dict[str, Any] = {"num_workers": training.most_workers, "precision": "fp32", "max_restarts": 0}
    if training.micro_batch_size is not None:
        changes["micro_batch_size"] = ROWS // 2
    return GradientCheck(_small(model), objectives, training.model_copy(update=changes))


def _small(model: ModelConfig) -> ModelConfig:
    """Stills instead of clips: an image encoder makes one vector of a clip's frames before any exchange."""
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
    """Compare each objective on its own. Collective; rank 0 gets the result, the others an empty list."""
    prepare_deepspeed()
    return [compared for name in check.objectives.named if (compared := _compare(check, name)) is not None]


def _compare(check: GradientCheck, name: str) -> Compared | None:
    import deepspeed

    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    model = build("model", check.model, VOCABULARY, seed=0, num_classes=CLASSES)
    learner = Learner(model, check.model, [_alone(check.objectives, name)], SPECIAL, seed=0, ranks=all_ranks())
    one_process = copy.deepcopy(learner)
    one_process.ranks = ALONE
    engine, *_ = deepspeed.initialize(
        model=learner,
        optimizer=torch.optim.SGD(learner.parameters(), lr=RATE),
        config=engine_settings(check.training, ROWS, clipped=False),
        dist_init_required=False,
    )
    batch = _random_batch(num_ranks * ROWS).map_tensors(lambda tensor: tensor.to(engine.device))
    before = whole_state(model)
    descend(engine, rows_of(batch, slice(rank * ROWS, (rank + 1) * ROWS)), 1)
    engine.step()
    after = whole_state(model)
    if rank > 0:
        return None
    one_process.to(engine.device)
    one_process(batch, 1)[0].backward()
    errors, sizes = [], []
    for key, parameter in one_process.model.named_parameters():
        expected = torch.zeros_like(before[key]) if parameter.grad is None else parameter.grad.cpu()
        errors.append(((before[key] - after[key]) / RATE - expected).abs().max())
        sizes.append(expected.abs().max())
    return Compared(name, float(torch.stack(errors).max()), float(torch.stack(sizes).max()))


def _alone(objectives: ObjectivesConfig, name: str) -> ObjectivesConfig:
    """One objective with weight 1. Matching draws partners from all rows: from a rank's own it would draw others."""
    objective = objectives.named[name].over_all_ranks().model_copy(update={"weight": 1.0})
    return ObjectivesConfig.model_validate({name: objective})


def _random_batch(rows: int) -> Batch:
    """A global batch with texts of different lengths; the last row is padding."""
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
