"""What is measured on a GPU, each function called in a process of its own. Without a GPU all of it runs, slowly."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from tests.benchmarks.tiled import dense_loss, loss_in_strips

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


def in_strips(rows: int, width: int) -> dict[str, float]:
    """mmflow's InfoNCE, of one rank."""
    return _loss_alone(rows, width, loss_in_strips(rows, _device().type))


def dense(rows: int, width: int) -> dict[str, float]:
    """transformers' loss on one matrix."""
    return _loss_alone(rows, width, dense_loss())


def _loss_alone(rows: int, width: int, loss_of: Callable[..., Any]) -> dict[str, float]:
    """Seconds of a forward and a backward pass, and the memory that they reach above what was there before."""
    device = _device()
    torch.manual_seed(0)
    leaves = [
        torch.nn.functional.normalize(torch.randn(rows, width, device=device), dim=1).requires_grad_() for _ in range(2)
    ]
    scale = torch.tensor([14.3], requires_grad=True, device=device)
    (leaves[0][:64] @ leaves[1][:64].T).sum().backward()  # what kernels and autograd set up once is not the loss's
    before = torch.cuda.memory_allocated() if device.type == "cuda" else 0
    passes = 0
    _wait(device)
    began = time.perf_counter()
    while not passes or time.perf_counter() - began < 1:
        loss_of(*leaves, scale).backward()
        _wait(device)
        passes += 1
    seconds = (time.perf_counter() - began) / passes
    reached = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
    return {"seconds": seconds, "bytes": reached - before}


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _learner(size: str, **changes: Any) -> Any:
    from mmflow.learning.learner import Learner
    from mmflow.learning.objectives import ObjectivesConfig
    from mmflow.learning.outputs import MaskingTokens
    from mmflow.models.config import ModelConfig
    from mmflow.models.model import build

    fields = SIZES[size]
    sides = {side: {**fields[side], **changes} for side in ("image", "text")}
    config = ModelConfig.model_validate({**fields, **sides})
    model = build("model", config, config.vocabulary_size, seed=1)
    return Learner(model, config, [ObjectivesConfig()], MaskingTokens(None, (), config.vocabulary_size), seed=1).train()


def _engine(learner: Any, batch: int) -> Any:
    from mmflow.training.config import TrainingConfig
    from mmflow.training.engine import build_engine, prepare_deepspeed

    prepare_deepspeed()
    os.environ["LOCAL_RANK"] = "0"  # as every launcher sets it; DeepSpeed insists
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    return build_engine(learner, TrainingConfig(zero_stage=1, precision="bf16", global_batch_size=batch), 1000)


def _batch(size: str, rows: int, device: torch.device) -> Any:
    from mmflow.loading.batches import Batch
    from mmflow.loading.plan import LoaderState

    fields = SIZES[size]
    side, tokens = fields["image_pixels"], fields["max_tokens"]
    pixels = torch.randint(0, 256, (rows, side, side, 3), dtype=torch.uint8, device=device)
    return Batch(
        keys=tuple(map(str, range(rows))),
        pixels=pixels.permute(0, 3, 1, 2),
        token_ids=torch.randint(5, fields["vocabulary_size"], (rows, tokens), device=device),
        token_mask=torch.ones(rows, tokens, dtype=torch.int64, device=device),
        real=torch.ones(rows, dtype=torch.bool, device=device),
        state=LoaderState(),
    )


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
