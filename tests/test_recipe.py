"""A recipe's mistakes are answered in one line that names the file, the key, and what to write instead."""

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


def edit(path: Path, **changes: Any) -> None:
    fields = yaml.safe_load(path.read_text()) | changes
    path.write_text(yaml.safe_dump(fields))


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("pretrian=1", "pretrian: unknown key; did you mean 'pretrain'?"),
        ("pretrain.training.epoch=3", "pretrain.training.epoch: unknown key; did you mean 'epochs'?"),
        (
            "distill.training.optimizer.learning_rat=3",
            "distill.training.optimizer.learning_rat: unknown key; did you mean 'learning_rate'?",
        ),
        ("distill.losses.soft_label=1", "did you mean 'soft_labels'?"),
        ("schedule.zzz=1", "schedule.zzz: unknown key; the keys here are cron, timezone"),
    ],
)
def test_unknown_key_is_answered_with_the_nearest(path: Path, override: str, said: str) -> None:
    message = refusal(path, override)
    assert said in message
    assert message.startswith(f"{path}: ")


def test_unknown_key_within_a_list_of_sections_is_answered_with_the_nearest(path: Path) -> None:
    edit(path, corpus=None, shard={"sources": [{"uri": "a.jsonl", "knd": "jsonl"}]})
    assert "shard.sources.0.knd: unknown key; did you mean 'kind'?" in refusal(path)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("seed=many", "seed: input should be a valid integer, unable to parse string as an integer, not 'many'"),
        ("pretrain.training.epochs=0", "pretrain.training.epochs: input should be greater than or equal to 1, not 0"),
        ("pretrain.training.zero_stage=4", "pretrain.training.zero_stage: input should be 0, 1, 2 or 3, not 4"),
        ("pretrain.training.epochs=", "pretrain.training.epochs: input should be a valid integer, not None"),
        ("promote.candidate=pupil", "promote.candidate: input should be 'student' or 'teacher', not 'pupil'"),
        ('name="two words"', "name: string should match pattern"),
        ('name="two\\nlines"', "'two\\nlines'"),
        ("pretrain=5", "pretrain: "),
        ("evaluate.splits=[]", "evaluate.splits: list should have at least 1 item"),
        ("pretrain.model.text.options.vocab_size=9", "pretrain.model: vocab_size follows from vocabulary_size"),
    ],
)
def test_wrong_value_is_named_with_its_key(path: Path, override: str, said: str) -> None:
    assert said in refusal(path, override)


def test_missing_section_and_missing_key_are_named(path: Path) -> None:
    assert "evaluate: " in refusal(path, "evaluate=null")
    assert "schedule.cron: missing; it is required" in refusal(path, "schedule.timezone=UTC")
    fields = yaml.safe_load(path.read_text())
    del fields["promote"]
    path.write_text(yaml.safe_dump(fields))
    assert f"{path}: promote: missing; it is required" in refusal(path)


def test_misspelt_required_key_is_told_as_misspelt_not_as_missing(path: Path) -> None:
    message = refusal(path, "schedule.crom=0 3 * * *")
    assert "schedule.crom: unknown key; did you mean 'cron'? (and 1 more)" in message


def test_further_mistakes_are_counted(path: Path) -> None:
    assert refusal(path, "sed=1", "nam=2", "workspac=3").endswith("(and 2 more)")


def test_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    absent = tmp_path / "absent.yaml"
    assert refusal(absent) == f"{absent}: cannot be read (No such file or directory); give a recipe's path"
    assert "cannot be read" in refusal(tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"name: caf\xe9\n")
    assert "binary.yaml: not UTF-8 text (invalid continuation byte at byte 9)" in refusal(tmp_path / "binary.yaml")


@pytest.mark.parametrize(
    ("text", "line"),
    [("name: a\nseed: [1, 2\n", 3), ("name: a\n\tseed: 1\n", 2), ("a: b\nb: c: d\n", 2), ("a: *nowhere\n", 1)],
)
def test_what_is_not_yaml_is_named_with_its_line(tmp_path: Path, text: str, line: int) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    assert refusal(path).startswith(f"{path}:{line}: not YAML: ")


@pytest.mark.parametrize("text", ["", "just words", "- a\n- b\n", "3"])
def test_yaml_that_is_no_mapping_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    assert "a recipe is a mapping of sections" in refusal(path)


def test_yaml_with_tags_of_python_runs_nothing(path: Path, tmp_path: Path) -> None:
    path.write_text(f"name: !!python/object/apply:os.mkdir [{tmp_path}/made]\n")
    assert "not YAML" in refusal(path)
    assert not (tmp_path / "made").exists()


def test_key_given_twice_is_named_with_the_line_of_the_second(path: Path) -> None:
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines, "seed: 8"]))
    assert refusal(path) == f"{path}:{len(lines) + 1}: not YAML: 'seed' is given twice"
    path.write_text("\n".join(lines).replace("quality: 92", "quality: 92, side: 32"))
    assert "'side' is given twice" in refusal(path)


def test_merge_key_shares_a_section_and_may_be_overridden(path: Path) -> None:
    path.write_text(path.read_text().replace("    epochs: 22\n", "    <<: &shared {epochs: 22, zero_stage: 1}\n"))
    # `zero_stage: 2` stands beside the merge key and wins over it
    recipe = load_recipe(str(path))
    assert (recipe.pretrain.training.epochs, recipe.pretrain.training.zero_stage) == (22, 2)


@pytest.mark.parametrize("override", ["epochs", "=3", "", "pretrain.training.epochs"])
def test_override_without_key_or_value_is_explained(path: Path, override: str) -> None:
    assert refusal(path, override) == f"{override!r}: an override is key=value, such as pretrain.training.epochs=3"


def test_override_below_a_value_and_of_broken_yaml_is_explained(path: Path) -> None:
    assert refusal(path, "seed.more=1") == "seed.more: seed is 7, it has no keys of its own"
    assert refusal(path, "seed=[1").startswith("seed:1: not YAML: ")


def test_an_item_of_a_list_is_overridden_by_its_number(path: Path) -> None:
    corpora = "corpus=[{name: openmoji}, {name: openclipart}]"
    recipe = load_recipe(str(path), [corpora, "corpus.1.package_directory=/packages", "evaluate.languages.1=fr"])
    assert isinstance(recipe.corpus, list)
    assert recipe.corpus[1].package_directory == "/packages"  # type: ignore[union-attr]
    assert recipe.evaluate.languages == ["en", "fr"]
    assert refusal(path, corpora, "corpus.2.seed=1") == (
        "corpus.2.seed: 2 is none of the 2 items there, which count from 0"
    )
    assert refusal(path, corpora, "corpus.seed=1") == (
        "corpus.seed: seed is none of the 2 items there, which count from 0"
    )


def test_override_values_are_yaml(path: Path) -> None:
    recipe = load_recipe(
        str(path),
        [
            "pretrain.training.optimizer.learning_rate=1e-3",
            "pretrain.model.text.options.layer_norm_eps=1e-6",
            "pretrain.loader.language_weights={en: 1, fr: .5}",
            "evaluate.splits=[unseen_concepts, unseen_variants]",
            "schedule.cron=0 3 * * *",
            "distill.model.image.options.depths=[1, 2]",
            "workspace=s3://bucket/a=b",
        ],
    )
    assert recipe.pretrain.training.optimizer.learning_rate == 0.001
    assert recipe.pretrain.model.text.options["layer_norm_eps"] == 1e-6  # a number, though nothing says its type
    assert recipe.pretrain.loader.language_weights == {"en": 1, "fr": 0.5}
    assert recipe.evaluate.splits == ["unseen_concepts", "unseen_variants"]
    assert recipe.schedule is not None
    assert recipe.schedule.cron == "0 3 * * *"
    assert recipe.distill is not None
    assert recipe.distill.model.image.options["depths"] == [1, 2]
    assert recipe.workspace == "s3://bucket/a=b"
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


def test_dumped_recipe_loads_to_the_same(path: Path, tmp_path: Path) -> None:
    recipe = load_recipe(str(path), ["pretrain.training.optimizer.final_learning_rate=1e-7", "name=other"])
    (tmp_path / "dumped.yaml").write_text(dump_recipe(recipe))
    again = load_recipe(str(tmp_path / "dumped.yaml"))
    assert again == recipe
    assert dump_recipe(again) == dump_recipe(recipe)
    assert "final_learning_rate" in dump_recipe(recipe)


def test_student_without_a_distill_section_is_refused(path: Path) -> None:
    message = refusal(path, "distill=null")
    assert "promote.candidate is student, and there is no distill section; set it to teacher" in message
    assert load_recipe(str(path), ["distill=null", "promote.candidate=teacher"]).distill is None


def test_records_come_from_one_place(path: Path) -> None:
    assert "name either corpus or shard.sources" in refusal(path, "corpus=null")
    assert "name either corpus or shard.sources" in refusal(path, "shard.sources=[{uri: a.jsonl}]")
    assert load_recipe(str(path), ["corpus=null", "shard.sources=[{uri: a.jsonl}]"]).corpus is None


def test_local_workspace_is_made_absolute(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_recipe(str(path)).workspace == str(tmp_path / "workspace/quickstart")
    assert load_recipe(str(path), ["workspace=~/w"]).workspace == str(Path.home() / "w")
    assert load_recipe(str(path), [f"workspace=file://{tmp_path}/w"]).workspace == f"{tmp_path}/w"
    assert load_recipe(str(path), ["workspace=gs://bucket/w"]).workspace == "gs://bucket/w"


def test_recipe_cannot_be_changed_after_loading(path: Path) -> None:
    with pytest.raises(ValueError, match="frozen"):
        load_recipe(str(path)).seed = 3  # type: ignore[misc]
