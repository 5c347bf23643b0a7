"""One of two ranks that train a tiny model with DeepSpeed: `python -m tests.training.sharded RANK DIRECTORY`.

Each act goes through all its cases, because DeepSpeed's import costs seconds, and leaves what to assert on.
"""

from __future__ import annotations

import copy
import datetime
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mmflow.learning.learner import Learner, MicroBatch
from mmflow.learning.objectives import ObjectivesConfig, total
from mmflow.learning.outputs import MaskingTokens
from mmflow.learning.rows import all_ranks, gather_rows
from mmflow.loading.batches import Batch
from mmflow.loading.plan import LoaderState
from mmflow.models.config import ModelConfig
from mmflow.models.model import build
from mmflow.training import selfcheck
from mmflow.training.config import TrainingConfig
from mmflow.training.engine import build_engine, descend, engine_settings, prepare_deepspeed, rows_of, whole_state
from mmflow.training.selfcheck import compare_gradients, small_check

STAGES = (0, 1, 2, 3)
SHARDED = (("adamw", 2), ("adamw", 3), *((name, stage) for name in ("muon", "lamb") for stage in STAGES[1:]))
OFFLOADED = (("adamw", 2), ("muon", 3))
RESTARTED = {0: "adamw", 1: "muon", 2: "lamb", 3: "muon"}
ROWS, MICRO_ROWS, SIDE, TOKENS, VOCABULARY, CLASSES = 5, 2, 16, 8, 64, 3
SPECIAL = MaskingTokens(mask=4, ids=(0, 1, 2, 3, 4), vocabulary_size=VOCABULARY)
OBJECTIVES: dict[str, Any] = {
    "contrastive": {"label_smoothing": 0.1, "weight": 0.5},
    "sigmoid": {},
    "masked_language": {"share": 0.4},
    "masked_image": {"square_pixels": 8},
    "captioning": {},
    "answering": {"targets": "scores"},
    "classification": {"weight": 2.0},
}
OF_EACH_KIND = ("contrastive", "masked_language")  # compares rows, is a mean over places


def model_config(dropout: float = 0.0, layers: int = 1) -> ModelConfig:
    options = {
        "hidden_size": 12,  # whose matrices no number of ranks cuts between rows
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "intermediate_size": 18,
        "hidden_dropout_prob": dropout,
        "attention_probs_dropout_prob": dropout,
    }
    fields = {
        "image": {"type": "vit", "options": {**options, "patch_size": 8}},
        "text": {"type": "bert", "options": {**options, "max_position_embeddings": TOKENS}},
        "embedding_width": 6,
        "image_pixels": SIDE,
        "max_tokens": TOKENS,
        "vocabulary_size": VOCABULARY,
        "bias": -3.0,
        "fusion": {"kind": "both_directions", "width": 8, "layers": 1, "heads": 2, "dropout": dropout},
        "heads": ["masked_language", "masked_image", "classes"],
        "decoder": {"width": 8, "layers": 1, "heads": 2, "dropout": dropout},
    }
    return ModelConfig.model_validate(fields)


def learner(config: ModelConfig, objectives: dict[str, Any]) -> Learner:
    model = build("model", config, VOCABULARY, seed=1, num_classes=CLASSES)
    named = ObjectivesConfig.model_validate(objectives)
    return Learner(model, config, [named], SPECIAL, seed=1, ranks=all_ranks())


def batch(step: int, rows: int = ROWS) -> Batch:
    """This rank's rows of a global batch; the last of them all is padding."""
    everything = rows * dist.get_world_size()
    random = torch.Generator().manual_seed(step)
    lengths = torch.randint(3, TOKENS + 1, (everything, 1), generator=random)
    whole = Batch(
        keys=tuple(map(str, range(everything))),
        pixels=torch.randint(0, 256, (everything, 3, SIDE, SIDE), generator=random, dtype=torch.uint8),
        token_ids=torch.randint(5, VOCABULARY, (everything, TOKENS), generator=random),
        token_mask=(torch.arange(TOKENS) < lengths).long(),
        real=torch.arange(everything) < everything - 1,
        targets={
            "label": torch.randint(-1, CLASSES, (everything,), generator=random),
            "answer_scores": torch.rand(everything, CLASSES, generator=random),
        },
        state=LoaderState(),
    )
    return rows_of(whole, slice(dist.get_rank() * rows, (dist.get_rank() + 1) * rows))


