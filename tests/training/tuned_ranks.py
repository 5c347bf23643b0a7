"""A rank that tunes models on several tasks and by adapters: `python -m tests.training.tuned_ranks RANK RANKS DIRECTORY
ACT…`.

Each act goes through all its cases, because DeepSpeed's import costs seconds, and leaves what to assert on.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mmflow.core.errors import TrainingError
from mmflow.learning.learner import Learner
from mmflow.learning.objectives import ObjectivesConfig
from mmflow.learning.outputs import MaskingTokens
from mmflow.learning.rows import all_ranks
from mmflow.loading.batches import Batch
from mmflow.loading.config import LoaderConfig
from mmflow.loading.plan import LoaderState
from mmflow.models.config import LoraConfig, ModelConfig
from mmflow.models.lora import adapt, merged
from mmflow.models.model import build
from mmflow.training.config import GuardsConfig, OptimizerConfig, Task, TrainingConfig
from mmflow.training.engine import build_engine, prepare_deepspeed, whole_state
from mmflow.training.guards import Guards
from mmflow.training.job import TrainingJob
from mmflow.training.journal import Journal
from mmflow.training.loop import Due, Loop
from mmflow.training.rank import run_rank
from mmflow.training.zero import fragments_of

ROWS, VOCABULARY, CLASSES = 3, 400, 4
# Just wide enough that ZeRO-3 cuts weights up: it leaves those of up to 100,000 numbers whole.
WIDE: dict[str, Any] = {"hidden_size": 320, "num_hidden_layers": 1, "num_attention_heads": 5, "intermediate_size": 320}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
MODEL: dict[str, Any] = {
    "image": {"type": "vit", "options": {**WIDE, **NO_DROPOUT, "patch_size": 8}},
    "text": {"type": "bert", "options": {**WIDE, **NO_DROPOUT, "max_position_embeddings": 16}},
    "embedding_width": 6,
    "image_pixels": 16,
    "max_tokens": 8,
    "fusion": {"kind": "cross_attention", "width": 8, "layers": 1, "heads": 2, "dropout": 0.0},
    "heads": ["classes"],
    "decoder": {"width": 8, "layers": 1, "heads": 2, "dropout": 0.0},
}
OBJECTIVES = {"pairs": {"contrastive": {}}, "words": {"captioning": {}}, "vqa": {"answering": {}}}
TURNS = (0, 1, 2, 0, 0, 1, 2, 1)
ENGINES = ((0, False), (1, False), (2, False), (3, False), (2, True), (3, True))  # (ZeRO stage, states offloaded)
LORA = LoraConfig(rank=4, alpha=8.0)
SMALL = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 16}
JOBS = (2, 3)  # ZeRO stages
STOPPED_BEFORE, EVERY = 9, 4


def batch(step: int, task: int) -> Batch:
    random = torch.Generator().manual_seed(100 * step + dist.get_rank())
    return Batch(
        keys=tuple(f"{dist.get_rank()}-{row}" for row in range(ROWS)),
        pixels=torch.randint(0, 256, (ROWS, 3, 16, 16), generator=random, dtype=torch.uint8),
        token_ids=torch.randint(5, VOCABULARY, (ROWS, 8), generator=random),
        token_mask=torch.ones(ROWS, 8, dtype=torch.int64),
        real=torch.ones(ROWS, dtype=torch.bool),
        targets={"answer": torch.randint(0, CLASSES, (ROWS,), generator=random)},
        task=task,
        state=LoaderState(),
    )


def learner() -> Learner:
    config = ModelConfig.model_validate(MODEL)
    model = build("pretrain.model", config, VOCABULARY, seed=1, num_classes=CLASSES)
    special = MaskingTokens(None, (), VOCABULARY)
    sections = [ObjectivesConfig.model_validate(each) for each in OBJECTIVES.values()]
    return Learner(model, config, sections, special, seed=1, ranks=all_ranks())


def engine_of(module: Learner, zero_stage: int, offload: bool = False) -> Any:
    return build_engine(
        module,
        TrainingConfig(
            optimizer=OptimizerConfig(learning_rate=0.001, warmup_steps=1, gradient_clipping=100.0),
            zero_stage=zero_stage,
            global_batch_size=dist.get_world_size() * ROWS,
            offload_optimizer=offload,
        ),
        total_steps=10,
    )


def take_turns(engine: Any, journal: Path) -> None:
    """A step of each turn's task, a line of the journal for every two."""
    lines = Journal(journal)

    def source() -> Iterator[Batch]:
        for step, task in enumerate(TURNS, 1):
            yield batch(step, task)

    loop = Loop(
        engine=engine,
        total_steps=len(TURNS),
        log_every=2,
        due=Due(every_steps=100, every_minutes=None),
        save=lambda *_: True,
        guards=Guards(GuardsConfig()),
        journal=lines if dist.get_rank() == 0 else Journal(),
        shard_name=lambda dataset, shard: "",
        task_names=tuple(OBJECTIVES),
    )
    loop.run(source(), first_step=0, state=LoaderState())
    lines.close()


def tasks(directory: Path) -> dict[Any, Any]:
    """Eight steps of three tasks by each kind of engine."""
    found = {}
    for case in ENGINES:
        engine = engine_of(learner(), *case)
        take_turns(engine, directory / f"tasks-{case[0]}-{case[1]}-{dist.get_rank()}.jsonl")
        found[case] = whole_state(engine.module.model)
    return found


