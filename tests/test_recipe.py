"""A mistake in a recipe is answered in one line that names the file, the key, and what to write instead."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from mmflow.core.errors import RecipeError
from mmflow.recipe import dump_recipe, load_recipe, parse

QUICKSTART = Path(__file__).parents[1] / "pipelines" / "quickstart.yaml"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A copy of the quickstart's recipe, to alter."""
    return Path(shutil.copy(QUICKSTART, tmp_path / "recipe.yaml"))


def refusal(path: Path | str, *overrides: str) -> str:
    """The message of the refusal, which is one line."""
    with pytest.raises(RecipeError) as caught:
        load_recipe(str(path), overrides)
    message = str(caught.value)
    assert message
    assert "\n" not in message
    assert caught.value.exit_code == 2
    return message


SOURCES = "shard.sources=[{uri: a.jsonl, knd: jsonl}]"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["pretrian=1"], "pretrian: unknown key; did you mean 'pretrain'?"),
        (["pretrain.training.epoch=3"], "pretrain.training.epoch: unknown key; did you mean 'epochs'?"),
        (["pretrain.training.learning rate=1"], "pretrain.training.learning rate: unknown key; the keys here are"),
        (["distill.losses.soft_label=1"], "did you mean 'soft_labels'?"),
        (["schedule.zzz=1"], "schedule.zzz: unknown key; the keys here are cron, timezone"),
        (["corpus=null", SOURCES], "shard.sources.0.knd: unknown key; did you mean 'kind'?"),
        (["corpus={name: openmoji, sed: 1}"], "corpus.sed: unknown key; did you mean 'seed'?"),
        (["seed=many"], "seed: input should be a valid integer, unable to parse string as an integer, not 'many'"),
        (["pretrain.training.epochs=0"], "pretrain.training.epochs: input should be greater than or equal to 1, not 0"),
        (["pretrain.training.zero_stage=4"], "pretrain.training.zero_stage: input should be 0, 1, 2 or 3, not 4"),
        (["pretrain.training.epochs="], "pretrain.training.epochs: input should be a valid integer, not None"),
        (["promote.candidate=pupil"], "promote.candidate: input should be 'student' or 'teacher', not 'pupil'"),
        (['name="two words"'], "name: string should match pattern"),
        (['name="two\\nlines"'], "'two\\nlines'"),
        (["pretrain=5"], "pretrain: "),
        (["evaluate.splits=[]"], "evaluate.splits: list should have at least 1 item"),
        (["pretrain.model.text.options.vocab_size=9"], "pretrain.model: vocab_size follows from vocabulary_size"),
        (["evaluate=null"], "evaluate: "),
        (["schedule.timezone=UTC"], "schedule.cron: missing; it is required"),
        (["schedule.crom=0 3 * * *"], "schedule.crom: unknown key; did you mean 'cron'? (and 1 more)"),
        (["sed=1", "nam=2", "workspac=3"], "(and 2 more)"),
        (["distill=null"], "promote.candidate is student, and there is no distill section; set it to teacher"),
        (["corpus=null"], "name either corpus or shard.sources"),
        (["shard.sources=[{uri: a.jsonl}]"], "name either corpus or shard.sources"),
        (["promote.floors={elsewhere/text_to_image/R@1: 0}"], "is of no split that evaluate.splits names"),
        (["pretrain.start={model: nothing}"], "pretrain.start: give either package, a model package's URI, or model"),
        (["pretrain.start={package: p}", "pretrain.training.epoch=3"], "pretrain.training.epoch: unknown key; did you"),
    ],
)
def test_a_mistake_is_named_with_its_key(path: Path, overrides: list[str], message: str) -> None:
    refused = refusal(path, *overrides)
    assert refused.startswith(f"{path}: ")
    assert message in refused


@pytest.mark.parametrize(
    ("override", "message"),
    [
        *(
            (text, f"{text!r}: an override is key=value, such as ")
            for text in ("epochs", "=3", "", "pretrain.training")
        ),
        ("seed.more=1", "seed.more: seed is 7, it has no keys of its own"),
        ("seed=[1", "seed:1: not YAML: "),
        ("corpus.2.seed=1", "corpus.2.seed: 2 is none of the 2 items there, which count from 0"),
        ("corpus.seed=1", "corpus.seed: seed is none of the 2 items there, which count from 0"),
    ],
)
def test_an_override_that_cannot_be_set_is_explained(path: Path, override: str, message: str) -> None:
    corpora = ["corpus=[{name: openmoji}, {name: openclipart}]"] if override.startswith("corpus") else []
    assert refusal(path, *corpora, override).startswith(message)


def test_missing_section_is_named(path: Path) -> None:
    fields = yaml.safe_load(path.read_text())
    del fields["promote"]
    path.write_text(yaml.safe_dump(fields))
    assert f"{path}: promote: missing; it is required" in refusal(path)


