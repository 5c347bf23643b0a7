"""Several tasks at once and adapters, on two ranks with real DeepSpeed engines: each ZeRO stage trains what the
unsharded one does, restarts change nothing, and the package is an ordinary model."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from mmflow.core.errors import TrainingError
from mmflow.learning.learner import Learner
from mmflow.learning.objectives import ObjectivesConfig
from mmflow.learning.outputs import MaskingTokens
from mmflow.loading.batches import Batch
from mmflow.loading.config import LoaderConfig
from mmflow.loading.plan import LoaderState
from mmflow.loading.tokens import train_tokenizer
from mmflow.models.config import LoraConfig
from mmflow.models.encoders import parameter_count
from mmflow.models.lora import adapt, merged
from mmflow.models.model import build
from mmflow.models.package import load_package, read_config, read_package, write_package
from mmflow.training.config import GuardsConfig, Task, TrainingConfig
from mmflow.training.engine import build_engine, whole_state
from mmflow.training.guards import Guards
from mmflow.training.job import TrainingJob
from mmflow.training.journal import Journal, curves, journal_at
from mmflow.training.loop import Due, TrainingLoop
from mmflow.training.rank import run_rank
from mmflow.training.zero import places_of
from tests.dataset.handmade import Handmade, write_dataset
from tests.training.ranks import (
    assert_bit_equal,
    dual_encoder,
    fresh_learner,
    furthest,
    main,
    perform,
    random_batch,
    result_of,
    transformer,
)

ROWS, VOCABULARY, CLASSES, SAMPLES = 3, 400, 4, 13
# Just wide enough that ZeRO-3 cuts weights up: it leaves those of up to 100,000 numbers whole.
MODEL = dual_encoder(
    transformer(320, heads=5, intermediate=320),
    fusion={"kind": "cross_attention", "width": 8, "layers": 1, "heads": 2, "dropout": 0.0},
    heads=["classes"],
    decoder={"width": 8, "layers": 1, "heads": 2, "dropout": 0.0},
)
OBJECTIVES: dict[str, Any] = {"pairs": {"contrastive": {}}, "words": {"captioning": {}}, "vqa": {"answering": {}}}
TURNS = (0, 1, 2, 0, 0, 1, 2, 1)
ENGINES = ((0, False), (1, False), (2, False), (3, False), (2, True), (3, True))  # (ZeRO stage, states offloaded)
LORA = LoraConfig(rank=4, alpha=8.0)
JOBS = (2, 3)  # ZeRO stages
STOPPED_BEFORE, EVERY = 9, 4


def learner() -> Learner:
    special = MaskingTokens(None, (), VOCABULARY)
    return fresh_learner(MODEL, *OBJECTIVES.values(), special=special, classes=CLASSES)


def engine_of(module: Learner, zero_stage: int, offload: bool = False) -> Any:
    fields = {
        "optimizer": {"learning_rate": 0.001, "warmup_steps": 1, "gradient_clipping": 100.0},
        "zero_stage": zero_stage,
        "global_batch_size": dist.get_world_size() * ROWS,
        "offload_optimizer": offload,
    }
    return build_engine(module, TrainingConfig.model_validate(fields), total_steps=10)


def turns() -> Iterator[Batch]:
    for step, task in enumerate(TURNS, 1):
        seed = 100 * step + dist.get_rank()
        answers = torch.randint(0, CLASSES, (ROWS,), generator=torch.Generator().manual_seed(seed))
        yield random_batch(seed, ROWS, vocabulary=VOCABULARY, targets={"answer": answers}, task=task)


def take_turns(engine: Any, journal: Path) -> None:
    """A step of each turn's task, a line of the journal for every two."""
    with contextlib.closing(Journal(journal if dist.get_rank() == 0 else None)) as lines:
        loop = TrainingLoop(
            engine=engine,
            total_steps=len(TURNS),
            log_every=2,
            due=Due(every_steps=100, every_minutes=None),
            save=lambda *_: True,
            guards=Guards(GuardsConfig()),
            journal=lines,
            shard_name=lambda dataset, shard: "",
            task_names=tuple(OBJECTIVES),
        )
        loop.run(turns(), first_step=0, state=LoaderState())


# --- the acts -------------------------------------------------------------------------------------------------------


def tasks(directory: Path) -> dict[Any, Any]:
    """Eight steps of three tasks by each kind of engine."""
    results = {}
    for stage, offload in ENGINES:
        engine = engine_of(learner(), stage, offload)
        take_turns(engine, directory / f"tasks-{stage}-{offload}.jsonl")
        results[stage, offload] = whole_state(engine.module.model)
    return results


