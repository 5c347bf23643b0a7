"""A student learns from teachers of other widths, picture sizes and tokenizers; nothing of them is in its package."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from mmflow.core.errors import RecipeError
from mmflow.learning.distillation import DistillationLossesConfig
from mmflow.learning.distillation.features import Features
from mmflow.learning.distillation.soft_labels import SoftLabels
from mmflow.learning.student import Student, Teacher
from mmflow.loading.batches import Reading
from mmflow.models.config import ModelConfig
from mmflow.models.model import build
from mmflow.training.config import DistillConfig
from tests.learning.teaching import FUSED, VOCABULARY, attending, batch, distillation_batch, loaded, student_of
from tests.tiny import SMALLEST_MODEL

EVERYTHING: dict[str, Any] = {
    "soft_labels": {"temperature": 2.0},
    "similarities": {},
    "features": {},
    "interactive": {},
    "attention": {"sides": ["image", "text"]},
    "hidden": {"sides": ["image", "text"]},
    "ranking": {"negatives": 2},
}


def teacher(weight: float = 1.0, seed: int = 3, **changes: Any) -> Teacher:
    return Teacher(weight=weight, loaded=loaded({**SMALLEST_MODEL, **changes}, seed))


def smallest(*teachers: Teacher, losses: dict[str, Any], weight: float = 0.0, **changes: Any) -> Student:
    return student_of({**SMALLEST_MODEL, **changes}, losses, *teachers, weight=weight)


@pytest.mark.parametrize(("teacher_width", "num_projections"), [(6, 0), (10, 2), (3, 2)])
@pytest.mark.parametrize("name", ["features", "interactive"])
def test_student_is_compared_in_its_teacher_s_width(name: str, teacher_width: int, num_projections: int) -> None:
    student = smallest(teacher(embedding_width=teacher_width), losses={name: 1})
    loss, parts = student(batch(), 1)
    torch.testing.assert_close(loss, parts[name])
    assert len(list(student.projections.parameters())) == num_projections
    loss.backward()
    for weight in student.projections.parameters():
        assert weight.grad is not None
        assert weight.grad.any()
    model = student.learner.model
    assert model.image_projection is not None
    assert model.image_projection.weight.grad is not None


def test_losses_that_compare_no_vectors_have_no_projections() -> None:
    student = smallest(teacher(embedding_width=10), losses={"soft_labels": 1, "similarities": 1})
    assert not list(student.projections.parameters())


def test_loss_is_the_weighted_sum_of_objectives_and_losses() -> None:
    losses = {"soft_labels": {"weight": 0.5, "temperature": 2}, "features": {"weight": [[0, 0], [4, 4]]}}
    student = smallest(taught := teacher(), losses=losses, weight=0.25)
    student.eval()
    loss, parts = student(batch(), 3)
    torch.testing.assert_close(loss, 0.25 * parts["contrastive"] + 0.5 * parts["soft_labels"] + 3 * parts["features"])
    learner, rows = student.learner, student.learner.rows(batch())
    outputs = learner.outputs(learner.model, learner.config, batch(), 3, rows)
    assert taught.loaded is not None
    mine = outputs.embeddings
    theirs = learner.outputs(taught.loaded.model, taught.loaded.config, batch(), 3, rows).embeddings
    compared = distillation_batch(mine, [(1.0, theirs)], rows)
    torch.testing.assert_close(parts["soft_labels"], SoftLabels(temperature=2.0).loss(compared))
    torch.testing.assert_close(parts["features"], Features().loss(compared))


def test_teachers_do_not_learn_and_are_no_part_of_the_student() -> None:
    teachers = [Teacher(loaded=loaded(attending(**FUSED), seed)) for seed in (3, 4)]
    student = student_of(attending(layers=1), EVERYTHING, *teachers)
    teacher_models = [teacher.loaded.model for teacher in teachers if teacher.loaded]
    before = [{name: weight.clone() for name, weight in model.state_dict().items()} for model in teacher_models]
    student.train()
    loss, parts = student(batch(), 1)
    assert set(DistillationLossesConfig.model_fields) <= set(parts)
    loss.backward()
    for model, weights_before in zip(teacher_models, before, strict=True):
        assert all(weight.grad is None for weight in model.parameters())
        assert all(torch.equal(weight, weights_before[name]) for name, weight in model.state_dict().items())
        assert not model.training
    assert [name for name, weight in student.named_parameters() if weight.grad is None] == []
    own = {id(weight) for part in (student.learner.model, student.projections) for weight in part.parameters()}
    assert {id(weight) for weight in student.parameters()} == own


@pytest.mark.parametrize("name", EVERYTHING)
def test_every_distillation_loss_falls(name: str) -> None:
    """Its loss falls when it alone is descended."""
    student = student_of(
        attending(layers=1), {name: EVERYTHING[name]}, Teacher(loaded=loaded(attending(width=12, **FUSED)))
    )
    descent = torch.optim.Adam(student.parameters(), lr=0.01)
    history = []
    for _ in range(12):
        loss, parts = student(batch(), 0)
        descent.zero_grad()
        loss.backward()
        descent.step()
        history.append(parts[name].item())
    assert history[-1] < history[0]


@pytest.mark.parametrize("name", EVERYTHING)
def test_padded_rows_change_nothing(name: str) -> None:
    student = student_of(attending(layers=1), {name: EVERYTHING[name]}, Teacher(loaded=loaded(attending(**FUSED))))
    real = torch.arange(6) < 4
    whole, garbled = batch(6, real=real), batch(6, real=real, seed=9)
    other = replace(
        whole,
        pixels=torch.where(real[:, None, None, None], whole.pixels, garbled.pixels),
        token_ids=torch.where(real[:, None], whole.token_ids, garbled.token_ids),
        token_mask=torch.where(real[:, None], whole.token_mask, garbled.token_mask),
    )
    alone = whole.map_tensors(lambda tensor: tensor[:4])
    alone = replace(alone, keys=whole.keys[:4])
    expected, _ = student(alone, 1)
    for padded in (whole, other):
        torch.testing.assert_close(student(padded, 1)[0], expected, atol=1e-5, rtol=1e-5)


def test_projections_are_no_part_of_the_model_that_is_packaged() -> None:
    student = smallest(teacher(embedding_width=10), losses={"features": 1})
    assert list(student.projections.parameters())
    config = ModelConfig.model_validate(SMALLEST_MODEL)
    assert set(student.learner.model.state_dict()) == set(build("model", config, VOCABULARY, seed=0).state_dict())


def test_each_side_sees_the_picture_at_its_own_size() -> None:
    student = smallest(teacher(image_pixels=32), teacher(image_pixels=24), losses={"soft_labels": 1})
    assert student.image_pixels == 32
    loss, _ = student(batch(side=32), 1)
    assert torch.isfinite(loss)
    learner = student.learner
    shown = learner.outputs(learner.model, learner.config, batch(side=32), 1, learner.rows(batch(side=32)))
    assert shown.pixels.shape == (5, 3, 16, 16)


def test_a_teacher_reads_the_texts_with_its_own_tokenizer() -> None:
    """As if it were alone with a batch of its own tokens."""
    own = teacher(seed=4)
    assert own.loaded is not None
    reading = Reading(own.loaded.tokenizer, 8)
    ids, mask = torch.randint(1, VOCABULARY, (5, 3)), torch.ones(5, 3, dtype=torch.int64)
    student = smallest(teacher(), replace(own, reading=reading), losses={"features": 1})
    assert student.readings == (reading,)
    learner = student.learner
    rows = learner.rows(batch())
    translated = batch(token_ids=ids, token_mask=mask)
    theirs = learner.outputs(own.loaded.model, own.loaded.config, translated, 1, rows).embeddings
    student.eval()
    mine = learner.outputs(learner.model, learner.config, batch(), 1, rows).embeddings
    first_alone = smallest(teacher(), losses={"features": 1}).eval()(batch(), 1)[1]["features"]
    both = student(batch(readings=((ids, mask),)), 1)[1]["features"]
    torch.testing.assert_close(
        both, 0.5 * (first_alone + Features().loss(distillation_batch(mine, [(1.0, theirs)], rows)))
    )


def test_twice_the_weight_equals_the_same_teacher_twice() -> None:
    losses = {"soft_labels": 1, "similarities": 1, "features": 1, "interactive": 1}
    twice = smallest(teacher(), teacher(), teacher(seed=5), losses=losses).eval()(batch(), 1)
    heavier = smallest(teacher(weight=2.0), teacher(seed=5), losses=losses).eval()(batch(), 1)
    torch.testing.assert_close(heavier[0], twice[0])


def test_a_loss_uses_only_teachers_with_the_outputs_it_reads() -> None:
    fused, dual = Teacher(loaded=loaded(attending(**FUSED))), Teacher(loaded=loaded(attending(), seed=8))
    losses = {"ranking": {"negatives": 2}}
    alone = student_of(attending(), losses, fused)(batch(), 1)[1]["ranking"]
    beside = student_of(attending(), losses, dual, fused)(batch(), 1)[1]["ranking"]
    torch.testing.assert_close(beside, alone)


@pytest.mark.parametrize(
    ("student", "taught", "losses", "message"),
    [
        (
            {},
            {"embedding_width": None, **FUSED},
            {"soft_labels": 1},
            "soft_labels: the teacher .* embedding_width, or leave soft_labels out",
        ),
        ({"embedding_width": None, **FUSED}, {}, {"features": 1}, "features: the student .* embedding_width"),
        ({}, {}, {"ranking": {}}, "ranking: the teacher has no matching_logits"),
        ({"image": SMALLEST_MODEL["image"]}, {}, {"attention": {"sides": ["image"]}}, "attention: the student's image"),
        (
            {"image_pixels": 24},
            {},
            {"attention": {"sides": ["image"]}},
            "attention: .* layer 2 has 10 .* 5;",
        ),
        ({}, {}, {"attention": {"sides": ["text"], "layers": [[1, 3]]}}, r"attention: layers: \[1, 3\], .* 2 layers"),
        (
            {},
            attending(attention_heads=4),
            {"attention": {"sides": ["text"], "heads": "same"}},
            "attention: heads: same, .* 2 heads and the teacher's 4",
        ),
        ({}, {}, {"attention": {"sides": ["text"], "heads": [[1, 5]]}}, r"attention: heads: \[1, 5\], .* 2 heads"),
        (
            {"image": {**attending()["image"], "patch_dropout": 0.5}},
            {},
            {"hidden": {"sides": ["image"]}},
            r"hidden: the student .* image\.patch_dropout to 0",
        ),
    ],
)
def test_a_loss_that_cannot_work_is_named_with_its_remedy(
    student: dict[str, Any], taught: dict[str, Any], losses: dict[str, Any], message: str
) -> None:
    teacher = Teacher(loaded=loaded(attending(**taught) if "image" not in taught else taught))
    with pytest.raises(RecipeError, match=rf"^distill\.losses\.{message}"):
        student_of(attending(**student), losses, teacher)


def test_a_number_is_a_weight_and_nothing_named_is_soft_labels_and_features() -> None:
    named = DistillationLossesConfig.model_validate({"soft_labels": 1.0, "features": 20.0}).named
    assert {name: section.weight_at(0) for name, section in named.items()} == {"soft_labels": 1.0, "features": 20.0}
    usual = DistillationLossesConfig().named
    assert {name: section.weight_at(0) for name, section in usual.items()} == {"soft_labels": 1.0, "features": 10.0}
    assert list(DistillationLossesConfig.model_validate({"similarities": {"temperature": 0.2}}).named) == [
        "similarities"
    ]
    with pytest.raises(ValueError, match="every loss is null"):
        DistillationLossesConfig.model_validate({"features": None})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"cache": {}, "losses": {"attention": {"sides": ["text"]}}},
            "cache: no loss reads the embeddings",
        ),
        (
            {"training": {"compile": True}, "losses": {"hidden": {"sides": ["text"]}}},
            "training.compile: losses.hidden reads",
        ),
        ({"teachers": [{"model": "m"}]}, "give either package, a model package's URI, or model and version"),
        ({"losses": {"attention": {"sides": ["text"], "layers": []}}}, "at least 1 item"),
    ],
)
def test_settings_that_nothing_reads_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DistillConfig.model_validate({"model": attending(), **fields})
