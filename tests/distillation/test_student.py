"""A student hears its teacher in the teacher's width, and takes nothing of it into its package."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models

from mmflow.distillation.config import LessonsConfig
from mmflow.distillation.losses import SIDES, feature_loss, soft_label_loss
from mmflow.distillation.student import Student, embeddings
from mmflow.errors import RecipeError
from mmflow.loading.batches import Batch
from mmflow.loading.plan import LoaderState
from mmflow.models.config import ModelConfig
from mmflow.models.model import build
from mmflow.models.package import LoadedModel
from mmflow.objectives.config import ObjectivesConfig
from mmflow.objectives.learner import Learner
from mmflow.objectives.outputs import MaskingTokens
from tests.tiny import SMALLEST_MODEL

VOCABULARY = 64


def config(**changes: Any) -> ModelConfig:
    return ModelConfig.model_validate({**SMALLEST_MODEL, **changes})


def teacher(**changes: Any) -> LoadedModel:
    taught = config(**changes)
    return LoadedModel(build("model", taught, VOCABULARY, seed=3).eval(), Tokenizer(models.WordPiece()), taught)


def student_of(teacher: LoadedModel, lessons: LessonsConfig, weight: float = 1.0, **changes: Any) -> Student:
    mine = config(**changes)
    objectives = ObjectivesConfig.model_validate({"contrastive": {"weight": weight}})
    special = MaskingTokens(None, (), VOCABULARY)
    return Student(
        Learner(build("model", mine, VOCABULARY, seed=0), mine, objectives, special, seed=0), teacher, lessons
    )


def batch(side: int) -> Batch:
    random = torch.Generator().manual_seed(0)
    return Batch(
        keys=tuple("abcde"),
        pixels=torch.randint(0, 256, (5, 3, side, side), generator=random, dtype=torch.uint8),
        token_ids=torch.randint(0, VOCABULARY, (5, 7), generator=random),
        token_mask=torch.ones(5, 7, dtype=torch.int64),
        real=torch.tensor([True, True, True, True, False]),
        state=LoaderState(),
    )


@pytest.mark.parametrize(("teacher_width", "num_projections"), [(6, 0), (10, 2), (3, 2)])
def test_student_is_compared_in_its_teacher_s_width(teacher_width: int, num_projections: int) -> None:
    student = student_of(teacher(embedding_width=teacher_width), LessonsConfig(soft_labels=0, features=1), weight=0)
    loss, parts = student(batch(16), 1)
    torch.testing.assert_close(loss, parts["features"])
    assert len(student.projections) == num_projections
    loss.backward()
    projections = list(student.projections.parameters())
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in projections)
    model = student.learner.model
    assert model.image_projection is not None
    assert model.image_projection.weight.grad is not None
    assert model.scale is not None
    assert not model.scale.logit_scale.grad  # distances do not depend on the temperature, nor does a loss of weight 0


def test_loss_is_the_weighted_sum_of_objectives_and_lessons() -> None:
    lessons = LessonsConfig(soft_labels=0.5, features=3, temperature=2)
    student = student_of(taught := teacher(), lessons, weight=0.25)
    student.eval()
    loss, parts = student(batch(16), 1)
    torch.testing.assert_close(loss, 0.25 * parts["contrastive"] + 0.5 * parts["soft_labels"] + 3 * parts["features"])
    learner, rows = student.learner, student.learner.rows(batch(16))
    outputs = learner.outputs(learner.model, learner.config, batch(16), 1, rows)
    learnt = embeddings(outputs)
    told = embeddings(learner.outputs(taught.model, taught.config, batch(16), 1, rows))
    learnt |= {f"projected_{side}": learnt[side] for side in SIDES}
    torch.testing.assert_close(parts["soft_labels"], soft_label_loss(learnt, told, outputs.rows, outputs.gather, 2.0))
    torch.testing.assert_close(parts["features"], feature_loss(learnt, told, outputs.rows))


def test_teacher_does_not_learn_and_is_no_part_of_the_student() -> None:
    taught = teacher()
    student = student_of(taught, LessonsConfig())
    before = {name: weight.clone() for name, weight in taught.model.state_dict().items()}
    student.train()
    loss, _ = student(batch(16), 1)
    loss.backward()
    assert all(weight.grad is None for weight in taught.model.parameters())
    assert all(torch.equal(weight, before[name]) for name, weight in taught.model.state_dict().items())
    assert not taught.model.training
    assert len(list(student.parameters())) == len(list(student.learner.model.parameters()))


def test_projections_are_no_part_of_the_model_that_is_packaged() -> None:
    student = student_of(teacher(embedding_width=10), LessonsConfig())
    assert student.projections
    assert set(student.learner.model.state_dict()) == set(build("model", config(), VOCABULARY, seed=0).state_dict())


def test_each_side_sees_the_picture_at_its_own_size() -> None:
    student = student_of(teacher(image_pixels=32), LessonsConfig())
    loss, _ = student(batch(32), 1)
    assert torch.isfinite(loss)
    learner = student.learner
    shown = learner.outputs(learner.model, learner.config, batch(32), 1, learner.rows(batch(32)))
    assert shown.pixels.shape == (5, 3, 16, 16)


def test_a_teacher_without_a_shared_space_has_no_lessons() -> None:
    without = teacher(embedding_width=None, heads=["masked_language"], fusion={"kind": "concatenation", "width": 8})
    with pytest.raises(RecipeError, match="embedding_width"):
        student_of(without, LessonsConfig())
