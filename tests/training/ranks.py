"""Real ranks with DeepSpeed for tests. A test module that runs as a program lists its acts in `main`; `perform` runs it
in one process a rank.

Importing DeepSpeed takes seconds, so a process performs several acts, and each act runs all its cases and saves their
results for the tests.
"""

from __future__ import annotations

import datetime
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mmflow.learning.learner import Learner
from mmflow.learning.objectives import ObjectivesConfig
from mmflow.learning.outputs import MaskingTokens
from mmflow.learning.rows import all_ranks
from mmflow.loading.batches import Batch
from mmflow.loading.plan import LoaderState
from mmflow.models.config import ModelConfig
from mmflow.models.model import build
from mmflow.training.engine import prepare_deepspeed

ROOT = Path(__file__).parents[2]


def perform(module: str, num_ranks: int, directory: Path, *acts: str) -> None:
    """Run the acts of a module on new ranks, which hold no engine, random state or module of earlier acts."""
    command = [sys.executable, "-m", f"tests.training.{module}", str(num_ranks), str(directory)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen([*command, str(rank), *acts], cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
        for rank in range(num_ranks)
    ]
    try:
        errors = [rank.communicate(timeout=560)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0] * num_ranks, "\n".join(text[-3000:] for text in errors)


def main(*known: Callable[[Path], Any]) -> None:
    """Perform the acts that `perform` asks this process for, and keep what rank 0 returns."""
    num_ranks, path, rank, *acts = sys.argv[1:]
    directory = Path(path)
    begin_rank(int(rank), int(num_ranks), directory / f"store-{num_ranks}-{'-'.join(acts)}")
    for act in acts:
        result = {function.__name__: function for function in known}[act](directory)
        if result is not None and dist.get_rank() == 0:
            torch.save(result, directory / f"{act}.pt")
    dist.destroy_process_group()


def begin_rank(rank: int, num_ranks: int, store: Path, seconds: float = 120) -> None:
    """Make this process a rank."""
    torch.set_num_threads(1)
    os.environ["LOCAL_RANK"] = str(rank)  # as every launcher sets it; DeepSpeed insists
    prepare_deepspeed()
    timeout = datetime.timedelta(seconds=seconds)
    file_store = dist.FileStore(str(store), num_ranks)
    dist.init_process_group("gloo", store=file_store, rank=rank, world_size=num_ranks, timeout=timeout)


def result_of(directory: Path, act: str) -> dict[Any, Any]:
    """What an act returned on rank 0."""
    return dict(torch.load(directory / f"{act}.pt", weights_only=True))


def transformer(
    width: int = 8, *, heads: int = 2, layers: int = 1, intermediate: int = 16, dropout: float = 0.0
) -> dict[str, Any]:
    """Options of a small ViT or BERT."""
    return {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": intermediate,
        "hidden_dropout_prob": dropout,
        "attention_probs_dropout_prob": dropout,
    }


def dual_encoder(options: dict[str, Any], **changes: Any) -> ModelConfig:
    """A small ViT and a small BERT with a shared space, and changes to that."""
    fields = {
        "image": {"type": "vit", "options": options | {"patch_size": 8}},
        "text": {"type": "bert", "options": options | {"max_position_embeddings": 20}},
        "embedding_width": 6,
        "image_pixels": 16,
        "max_tokens": 8,
    }
    return ModelConfig.model_validate(fields | changes)


def fresh_learner(
    config: ModelConfig, *objectives: dict[str, Any], special: MaskingTokens, classes: int = 0
) -> Learner:
    """A fresh model and the objectives of each of its tasks."""
    model = build("pretrain.model", config, special.vocabulary_size, seed=1, num_classes=classes)
    sections = [ObjectivesConfig.model_validate(section) for section in objectives]
    return Learner(model, config, sections, special, seed=1, ranks=all_ranks())


def random_batch(seed: int, rows: int, *, tokens: int = 8, vocabulary: int = 64, **fields: Any) -> Batch:
    """A batch of real rows that follows from a seed, with changes to its fields."""
    random = torch.Generator().manual_seed(seed)
    known: dict[str, Any] = {
        "keys": tuple(map(str, range(rows))),
        "pixels": torch.randint(0, 256, (rows, 3, 16, 16), generator=random, dtype=torch.uint8),
        "token_ids": torch.randint(5, vocabulary, (rows, tokens), generator=random),
        "token_mask": torch.ones(rows, tokens, dtype=torch.int64),
        "real": torch.ones(rows, dtype=torch.bool),
        "state": LoaderState(),
    }
    return Batch(**(known | fields))


def mean_over_ranks(*values: Tensor) -> list[float]:
    """Numbers of this rank, () each, as means over ranks."""
    stacked = torch.stack([value.detach().reshape(()) for value in values])
    dist.all_reduce(stacked)
    return list((stacked / dist.get_world_size()).tolist())


def furthest(first: dict[str, Tensor], second: dict[str, Tensor], *, without: str | tuple[str, ...] = "-") -> float:
    """The largest difference of any weight without those with names that end in `without`.

    A key's bias has no gradient by its mathematics, and Adam steps along the sign of its rounding error.
    """
    assert first.keys() == second.keys()
    names = [name for name in first if not name.endswith(without)]
    return max(float((first[name].double() - second[name].double()).abs().max()) for name in names)


def assert_bit_equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    """Equal in every bit, and name those that are not."""
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []
