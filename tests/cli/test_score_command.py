"""`mmflow score` as its user meets it: any model over any dataset, and mistakes in one line that leave no trace."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

from mmflow.cli.main import app
from mmflow.core.errors import MmflowError
from mmflow.dataset.opened import Dataset
from mmflow.registry import versions
from mmflow.registry.tracking import tracking_uri
from tests.dataset.handmade import write_dataset
from tests.evaluation.models import captioner_config, dual_config, loaded_model, ranker_config, written_package
from tests.inference.asking import square, squares
from tests.tiny import tiny_fields, write_recipe, write_shapes


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("packages")
    configs = {"dual": dual_config(), "captioner": captioner_config(), "ranker": ranker_config()}
    return {name: written_package(folder / name, loaded_model(config, seed=4)).uri for name, config in configs.items()}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    (shard,) = squares(3)
    return write_dataset(tmp_path_factory.mktemp("corpus") / "data", [shard, ("held_out", [square("other")])])


@pytest.fixture(scope="module")
def registry(packages: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace where `squares` has two versions, the first of them champion."""
    workspace = tmp_path_factory.mktemp("registry")
    tracking = tracking_uri(str(workspace))
    for name in ("dual", "ranker"):
        versions.register("squares", packages[name], digest=name, metrics={}, tags={}, uri=tracking)
    versions.set_alias("squares", "champion", 1, "the first", uri=tracking)
    return workspace


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Callable[..., list[str]]:
    """`mmflow score`; the lines that it prints."""

    def run(*arguments: str) -> list[str]:
        app(["score", *arguments], standalone_mode=False)
        return capsys.readouterr().out.splitlines()

    return run


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores are made in this process, which starts no Ray."""
    monkeypatch.setattr("mmflow.cluster.local.ensure_ray", lambda num_cpus: None)


def refusal(command: Callable[..., list[str]], *arguments: str) -> tuple[int, str]:
    """The exit code and the error, which is one line."""
    with pytest.raises(MmflowError) as raised:
        command(*arguments)
    assert "\n" not in str(raised.value)
    return raised.value.exit_code, str(raised.value)


def scored(workspace: Path) -> dict[str, Any]:
    """The manifest of the latest scores."""
    uri = json.loads((workspace / "score" / "latest.json").read_text())["uri"]
    return dict(json.loads(Path(uri, "manifest.json").read_text()))


# --- what it does -----------------------------------------------------------------------------------------------------


def test_a_package_scores_a_dataset_once(
    command: Callable[..., list[str]], dataset: Dataset, packages: dict[str, str], tmp_path: Path, ray_cluster: None
) -> None:
    workspace = tmp_path / "workspace"
    arguments = ("--dataset", dataset.uri, "--model", packages["dual"], "--tasks", "embed", "--output", str(workspace))
    for outcome in ("built", "already committed"):
        first, second, *_ = command(*arguments)
        assert first.startswith(f"score: {outcome}: {workspace}/score/")
        assert second == f"  4 rows by {packages['dual']}: embed"
    manifest = scored(workspace)
    assert (manifest["model"]["package"], manifest["model"]["version"]) == (packages["dual"], None)
    assert manifest["totals"]["rows"] == 4


def test_a_registered_model_scores_tars_of_others_by_a_recipe_without_training(
    command: Callable[..., list[str]],
    dataset: Dataset,
    packages: dict[str, str],
    registry: Path,
    tmp_path: Path,
    here: None,
) -> None:
    """All tars in a folder; one more is scored with those that are there, and tars are not written to."""
    workspace, tars = tmp_path / "workspace", tmp_path / "others"
    tars.mkdir()
    shutil.copytree(registry, workspace)
    recipe = tmp_path / "score.yaml"
    score = {"datasets": [f"{tars}/*.tar", dataset.uri], "model": {"name": "squares", "version": 2}}
    recipe.write_text(yaml.safe_dump({"workspace": str(workspace), "score": {**score, "splits": ["train"]}}))
    for split, rows in (("train", 6), ("held_out", 7)):
        (shard,) = dataset.shards(split)
        tar = shutil.copy(dataset.tar_uri(shard), tars / f"{split}.tar")
        before = Path(tar).read_bytes()
        assert command(str(recipe))[1] == f"  {rows} rows by squares 2: embed, match"
        assert Path(tar).read_bytes() == before
    manifest = scored(workspace)
    assert (manifest["model"]["name"], manifest["model"]["version"]) == ("squares", 2)
    assert [(entry["name"], entry["rows"]) for entry in manifest["datasets"]] == [("others", 4), ("data", 3)]
    table = pq.read_table(Path(json.loads((workspace / "score/latest.json").read_text())["uri"]) / "scores")
    assert sorted(table["dataset"].to_pylist()) == ["data"] * 3 + ["others"] * 4


def test_datasets_of_one_name_are_told_apart_by_their_folders(
    command: Callable[..., list[str]], packages: dict[str, str], tmp_path: Path, here: None
) -> None:
    uris = [write_dataset(tmp_path / place / "data", squares(2, first=2)).uri for place in ("a", "b")]
    arguments = [part for uri in uris for part in ("--dataset", uri)]
    command(*arguments, "--model", packages["dual"], "--tasks", "embed", "--output", str(tmp_path / "workspace"))
    assert [entry["name"] for entry in scored(tmp_path / "workspace")["datasets"]] == ["a-data", "b-data"]
    results = list((tmp_path / "workspace" / "results").rglob("*.parquet"))
    assert len(results) == 2  # of a picture and its caption, for the shard that both have


@pytest.mark.slow
def test_a_shard_that_is_gone_is_one_line_and_costs_only_itself_when_it_is_back(
    packages: dict[str, str], tmp_path: Path
) -> None:
    """With a Ray of its own, whose logs are not the user's."""
    dataset = write_dataset(tmp_path / "data", squares(2, 2, 2))
    tar = Path(dataset.tar_uri(dataset.shards("train")[1]))
    whole = tar.read_bytes()
    tar.unlink()
    command = [sys.executable, "-m", "mmflow.cli.main", "score", "--dataset", dataset.uri, "--model", packages["dual"]]
    command += ["--output", str(tmp_path / "workspace")]
    failed = subprocess.run(command, capture_output=True, text=True)
    assert (failed.returncode, failed.stdout) == (1, "")
    *progress, error = failed.stderr.splitlines()
    assert error.startswith(f"error: a worker: MissingArtifactError: {tar}: no such file; fix the cause and rerun")
    assert all(line.startswith("  score ") for line in progress)
    tar.write_bytes(whole)
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[1] == f"  6 rows by {packages['dual']}: embed"