def adapters(directory: Path) -> dict[Any, Any]:
    """The same by adapters at each ZeRO stage: the weights before, as they are trained, and merged; the sizes of what
    is trained and of the optimizer's states over all ranks."""
    found = {}
    for stage in (0, 1, 2, 3):
        module = learner()
        before = {name: each.clone() for name, each in module.model.state_dict().items()}
        adapt("pretrain.lora", module.model, LORA, ["heads"], seed=1)
        sizes = {name: each.numel() for name, each in module.model.named_parameters() if each.requires_grad}
        engine = engine_of(module, stage)
        take_turns(engine, directory / f"adapters-{stage}-{dist.get_rank()}.jsonl")
        after = whole_state(module.model)
        found[stage] = {
            "before": before,
            "after": after,
            "merged": merged(after, LORA) if after else {},
            "trained": sizes,
            "states": state_numel(engine, stage),
        }
    return found


def state_numel(engine: Any, stage: int) -> int:
    """Numbers in the optimizer's moments over all ranks, without what pads flat tensors."""
    if stage == 0:
        states = engine.optimizer.state.values()
        return sum(each["exp_avg"].numel() + each["exp_avg_sq"].numel() for each in states)
    held = sum(2 * each.numel for fragments in fragments_of(engine).values() for each in fragments)
    assert all({"exp_avg", "exp_avg_sq"} <= set(engine.basic_optimizer.state[flat]) for flat in fragments_of(engine))
    total = torch.tensor(held)
    dist.all_reduce(total)
    return int(total)


# --- whole trainings ------------------------------------------------------------------------------------------------


def job_of(directory: Path, name: str, zero_stage: int) -> TrainingJob:
    """A package tuned by adapters on two tasks of one dataset, with a head that it lacks, and what is written is the
    running average. At ZeRO 3 in micro-batches, which make the same step."""
    here = directory / name
    options = SMALL | NO_DROPOUT | {"num_hidden_layers": 1}
    model = ModelConfig.model_validate(
        {
            "image": {"type": "vit", "options": {**options, "patch_size": 8}},
            "text": {"type": "bert", "options": {**options, "max_position_embeddings": 16}},
            "embedding_width": 6,
            "image_pixels": 16,
            "max_tokens": 8,
            "vocabulary_size": 64,
            "fusion": {"kind": "concatenation", "width": 8, "dropout": 0.0},
            "heads": ["classes"],
        }
    )

    def task(number: int, weight: float, loader: Mapping[str, Any], objectives: Mapping[str, Any]) -> Task:
        return Task(
            key=f"pretrain.tasks.{number}",
            name=("pairs", "vqa")[number],
            weight=weight,
            loader=LoaderConfig.model_validate(loader),
            objectives=ObjectivesConfig.model_validate(objectives),
        )

    training = {
        "epochs": 2,
        "global_batch_size": 5,
        "optimizer": {"learning_rate": 0.003, "warmup_steps": 2},
        "zero_stage": zero_stage,
        "micro_batch_size": 2 if zero_stage == 3 else None,
        "ema_decay": 0.8,
        "checkpoint_every_steps": EVERY,
        "log_every_steps": 1,
    }
    return TrainingJob(
        stage="pretrain",
        dataset=str(directory / "dataset"),
        tokenizer_json=(directory / "start" / "tokenizer.json").read_text(),
        model=model,
        training=TrainingConfig.model_validate(training),
        seed=3,
        package=str(here / "package"),
        journal=str(here / "journal.jsonl"),
        checkpoints=str(here / "checkpoints"),
        classes=("yes", "no"),
        start=str(directory / "start"),
        lora=LORA,
        tasks=(task(0, 2.0, {}, {"contrastive": {}}), task(1, 1.0, {"text": "questions"}, {"answering": {}})),
    )


def straight(directory: Path) -> None:
    for stage in JOBS:
        run_rank(job_of(directory, f"straight-{stage}", stage))


def stopped(directory: Path) -> None:
    """Ended before a step, with a checkpoint behind it."""
    whole = Loop.run

    def run_until(loop: Loop, source: Iterator[Batch], **settings: Any) -> int:
        def until() -> Iterator[Batch]:
            for step, each in enumerate(source, 1):
                if step == STOPPED_BEFORE:
                    raise TrainingError("stopped")
                yield each

        return whole(loop, until(), **settings)

    Loop.run = run_until  # type: ignore[method-assign]
    for stage in JOBS:
        with contextlib.suppress(TrainingError):
            run_rank(job_of(directory, f"stopped-{stage}", stage))
    Loop.run = whole  # type: ignore[method-assign]


def resumed(directory: Path) -> None:
    for stage in JOBS:
        run_rank(job_of(directory, f"resumed-{stage}-{dist.get_world_size()}", stage))


def main() -> None:
    rank, num_ranks, path, *acts = sys.argv[1:]
    directory = Path(path)
    torch.set_num_threads(1)
    prepare_deepspeed()
    os.environ["LOCAL_RANK"] = rank  # as every launcher sets it; DeepSpeed insists
    store = dist.FileStore(str(directory / f"store-{'-'.join(acts)}"), int(num_ranks))
    dist.init_process_group("gloo", store=store, rank=int(rank), world_size=int(num_ranks))
    known = {each.__name__: each for each in (tasks, adapters, straight, stopped, resumed)}
    for act in acts:
        found = known[act](directory)
        if found is not None and dist.get_rank() == 0:
            torch.save(found, directory / f"{act}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
