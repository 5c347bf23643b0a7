"""The parameter groups of an optimizer, micro-batches, compiled parts, and fp16 only on GPUs."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mmflow.core.errors import RecipeError
from mmflow.models.config import ModelConfig
from mmflow.models.model import build
from mmflow.training.config import TrainingConfig
from mmflow.training.engine import check_fp16, compile_parts, engine_settings, parameter_groups
from tests.tiny import SMALLEST_MODEL


def test_matrices_decay_and_norms_biases_and_scales_do_not() -> None:
    module = nn.ModuleDict(
        {"linear": nn.Linear(3, 2), "kernel": nn.Conv2d(1, 1, 2), "norm": nn.LayerNorm(2), "frozen": nn.Linear(1, 1)}
    )
    module.register_parameter("logit_scale", nn.Parameter(torch.zeros(1)))
    module["frozen"].requires_grad_(False)
    decayed, undecayed = parameter_groups(module, 0.01, 0.3)
    assert (decayed["weight_decay"], undecayed["weight_decay"]) == (0.3, 0.0)
    assert (decayed["lr"], undecayed["lr"]) == (0.01, 0.01)
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    assert {names[id(weight)] for weight in decayed["params"]} == {"linear.weight", "kernel.weight"}
    assert {names[id(weight)] for weight in undecayed["params"]} == {
        "linear.bias",
        "kernel.bias",
        "norm.weight",
        "norm.bias",
        "logit_scale",
    }


def test_muon_is_given_the_matrices_of_hidden_layers() -> None:
    fields = {
        **SMALLEST_MODEL,
        "fusion": {"kind": "concatenation", "width": 8},
        "heads": ["masked_language", "matching"],
    }
    model = build("model", ModelConfig.model_validate(fields), 64, seed=0)
    groups = parameter_groups(model, 0.01, 0.3, muon=True)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for_muon = {names[id(weight)] for group in groups if group["muon"] for weight in group["params"]}
    assert all(group["weight_decay"] == 0.3 for group in groups if group["muon"])
    assert {"image_projection.weight", "text_projection.weight"} < for_muon
    assert any("attention" in name for name in for_muon)
    assert all(dict(model.named_parameters())[name].dim() == 2 for name in for_muon)
    assert [name for name in for_muon if "embeddings" in name or name.startswith("heads")] == []
    placed = [id(weight) for group in groups for weight in group["params"]]
    assert len(placed) == len(set(placed)) == len(names)


@pytest.mark.parametrize(
    ("rows_per_rank", "micro_batch_size", "parts", "rows"),
    [(10, None, 1, 10), (10, 10, 1, 10), (10, 64, 1, 10), (10, 5, 2, 5), (10, 4, 3, 4), (7, 3, 3, 3), (1, 1, 1, 1)],
)
def test_a_batch_comes_in_as_few_even_parts_as_fit(
    rows_per_rank: int, micro_batch_size: int | None, parts: int, rows: int
) -> None:
    settings = engine_settings(TrainingConfig(micro_batch_size=micro_batch_size), rows_per_rank)
    assert settings["gradient_accumulation_steps"] == parts
    assert settings["train_micro_batch_size_per_gpu"] == rows
    assert rows * (parts - 1) < rows_per_rank <= rows * parts


def test_fp16_without_gpus_is_refused() -> None:
    check_fp16("pretrain.training", accelerated=True)
    with pytest.raises(RecipeError, match=r"^pretrain\.training\.precision: fp16 needs GPUs"):
        check_fp16("pretrain.training", accelerated=False)


@pytest.mark.slow
def test_compiled_parts_learn_the_same() -> None:
    text = SMALLEST_MODEL["text"]
    options = {**text["options"], "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = ModelConfig.model_validate({**SMALLEST_MODEL, "text": {**text, "options": options}})
    batch = {
        "pixels": torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0)),
        "token_ids_BT": torch.arange(24).view(4, 6),
        "token_mask_BT": torch.ones(4, 6, dtype=torch.int64),
    }
    gradients = []
    for compiled in (False, True):
        model = build("model", config, 64, seed=0)
        if compiled:
            compile_parts(model)
        outputs = model(**batch)
        (outputs["image_embedding"] * outputs["text_embedding"]).sum().backward()
        gradients.append({name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-5)
