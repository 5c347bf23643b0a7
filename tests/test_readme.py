"""Every command that README shows does what it says, here on a corpus of 54 shapes."""

from __future__ import annotations

import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from mmflow.cli.main import app
from mmflow.recipe import ScoreRecipe, load_recipe, validated
from mmflow.training.check import check_training
from tests.tiny import tiny_fields, write_recipe, write_shapes

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)
COMMANDS = [
    line.split("  #")[0].strip()
    for block in BLOCKS
    for line in block.splitlines()
    if line.startswith(("mmflow ", "make ", "python "))
]
ELSEWHERE = {
    "mmflow shard pipelines/recipes/openclipart.yaml": "tests/corpora/test_openclipart.py",  # it downloads 156 MB
    "mmflow pretrain recipe.yaml --submit http://head:8265": "tests/cluster/test_submit.py",
    "mmflow cluster check cluster.yaml": "tests/cluster/test_lint.py",
    "mmflow models import downloads/clip-vit-base-patch32 models/clip": "tests/cli/test_cli.py",
    "mmflow models export models/clip exported/clip": "tests/cli/test_cli.py",
    "mmflow models export models/clip exported/clip-onnx --format onnx": "tests/cli/test_cli.py",
    "mmflow score --dataset workspace/openclipart/shard/* --model workspace/drawings/pretrain/*/package "
    "--tasks caption --output workspace/drawings": "tests/inference/test_tasks.py",
    "mmflow score --dataset workspace/easy_vqa/shard/* --model workspace/easy_vqa/pretrain/*/package "
    "--tasks answer --output workspace/easy_vqa": "tests/inference/test_tasks.py",
    "mmflow schedule pipelines/nightly.yaml": "test_the_scheduler_starts_and_stops",
}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, ray_cluster: None) -> str:
    """A tiny recipe in the place of README's."""
    directory = tmp_path_factory.mktemp("readme")
    records = write_shapes(directory / "corpus")
    fields = tiny_fields(directory / "workspace", records)
    fields["pretrain"]["training"]["epochs"] = 1  # type: ignore[index]
    fields["distill"]["training"]["epochs"] = 1  # type: ignore[index]
    path = write_recipe(directory / "tiny.yaml", fields)
    app(["run", path], standalone_mode=False)
    # A second version, so that there is one to roll back from.
    app(["run", path, "distill.training.epochs=2", "promote.min_gain=-1"], standalone_mode=False)
    return path


def test_readme_shows_commands_of_every_kind() -> None:
    shown = " ".join(COMMANDS)
    for each in (
        "make quickstart",
        "make test",
        "mmflow run",
        "mmflow score",
        "mmflow search",
        "mmflow models rollback",
        "mmflow verify",
        "mmflow describe",
        "mmflow adopt",
    ):
        assert each in shown


@pytest.mark.parametrize("command", [each for each in COMMANDS if each.startswith("mmflow") and each not in ELSEWHERE])
def test_an_mmflow_command_of_readme_succeeds(command: str, recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    workspace = load_recipe(recipe).workspace
    words = shlex.split(re.sub(r"pipelines/(quickstart|recipes/\w+)\.yaml", recipe, command))[1:]
    words = [word.replace("distill.training.epochs=20", "distill.training.epochs=1") for word in words]
    datasets = [str(path) for path in Path(workspace, "shard").iterdir()]
    words = [re.sub(r"workspace/(quickstart|openclipart)/shard/\*", datasets[0], word) for word in words]
    words = [re.sub(r"^workspace/quickstart(?=/|$)", workspace, word) for word in words]
    words = [word.replace("openmoji-dual-encoder@", "tiny-dual-encoder@") for word in words]
    if words[0] == "adopt":
        words[1:3] = [f"{workspace}/theirs", f"{datasets[0]}/shards/{{00000..00001}}.tar"]
    assert not app(words, standalone_mode=False)
    printed = capsys.readouterr().out.split()
    assert printed
    assert all(Path(word.rstrip(":")).exists() for word in printed if word.startswith(workspace))


@pytest.mark.parametrize("command", [each for each in COMMANDS if each.startswith("python")])
def test_a_script_of_readme_succeeds(command: str, recipe: str) -> None:
    words = shlex.split(command.replace("pipelines/quickstart.yaml", recipe))
    done = subprocess.run([sys.executable, *words[1:]], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "already committed" in done.stdout


@pytest.mark.parametrize("command", [each for each in COMMANDS if each.startswith("make")])
def test_a_make_target_of_readme_exists(command: str) -> None:
    planned = subprocess.run([*command.split(), "--dry-run"], cwd=ROOT, capture_output=True, text=True)
    assert planned.returncode == 0, planned.stderr


def test_the_recipes_in_readme_and_beside_it_are_valid(tmp_path: Path) -> None:
    assert load_recipe(str(ROOT / "pipelines/nightly.yaml")).schedule is not None
    (fragment,) = [block for block in BLOCKS if block.startswith("shard:")]
    fields = yaml.safe_load((ROOT / "pipelines/quickstart.yaml").read_text()) | yaml.safe_load(fragment)
    del fields["corpus"]
    assert load_recipe(write_recipe(tmp_path / "own.yaml", fields)).shard.sources[0].uri.startswith("s3://")
    for path in (ROOT / "pipelines").rglob("*.yaml"):
        assert load_recipe(str(path)).name == path.stem
    (scoring,) = [block for block in BLOCKS if block.startswith("workspace:")]
    assert validated(ScoreRecipe, yaml.safe_load(scoring)).score.tasks.neighbours is not None


@pytest.mark.parametrize("fragment", [block for block in BLOCKS if block.startswith("pretrain:")])
def test_a_training_section_in_readme_is_one(fragment: str, tmp_path: Path) -> None:
    section = yaml.safe_load(fragment)["pretrain"]
    fields = yaml.safe_load((ROOT / "pipelines/quickstart.yaml").read_text())
    if "start" in section:  # with the quickstart's own model in the package's place, which nothing has trained
        del section["start"], section["lora"]
        section["model"] = fields["pretrain"]["model"] | section["model"]
        section["tasks"] = [task | {"dataset": None} for task in section["tasks"]]
        fields["pretrain"] = section
    fields["pretrain"] |= section
    recipe = load_recipe(write_recipe(tmp_path / "own.yaml", fields))
    check_training("pretrain", recipe.pretrain)


def test_the_scheduler_starts_and_stops(recipe: str, tmp_path: Path) -> None:
    fields = yaml.safe_load(Path(recipe).read_text()) | {"schedule": {"cron": "0 2 * * *"}}
    path = write_recipe(tmp_path / "nightly.yaml", fields)
    log = tmp_path / "log"
    with log.open("wb") as stream:
        scheduler = subprocess.Popen(
            [sys.executable, "-m", "mmflow.cli.main", "schedule", path],
            stdout=stream,
            stderr=stream,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + 120
        while "SchedulerDaemon" not in log.read_text():
            assert scheduler.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
    finally:
        scheduler.send_signal(signal.SIGINT)
        scheduler.wait(timeout=60)
    assert scheduler.returncode == 130
