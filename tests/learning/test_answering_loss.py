"""Answers and labels: the losses of transformers' ViLT and LXMERT, unknown targets left out."""

from __future__ import annotations

import pytest
import torch

from mmflow.core.errors import TrainingError
from mmflow.learning.objectives.answering import Answering, answer_scores_loss
from mmflow.learning.objectives.captioning import next_token_loss
from mmflow.learning.objectives.classification import Classification
from tests.learning.tiny import CLASSES, TinyModel, all_real, alone, batch, gradients, outputs_of, rows_of


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_loss_and_gradient_equal_those_of_transformers_vilt(dtype: torch.dtype) -> None:
    """Its `binary_cross_entropy_with_logits(logits, labels) * labels.shape[1]`, through the smallest ViLT it builds."""
    from transformers import ViltConfig, ViltForQuestionAnswering

    torch.manual_seed(0)
    config = ViltConfig(
        vocab_size=20,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=8,
        image_size=8,
        patch_size=4,
        num_labels=5,
    )
    model = ViltForQuestionAnswering(config).eval()
    scores = torch.rand(3, 5)
    output = model(input_ids=torch.randint(0, 20, (3, 4)), pixel_values=torch.randn(3, 3, 8, 8), labels=scores)
    logits = output.logits.detach().to(dtype).requires_grad_()
    reference = logits.detach().float().requires_grad_()
    expected = torch.nn.functional.binary_cross_entropy_with_logits(reference, scores) * 5
    if dtype == torch.float32:
        torch.testing.assert_close(expected, output.loss)
    expected.backward()
    loss = answer_scores_loss(logits, scores, all_real(3))
    loss.backward()
    torch.testing.assert_close(loss, expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(logits.grad, reference.grad.to(dtype), atol=1e-6, rtol=1e-5)


def test_index_loss_and_gradient_equal_those_of_transformers_lxmert() -> None:
    """The mean cross-entropy with which LXMERT learns answers, over the rows with a known answer."""
    model, arguments = TinyModel(), batch(7)
    arguments["targets"]["answer"] = torch.tensor([0, 2, -1, 1, 1, -1, 2])
    real = torch.arange(7) != 3
    loss = Answering().loss(outputs_of(model, arguments, rows_of(real)))
    actual = gradients(loss, model)
    logits = model.class_logits(outputs_of(model, arguments, rows_of(real)).fused)
    expected = torch.nn.CrossEntropyLoss()(logits[[0, 1, 4, 6]], torch.tensor([0, 2, 1, 2]))
    torch.testing.assert_close(loss, expected, atol=1e-6, rtol=1e-5)
    for name, gradient in gradients(expected, model).items():
        torch.testing.assert_close(actual[name], gradient, atol=1e-6, rtol=1e-5)


def test_answers_are_generated_from_the_memory_of_the_question() -> None:
    class Remembering(TinyModel):
        def memory(self, image, text=None):  # type: ignore[no-untyped-def]
            return text._replace(sequence_BTW=self.fuse(image, text).text_BTW)

    model, arguments = Remembering(), batch(5)
    outputs = outputs_of(model, arguments, all_real(5))
    loss = Answering(by="generation", label_smoothing=0.1).loss(outputs)
    logits = model.decode(model.memory(outputs.image, outputs.text), arguments["targets"]["answer_ids"])
    ids, there = arguments["targets"]["answer_ids"], arguments["targets"]["answer_mask"].bool()
    torch.testing.assert_close(loss, next_token_loss(logits, ids, there, alone, 0.1))


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
def test_label_smoothing_follows_its_equation(smoothing: float) -> None:
    """q = (1 − ε) · right + ε / C, a class at a time."""
    model, arguments = TinyModel(), batch(4)
    arguments["targets"]["label"] = torch.tensor([2, -1, 0, 1])
    outputs = outputs_of(model, arguments, all_real(4))
    log_p = model.class_logits(outputs.fused).log_softmax(-1)
    losses = []
    for row, label in ((0, 2), (2, 0), (3, 1)):
        target = [smoothing / CLASSES + (1 - smoothing) * (candidate == label) for candidate in range(CLASSES)]
        losses.append(-sum(q * log_p[row, candidate] for candidate, q in enumerate(target)))
    loss = Classification(label_smoothing=smoothing).loss(outputs)
    torch.testing.assert_close(loss, torch.stack(losses).mean(), atol=1e-6, rtol=1e-5)


def test_a_missing_target_is_named() -> None:
    model, arguments = TinyModel(), batch(2)
    del arguments["targets"]["label"]
    with pytest.raises(TrainingError, match=r"no target 'label'.*answer, answer_ids.*loader"):
        Classification().loss(outputs_of(model, arguments, all_real(2)))
