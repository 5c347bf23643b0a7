"""The command line as its user meets it: exit codes, one line an error, an untouched workspace."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mmflow.cli.main import app
from mmflow.core.errors import MisuseError
from mmflow.recipe import load_recipe
from mmflow.stages.loop import STAGES
from tests.dataset.handmade import handmade, write_dataset
from tests.tiny import tiny_fields, write_recipe, write_shapes

HEAVY = ("ray", "torch", "mlflow", "dagster", "transformers", "deepspeed", "pandas")


def mmflow(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    import os

    command = [sys.executable, "-m", "mmflow.cli.main", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=os.environ | environment)


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    records = write_shapes(tmp_path / "corpus")
    return write_recipe(tmp_path / "tiny.yaml", tiny_fields(tmp_path / "workspace", records))


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("pretrain.training.epoch=3", "did you mean 'epochs'?"),
        ("pretrian={}", "did you mean 'pretrain'?"),
        ("pretrain.training.epochs=many", "pretrain.training.epochs"),
        ("pretrain.training.zero_stage=4", "pretrain.training.zero_stage"),
        ("pretrain.model.image.type=resnot", "did you mean 'resnet'?"),
        ("pretrain.model.text.options.hiden_size=8", "did you mean 'hidden_size'?"),
        ("pretrain.training.epochs", "an override is key=value"),
        ("pretrain.model.text={checkpoint: there}", "vocabulary_size: 200, and text.checkpoint brings its own"),
        ("pretrain.model.bias=-10", "pretrain.model.bias: no objective trains it; name sigmoid"),
        ("evaluate.captions={}", "evaluate.captions: pretrain.model and distill.model cannot be examined in it"),
    ],
)
def test_a_wrong_setting_is_one_line_with_the_key_and_the_workspace_is_untouched(
    recipe: str, tmp_path: Path, override: str, told: str
) -> None:
    done = mmflow("run", recipe, override)
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert told in done.stderr
    assert not (tmp_path / "workspace").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (("run", "nowhere.yaml"), 2, "nowhere.yaml: cannot be read"),
        (("verify", "nowhere"), 1, "no manifest.json"),
        (("verify", "nowhere", "--decode", "some"), 2, "--decode some: `all` or a number"),
        (("describe", "nowhere"), 1, "nothing was committed"),
        (("adopt", "nowhere", "nowhere.tar"), 2, "nowhere.tar"),
        (("adopt", "nowhere"), 2, "TARS"),
        (("frobnicate",), 2, "No such command"),
        (("cluster", "check", "nowhere.yaml"), 2, "nowhere.yaml"),
    ],
)
def test_what_is_missing_is_named(arguments: tuple[str, ...], code: int, told: str) -> None:
    done = mmflow(*arguments)
    assert done.returncode == code
    assert told in done.stderr + done.stdout
    assert "Traceback" not in done.stderr


def test_missing_records_are_named_before_anything_is_made(recipe: str, tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / "corpus")
    done = mmflow("run", recipe)
    assert done.returncode in (1, 2)
    assert "records.jsonl" in done.stderr.strip().splitlines()[-1]
    assert not list(tmp_path.glob("workspace/*/*/manifest.json"))


def test_a_stage_whose_input_is_not_committed_says_what_to_run(recipe: str, tmp_path: Path) -> None:
    done = mmflow("pretrain", recipe)
    assert done.returncode == 1
    assert "`mmflow shard" in done.stderr
    assert not (tmp_path / "workspace").exists()


def test_an_unreachable_cluster_is_named(recipe: str, tmp_path: Path) -> None:
    done = mmflow("shard", recipe, "--submit", "http://127.0.0.1:9")
    assert done.returncode in (1, 2)
    assert "127.0.0.1:9" in done.stderr.strip().splitlines()[-1]
    assert not (tmp_path / "workspace").exists()


def test_debug_shows_the_traceback_that_is_hidden_otherwise() -> None:
    assert "Traceback" in mmflow("--debug", "run", "nowhere.yaml").stderr
    assert "Traceback" not in mmflow("run", "nowhere.yaml").stderr


@pytest.mark.parametrize("stage", [name for name in STAGES if name != "corpus"])
def test_every_stage_has_a_help_with_an_example_that_parses(stage: str) -> None:
    told = mmflow(stage, "--help")
    assert told.returncode == 0
    example = next(line for line in told.stdout.splitlines() if line.strip().startswith("Example:"))
    recipe = example.split()[-1]
    assert example.split()[1:3] == ["mmflow", stage]
    assert load_recipe(str(Path(__file__).parents[2] / recipe)).name == "quickstart"


def test_tars_of_others_are_adopted_verified_and_described(tmp_path: Path) -> None:
    made = write_dataset(tmp_path / "made", [("train", [handmade(number) for number in range(4)])])
    theirs, dataset = made.tar_uri(made.shards("train")[0]), str(tmp_path / "dataset")
    cut = tmp_path / "cut.tar"
    cut.write_bytes(Path(theirs).read_bytes()[:-1024])
    done = mmflow("adopt", dataset, theirs, str(cut))
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith(f"error: {cut}: byte ")
    assert "Traceback" not in done.stderr
    assert not Path(dataset, "manifest.json").exists()
    options = ("--skip-damaged", "--split", "dev", "--license", "CC0-1.0")
    for said in ("built", "already committed"):
        done = mmflow("adopt", dataset, theirs, str(cut), *options)
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines() == [
            f"adopt: {said}: {dataset}",
            "  4 samples in 1 shards",
            "  1 records quarantined: source_damaged",
        ]
    assert mmflow("verify", dataset, "--decode", "all").stdout == f"{dataset}: whole\n"
    assert mmflow("describe", dataset).stdout == f"{dataset}/describe.html\n"
    Path(dataset, "shards/00000.tar").write_bytes(b"")
    done = mmflow("verify", dataset)
    assert done.returncode == 1
    assert "00000.tar: 0 bytes" in done.stdout


@pytest.mark.parametrize("command", ["verify", "adopt", "describe"])
def test_a_command_on_datasets_has_a_help_with_an_example_that_parses(command: str) -> None:
    told = mmflow(command, "--help")
    assert told.returncode == 0
    example = " ".join(told.stdout.partition("Example: ")[2].split())
    words = shlex.split(example)
    assert words[:2] == ["mmflow", command]
    done = mmflow(*words[1:])
    assert done.returncode in (1, 2)  # what it names is not here
    assert "Usage" not in done.stderr


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny CLIP as `save_pretrained` writes it, with its tokenizer and image processor."""
    from transformers import CLIPConfig, CLIPModel

    from mmflow.loading.tokens import train_tokenizer

    directory = tmp_path_factory.mktemp("checkpoint") / "clip"
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    words = {**sizes, "max_position_embeddings": 12, "bos_token_id": 2, "eos_token_id": 3}
    pictures = {**sizes, "image_size": 16, "patch_size": 8}
    tokenizer = train_tokenizer(["red apple", "green pear", "apple tree"], 64)
    words["vocab_size"] = tokenizer.get_vocab_size()
    CLIPModel(CLIPConfig(vision_config=pictures, text_config=words, projection_dim=10)).save_pretrained(directory)
    tokenizer.save(str(directory / "tokenizer.json"))
    processor = {"size": {"shortest_edge": 16}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (directory / "preprocessor_config.json").write_text(json.dumps(processor))
    return directory


def models(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What `mmflow models …` prints, run in this process, which has torch already."""
    app(["models", *arguments], standalone_mode=False)
    return capsys.readouterr().out


def test_a_clip_becomes_a_package_and_a_package_a_clip(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    package, exported = str(tmp_path / "package"), str(tmp_path / "exported")
    said = models(capsys, "import", str(checkpoint), package)
    card = json.loads(Path(package, "mmflow.json").read_text())
    assert said == f"{package}: clip, {card['parameters']:,} parameters, digest {card['digest']}\n"
    with pytest.raises(MisuseError, match="package: a model package is there already; name another directory"):
        models(capsys, "import", str(checkpoint), package)
    said, _, difference = models(capsys, "export", package, exported).removesuffix(" at most\n").rpartition(" ")
    assert said == f"{exported}: clip, logits differ by"
    assert 0 <= float(difference) <= 1e-4
    assert json.loads(Path(exported, "config.json").read_text())["model_type"] == "clip"
    with pytest.raises(MisuseError, match="exported: exists; name a new directory"):
        models(capsys, "export", package, exported)


def test_two_towers_are_exported_as_graphs(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    package, exported = str(tmp_path / "package"), str(tmp_path / "exported")
    models(capsys, "import", str(checkpoint), package)
    lines = models(capsys, "export", package, exported, "--format", "onnx").splitlines()
    found = [line.removesuffix(" at most").partition(": embeddings differ by ") for line in lines]
    assert [name for name, _, _ in found] == [f"{exported}/image.onnx", f"{exported}/text.onnx"]
    assert all(0 <= float(difference) <= 1e-4 for _, _, difference in found)


@pytest.mark.parametrize("command", ["import", "export"])
def test_a_command_on_packages_has_a_help_with_an_example_that_parses(command: str) -> None:
    told = mmflow("models", command, "--help")
    assert told.returncode == 0
    words = shlex.split(" ".join(told.stdout.partition("Example: ")[2].split()))
    assert words[:3] == ["mmflow", "models", command]
    done = mmflow(*words[1:])
    assert done.returncode in (1, 2)  # what it names is not here
    assert "Usage" not in done.stderr


def test_help_and_import_load_nothing_heavy() -> None:
    script = (
        "import sys, json, mmflow, mmflow.cli.main, mmflow.recipe\n"
        "try: mmflow.cli.main.main(['--help'])\n"
        "except SystemExit: pass\n"
        "print(json.dumps(sorted(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    loaded = {name.split(".")[0] for name in json.loads(done.stdout.splitlines()[-1])}
    assert loaded.isdisjoint(HEAVY)
