"""Validation during training by real ranks: its values, that it does not change the training, and early stopping."""

from __future__ import annotations

import shutil
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mmflow.dataset.opened import Dataset
from mmflow.learning.learner import Learner
from mmflow.learning.objectives import ObjectivesConfig
from mmflow.learning.outputs import masking_tokens
from mmflow.learning.retrieval import rank_one, retrieval_metrics
from mmflow.loading.config import AugmentConfig, CropConfig, LoaderConfig
from mmflow.loading.loader import Loader
from mmflow.loading.opening import held_out_loader, open_loader
from mmflow.models.package import load_package, read_package
from mmflow.training.checkpoint_store import directory_of, saved_checkpoints
from mmflow.training.config import CheckpointsConfig, ValidationConfig
from mmflow.training.journal import curves, journal_at
from mmflow.training.metrics import known_peak
from mmflow.training.validation import Best
from tests.dataset.handmade import Handmade, write_dataset
from tests.training.faulty_ranks import BATCH, MODEL, OPTIONS
from tests.training.trainings import SAMPLES, STEPS, Trainings, largest_difference

pytestmark = pytest.mark.timeout(600)

HELD_OUT, LOOKED_AT = 9, 7  # samples
LOSS = "validation/loss"
RECALLS = [f"validation/{direction}/R@{k}" for direction in ("text_to_image", "image_to_text") for k in (1, 5)]
LOOKS: dict[str, Any] = {"split": "held_out", "every_steps": 4, "max_samples": LOOKED_AT}
KEEPS = {"checkpoints": {"keep_last": 9, "keep_best": 1, "best_metric": LOSS}}
# After steps 2, 4, 6 and 8; no later one is better than the first by so much.
ENDS = {"validation": {**LOOKS, "every_steps": 2, "patience": 3, "least_gain": 100}, **KEEPS}
RARELY = {"checkpoint_every_steps": 100}  # but where one is the best
STAGES = (2, 3)


def split_in(directory: Path) -> Dataset:
    """The dataset of all trainings with a held-out split beside it."""
    number, shards = 0, []
    for split, samples in (*(("train", sample_number) for sample_number in SAMPLES), ("held_out", HELD_OUT)):
        start = 0 if split == "held_out" else number
        rows = [
            Handmade(
                key=f"{'held' if split == 'held_out' else 'key'}-{sample_number}",
                captions=[{"language": "en", "text": f"picture-{sample_number}"}],
                size=(24, 24),
            )
            for sample_number in range(start, start + samples)
        ]
        shards.append((split, rows))
        number += samples
    return write_dataset(directory / "split", shards)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Trainings:
    place = Trainings(tmp_path_factory.mktemp("validation"))
    place.dataset = split_in(place.directory)
    return place


@pytest.fixture(scope="module")
def validated(place: Trainings) -> Trainings:
    looks = {"zero_stage": 2, "ema_decay": 0.7, "validation": LOOKS}
    cut = {"zero_stage": 2, "validation": {**LOOKS, "max_seconds": 1e-6, "patience": 1}, **KEEPS}
    place.run(
        1,
        {"name": "values-1", "training": looks},
        {"name": "cut", "training": cut},
        {"name": "several", "tasks": ["one", "other"], "training": {**looks, "epochs": 1}},
        {"name": "best", "training": {"zero_stage": 2, **ENDS, **RARELY}},
        {"name": "ends", "training": {"zero_stage": 2, **ENDS}},
    )
    again = place.copy("ends", "again")
    shutil.rmtree(directory_of(str(again / "checkpoints"), 8))
    place.copy("ends", "over")
    pairs = [
        {"name": f"{name}-{stage}", "unsteady": True, "training": {"zero_stage": stage, "ema_decay": 0.7, **more}}
        for stage in STAGES
        for name, more in (("alone", {}), ("looked-at", {"validation": {**LOOKS, "every_steps": 3}}))
    ]
    restarts = [{"name": name, "training": {"zero_stage": 2, **ENDS}} for name in ("again", "over")]
    sharded = {"name": "best-3", "training": {"zero_stage": 3, **ENDS, **RARELY}}
    place.run(
        2,
        *pairs,
        *restarts,
        sharded,
        {"name": "values-2", "training": {**looks, "zero_stage": 3, "peak_tflops": 1e-3}},
        {"name": "last", "training": {**looks, "zero_stage": 0, "ema_decay": None}},
    )
    place.run(3, {"name": "values-3", "training": {**looks, "zero_stage": 0}})
    return place


def curves_of(place: Trainings, name: str) -> dict[str, list[tuple[int, float]]]:
    return curves(journal_at(str(place.directory / name / "journal.jsonl")))