def engine_of(module: Learner, zero_stage: int, name: str = "adamw", **changes: Any) -> Any:
    settings: dict[str, Any] = {
        "optimizer": {"name": name, "learning_rate": 0.01, "warmup_steps": 0, "gradient_clipping": 0.3},
        "zero_stage": zero_stage,
        "global_batch_size": ROWS * dist.get_world_size(),
        "ema_decay": 0.5,
    }
    return build_engine(module, TrainingConfig.model_validate(settings | changes), total_steps=6)


def train(engine: Any, first: int, last: int) -> list[float]:
    """The steps after `first`; their losses over all ranks."""
    losses = []
    for step in range(first + 1, last + 1):
        loss, _ = descend(engine, batch(step), step)
        engine.step()
        dist.all_reduce(loss)
        losses.append(float(loss) / dist.get_world_size())
    return losses


def states(engine: Any) -> dict[str, dict[str, Tensor]]:
    model = engine.module.model
    return {"last": whole_state(model), "average": whole_state(model, engine)}


# --- the acts -------------------------------------------------------------------------------------------------------


def optimizers(directory: Path) -> dict[Any, Any]:
    """Three steps by each optimizer at each ZeRO stage, and with its states offloaded."""
    whole = [(name, 0) for name in ("adamw", "muon", "lamb")]
    found = {}
    for name, stage, offload in [
        *((*case, False) for case in (*whole, *SHARDED)),
        *((*case, True) for case in OFFLOADED),
    ]:
        engine = engine_of(learner(model_config(), {"contrastive": {}}), stage, name, offload_optimizer=offload)
        losses = train(engine, 0, 3)
        found[name, stage, offload] = {**states(engine), "losses": losses}
    return found


def restarts(directory: Path) -> dict[Any, Any]:
    """Four steps, and two with two more by an engine that knows what the first one saved."""
    found = {}
    for stage, name in RESTARTED.items():
        engine = engine_of(learner(model_config(), {"contrastive": {}}), stage, name)
        train(engine, 0, 2)
        engine.save_checkpoint(str(directory / f"saved-{stage}"), tag="state", save_latest=False)
        train(engine, 2, 4)
        found[stage, "straight"] = states(engine)
        engine = engine_of(learner(model_config(), {"contrastive": {}}), stage, name)
        engine.load_checkpoint(str(directory / f"saved-{stage}"), tag="state")
        train(engine, 2, 4)
        found[stage, "restarted"] = states(engine)
    return found


def gradients(directory: Path) -> dict[Any, Any]:
    """Each objective's gradient against one process's, in micro-batches; of each kind one at each ZeRO stage."""
    found = compared(OBJECTIVES, 2, in_micro_batches=True)
    for stage in (0, 1, 3):
        found |= compared({name: OBJECTIVES[name] for name in OF_EACH_KIND}, stage, in_micro_batches=True)
    return found


def compared(objectives: dict[str, Any], stage: int, in_micro_batches: bool) -> dict[Any, Any]:
    check = small_check(
        model_config(),
        ObjectivesConfig.model_validate(objectives),
        TrainingConfig(zero_stage=stage, micro_batch_size=2 if in_micro_batches else None),
    )
    return {
        (each.objective, stage, in_micro_batches): (each.error, each.largest, each.equal)
        for each in compare_gradients(check)
    }


def broken(directory: Path) -> dict[Any, Any]:
    """At once, by ranks whose rows come to the others without a gradient."""
    selfcheck.all_ranks = lambda: replace(all_ranks(), gather=lambda rows: gather_rows(rows.detach()))
    return compared({"contrastive": {}, "classification": {}}, 2, in_micro_batches=False)


def together(directory: Path) -> dict[Any, Any]:
    """All objectives at once: losses and their parts over three steps, whole and in uneven micro-batches."""
    found = {}
    for micro_rows in (None, MICRO_ROWS):
        engine = engine_of(learner(model_config(), OBJECTIVES), 2, micro_batch_size=micro_rows)
        steps = []
        for step in range(1, 4):
            loss, parts = descend(engine, batch(step), step)
            engine.step()
            values = torch.stack([each.detach().reshape(()) for each in (loss, *parts.values())])
            dist.all_reduce(values)
            steps.append(dict(zip(("loss", *parts), (values / dist.get_world_size()).tolist(), strict=True)))
        found[micro_rows] = (steps, engine.global_steps, engine.gradient_accumulation_steps())
    return found


