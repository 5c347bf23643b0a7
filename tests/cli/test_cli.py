"""The command line as its user meets it: exit codes, one line an error, an untouched workspace."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer

from mmflow.cli.main import app
from mmflow.core.errors import MisuseError
from mmflow.stages.loop import STAGES
from tests.dataset.handmade import handmade, write_dataset
from tests.tiny import tiny_fields, write_recipe, write_shapes

HEAVY = ("ray", "torch", "mlflow", "dagster", "transformers", "deepspeed", "pandas")


def mmflow(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mmflow.cli.main", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    records = write_shapes(tmp_path / "corpus")
    return write_recipe(tmp_path / "tiny.yaml", tiny_fields(tmp_path / "workspace", records))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("pretrain.training.epoch=3", "did you mean 'epochs'?"),
        ("pretrain.model.image.type=resnot", "did you mean 'resnet'?"),
        ("pretrain.model.text.options.hiden_size=8", "did you mean 'hidden_size'?"),
        ("pretrain.model.bias=-10", "pretrain.model.bias: no objective trains it; name sigmoid"),
        ("evaluate.captions={}", "evaluate.captions: pretrain.model and distill.model cannot be examined in it"),
        ("shard.sources.0.uri=nowhere.jsonl", "shard.sources.0.uri: "),
    ],
)
def test_a_wrong_setting_is_one_line_with_the_key_and_the_workspace_is_untouched(
    recipe: str, tmp_path: Path, override: str, message: str
) -> None:
    done = mmflow("run", recipe, override)
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert message in done.stderr
    assert not (tmp_path / "workspace").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("run", "nowhere.yaml"), 2, "nowhere.yaml: cannot be read"),
        (("verify", "nowhere"), 1, "no manifest.json"),
        (("verify", "nowhere", "--decode", "some"), 2, "--decode some: give `all` or a number"),
        (("describe", "nowhere"), 1, "nothing was committed"),
        (("adopt", "nowhere", "nowhere.tar"), 2, "nowhere.tar"),
        (("adopt", "nowhere"), 2, "TARS"),
        (("frobnicate",), 2, "No such command"),
        (("run", "--frob", "nowhere.yaml"), 2, "No such option"),
        (("cluster", "check", "nowhere.yaml"), 2, "nowhere.yaml"),
    ],
)
def test_what_is_missing_is_named(arguments: tuple[str, ...], code: int, message: str) -> None:
    done = mmflow(*arguments)
    assert done.returncode == code
    assert message in done.stderr + done.stdout
    assert "Traceback" not in done.stderr
    if arguments[0] == "run":
        assert "Traceback" in mmflow("--debug", *arguments).stderr


def test_a_stage_that_cannot_begin_says_what_to_do(recipe: str, tmp_path: Path) -> None:
    done = mmflow("pretrain", recipe)
    assert done.returncode == 1
    assert "`mmflow shard" in done.stderr
    done = mmflow("shard", recipe, "--submit", "http://127.0.0.1:9")
    assert done.returncode == 1
    assert "127.0.0.1:9" in done.stderr.strip().splitlines()[-1]
    assert not (tmp_path / "workspace").exists()


COMMANDS = [
    *((stage,) for stage in STAGES),
    *((command,) for command in ("run", "schedule", "search", "verify", "adopt", "describe")),
    *(("models", command) for command in ("list", "show", "rollback", "import", "export")),
    *(("cluster", "check"), ("selfcheck", "gradients")),
]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_has_a_help_with_an_example_that_parses(
    command: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    app([*command, "--help"], standalone_mode=False)
    example = " ".join(capsys.readouterr().out.partition("Example: ")[2].split())
    words = shlex.split(example)
    assert tuple(words[: 1 + len(command)]) == ("mmflow", *command)
    parsed: Any = typer.main.get_command(app)
    for name in command:
        parsed = parsed.commands[name]
    parsed.make_context("mmflow", words[1 + len(command) :])


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
    for outcome in ("built", "already committed"):
        done = mmflow("adopt", dataset, theirs, str(cut), *options)
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines() == [
            f"adopt: {outcome}: {dataset}",
            "  4 samples in 1 shards",
            "  1 records quarantined: source_damaged",
        ]
    assert mmflow("verify", dataset, "--decode", "all").stdout == f"{dataset}: whole\n"
    assert mmflow("describe", dataset).stdout == f"{dataset}/describe.html\n"
    Path(dataset, "shards/00000.tar").write_bytes(b"")
    done = mmflow("verify", dataset)
    assert done.returncode == 1
    assert "00000.tar: 0 bytes" in done.stdout


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
    printed = models(capsys, "import", str(checkpoint), package)
    card = json.loads(Path(package, "mmflow.json").read_text())
    assert printed == f"{package}: clip, {card['parameters']:,} parameters, digest {card['digest']}\n"
    with pytest.raises(MisuseError, match="name another directory"):
        models(capsys, "import", str(checkpoint), package)
    printed = models(capsys, "export", package, exported).removesuffix(" at most\n")
    printed, _, difference = printed.rpartition(" ")
    assert printed == f"{exported}: clip, logits differ by"
    assert 0 <= float(difference) <= 1e-4
    assert json.loads(Path(exported, "config.json").read_text())["model_type"] == "clip"
    with pytest.raises(MisuseError, match="name a new directory"):
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
