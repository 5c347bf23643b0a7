"""Distillation losses of embeddings against plain loops, in value and gradient. Padding and agreement cost nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mmflow.learning.distillation.features import Features
from mmflow.learning.distillation.interactive import Interactive
from mmflow.learning.distillation.loss import DistillationLoss, scaled_products
from mmflow.learning.distillation.similarities import Similarities
from mmflow.learning.distillation.soft_labels import SoftLabels
from mmflow.learning.outputs import Embeddings
from mmflow.learning.rows import GlobalRows
from tests.learning.teaching import distillation_batch, space, without_gradient
from tests.learning.tiny import all_real, rows_of

Teachers = Sequence[tuple[float, Embeddings]]
Plain = Callable[[Embeddings, Teachers], Tensor]

LOSSES: dict[str, DistillationLoss] = {
    "soft labels": SoftLabels(temperature=2.0),
    "similarities": Similarities(temperature=0.5),
    "features": Features(),
    "interactive": Interactive(),
}


def loss_of(loss: str | DistillationLoss, student: Embeddings, teachers: Teachers, rows: GlobalRows) -> Tensor:
    section = LOSSES[loss] if isinstance(loss, str) else loss
    return section.loss(distillation_batch(student, teachers, rows))


def softmax(logits: Sequence[Tensor]) -> list[Tensor]:
    exponentials = [logit.exp() for logit in logits]
    return [exponential / sum(exponentials) for exponential in exponentials]


def both_ways(embeddings: Embeddings) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    image, text = embeddings.image_BE.double(), embeddings.text_BE.double()
    return (image, text), (text, image)


def of_unit_length(student: Embeddings) -> Embeddings:
    """As projections leave them."""
    image, text = (torch.nn.functional.normalize(side, dim=-1) for side in student[:2])
    return Embeddings(image, text, student.logit_scale)


def divergence_of_mean(rows: Sequence[tuple[float, Sequence[Tensor]]], ours: Sequence[Tensor]) -> Tensor:
    """KL of the mean of the teachers' probabilities from the student's."""
    taught = [sum(share * theirs[column] for share, theirs in rows) for column in range(len(ours))]
    return sum(p * (p / q).log() for p, q in zip(taught, ours, strict=True))  # type: ignore[union-attr]


def mean_divergence(
    student: Embeddings, teachers: Teachers, probabilities: Callable[[Embeddings, int, int], list[Tensor]]
) -> Tensor:
    """The mean over both sides and all rows."""
    total, num_rows = torch.zeros(()).double(), len(student.image_BE)
    for side in range(2):
        for row in range(num_rows):
            theirs = [(share, probabilities(teacher, side, row)) for share, teacher in teachers]
            total = total + divergence_of_mean(theirs, probabilities(student, side, row))
    return total / (2 * num_rows)


def plain_soft_labels(student: Embeddings, teachers: Teachers, temperature: float = 2.0) -> Tensor:
    """Hinton's equation 1 and the sum over candidates, a number at a time."""

    def probabilities(model: Embeddings, side: int, row: int) -> list[Tensor]:
        anchors, candidates = both_ways(model)[side]
        scale = model.logit_scale[0].double() / temperature
        return softmax([scale * (anchors[row] @ candidate) for candidate in candidates])

    return temperature**2 * mean_divergence(student, teachers, probabilities)


def plain_similarities(student: Embeddings, teachers: Teachers, temperature: float = 0.5) -> Tensor:
    def probabilities(model: Embeddings, side: int, row: int) -> list[Tensor]:
        vectors, _ = both_ways(model)[side]
        return softmax([vectors[row] @ other / temperature for place, other in enumerate(vectors) if place != row])

    return mean_divergence(student, teachers, probabilities)


def plain_features(student: Embeddings, teachers: Teachers) -> Tensor:
    student = of_unit_length(student)
    total, rows = torch.zeros(()).double(), len(student.image_BE)
    for share, teacher in teachers:
        for ours, theirs in zip(student[:2], teacher[:2], strict=True):
            for row in range(rows):
                for own, taught in zip(ours[row].double(), theirs[row].double(), strict=True):
                    total = total + share * (own - taught) ** 2
    return total / (2 * rows)