def test_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    absent = tmp_path / "absent.yaml"
    assert refusal(absent) == f"{absent}: cannot be read (No such file or directory); give a recipe's path"
    assert "cannot be read" in refusal(tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"name: caf\xe9\n")
    assert "binary.yaml: not UTF-8 text (invalid continuation byte at byte 9)" in refusal(tmp_path / "binary.yaml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: a\nseed: [1, 2\n", ":3: not YAML: "),
        ("name: a\n\tseed: 1\n", ":2: not YAML: "),
        ("a: b\nb: c: d\n", ":2: not YAML: "),
        ("a: *nowhere\n", ":1: not YAML: "),
        ("a: 1\nb: {c: 1, c: 2}\n", ":2: not YAML: 'c' is given twice"),
        ("a: 1\nb: 2\na: 3\n", ":3: not YAML: 'a' is given twice"),
        ("name: !!python/object/apply:os.mkdir [made]\n", ":1: not YAML: could not determine a constructor"),
        *((text, ": a recipe is a mapping of sections") for text in ("", "just words", "- a\n- b\n", "3")),
    ],
)
def test_a_file_that_is_no_recipe_is_named_with_its_line(
    tmp_path: Path, text: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    assert refusal(path).startswith(f"{path}{message}")
    assert not (tmp_path / "made").exists(), "YAML with tags of Python runs nothing"


def test_merge_key_shares_a_section_and_may_be_overridden(path: Path) -> None:
    path.write_text(path.read_text().replace("    epochs: 22\n", "    <<: &shared {epochs: 22, zero_stage: 1}\n"))
    # `zero_stage: 2` stands beside the merge key and wins over it
    training = load_recipe(str(path)).pretrain.training
    assert (training.epochs, training.zero_stage) == (22, 2)


def test_override_values_are_yaml(path: Path) -> None:
    recipe = load_recipe(
        str(path),
        [
            "pretrain.training.optimizer.learning_rate=1e-3",
            "pretrain.model.text.options.layer_norm_eps=1e-6",
            "pretrain.loader.language_weights={en: 1, fr: .5}",
            "evaluate.languages.1=fr",
            "schedule.cron=0 3 * * *",
            "distill.model.image.options.depths=[1, 2]",
            "workspace=s3://bucket/a=b",
            "corpus=[{name: openmoji}, {name: openclipart}]",
            "corpus.1.package_directory=/packages",
        ],
    )
    fields: dict[str, Any] = recipe.model_dump()
    assert fields["pretrain"]["training"]["optimizer"]["learning_rate"] == 0.001
    # A number, though nothing says its type.
    assert fields["pretrain"]["model"]["text"]["options"]["layer_norm_eps"] == 1e-6
    assert fields["pretrain"]["loader"]["language_weights"] == {"en": 1, "fr": 0.5}
    assert fields["evaluate"]["languages"] == ["en", "fr"]
    assert fields["schedule"]["cron"] == "0 3 * * *"
    assert fields["distill"]["model"]["image"]["options"]["depths"] == [1, 2]
    assert fields["workspace"] == "s3://bucket/a=b"
    assert fields["corpus"][1]["package_directory"] == "/packages"
    assert recipe.pretrain.training.epochs == load_recipe(str(path)).pretrain.training.epochs


@given(
    number=st.floats(allow_nan=False, allow_infinity=False), form=st.sampled_from(["{!r}", "{:e}", "{:.3E}", "{:g}"])
)
def test_every_way_to_write_a_number_is_a_number(number: float, form: str) -> None:
    text = form.format(number)
    assert parse(text, "here") == float(text)
    assert isinstance(parse(text, "here"), int | float)


@pytest.mark.parametrize("text", ["1e", "e3", "1e3x", "v1e3", "1.2.3", "1e-"])
def test_text_that_looks_like_a_number_stays_text(text: str) -> None:
    assert parse(text, "here") == text


@pytest.mark.parametrize(
    "start", [[], ["pretrain.start={model: clip, version: 3}", "pretrain.model={heads: [classes]}"]]
)
def test_dumped_recipe_loads_to_the_same(path: Path, tmp_path: Path, start: list[str]) -> None:
    recipe = load_recipe(str(path), ["pretrain.training.optimizer.final_learning_rate=1e-7", "name=other", *start])
    (tmp_path / "dumped.yaml").write_text(dump_recipe(recipe))
    assert load_recipe(str(tmp_path / "dumped.yaml")) == recipe
    assert "gradient_clipping" in dump_recipe(recipe), "every default is spelled out"


def test_local_workspace_is_made_absolute(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_recipe(str(path)).workspace == str(tmp_path / "workspace/quickstart")
    assert load_recipe(str(path), ["workspace=~/w"]).workspace == str(Path.home() / "w")
    assert load_recipe(str(path), [f"workspace=file://{tmp_path}/w"]).workspace == f"{tmp_path}/w"
    assert load_recipe(str(path), ["workspace=gs://bucket/w"]).workspace == "gs://bucket/w"


def test_recipe_cannot_be_changed_after_loading(path: Path) -> None:
    with pytest.raises(ValueError, match="frozen"):
        load_recipe(str(path)).seed = 3  # type: ignore[misc]
