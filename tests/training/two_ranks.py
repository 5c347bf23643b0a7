"""One of two processes that train what ZeRO-3 could trip over: `python -m tests.training.two_ranks RANK DIRECTORY`.

Weights are just wide enough that ZeRO-3 partitions them: DeepSpeed leaves those of up to 100,000 numbers whole, and
with smaller ones it would be ZeRO-2 that is tested.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mmflow.learning.learner import Learner
from mmflow.learning.objectives import ObjectivesConfig
from mmflow.learning.outputs import MaskingTokens
from mmflow.learning.rows import all_ranks
from mmflow.loading.batches import Batch
from mmflow.loading.plan import LoaderState
from mmflow.models.config import ModelConfig
from mmflow.models.model import build
from mmflow.training.config import OptimizerConfig, TrainingConfig
from mmflow.training.engine import build_engine, prepare_deepspeed
from tests.tiny import SMALLEST_MODEL

WORLD_SIZE, ROWS, STEPS, VOCABULARY = 2, 3, 2, 400
TOKENS = (6, 20)  # of each rank's texts: its windows are fewer than the other's, its calls must not be
WIDE: dict[str, Any] = {"hidden_size": 320, "num_hidden_layers": 1, "num_attention_heads": 5, "intermediate_size": 320}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
BERT = {"type": "bert", "options": {**WIDE, **NO_DROPOUT, "max_position_embeddings": 20}}
VIT = {"type": "vit", "options": {**WIDE, **NO_DROPOUT, "patch_size": 8}}
DEEP = {"num_hidden_layers": 2}
MODELS: dict[str, dict[str, Any]] = {
    "siglip's pooler": {
        "image": {"type": "siglip_vision_model", "options": {**WIDE, "patch_size": 8}, "pooling": "pooler"},
        "text": {
            "type": "siglip_text_model",
            "options": {**WIDE, "projection_size": 320, "max_position_embeddings": 20},
            "pooling": "pooler",
        },
    },
    "windows": {"text": {**BERT, "windows": {"tokens": 8, "layers": 1, "heads": 5}}},
    "activation checkpointing": {
        "image": {**VIT, "options": {**VIT["options"], **DEEP}, "activation_checkpointing": True},
        "text": {**BERT, "options": {**BERT["options"], **DEEP}, "activation_checkpointing": True},
    },
}


def batch(rank: int) -> Batch:
    random = torch.Generator().manual_seed(rank)
    return Batch(
        keys=tuple(f"{rank}-{row}" for row in range(ROWS)),
        pixels=torch.randint(0, 256, (ROWS, 3, 16, 16), generator=random, dtype=torch.uint8),
        token_ids=torch.randint(5, VOCABULARY, (ROWS, TOKENS[rank]), generator=random),
        token_mask=torch.ones(ROWS, TOKENS[rank], dtype=torch.int64),
        real=torch.ones(ROWS, dtype=torch.bool),
        state=LoaderState(),
    )


def losses(name: str, zero_stage: int, rank: int) -> list[float]:
    """The mean over ranks of each step's loss, the first step's before any update."""
    config = ModelConfig.model_validate(SMALLEST_MODEL | {"max_tokens": 20, "vocabulary_size": None} | MODELS[name])
    model = build("pretrain.model", config, VOCABULARY, seed=1)
    special, ranks = MaskingTokens(None, (), VOCABULARY), all_ranks()
    engine = build_engine(
        Learner(model, config, [ObjectivesConfig()], special, seed=1, ranks=ranks),
        TrainingConfig(
            optimizer=OptimizerConfig(learning_rate=0.001, warmup_steps=1),
            zero_stage=zero_stage,
            global_batch_size=WORLD_SIZE * ROWS,
        ),
        total_steps=10,
    )
    partitioned = any(getattr(weight, "ds_tensor", weight).numel() < weight_of(weight) for weight in model.parameters())
    assert partitioned == (zero_stage == 3), "weights are too small, or too large"
    engine.train()
    found = []
    for step in range(STEPS):
        loss, _ = engine(batch(rank), step)
        engine.backward(loss)
        engine.step()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        found.append(float(mean) / WORLD_SIZE)
    return found


def weight_of(parameter: Any) -> int:
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def main() -> None:
    rank, directory = int(sys.argv[1]), Path(sys.argv[2])
    torch.set_num_threads(1)
    prepare_deepspeed()
    os.environ["LOCAL_RANK"] = str(rank)  # as every launcher sets it; DeepSpeed insists
    store = dist.FileStore(str(directory / "store"), WORLD_SIZE)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD_SIZE)
    found = {(name, zero_stage): losses(name, zero_stage, rank) for name in MODELS for zero_stage in (0, 3)}
    torch.save(found, directory / f"losses-{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