def adapters(directory: Path) -> dict[Any, Any]:
    """The same with adapters at each ZeRO stage: the weights before, trained and merged; the sizes of the trained
    weights and of the optimizer's states over all ranks."""
    results = {}
    for stage in (0, 1, 2, 3):
        module = learner()
        before = {name: weight.clone() for name, weight in module.model.state_dict().items()}
        adapt("pretrain.lora", module.model, LORA, ["heads"], seed=1)
        trained = {name: weight.numel() for name, weight in module.model.named_parameters() if weight.requires_grad}
        engine = engine_of(module, stage)
        take_turns(engine, directory / f"adapters-{stage}.jsonl")
        after = whole_state(module.model)
        results[stage] = {
            "before": before,
            "after": after,
            "merged": merged(after, LORA) if after else {},
            "trained": trained,
            "states": state_numel(engine, stage),
        }
    return results


def state_numel(engine: Any, stage: int) -> int:
    """Numbers in the optimizer's moments over all ranks, without what pads flat tensors."""
    if stage == 0:
        states = engine.optimizer.state.values()
        return sum(state["exp_avg"].numel() + state["exp_avg_sq"].numel() for state in states)
    places = places_of(engine).values()
    assert all({"exp_avg", "exp_avg_sq"} <= set(engine.basic_optimizer.state[flat]) for flat, _ in places)
    total = torch.tensor(sum(2 * fragment.numel for _, fragment in places))
    dist.all_reduce(total)
    return int(total)


def job_of(directory: Path, name: str, zero_stage: int) -> TrainingJob:
    """Adapters and a new head are trained on two tasks of one dataset, from a package. The running average is packaged.
    ZeRO 3 uses micro-batches, which give the same step."""
    model = dual_encoder(
        transformer(),
        vocabulary_size=64,
        fusion={"kind": "concatenation", "width": 8, "dropout": 0.0},
        heads=["classes"],
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
        package=str(directory / name / "package"),
        journal=str(directory / name / "journal.jsonl"),
        checkpoints=str(directory / name / "checkpoints"),
        classes=("yes", "no"),
        start=str(directory / "start"),
        lora=LORA,
        tasks=(task(0, 2.0, {}, {"contrastive": {}}), task(1, 1.0, {"text": "questions"}, {"answering": {}})),
    )


def straight(directory: Path) -> None:
    for stage in JOBS:
        run_rank(job_of(directory, f"straight-{stage}", stage))


def stopped(directory: Path) -> None:
    """Stopped before a step, after a checkpoint."""
    run = TrainingLoop.run

    def run_until(loop: TrainingLoop, source: Iterator[Batch], **settings: Any) -> int:
        def until() -> Iterator[Batch]:
            for step, batch in enumerate(source, 1):
                if step == STOPPED_BEFORE:
                    raise TrainingError("stopped")
                yield batch

        return run(loop, until(), **settings)

    TrainingLoop.run = run_until  # type: ignore[method-assign]
    for stage in JOBS:
        with contextlib.suppress(TrainingError):
            run_rank(job_of(directory, f"stopped-{stage}", stage))


def resumed(directory: Path) -> None:
    for stage in JOBS:
        run_rank(job_of(directory, f"resumed-{stage}-{dist.get_world_size()}", stage))


# --- what they show -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tuning")
    questions = [{"question": "is it red", "answers": ["yes"]}, {"question": "is it blue", "answers": ["no"]}]
    samples = [
        Handmade(
            key=f"key-{number}",
            captions=[{"language": "en", "text": f"picture {number}"}],
            metadata={"questions": questions},
            size=(24, 24),
        )
        for number in range(SAMPLES)
    ]
    write_dataset(directory / "dataset", [("train", samples)])
    tokenizer = train_tokenizer(["picture is it red blue", "0 1 2 3 4 5 6 7 8 9"], 64)
    (directory / "start").mkdir()
    (directory / "start" / "tokenizer.json").write_text(tokenizer.to_str())  # which `job_of` reads
    config = job_of(directory, "start", 0).model.model_copy(update={"fusion": None, "heads": ()})
    model = build("model", config, tokenizer.get_vocab_size(), seed=8)
    write_package(
        str(directory / "start"),
        state=model.state_dict(),
        config=config,
        tokenizer_json=tokenizer.to_str(),
        parameters=parameter_count(model),
        lineage={},
    )
    perform("test_tuning", 2, directory, "tasks", "adapters", "straight", "stopped")
    for stage in JOBS:
        for num_ranks in (1, 2):
            shutil.copytree(directory / f"stopped-{stage}", directory / f"resumed-{stage}-{num_ranks}")
    perform("test_tuning", 2, directory, "resumed")
    perform("test_tuning", 1, directory, "resumed")
    return directory


def weights(directory: Path, name: str) -> dict[str, Tensor]:
    return dict(load_package(read_package(str(directory / name / "package"))).model.state_dict())


