"""What is measured on a GPU, each function called in a process of its own. Without a GPU all of it runs, slowly."""

from __future__ import annotations

import time
from typing import Any

import torch
import torch.distributed as dist

from tests.benchmarks.training import engine_of, learner_of, random_batch

WARM_STEPS, STEPS = 5, 20
LONGEST_SEARCH = 8  # doublings
VOCABULARY, TOKENS = 49_408, 77
SIZES: dict[str, dict[str, Any]] = {
    "vit_b_16": {
        "image": {"type": "vit", "options": {"patch_size": 16}, "pooling": "first"},
        "text": {
            "type": "clip_text_model",
            "options": {"hidden_size": 512, "num_hidden_layers": 12, "num_attention_heads": 8,
                        "intermediate_size": 2048, "max_position_embeddings": TOKENS},
            "pooling": "last",
        },
        "embedding_width": 512, "image_pixels": 224, "max_tokens": TOKENS, "vocabulary_size": VOCABULARY,
    },
    "tiny": {
        "image": {
            "type": "vit",
            "options": {"patch_size": 16, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
                        "intermediate_size": 64},
            "pooling": "first",
        },
        "text": {
            "type": "clip_text_model",
            "options": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64,
                        "max_position_embeddings": TOKENS},
            "pooling": "last",
        },
        "embedding_width": 32, "image_pixels": 32, "max_tokens": TOKENS, "vocabulary_size": 512,
    },
}  # fmt: skip


def training_steps(size: str, batch: int, compiled: bool) -> dict[str, float | None]:
    """Samples a second of whole steps with a DeepSpeed engine, and the share that they make of the GPU's peak."""
    from mmflow.training.engine import compile_parts, descend
    from mmflow.training.metrics import peak_flops, training_flops

    learner = _learner(size)
    if compiled:
        compile_parts(learner.model)
    engine = _engine(learner, batch)
    given = _batch(size, batch, engine.device)
    flops = training_flops(engine, given)
    for step in range(WARM_STEPS + STEPS):
        if step == WARM_STEPS:
            _wait(engine.device)
            began = time.perf_counter()
        descend(engine, given, step + 1)
        engine.step()
    _wait(engine.device)
    rate = batch * STEPS / (time.perf_counter() - began)
    peak = peak_flops(engine.device, "bf16")
    dist.destroy_process_group()
    return {"samples_per_second": rate, "share_of_peak": rate * flops / peak if peak else None}


def fits(size: str, batch: int, checkpointed: bool) -> bool:
    """Whether two steps of a batch go through; the second has the optimizer's states beside it."""
    from mmflow.training.engine import descend

    changes = {"activation_checkpointing": True} if checkpointed else {}
    engine = _engine(_learner(size, **changes), batch)
    try:
        for step in (1, 2):
            descend(engine, _batch(size, batch, engine.device), step)
            engine.step()
        _wait(engine.device)
    except torch.OutOfMemoryError:
        return False
    return True


def _learner(size: str, **changes: Any) -> Any:
    fields = SIZES[size]
    return learner_of({**fields, **{side: {**fields[side], **changes} for side in ("image", "text")}})


def _engine(learner: Any, batch: int) -> Any:
    from mmflow.training.config import TrainingConfig

    return engine_of(learner, TrainingConfig(zero_stage=1, precision="bf16", global_batch_size=batch))


def _batch(size: str, rows: int, device: torch.device) -> Any:
    fields = SIZES[size]
    return random_batch(rows, fields["image_pixels"], fields["max_tokens"], fields["vocabulary_size"], device)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