def plain_interactive(student: Embeddings, teachers: Teachers) -> Tensor:
    student = of_unit_length(student)
    total, rows, scale = torch.zeros(()).double(), len(student.image_BE), student.logit_scale[0].double()
    for share, teacher in teachers:
        for direction in range(2):
            anchors, candidates = both_ways(student)[direction][0], both_ways(teacher)[direction][1]
            for row in range(rows):
                probabilities = softmax([scale * (anchors[row] @ candidate) for candidate in candidates])
                total = total - share * probabilities[row].log()
    return total / (2 * rows)


PLAIN: dict[str, Plain] = {
    "soft labels": plain_soft_labels,
    "similarities": plain_similarities,
    "features": plain_features,
    "interactive": plain_interactive,
}


def gradients(loss: Tensor, student: Embeddings) -> list[Tensor]:
    return list(torch.autograd.grad(loss, student, allow_unused=True, materialize_grads=True))


@pytest.mark.parametrize("num_teachers", [1, 3])
@pytest.mark.parametrize("name", LOSSES)
def test_value_and_gradient_equal_a_plain_loop(name: str, num_teachers: int) -> None:
    seed = torch.seed() % 2**31
    student = space(6, 5, seed, scale=8.0)
    shares = {1: (1.0,), 3: (0.5, 0.3, 0.2)}[num_teachers]
    teachers = [(share, without_gradient(space(6, 5, seed + n, 12.0))) for n, share in enumerate(shares, start=1)]
    loss, expected = loss_of(name, student, teachers, all_real(6)), PLAIN[name](student, teachers)
    torch.testing.assert_close(loss, expected.float(), atol=1e-5, rtol=1e-4)
    for ours, plain in zip(gradients(loss, student), gradients(expected, student), strict=True):
        torch.testing.assert_close(ours, plain, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("name", ["soft labels", "similarities"])
def test_a_teacher_s_width_is_its_own(name: str) -> None:
    student, teacher = space(6, 5, 0), without_gradient(space(6, 9, 1))
    loss = loss_of(name, student, [(1.0, teacher)], all_real(6))
    torch.testing.assert_close(loss, PLAIN[name](student, [(1.0, teacher)]).float(), atol=1e-5, rtol=1e-4)


def test_soft_labels_at_temperature_1_are_contrastive_relational_distillation() -> None:
    """CLIP-KD's CRD: each model's own contrastive probabilities, the teacher's times the logarithm of the ratio."""
    student, teacher = space(6, 5, 0, 8.0), without_gradient(space(6, 5, 1, 12.0))
    expected = torch.zeros(())
    for ours, theirs in zip(both_ways(student), both_ways(teacher), strict=True):
        q = (student.logit_scale * ours[0] @ ours[1].T).softmax(1)
        p = (teacher.logit_scale * theirs[0] @ theirs[1].T).softmax(1)
        expected = expected + 0.5 * (p * (p / q).log()).sum(1).mean()
    loss = loss_of(SoftLabels(temperature=1.0), student, [(1.0, teacher)], all_real(6))
    torch.testing.assert_close(loss, expected.float(), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["soft labels", "similarities", "features"])
def test_a_student_that_equals_its_teacher_has_nothing_to_learn(name: str) -> None:
    student = space(8, 5, 3)
    loss = loss_of(name, student, [(1.0, without_gradient(student))], all_real(8))
    assert abs(loss.item()) < 1e-6
    assert all(gradient.abs().max() < 1e-6 for gradient in gradients(loss, student))


def test_kullback_leibler_is_from_the_teacher_to_the_student() -> None:
    """A student surer than its teacher pays more than one less sure: the other direction would turn that around."""
    teacher = without_gradient(space(8, 5, 0, scale=5.0))
    surer = teacher._replace(logit_scale=torch.tensor([15.0]))
    paid = [
        loss_of(SoftLabels(temperature=1.0), student, [(1.0, target)], all_real(8))
        for student, target in ((surer, teacher), (teacher, surer))
    ]
    assert paid[0] > paid[1]


def test_teachers_are_averaged_after_the_softmax() -> None:
    """Of two that are sure of different captions the student learns both; the mean of their logits would be another."""
    sides = torch.eye(3)
    student = Embeddings(sides, sides, torch.tensor([1.0]))
    first, second = (Embeddings(sides, sides.roll(turn, 0), torch.tensor([50.0])) for turn in (0, 1))
    half = Embeddings(sides, torch.nn.functional.normalize(sides + sides.roll(1, 0), dim=1), torch.tensor([50.0]))
    loss = loss_of(SoftLabels(temperature=1.0), half, [(0.5, first), (0.5, second)], all_real(3))
    torch.testing.assert_close(loss, torch.zeros(()), atol=1e-4, rtol=0)
    assert loss_of(SoftLabels(temperature=1.0), student, [(0.5, first), (0.5, second)], all_real(3)) > 0.05


def test_temperature_squared_keeps_the_size_of_the_gradient() -> None:
    sizes = []
    for temperature in (1.0, 4.0):
        student, teacher = space(32, 16, 0, scale=2.0), without_gradient(space(32, 16, 1, scale=2.0))
        loss = loss_of(SoftLabels(temperature=temperature), student, [(1.0, teacher)], all_real(32))
        sizes.append(float(torch.stack([gradient.norm() for gradient in gradients(loss, student)[:2]]).norm()))
    assert 0.7 < sizes[1] / sizes[0] < 1.4  # without the square it would be a sixteenth


@pytest.mark.parametrize("name", LOSSES)
@given(rows=st.integers(2, 10), padding=st.integers(1, 10), seed=st.integers(0, 999))
def test_padded_rows_change_nothing(name: str, rows: int, padding: int, seed: int) -> None:
    places = torch.randperm(rows + padding, generator=torch.Generator().manual_seed(seed))[:rows].sort().values
    real = torch.zeros(rows + padding, dtype=torch.bool)
    real[places] = True
    plain = space(rows, 5, seed), without_gradient(space(rows, 5, seed + 1))
    padded = space(rows + padding, 5, seed + 2), without_gradient(space(rows + padding, 5, seed + 3))
    with torch.no_grad():
        for short, long in zip(plain, padded, strict=True):
            for ours, theirs in zip(short[:2], long[:2], strict=True):
                theirs[places] = ours
    expected = loss_of(name, plain[0], [(1.0, plain[1])], all_real(rows))
    loss = loss_of(name, padded[0], [(1.0, padded[1])], rows_of(real))
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
    *padded_gradients, scale = gradients(loss, padded[0])
    *plain_gradients, scale_wanted = gradients(expected, plain[0])
    for long, short in zip(padded_gradients, plain_gradients, strict=True):
        torch.testing.assert_close(long[places], short, atol=1e-5, rtol=1e-4)
        assert (long[~real] == 0).all()
    torch.testing.assert_close(scale, scale_wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", LOSSES)
def test_a_batch_of_padding_adds_zero_and_no_nan(name: str) -> None:
    student = space(4, 5, 0)
    loss = loss_of(name, student, [(1.0, without_gradient(space(4, 5, 1)))], rows_of(torch.zeros(4, dtype=torch.bool)))
    assert loss.item() == 0
    assert all(torch.equal(gradient, torch.zeros_like(gradient)) for gradient in gradients(loss, student))


def test_a_row_without_another_has_no_similarities_to_learn() -> None:
    student = space(3, 5, 0)
    only_row = rows_of(torch.tensor([False, True, False]))
    loss = loss_of("similarities", student, [(1.0, without_gradient(space(3, 5, 1)))], only_row)
    assert loss.item() == 0
    assert all(torch.isfinite(gradient).all() for gradient in gradients(loss, student))


def test_columns_of_padding_get_no_probability() -> None:
    real = torch.tensor([True, False, True])
    logits = scaled_products(torch.randn(3, 6), torch.randn(3, 6), torch.tensor([5.0]), real)
    assert torch.isfinite(logits).all()
    assert (logits.softmax(dim=-1)[:, 1] == 0).all()