def losses(directory: Path, name: str) -> dict[str, list[tuple[int, float]]]:
    return curves(journal_at(str(directory / f"{name}.jsonl")))


def events(directory: Path, name: str, kind: str) -> list[dict[str, Any]]:
    return [line for line in journal_at(str(directory / name / "journal.jsonl")) if line.get("event") == kind]


@pytest.mark.parametrize("case", ENGINES[1:])
def test_parts_that_a_step_does_not_use_have_no_gradient_at_any_stage(directory: Path, case: tuple[int, bool]) -> None:
    by_case = result_of(directory, "tasks")
    # A tenth of a step; a gradient kept is one of five.
    assert furthest(by_case[0, False], by_case[case], without="bias") < 1e-4
    expected, sharded = (losses(directory, f"tasks-{stage}-{offload}") for stage, offload in ((0, False), case))
    for name in ("loss", *(f"{task}/loss" for task in OBJECTIVES)):
        assert dict(sharded[name]) == pytest.approx(dict(expected[name]), rel=1e-5)


def test_metrics_belong_to_their_task(directory: Path) -> None:
    by_name = losses(directory, "tasks-0-False")
    for number, (task, objectives) in enumerate(OBJECTIVES.items()):
        (objective,) = objectives
        lines = {2 * (turn // 2 + 1) for turn, turn_of in enumerate(TURNS) if turn_of == number}
        assert [step for step, _ in by_name[f"{task}/{objective}"]] == sorted(lines)
        assert dict(by_name[f"{task}/{objective}"]) == pytest.approx(dict(by_name[f"{task}/loss"]))
    first, second = (dict(by_name[f"{task}/loss"])[2] for task in ("pairs", "words"))
    assert dict(by_name["loss"])[2] == pytest.approx((first + second) / 2)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_adapters_are_trained_and_the_base_is_not(directory: Path, stage: int) -> None:
    by_stage = result_of(directory, "adapters")
    case = by_stage[stage]
    before, after = case["before"], {name.replace(".base_layer.", "."): value for name, value in case["after"].items()}
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name.split(".")[0] for name in moved} == {"image_projection", "text_projection", "scale", "heads"}
    still = [name for name in case["trained"] if ".lora_B." in name and not case["after"][name].any()]
    assert still == []
    adapted = {name.split(".")[0] for name in case["trained"] if ".lora_" in name}
    assert adapted == {"image", "text", "fusion", "decoder"}
    changed = {name for name in before if not torch.equal(before[name], case["merged"][name])}
    assert case["merged"].keys() == before.keys()
    assert "text.backbone.encoder.layer.0.attention.self.query.weight" in changed - moved
    assert furthest(by_stage[0]["merged"], case["merged"], without="bias") < 1e-4


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_optimizer_has_states_only_for_trained_weights(directory: Path, stage: int) -> None:
    case = result_of(directory, "adapters")[stage]
    assert case["states"] == 2 * sum(case["trained"].values())
    assert case["states"] < 0.15 * sum(weight.numel() for weight in case["before"].values())


@pytest.mark.parametrize("stage", JOBS)
def test_a_restart_continues_each_task_where_it_was(directory: Path, stage: int) -> None:
    expected = weights(directory, f"straight-{stage}")
    assert_bit_equal(expected, weights(directory, f"resumed-{stage}-2"))
    assert furthest(expected, weights(directory, f"resumed-{stage}-1"), without="bias") < 1e-5
    for num_ranks in (1, 2):
        started = events(directory, f"resumed-{stage}-{num_ranks}", "started")
        assert [line["step"] for line in started] == [0, (STOPPED_BEFORE - 1) // EVERY * EVERY]


def test_each_task_has_its_share_of_the_steps(directory: Path) -> None:
    by_name = losses(directory, "straight-2/journal")
    pairs, vqa = ([step for step, _ in by_name[name]] for name in ("pairs/contrastive", "vqa/answering"))
    steps = 2 * 2 * -(-SAMPLES // 5)
    assert sorted(pairs + vqa) == list(range(1, steps + 1))
    for end in range(1, steps + 1):
        assert abs(sum(step <= end for step in vqa) - end / 3) < 1


def test_the_package_is_an_ordinary_model_and_the_journal_records_its_start(directory: Path) -> None:
    package = read_package(str(directory / "straight-3" / "package"))
    loaded = load_package(package)
    assert package.parameters == parameter_count(loaded.model)
    assert read_config(package) == job_of(directory, "straight-3", 3).model
    (begun,) = events(directory, "straight-3", "begun")
    assert (set(begun["fresh"]), begun["left_out"]) == ({"fusion", "heads"}, [])
    assert furthest(weights(directory, "straight-2"), weights(directory, "straight-3"), without="bias") < 1e-5


if __name__ == "__main__":
    main(tasks, adapters, straight, stopped, resumed)
