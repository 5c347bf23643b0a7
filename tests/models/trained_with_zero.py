"""A process that trains a model with every part by DeepSpeed: `python -m tests.models.trained_with_zero DIRECTORY`.

For each ZeRO stage it writes the losses of a few steps, the weights, and the weights of a reloaded checkpoint.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mmflow.models.config import ModelConfig
from mmflow.models.encoders import parameter_count
from mmflow.models.heads import patches
from mmflow.models.model import Model, build
from mmflow.training.config import OptimizerConfig, TrainingConfig
from mmflow.training.engine import build_engine, prepare_deepspeed, whole_state
from tests.tiny import SMALLEST_MODEL

ZERO_STAGES = (0, 2, 3)
STEPS, BATCH, VOCABULARY, CLASSES = 3, 6, 40, 3
VIT = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "patch_size": 8}
CONFIG = ModelConfig.model_validate(
    SMALLEST_MODEL
    | {
        "image": {"type": "vit", "options": VIT, "pooling": "first"},
        "fusion": {"kind": "both_directions", "width": 8, "layers": 2, "heads": 2, "dropout": 0.0},
        "heads": ["matching", "masked_language", "masked_image", "classes"],
        "decoder": {"width": 8, "layers": 1, "heads": 2, "dropout": 0.0},
        "bias": -2.0,
    }
)


def fresh() -> Model:
    return build("pretrain.model", CONFIG, VOCABULARY, seed=1, num_classes=CLASSES)


class Everything(nn.Module):
    """One loss over everything that the model gives."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor, token_ids: Tensor) -> Tensor:
        model, cross_entropy = self.model, nn.functional.cross_entropy
        image, text = model.encode_image(pixels), model.encode_text(token_ids, torch.ones_like(token_ids))
        fused, (scale, bias) = model.fuse(image, text), model.scale()
        rows, sign = torch.arange(len(pixels)), 2 * torch.eye(len(pixels)) - 1
        cosines = model.embed_image(image) @ model.embed_text(text).T
        next_token_logits = model.decode(model.memory(image), token_ids)[:, :-1]
        return (
            -nn.functional.logsigmoid(sign * (scale * cosines + bias)).mean()
            + cross_entropy(model.matching_logits(fused), rows % 2)
            + cross_entropy(model.masked_language_logits(fused).flatten(0, 1), token_ids.flatten())
            + (model.masked_image_pixels(fused) - patches(pixels, 8)).square().mean()
            + cross_entropy(model.class_logits(fused), rows % CLASSES)
            + cross_entropy(next_token_logits.flatten(0, 1), token_ids[:, 1:].flatten())
        )


def engine_of(zero_stage: int) -> Any:
    optimizer = OptimizerConfig(learning_rate=0.003, warmup_steps=1)
    config = TrainingConfig(optimizer=optimizer, zero_stage=zero_stage, global_batch_size=BATCH)
    return build_engine(Everything(fresh()).eval(), config, STEPS)


def train(directory: Path, zero_stage: int) -> None:
    engine, losses = engine_of(zero_stage), []
    for _ in range(STEPS):
        random = torch.Generator().manual_seed(5)  # one batch, so that its loss falls
        pixels = torch.randn(BATCH, 3, 16, 16, generator=random)
        loss = engine(pixels, torch.randint(5, VOCABULARY, (BATCH, 7), generator=random))
        losses.append(loss.item())
        engine.backward(loss)
        engine.step()
    engine.save_checkpoint(str(directory / f"checkpoint-{zero_stage}"), tag="last")
    again = engine_of(zero_stage)
    again.load_checkpoint(str(directory / f"checkpoint-{zero_stage}"), tag="last")
    states = {"after": whole_state(engine.module.model), "again": whole_state(again.module.model)}
    facts = {"losses": losses, "parameters": parameter_count(engine.module.model)}
    torch.save(facts | states, directory / f"{zero_stage}.pt")


def main() -> None:
    torch.set_num_threads(1)
    prepare_deepspeed()
    os.environ["LOCAL_RANK"] = "0"  # as every launcher sets it; DeepSpeed insists
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    for zero_stage in ZERO_STAGES:
        train(Path(sys.argv[1]), zero_stage)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