# --- what it refuses --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "code", "message"),
    [
        ({"--tasks": "embd"}, 2, "score.tasks.embd: unknown key; did you mean 'embed'?"),
        ({"--tasks": "zero_shot"}, 2, "score.tasks.zero_shot.prompts: missing; it is required"),
        (
            {"--tasks": "embed,caption"},
            2,
            "score.tasks.caption: the model at PACKAGE lacks a decoder with memory: image",
        ),
        ({"--model": "PACKAGE-2"}, 1, "PACKAGE-2: no mmflow.json, so no model package was committed here"),
        ({"--model": "DATA"}, 1, "DATA: no mmflow.json, so no model package was committed here"),
        ({"--model": "squares@champion"}, 1, "squares: no model is registered at sqlite:///WORKSPACE/mlflow.db; set "),
        ({"--model": "squares/3"}, 1, "squares: no model is registered at sqlite:///WORKSPACE/mlflow.db; set "),
        ({"--dataset": "DATA-2"}, 1, "DATA-2: no manifest.json, so nothing was committed here"),
        ({"--dataset": "PACKAGE"}, 1, "PACKAGE: no manifest.json, so nothing was committed here"),
        ({"--dataset": "DATA/shards/9*.tar"}, 2, "DATA/shards/9*.tar: no such file; correct its path"),
        ({"--output": ""}, 2, "score: --output missing; or give a recipe"),
        ({"--model": "", "--dataset": ""}, 2, "score: --dataset and --model missing; or give a recipe"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_no_trace(
    command: Callable[..., list[str]],
    dataset: Dataset,
    packages: dict[str, str],
    tmp_path: Path,
    changes: dict[str, str],
    code: int,
    message: str,
) -> None:
    words = {"DATA": dataset.uri, "PACKAGE": packages["dual"], "WORKSPACE": str(tmp_path / "workspace")}

    def spelt(text: str) -> str:
        for word, value in words.items():
            text = text.replace(word, value)
        return text

    options = {"--dataset": "DATA", "--model": "PACKAGE", "--output": "WORKSPACE"} | changes
    arguments = [spelt(part) for pair in options.items() if pair[1] for part in pair]
    found = refusal(command, *arguments)
    assert found[0] == code
    assert found[1].startswith(spelt(message))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "champion"}, "score.model.name: missing; which registered model is it?"),
        ({"model": {"name": "squares", "alias": "best"}}, "squares: no version has the best alias"),
        ({"model": {"name": "squares", "version": 3}}, "squares: no version 3; there are [1, 2]"),
        ({"model": {"name": "circles", "alias": "champion"}}, "circles: no version has the champion alias"),
        ({"model": {"name": "squares", "alias": "champion", "version": 1}}, "score.model: name one of alias, version"),
        ({"splits": ["test"]}, "DATA: no split 'test'; there are held_out, train"),
        ({"datasets": ["TARS", "DATA-2"]}, "DATA-2: no manifest.json"),
        ({"datasets": ["TARS"], "splits": ["test"]}, "score.splits: test: all tars of others are of split train"),
        (
            {"datasets": ["DATA", "DATA"]},
            "score.datasets: DATA, DATA: name each dataset, and each folder of tars, once",
        ),
        ({"datasets": None}, "score.datasets: missing; name the datasets"),
        ({"task": {}}, "score.task: unknown key; did you mean 'tasks'?"),
        ({"tasks": {"embed": {"width": 99}}}, "score.tasks.embed.width: 99, but the vectors of the model at "),
        ({"tasks": {"caption": {"candidates": 2}}}, "score.tasks.caption: candidates: 2 equal captions; set search to"),
    ],
)
def test_a_recipe_s_mistake_is_one_line_and_leaves_no_trace(
    command: Callable[..., list[str]],
    dataset: Dataset,
    registry: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
    message: str,
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking_uri(str(registry)))
    workspace, path = tmp_path / "workspace", tmp_path / "score.yaml"
    score = {"datasets": ["DATA"], "model": {"name": "squares", "alias": "champion"}, **changes}
    text = json.dumps({"workspace": str(workspace), "score": score})
    words = {"TARS": f"{dataset.uri}/shards/*.tar", "DATA": dataset.uri}
    for word, value in words.items():
        text, message = text.replace(word, value), message.replace(word, value)
    path.write_text(text)
    _, line = refusal(command, str(path))
    assert line.removeprefix(f"{path}: ").startswith(message)
    assert not workspace.exists()


def test_a_loop_s_recipe_is_refused_before_it_is_trained(
    command: Callable[..., list[str]], packages: dict[str, str], tmp_path: Path
) -> None:
    recipe = write_recipe(
        tmp_path / "tiny.yaml", tiny_fields(tmp_path / "workspace", write_shapes(tmp_path / "corpus"))
    )
    code, line = refusal(command, recipe, "score.tasks.caption={}")
    assert (code, line.partition(" lacks ")[0]) == (2, "score.tasks.caption: distill.model")
    assert refusal(command, recipe)[1].partition(": ")[2].startswith("stage shard is not committed for this recipe")
    found = refusal(command, recipe, "--model", packages["dual"])
    assert found == (2, f"--model: it is for scoring without a recipe; in {recipe} set it under score")
    assert not (tmp_path / "workspace").exists()