@pytest.mark.parametrize("stage", STAGES)
def test_a_training_is_bit_equal_with_and_without_validation(validated: Trainings, stage: int) -> None:
    alone, looked_at = (validated.weights(f"{name}-{stage}") for name in ("alone", "looked-at"))
    assert [name for name in alone if not torch.equal(alone[name], looked_at[name])] == []
    assert validated.seen(f"alone-{stage}") == validated.seen(f"looked-at-{stage}")
    assert [step for step, _ in curves_of(validated, f"looked-at-{stage}")[LOSS]] == [3, 6, 9, 12, STEPS]


def test_values_are_the_same_on_any_number_of_ranks(validated: Trainings) -> None:
    expected = curves_of(validated, "values-1")
    for name in (LOSS, "validation/contrastive", *RECALLS):
        assert [step for step, _ in expected[name]] == [4, 8, 12, STEPS]
        for num_ranks in (2, 3):
            assert curves_of(validated, f"values-{num_ranks}")[name] == [
                (step, pytest.approx(value, rel=1e-5)) for step, value in expected[name]
            ]
    assert len({value for _, value in expected[LOSS]}) == 4
    of_averages, of_last = expected[LOSS][-1], curves_of(validated, "last")[LOSS][-1]
    assert of_averages[1] != pytest.approx(of_last[1], rel=1e-3)


def packaged(validated: Trainings, name: str, config: LoaderConfig) -> tuple[Learner, Loader]:
    """The packaged model of a training, and a loader of its batches."""
    loaded = load_package(read_package(str(validated.directory / name / "package")))
    loader = open_loader(
        config,
        validated.dataset,
        loaded.tokenizer,
        global_batch_size=BATCH,
        image_pixels=MODEL.image_pixels,
        max_tokens=MODEL.max_tokens,
        seed=3,
    )
    return Learner(loaded.model, loaded.config, [ObjectivesConfig()], masking_tokens(loaded.tokenizer), seed=3), loader


@pytest.mark.parametrize("name", ["values-1", "values-2", "values-3", "last"])
def test_values_are_those_of_the_package(validated: Trainings, name: str) -> None:
    """The last values, computed again by the packaged model on the loader's batches."""
    augmented = LoaderConfig(augment=AugmentConfig(crop=CropConfig(), token_dropout=0.5), bucket_batches=2)
    learner, loader = packaged(validated, name, held_out_loader(augmented, "held_out"))
    learner.eval()
    first, second = islice(loader, 2)
    second.real[LOOKED_AT - BATCH :] = False
    losses, images, texts = [], [], []
    with torch.no_grad():
        for number, batch in enumerate((first, second)):
            _, parts = learner(batch, number, examined=True)
            losses.append(float(parts["contrastive"]) * int(batch.real.sum()))
            images.append(parts["image_embedding"][batch.real])
            texts.append(parts["text_embedding"][batch.real])
    by_metric = curves_of(validated, name)
    assert by_metric[LOSS][-1] == (STEPS, pytest.approx(sum(losses) / LOOKED_AT, rel=1e-5))
    similarity = (torch.cat(texts) @ torch.cat(images).T).numpy()
    for direction, matrix in (("text_to_image", similarity), ("image_to_text", similarity.T)):
        recalls = retrieval_metrics(rank_one(np.ascontiguousarray(matrix)))
        for k in (1, 5):
            assert by_metric[f"validation/{direction}/R@{k}"][-1][1] == pytest.approx(recalls[f"R@{k}"])


def test_each_task_is_validated(validated: Trainings) -> None:
    by_metric = curves_of(validated, "several")
    assert [step for step, _ in by_metric[LOSS]] == [4, 8, 12, STEPS]  # an epoch of each
    for task in ("one", "other"):  # equal tasks, validated with the same weights
        for name in ("loss", "contrastive", "text_to_image/R@1"):
            assert by_metric[f"validation/{task}/{name}"] == by_metric[f"validation/one/{name}"]
        assert by_metric[f"validation/{task}/loss"] == [(step, pytest.approx(value)) for step, value in by_metric[LOSS]]
    assert "validation/contrastive" not in by_metric


@pytest.mark.parametrize(
    ("name", "like", "packaged"),
    [("best", "best", 2), ("best-3", "best", 2), ("ends", "ends", 8), ("again", "ends", 8), ("over", "ends", 8)],
)
def test_a_training_without_gain_ends_with_the_best_weights_that_are_kept(
    validated: Trainings, name: str, like: str, packaged: int
) -> None:
    ends = {line["step"] for line in validated.events(name, "stopped")}
    assert ends == {8}
    lineage = read_package(str(validated.directory / name / "package")).card["lineage"]
    assert (lineage["steps"], lineage["packaged_step"]) == (8, packaged)
    assert "at step 2 by 100 in 3 validations" in lineage["stopped"]
    assert largest_difference(validated.weights(like), validated.weights(name)) < 1e-5
    started = [line["step"] for line in validated.events(name, "started")]
    assert started == {"again": [0, 4], "over": [0, 8]}.get(name, [0])


