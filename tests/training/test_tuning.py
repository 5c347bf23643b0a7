"""Several tasks at once and adapters, on two ranks by real DeepSpeed engines: each ZeRO stage trains what the unsharded
one does, restarts change nothing, and what is packaged is an ordinary model."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mmflow.loading.tokens import train_tokenizer
from mmflow.models.encoders import parameter_count
from mmflow.models.model import build
from mmflow.models.package import load_package, read_config, read_package, write_package
from mmflow.training.journal import curves, read_journal
from tests.dataset.handmade import Handmade, write_dataset
from tests.training.tuned_ranks import ENGINES, EVERY, JOBS, OBJECTIVES, STOPPED_BEFORE, TURNS, job_of

ROOT = Path(__file__).parents[2]
SAMPLES = 13


def perform(directory: Path, num_ranks: int, *acts: str) -> None:
    command = [sys.executable, "-m", "tests.training.tuned_ranks"]
    ranks = [
        subprocess.Popen(
            [*command, str(rank), str(num_ranks), str(directory), *acts],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(num_ranks)
    ]
    try:
        said = [each.communicate(timeout=560)[1] for each in ranks]
    finally:
        for each in ranks:
            each.kill()
    assert [each.returncode for each in ranks] == [0] * num_ranks, "\n".join(each[-3000:] for each in said)


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
    perform(directory, 2, "tasks", "adapters", "straight", "stopped")
    for stage in JOBS:
        for num_ranks in (1, 2):
            shutil.copytree(directory / f"stopped-{stage}", directory / f"resumed-{stage}-{num_ranks}")
    perform(directory, 2, "resumed")
    perform(directory, 1, "resumed")
    return directory


def found(directory: Path, act: str) -> dict[Any, Any]:
    return dict(torch.load(directory / f"{act}.pt", weights_only=True))


def furthest(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """The largest difference of a matrix. A bias of keys has no gradient by its mathematics, and Adam steps along the
    sign of its rounding error."""
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one if not name.endswith("bias"))


def weights(directory: Path, name: str) -> dict[str, Tensor]:
    return dict(load_package(read_package(str(directory / name / "package"))).model.state_dict())


def losses(directory: Path, name: str) -> dict[str, list[tuple[int, float]]]:
    return curves(read_journal(directory / f"{name}.jsonl"))


def events(directory: Path, name: str, kind: str) -> list[dict[str, Any]]:
    return [line for line in read_journal(directory / name / "journal.jsonl") if line.get("event") == kind]


@pytest.mark.parametrize("case", ENGINES[1:])
def test_parts_that_a_step_does_not_use_have_no_gradient_at_any_stage(directory: Path, case: tuple[int, bool]) -> None:
    by_case = found(directory, "tasks")
    assert furthest(by_case[0, False], by_case[case]) < 1e-4  # a tenth of a step; a gradient kept is one of five
    expected, sharded = (losses(directory, f"tasks-{each[0]}-{each[1]}-0") for each in ((0, False), case))
    for name in ("loss", *(f"{task}/loss" for task in OBJECTIVES)):
        assert dict(sharded[name]) == pytest.approx(dict(expected[name]), rel=1e-5)


def test_metrics_are_of_their_task_alone(directory: Path) -> None:
    by_name = losses(directory, "tasks-0-False-0")
    lines = {
        task: [2 * (turn // 2 + 1) for turn, each in enumerate(TURNS) if each == number]
        for number, task in enumerate(OBJECTIVES)
    }
    for task, objectives in OBJECTIVES.items():
        (objective,) = objectives
        assert [step for step, _ in by_name[f"{task}/{objective}"]] == sorted(set(lines[task]))
        assert dict(by_name[f"{task}/{objective}"]) == pytest.approx(dict(by_name[f"{task}/loss"]))
    first, second = (dict(by_name[f"{task}/loss"])[2] for task in ("pairs", "words"))
    assert dict(by_name["loss"])[2] == pytest.approx((first + second) / 2)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_adapters_are_trained_and_the_base_is_not(directory: Path, stage: int) -> None:
    case = found(directory, "adapters")[stage]
    before, after = case["before"], {name.replace(".base_layer.", "."): each for name, each in case["after"].items()}
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name.split(".")[0] for name in moved} == {"image_projection", "text_projection", "scale", "heads"}
    still = [name for name in case["trained"] if ".lora_B." in name and not case["after"][name].any()]
    assert still == []
    adapted = {name.split(".")[0] for name in case["trained"] if ".lora_" in name}
    assert adapted == {"image", "text", "fusion", "decoder"}
    changed = {name for name in before if not torch.equal(before[name], case["merged"][name])}
    assert case["merged"].keys() == before.keys()
    assert "text.backbone.encoder.layer.0.attention.self.query.weight" in changed - moved


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_optimizer_has_states_of_what_is_trained_alone(directory: Path, stage: int) -> None:
    case = found(directory, "adapters")[stage]
    assert case["states"] == 2 * sum(case["trained"].values())
    assert case["states"] < 0.15 * sum(each.numel() for each in case["before"].values())


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_trains_the_adapters_of_the_unsharded_engine(directory: Path, stage: int) -> None:
    by_stage = found(directory, "adapters")
    assert furthest(by_stage[0]["merged"], by_stage[stage]["merged"]) < 1e-4


@pytest.mark.parametrize("stage", JOBS)
def test_a_restart_goes_on_with_each_task_where_it_was(directory: Path, stage: int) -> None:
    expected, restarted = (weights(directory, name) for name in (f"straight-{stage}", f"resumed-{stage}-2"))
    assert [name for name in expected if not torch.equal(expected[name], restarted[name])] == []
    assert furthest(expected, weights(directory, f"resumed-{stage}-1")) < 1e-5
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


def test_what_is_packaged_is_an_ordinary_model_that_says_what_it_began_with(directory: Path) -> None:
    package = read_package(str(directory / "straight-3" / "package"))
    loaded = load_package(package)
    assert package.parameters == parameter_count(loaded.model)
    assert read_config(package) == job_of(directory, "straight-3", 3).model
    (begun,) = events(directory, "straight-3", "begun")
    assert (set(begun["fresh"]), begun["left_out"]) == ({"fusion", "heads"}, [])
    assert furthest(weights(directory, "straight-2"), weights(directory, "straight-3")) < 1e-5
