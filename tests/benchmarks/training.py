"""Learners, batches and engines of the benchmarks that train, on the CPU and on a GPU."""

from __future__ import annotations

import os
from typing import Any


def learner_of(fields: dict[str, Any]) -> Any:
    """A contrastive learner of a model section's fields."""
    from mmflow.learning.learner import Learner
    from mmflow.learning.objectives import ObjectivesConfig
    from mmflow.learning.outputs import MaskingTokens
    from mmflow.models.config import ModelConfig
    from mmflow.models.model import build

    config = ModelConfig.model_validate(fields)
    model = build("model", config, config.vocabulary_size, seed=1)
    return Learner(model, config, [ObjectivesConfig()], MaskingTokens(None, (), config.vocabulary_size), seed=1).train()


def random_batch(rows: int, side: int, tokens: int, vocabulary_size: int, device: Any = "cpu", seed: int = 0) -> Any:
    """A batch of noise and of random tokens."""
    import torch

    from mmflow.loading.batches import Batch
    from mmflow.loading.plan import LoaderState

    random = torch.Generator(device).manual_seed(seed)
    pixels = torch.randint(0, 256, (rows, side, side, 3), generator=random, dtype=torch.uint8, device=device)
    return Batch(
        keys=tuple(map(str, range(rows))),
        pixels=pixels.permute(0, 3, 1, 2),
        token_ids=torch.randint(5, vocabulary_size, (rows, tokens), generator=random, device=device),
        token_mask=torch.ones(rows, tokens, dtype=torch.int64, device=device),
        real=torch.ones(rows, dtype=torch.bool, device=device),
        state=LoaderState(),
    )


def engine_of(learner: Any, training: Any) -> Any:
    """A DeepSpeed engine of one rank for a training section, in a process group of its own."""
    import torch
    import torch.distributed as dist

    from mmflow.training.engine import build_engine, prepare_deepspeed

    prepare_deepspeed()
    os.environ["LOCAL_RANK"] = "0"  # as every launcher sets it; DeepSpeed insists
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    return build_engine(learner, training, 10_000)