def dropout(directory: Path) -> dict[Any, Any]:
    """A gradient in micro-batches of two where units are dropped, and the same of one graph over all of them."""
    import deepspeed

    objectives = {"contrastive": {}, "masked_language": {"share": 0.4}}
    rate, rows, cuts = 1024.0, 6, [slice(0, 2), slice(2, 4), slice(4, 6)]
    module = learner(model_config(dropout=0.3), objectives)
    one_graph = copy.deepcopy(module)
    engine, *_ = deepspeed.initialize(
        model=module,
        optimizer=torch.optim.SGD(module.parameters(), lr=rate),
        config=engine_settings(TrainingConfig(zero_stage=1, micro_batch_size=2), rows, clipped=False),
        dist_init_required=False,
    )
    before = whole_state(module.model)
    torch.manual_seed(dist.get_rank())
    descend(engine, batch(1, rows), 1)
    engine.step()
    after = whole_state(module.model)

    whole = batch(1, rows)
    known = one_graph.rows(whole)
    places = one_graph.count_places(whole, 1, known, cuts)
    micro = [MicroBatch(known.micro_batch(cut, 3), places, gradients={}) for cut in cuts]
    torch.manual_seed(dist.get_rank())
    drawn, embedded = [], []
    for cut, each in zip(cuts, micro, strict=True):
        drawn.append(torch.get_rng_state())
        embedded.append(one_graph(rows_of(whole, cut), 1, MicroBatch(each.rows, places))[1])
    outputs = one_graph.outputs(one_graph.model, one_graph.config, whole, 1, known, shapes_only=True)
    outputs.image_embedding = torch.cat([each["image_embedding"] for each in embedded])
    outputs.text_embedding = torch.cat([each["text_embedding"] for each in embedded])
    loss = total(outputs, ObjectivesConfig.model_validate({"contrastive": {}}).named, 1)[0]
    for cut, each, state in zip(cuts, micro, drawn, strict=True):
        torch.set_rng_state(state)
        loss = loss + one_graph(rows_of(whole, cut), 1, each)[0] / 3
    loss.backward()
    expected = {name: each.grad for name, each in one_graph.model.named_parameters() if each.grad is not None}
    for gradient in expected.values():
        dist.all_reduce(gradient)
        gradient /= dist.get_world_size()
    return {"found": {name: (before[name] - after[name]) / rate for name in expected if after}, "expected": expected}


class Kept:
    """A tensor that a graph keeps for its backward pass; the bytes of all of them, now and at most."""

    now = most = 0

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        Kept.now += tensor.numel() * tensor.element_size()
        Kept.most = max(Kept.most, Kept.now)

    def __del__(self) -> None:
        Kept.now -= self.tensor.numel() * self.tensor.element_size()


def memory(directory: Path) -> dict[Any, Any]:
    """The most bytes that graphs keep in a step of 32 rows a rank, all at once and by fours."""
    found = {}
    for micro_rows in (None, 4):
        module = learner(model_config(layers=3), {"contrastive": {}})
        global_batch_size = 32 * dist.get_world_size()
        engine = engine_of(module, 2, global_batch_size=global_batch_size, micro_batch_size=micro_rows)
        Kept.now = Kept.most = 0
        with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor):
            descend(engine, batch(1, 32), 1)
        engine.step()
        found[micro_rows] = Kept.most
    return found


def main() -> None:
    rank, directory = sys.argv[1:]
    torch.set_num_threads(1)
    prepare_deepspeed()
    os.environ["LOCAL_RANK"] = rank  # as every launcher sets it; DeepSpeed insists
    store = dist.FileStore(f"{directory}/store", 2)
    timeout = datetime.timedelta(seconds=120)
    dist.init_process_group("gloo", store=store, rank=int(rank), world_size=2, timeout=timeout)
    for act in (optimizers, restarts, gradients, together, broken, dropout, memory):
        found = act(Path(directory))
        if dist.get_rank() == 0:
            torch.save(found, Path(directory) / f"{act.__name__}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
