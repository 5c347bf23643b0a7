"""The whole loop: it runs, it is reused, it is resumed after kill -9 of workers and drivers, and its gate refuses."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pyarrow.dataset
import pyarrow.fs
import pytest
import torch

from mmflow.core.artifacts import MANIFEST
from mmflow.core.storage import filesystem, join, read_json
from mmflow.dataset.verify import verify_dataset
from mmflow.models.package import load_package, read_package
from mmflow.recipe import Recipe, load_recipe
from mmflow.registry.tracking import tracking_uri
from mmflow.registry.versions import champion, list_versions
from mmflow.stages.loop import Loop
from mmflow.training.journal import curves, journal_at
from pipelines.run import run_pipeline
from tests.object_store import CREDENTIALS, object_store
from tests.tiny import tiny_fields, write_recipe, write_shapes

STAGES = ["shard", "pretrain", "distill", "evaluate", "promote", "score"]


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_shapes(tmp_path_factory.mktemp("shapes") / "corpus")


@pytest.fixture(scope="module")
def path(records: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tmp_path_factory.mktemp("loop")
    return write_recipe(directory / "tiny.yaml", tiny_fields(directory / "workspace", records))


@pytest.fixture(scope="module")
def recipe(path: str) -> Recipe:
    return load_recipe(path)


@pytest.fixture(scope="module")
def report(recipe: Recipe, ray_cluster: None) -> dict[str, Any]:
    """The report of an uninterrupted run."""
    run_pipeline(recipe)
    return read_report(recipe)


def read_report(recipe: Recipe) -> dict[str, Any]:
    return dict(json.loads((Path(recipe.workspace) / "report.json").read_text()))


def statuses(report: dict[str, Any]) -> dict[str, str]:
    return {stage["stage"]: stage["status"] for stage in report["stages"]}


def fingerprints(report: dict[str, Any]) -> list[str]:
    return [stage["output"] for stage in report["lineage"]]


def test_every_stage_commits_one_artifact_and_the_totals_agree(recipe: Recipe, report: dict[str, Any]) -> None:
    assert statuses(report) == dict.fromkeys(STAGES, "built")
    for stage in STAGES:
        assert len(list(Path(recipe.workspace, stage).glob(f"*/{MANIFEST}"))) == 1
    assert report["dataset"]["samples"] == 52
    assert report["dataset"]["quarantine"]["reasons"] == {"caption_missing": 1, "image_missing": 1}
    assert report["scores"]["rows"] == 52
    assert report["promotion"]["decision"] == "promoted"
    assert [report["training"][role]["restarts"] for role in ("teacher", "student")] == [0, 0]
    (dataset,) = Path(recipe.workspace, "shard").iterdir()
    assert verify_dataset(str(dataset)) == []


def test_the_report_page_stands_alone(recipe: Recipe, report: dict[str, Any]) -> None:
    page = (Path(recipe.workspace) / "report.html").read_text()
    assert "red circle" in page
    assert 'src="http' not in page
    assert "caption missing" in page


def test_every_sample_is_scored_once_by_the_champion(recipe: Recipe, report: dict[str, Any]) -> None:
    (scores,) = Path(recipe.workspace, "score").glob("*/scores")
    table = pyarrow.dataset.dataset(scores).to_table()
    assert len(set(table["key"].to_pylist())) == table.num_rows == 52
    assert {name for names in table["classes"].to_pylist() for name in names} == {"circle", "square", "bar"}
    assert all(-1.001 <= similarity <= 1.001 for similarity in table["similarity"].to_pylist())
    version = champion("tiny-dual-encoder", uri=tracking_uri(recipe.workspace))
    assert version is not None
    assert version.digest == report["scores"]["model"]["digest"]


def test_training_is_in_mlflow_as_one_finished_run_a_stage(recipe: Recipe, report: dict[str, Any]) -> None:
    assert_tracked(report, tracking_uri(recipe.workspace))


def assert_tracked(report: dict[str, Any], uri: str) -> None:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("tiny")
    runs = client.search_runs([experiment.experiment_id])
    assert sorted(run.info.run_name for run in runs) == ["distill", "pretrain"]
    assert {run.info.status for run in runs} == {"FINISHED"}
    teacher = next(run for run in runs if run.info.run_name == "pretrain")
    logged = [(point.step, point.value) for point in client.get_metric_history(teacher.info.run_id, "loss")]
    assert sorted(logged) == [tuple(point) for point in report["training"]["teacher"]["curves"]["loss"]]


def test_a_second_run_builds_nothing(recipe: Recipe, report: dict[str, Any]) -> None:
    run_pipeline(recipe)
    again = read_report(recipe)
    assert statuses(again) == dict.fromkeys(STAGES, "reused")
    assert fingerprints(again) == fingerprints(report)
    assert again["seconds"] == report["seconds"] > 0  # of the run that built the stages
    assert again["peak_memory_bytes"] == report["peak_memory_bytes"] > 0


def test_a_setting_that_an_error_advises_continues_the_same_training(path: str, report: dict[str, Any]) -> None:
    overrides = ["loader.on_corrupt=skip", "loader.max_skipped=7", "loader.workers={kind: processes}"]
    overrides += ["training.max_restarts=9", "training.log_every_steps=3", "training.checkpoint_every_steps=7"]
    advised = load_recipe(path, [f"pretrain.{override}" for override in overrides])
    assert Loop(advised).plan("pretrain").identity == Loop(load_recipe(path)).plan("pretrain").identity


def test_a_fused_model_trains_by_several_objectives_at_once(path: str, report: dict[str, Any]) -> None:
    overrides = [
        "model.fusion={kind: cross_attention, width: 8, layers: 1, heads: 2}",
        "model.heads=[matching, masked_language, classes]",
        "objectives={contrastive: {}, masked_language: {}, classification: {weight: 0.5}}",
        "objectives.matching={weight: [[0, 0.5], [4, 1.0]]}",
        "loader.label=shape",
        "training.epochs=1",
        "training.zero_stage=3",
    ]
    trained = Loop(load_recipe(path, [f"pretrain.{override}" for override in overrides])).run("pretrain")
    loaded = load_package(read_package(trained.file("package")))
    assert loaded.model.gives >= {"embeddings", "fused", "matching_logits", "masked_language_logits", "class_logits"}
    assert loaded.classes == ("bar", "circle", "square")
    written = curves(journal_at(trained.file("journal.jsonl")))
    assert {"loss", "contrastive", "matching", "masked_language", "classification"} <= written.keys()


def test_a_package_is_tuned_on_two_tasks_by_adapters(recipe: Recipe, report: dict[str, Any], tmp_path: Path) -> None:
    started = read_package(Loop(recipe).committed("pretrain").file("package"))
    fields = recipe.model_dump(mode="json") | {"distill": None}
    fields["promote"]["candidate"] = "teacher"
    labels = {"name": "shapes", "loader": {"label": "shape"}, "objectives": {"classification": {}}}
    fields["pretrain"] = {
        "start": {"package": started.uri},
        "lora": {"rank": 2},
        "model": {"heads": ["classes"]},
        "tasks": [{"name": "pairs", "weight": 2}, labels],
        "training": fields["pretrain"]["training"] | {"epochs": 1, "zero_stage": 3},
    }
    loop = Loop(load_recipe(write_recipe(tmp_path / "tuned.yaml", fields)))
    loop.check()
    trained = loop.run("pretrain")
    assert trained.manifest["inputs"]["start"] == started.digest
    lines = journal_at(trained.file("journal.jsonl"))
    assert {"loss", "pairs/contrastive", "shapes/classification"} <= curves(lines).keys()
    (begun,) = (line for line in lines if line.get("event") == "begun")
    assert (begun["fresh"], begun["left_out"]) == (["heads"], [])
    package = read_package(trained.file("package"))
    assert package.card["lineage"]["start"] == {"package": started.uri}
    tuned, before = (load_package(model).model.state_dict() for model in (package, started))
    assert tuned.keys() - before.keys() == {"heads.classes.weight", "heads.classes.bias"}
    moved = {name for name in before if not torch.equal(tuned[name], before[name])}
    assert "text.backbone.encoder.layer.0.attention.self.query.weight" in moved
    assert not any(name.startswith("image.") or "norm" in name.lower() for name in moved)  # convolutions, statistics


def test_a_student_begins_with_its_teacher_s_weights_and_learns_from_two_cached_teachers(
    path: str, recipe: Recipe, report: dict[str, Any]
) -> None:
    package = Loop(recipe).committed("pretrain").file("package")
    losses = {"soft_labels": 1, "similarities": 0.5, "features": 10, "interactive": 1}
    overrides = [f"losses={json.dumps(losses)}", f"teachers=[{{package: {package}, weight: 0.5}}]"]
    overrides += ["cache={augmentations: 2}", "initialise={}", "training.epochs=1", "training.zero_stage=3"]
    trained = Loop(load_recipe(path, [f"distill.{override}" for override in overrides])).run("distill")
    (cache,) = Path(recipe.workspace, "teacher_cache").glob(f"*/{MANIFEST}")  # of one package twice
    assert trained.manifest["inputs"]["teacher 0"] == json.loads(cache.read_text())["teacher"]
    written = curves(journal_at(trained.file("journal.jsonl")))
    assert {"loss", "contrastive", *losses} <= written.keys()


def test_a_change_reruns_only_what_it_touches_and_a_worse_model_is_refused(
    path: str, recipe: Recipe, report: dict[str, Any]
) -> None:
    worse_training = ["distill.training.epochs=1", "distill.training.optimizer={learning_rate: 1e-9}"]
    run_pipeline(load_recipe(path, [*worse_training, "promote.min_gain=0.01"]))
    worse = read_report(recipe)
    reused = dict.fromkeys(("shard", "pretrain", "score"), "reused")
    assert statuses(worse) == dict.fromkeys(STAGES, "built") | reused
    assert worse["promotion"]["decision"] == "refused"
    assert "held_out/text_to_image/R@5" in worse["promotion"]["reasons"][0]
    versions = list_versions("tiny-dual-encoder", uri=tracking_uri(recipe.workspace))
    assert [version.aliases for version in versions] == [("champion",), ("challenger",)]


def test_a_worker_killed_in_pretraining_costs_no_step_and_changes_no_weight(
    recipe: Recipe, report: dict[str, Any], records: str, tmp_path: Path, ray_cluster: None
) -> None:
    again = load_recipe(write_recipe(tmp_path / "tiny.yaml", tiny_fields(tmp_path / "workspace", records)))
    loop = Loop(again)
    loop.run("shard")
    journal = Path(loop.plan("pretrain").directory(again.workspace)) / "journal.jsonl"
    with ThreadPoolExecutor(1) as pool:
        training = pool.submit(loop.run, "pretrain")
        # The second is written only after the first is complete.
        wait_for(lambda: len(events(journal, "checkpoint")) >= 2, training.done)
        victims = [process for process in psutil.process_iter() if is_worker_of(process, os.getpid())]
        assert len(victims) == 2
        victims[0].kill()
        artifact = training.result(timeout=300)
    starts = [line["step"] for line in events(journal, "started")]
    assert len(starts) == 2
    assert starts[1] > 0
    steps = {line["step"] for line in journal_at(str(journal)) if "metrics" in line}
    assert steps == set(range(1, artifact.manifest["steps"] + 1))
    assert f"training {artifact.fingerprint[:12]}" in fingerprints(report)


def events(journal: Path, kind: str) -> list[dict[str, Any]]:
    return [line for line in journal_at(str(journal)) if line.get("event") == kind]


def is_worker_of(process: psutil.Process, driver: int) -> bool:
    try:
        return "RayTrainWorker" in " ".join(process.cmdline()) and driver in [
            parent.pid for parent in process.parents()
        ]
    except psutil.Error:
        return False


def wait_for(happened: Callable[[], bool], ended: Callable[[], bool], log: str = os.devnull) -> None:
    seconds = 240.0
    deadline = time.monotonic() + seconds
    while not happened():
        assert not ended() or happened(), Path(log).read_text()
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.02)


def test_a_workspace_in_an_object_store_holds_the_same_after_the_driver_was_killed(
    report: dict[str, Any], records: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path / "dagster"))
    with object_store() as workspace:
        path = write_recipe(tmp_path / "tiny.yaml", {**tiny_fields(tmp_path, records), "workspace": workspace})
        system, directory = filesystem(workspace)
        trained = pyarrow.fs.FileSelector(f"{directory}/pretrain", recursive=True, allow_not_found=True)

        def checkpoints() -> int:
            return sum(file.base_name == "part-0.json" for file in system.get_file_info(trained))

        command = [sys.executable, "-m", "mmflow.cli.main", "run", path]
        with (tmp_path / "log").open("ab") as log:
            driver = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        try:
            wait_for(lambda: checkpoints() >= 2, lambda: driver.poll() is not None, log.name)
        finally:
            driver.kill()
            driver.wait()
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        result = read_json(join(workspace, "report.json"))
    assert fingerprints(result) == fingerprints(report)
    assert [result["training"][role]["restarts"] for role in ("teacher", "student")] == [1, 0]
    for role in ("teacher", "student"):
        assert result["training"][role]["curves"]["loss"] == report["training"][role]["curves"]["loss"]
    assert_tracked(result, f"sqlite:///{tmp_path}/mlflow.db")


@pytest.mark.slow
@pytest.mark.timeout(1500)  # seven drivers, each with a Ray of its own
def test_a_driver_killed_in_any_stage_goes_on_to_the_same_artifacts(
    report: dict[str, Any], records: str, tmp_path: Path
) -> None:
    fields = tiny_fields(tmp_path / "workspace", records)
    path = write_recipe(tmp_path / "tiny.yaml", fields)
    recipe = load_recipe(path)
    workspace = tmp_path / "workspace"
    # What is seen once each stage has begun, and before it can be committed.
    begun = {
        "shard": "shard/*/.lock",
        "pretrain": "pretrain/*/checkpoints/step-*/part-0.json",
        "distill": "distill/*/journal.jsonl",
        "evaluate": "evaluate/*/.lock",
        "promote": "promote/*/.lock",
        "score": "score/*/.lock",
    }
    killed = []
    for stage, sign in begun.items():
        with (tmp_path / "log").open("ab") as log:
            driver = subprocess.Popen(
                [sys.executable, "-m", "mmflow.cli.main", "run", path], stdout=log, stderr=log, start_new_session=True
            )
        wait_for(lambda sign=sign: any(workspace.glob(sign)), lambda driver=driver: driver.poll() is not None, log.name)
        driver.send_signal(signal.SIGKILL)
        driver.wait()
        if not list(workspace.glob(f"{stage}/*/{MANIFEST}")):
            killed.append(stage)
    assert killed == list(begun)
    done = subprocess.run([sys.executable, "-m", "mmflow.cli.main", "run", path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == str(workspace / "report.html")
    finished = read_report(recipe)
    assert fingerprints(finished) == fingerprints(report)
