"""Shared by tests of distillation: small transformer teachers and students, batches, and embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from tokenizers import Tokenizer, models

from mmflow.learning.distillation import DistillationLossesConfig
from mmflow.learning.distillation.loss import DistillationBatch, TeacherOutputs
from mmflow.learning.learner import Learner
from mmflow.learning.objectives import ObjectivesConfig
from mmflow.learning.outputs import Embeddings, MaskingTokens
from mmflow.learning.rows import ALONE, GlobalRows, Ranks
from mmflow.learning.student import Student, Teacher
from mmflow.loading.batches import Batch
from mmflow.loading.plan import LoaderState
from mmflow.models.config import ModelConfig
from mmflow.models.model import build
from mmflow.models.package import LoadedModel
from tests.learning.tiny import unit

VOCABULARY, SIDE, TOKENS = 64, 16, 8
STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}  # nothing random
SPECIAL = MaskingTokens(None, (), VOCABULARY)


def attending(*, width: int = 8, attention_heads: int = 2, layers: int = 2, **changes: Any) -> dict[str, Any]:
    """A dual encoder of a ViT and a BERT, both of these layers."""
    options = {
        "hidden_size": width,
        "num_attention_heads": attention_heads,
        "num_hidden_layers": layers,
        "intermediate_size": 2 * width,
        **STILL,
    }
    fields = {
        "image": {"type": "vit", "options": {**options, "patch_size": 8}, "pooling": "first"},
        "text": {"type": "bert", "options": {**options, "max_position_embeddings": 16}},
        "embedding_width": 6,
        "image_pixels": SIDE,
        "max_tokens": TOKENS,
        "vocabulary_size": VOCABULARY,
    }
    return fields | changes


FUSED: dict[str, Any] = {
    "fusion": {"kind": "cross_attention", "width": 8, "layers": 1, "heads": 2, "dropout": 0.0},
    "heads": ["matching"],
}


def loaded(fields: dict[str, Any], seed: int = 3) -> LoadedModel:
    config = ModelConfig.model_validate(fields)
    model = build("model", config, VOCABULARY, seed=seed).eval()
    return LoadedModel(model, Tokenizer(models.WordPiece()), config)


def student_of(
    fields: dict[str, Any], losses: dict[str, Any], *teachers: Teacher, weight: float = 0.0, ranks: Ranks = ALONE
) -> Student:
    """A student; its own objective has weight 0 by default."""
    config = ModelConfig.model_validate(fields)
    objectives = ObjectivesConfig.model_validate({"contrastive": {"weight": weight}})
    learner = Learner(build("model", config, VOCABULARY, seed=0), config, [objectives], SPECIAL, seed=0, ranks=ranks)
    return Student(learner, teachers, DistillationLossesConfig.model_validate(losses))


def batch(rows: int = 5, *, side: int = SIDE, real: torch.Tensor | None = None, seed: int = 0, **changes: Any) -> Batch:
    """Texts of three to seven tokens, padded; without `real` the last row is padding."""
    random = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, TOKENS, (rows, 1), generator=random)
    mask = (torch.arange(TOKENS - 1) < lengths).long()
    fields: dict[str, Any] = {
        "keys": tuple(f"sample {number}" for number in range(rows)),
        "pixels": torch.randint(0, 256, (rows, 3, side, side), generator=random, dtype=torch.uint8),
        "token_ids": torch.randint(1, VOCABULARY, (rows, TOKENS - 1), generator=random) * mask,
        "token_mask": mask,
        "real": torch.arange(rows) < rows - 1 if real is None else real,
        "state": LoaderState(),
    }
    return Batch(**fields | changes)


def distillation_batch(
    student: Embeddings, teachers: Sequence[tuple[float, Embeddings]], rows: GlobalRows
) -> DistillationBatch:
    """Embeddings without models; the student's widths are those of the teachers."""
    outputs: Any = SimpleNamespace(embeddings=student, rows=rows, ranks=ALONE)
    same: Any = {}  # no projections
    return DistillationBatch(outputs, [TeacherOutputs(None, teacher, same, {}, share) for share, teacher in teachers])


def space(rows: int, width: int, seed: int, scale: float = 10.0) -> Embeddings:
    """Embeddings and a scale to differentiate by."""
    values = unit(rows, width, seed), unit(rows, width, seed + 100), torch.tensor([scale])
    return Embeddings(*(value.clone().requires_grad_() for value in values))


def without_gradient(embeddings: Embeddings) -> Embeddings:
    return Embeddings(*(tensor.detach() for tensor in embeddings))