def test_the_best_weights_are_those_of_their_step(validated: Trainings) -> None:
    store = validated.directory / "best" / "checkpoints"
    (saved,) = saved_checkpoints(str(store))
    assert saved.step == 2
    assert saved.facts["metrics"][LOSS] == dict(curves_of(validated, "best")[LOSS])[2]
    # The checkpoint of one rank holds the whole state.
    state = torch.load(next(store.rglob("*model_states.pt")), weights_only=False)["module"]
    packaged = validated.weights("best")
    assert [name for name, value in packaged.items() if not torch.equal(state[f"model.{name}"], value)] == []


def test_a_validation_that_takes_too_long_is_cut_and_decides_nothing(validated: Trainings) -> None:
    assert validated.error("cut") == ""
    events = validated.events("cut", "validation_cut")
    assert [line["step"] for line in events] == [4, 8, 12, STEPS]
    assert "max_seconds" in events[0]["reason"]
    by_metric = curves_of(validated, "cut")
    assert [name for name in by_metric if name.startswith("validation/")] == []
    assert by_metric["loss"][-1][0] == STEPS  # patience 1 did not end it
    best = [line for line in validated.events("cut", "checkpoint") if line["reason"] == "best"]
    assert best == []


def test_the_journal_reports_hardware_use(validated: Trainings) -> None:
    by_metric = curves_of(validated, "values-1")
    assert "mfu" not in by_metric  # the peak of a CPU is not known
    assert all(value > 1e7 for _, value in by_metric["peak_process_bytes"])
    asked = curves_of(validated, "values-2")
    for (_, tflops), (_, mfu) in zip(asked["model_tflops_per_second"], asked["mfu"], strict=True):
        assert mfu == pytest.approx(tflops / (2 * 1e-3))


def test_arithmetic_is_that_of_forward_and_backward(validated: Trainings) -> None:
    learner, loader = packaged(validated, "values-1", LoaderConfig())
    batch = next(iter(loader))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # in operations that it knows
        learner(batch, 1)[0].backward()
    # The gradient of the pictures is not computed in training; in so small a model it is a large part.
    of_pictures = 2 * 3 * MODEL.image_pixels**2 * OPTIONS["hidden_size"]
    counted = counter.get_total_flops() / BATCH + of_pictures
    for num_ranks in (1, 2, 3):
        lines = curves_of(validated, f"values-{num_ranks}")
        reported = 1e12 * lines["model_tflops_per_second"][0][1] / lines["samples_per_second"][0][1]
        assert reported == pytest.approx(counted, rel=0.05)


def test_peak_flops_are_looked_up_by_the_words_of_a_device_name() -> None:
    assert known_peak("NVIDIA A100-SXM4-80GB", "bf16") == 312e12
    assert known_peak("NVIDIA H100 80GB HBM3", "bf16") == 989.4e12
    assert known_peak("NVIDIA H100 PCIe", "fp32") == 51e12
    assert known_peak("Tesla T4", "bf16") is None
    assert known_peak("NVIDIA A10G", "bf16") is None  # another device than an A10


# --- what is best ---------------------------------------------------------------------------------------------------


def best_of(metric: str = LOSS, **validation: Any) -> Best:
    return Best(CheckpointsConfig(best_metric=metric), ValidationConfig(split="held_out", **validation))


def updates(best: Best, metric: str, *values: float) -> list[bool]:
    return [best.update(step, {metric: value}) for step, value in enumerate(values, 1)]


def test_small_gains_count_once_they_add_up() -> None:
    best = best_of(least_gain=0.125, patience=2)
    assert updates(best, LOSS, 1.0, 0.9375, 0.875, 0.8125) == [True, False, True, False]
    assert best.ended is None
    assert updates(best, LOSS, 0.8) == [False]
    assert best.ended == "no better validation/loss than 0.875 at step 3 by 0.125 in 2 validations"


def test_a_value_that_is_not_finite_is_never_the_best() -> None:
    best = best_of("validation/R@1", patience=3)
    assert updates(best, "validation/R@1", float("nan"), 0.1, 0.1) == [False, True, False]
    assert not best.update(4, {})  # cut short: it does not count
    assert best.state() == {"metric": "validation/R@1", "value": 0.1, "step": 2, "since": 1}


def test_a_restart_knows_the_best_value_unless_the_metric_has_changed() -> None:
    best, again, other = (best_of(name, patience=2) for name in (LOSS, LOSS, "validation/contrastive"))
    updates(best, LOSS, 1.0, 2.0)
    for restarted in (again, other):
        restarted.restore(best.state())
    assert again.state() == best.state()
    assert not again.update(3, {LOSS: 1.5})
    assert again.ended
    assert other.state()["value"] is None
