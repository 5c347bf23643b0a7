"""Training that starts from a package: which weights it takes, which it draws afresh, and what the check refuses."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer

from mmflow.core.errors import RecipeError, TrackingError
from mmflow.loading.tokens import train_tokenizer
from mmflow.models.config import ModelConfig
from mmflow.models.encoders import parameter_count
from mmflow.models.model import Model, build
from mmflow.models.package import Package, start_from, write_package
from mmflow.recipe import Recipe, load_recipe
from mmflow.registry import versions
from mmflow.stages.loop import Loop
from mmflow.stages.pretrain import resolve
from mmflow.stages.training import fingerprints_of, identity, pretrain_section
from mmflow.training.check import check_training, tokenizer_of
from mmflow.training.config import PretrainConfig
from tests.tiny import SMALLEST_MODEL, tiny_fields, write_recipe

FUSION = {"kind": "cross_attention", "width": 8, "layers": 1, "heads": 2}
CLASSES = ("bar", "circle", "square")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(["red circle", "green square", "blue bar"], 64)


def model_of(tokenizer: Tokenizer, seed: int, num_classes: int = 3, **changes: Any) -> Model:
    config = ModelConfig.model_validate(SMALLEST_MODEL | changes)
    return build("pretrain.model", config, tokenizer.get_vocab_size(), seed=seed, num_classes=num_classes)


def package_of(directory: Path, tokenizer: Tokenizer, seed: int = 1, **changes: Any) -> Package:
    model = model_of(tokenizer, seed, **changes)
    return write_package(
        str(directory),
        state=model.state_dict(),
        config=ModelConfig.model_validate(SMALLEST_MODEL | changes),
        tokenizer_json=tokenizer.to_str(),
        parameters=parameter_count(model),
        lineage={},
        classes=CLASSES if "classes" in changes.get("heads", ()) else (),
    )


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Package:
    """A dual encoder that also classifies."""
    return package_of(tmp_path_factory.mktemp("package") / "dual", tokenizer, heads=["classes"])


def recipe_of(directory: Path, package: Package, **pretrain: Any) -> Recipe:
    fields: dict[str, Any] = tiny_fields(directory / "workspace", "records.jsonl") | {"distill": None}
    fields["promote"]["candidate"] = "teacher"
    loader, objectives = {"label": "shape"}, {"contrastive": {}, "classification": {}}
    section = {"start": {"package": package.uri}, "loader": loader, "objectives": objectives}
    return load_recipe(write_recipe(directory / "recipe.yaml", fields | {"pretrain": section | pretrain}))


def section_of(directory: Path, package: Package, **pretrain: Any) -> PretrainConfig:
    return pretrain_section(resolve(recipe_of(directory, package, **pretrain)))


def test_common_parts_are_taken_and_the_others_are_named(package: Package, tokenizer: Tokenizer) -> None:
    theirs = model_of(tokenizer, 1, heads=["classes"]).state_dict()
    model = model_of(tokenizer, 2, embedding_width=None, heads=["classes", "masked_language"])
    drawn = {name: weight.clone() for name, weight in model.state_dict().items()}
    begun = start_from("pretrain.start", model, package, CLASSES)
    assert begun.fresh == ("heads.masked_language",)
    assert set(begun.left_out) == {"image_projection", "text_projection", "scale"}
    for name, tensor in model.state_dict().items():
        expected = drawn if name.startswith("heads.masked_language") else theirs
        assert torch.equal(tensor, expected[name]), name


def test_a_head_for_other_classes_starts_afresh(package: Package, tokenizer: Tokenizer) -> None:
    model = model_of(tokenizer, 2, heads=["classes"])
    drawn = model.heads["classes"].weight.clone()
    begun = start_from("pretrain.start", model, package, CLASSES[::-1])
    assert (begun.fresh, begun.left_out) == (("heads",), ("heads",))
    assert torch.equal(model.heads["classes"].weight, drawn)


def test_a_recipe_only_lists_what_changes(package: Package, tokenizer: Tokenizer, tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, package, model={"image": {"frozen_layers": "all"}})
    section = pretrain_section(resolve(recipe))
    theirs = ModelConfig.model_validate(SMALLEST_MODEL | {"heads": ["classes"]})
    image = theirs.image.model_copy(update={"frozen_layers": "all"})
    assert section.model == theirs.model_copy(update={"image": image})
    check_training("pretrain", section)
    started_with = tokenizer_of("pretrain", section)
    assert started_with is not None
    assert started_with.to_str() == tokenizer.to_str()
    again = load_recipe(write_recipe(tmp_path / "resolved.yaml", recipe.model_dump(mode="json")))
    assert again.pretrain == recipe.pretrain


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"embedding_width": 8}, r"start: image_projection\.weight is \[6, 8\] .* \[8, 8\]"),
        ({"fusion": FUSION | {"width": 16}}, r"start: heads\.classes\.weight is \[3, 8\] .* \[2, 16\]"),
        ({"vocabulary_size": 70}, r"model\.vocabulary_size: 70"),
        ({"image": {"type": None, "checkpoint": "/nowhere"}}, r"model\.image\.checkpoint: pretrain\.start"),
    ],
)
def test_a_model_that_the_package_does_not_fit_is_refused(
    package: Package, tmp_path: Path, model: dict[str, Any], message: str
) -> None:
    with pytest.raises(RecipeError, match=rf"pretrain\.{message}"):
        check_training("pretrain", section_of(tmp_path, package, model=model))


def test_a_package_with_nothing_in_common_is_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    options = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    image = {"type": "vit", "options": options | {"patch_size": 8}}
    other = package_of(tmp_path / "vit", tokenizer, image=image)
    fields = SMALLEST_MODEL | {"vocabulary_size": 64}
    section = section_of(tmp_path, other, model=fields, loader={}, objectives={})
    changed = section.model_copy(update={"model": ModelConfig.model_validate(fields)})
    with pytest.raises(RecipeError, match=r"^pretrain\.start: the package's image encoder"):
        check_training("pretrain", changed)


def test_a_missing_package_is_refused(package: Package, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"pretrain\.start: .*/nowhere: no mmflow\.json, so no model package"):
        section_of(tmp_path, package, start={"package": str(tmp_path / "nowhere")})
    with pytest.raises(RecipeError, match=r"pretrain\.start: give either package, a model package's URI, or model and"):
        recipe_of(tmp_path, package, start={"model": "nothing"})


def test_a_registered_version_is_looked_up(package: Package, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    registered = (SimpleNamespace(version=3, package_uri=package.uri),)
    monkeypatch.setattr(versions, "list_versions", lambda name, *, uri: registered)
    section = section_of(tmp_path, package, start={"model": "tagger", "version": 3})
    assert section.model == section_of(tmp_path, package).model
    assert section.start is not None
    assert section.start.package == package.uri
    assert fingerprints_of("pretrain", section) == {"start": package.digest}


def test_an_unreachable_registry_is_not_reported_as_a_recipe_error(
    package: Package, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
    recipe = recipe_of(tmp_path, package, start={"model": "tagger", "version": 3})
    with pytest.raises(TrackingError, match=r"^pretrain\.start: .*MLFLOW_TRACKING_URI"):
        Loop(recipe)


def test_another_package_is_another_artifact(package: Package, tokenizer: Tokenizer, tmp_path: Path) -> None:
    section = section_of(tmp_path, package)
    moved = package_of(tmp_path / "moved", tokenizer, heads=["classes"])
    other = package_of(tmp_path / "other", tokenizer, seed=3, heads=["classes"])
    for candidate, same in ((moved, True), (other, False)):
        begun = section_of(tmp_path, candidate)
        assert identity(begun) == identity(section)
        assert (fingerprints_of("pretrain", begun) == fingerprints_of("pretrain", section)) is same
    assert fingerprints_of("pretrain", section) == {"start": package.digest}
    assert fingerprints_of("pretrain", section.model_copy(update={"start": None})) == {}


def test_the_whole_recipe_is_checked_by_the_package(package: Package, tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, package)
    source = recipe.shard.model_copy(update={"sources": []})
    Loop(recipe.model_copy(update={"shard": source})).check(["pretrain"])


# --- adapters on a package ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lora", "key"),
    [
        ({"targets": ["query", "intermediate.dense"], "trained": ["scale"]}, None),
        ({"targets": ["query", "quary"]}, r"lora\.targets\.1: .*'quary'"),
        ({"targets": ["fusion.mix.text"]}, r"lora\.targets\.0: .*'fusion\.mix\.text'"),
        ({"trained": ["head"]}, r"lora\.trained\.0: .*'head'.*fusion"),
    ],
)
def test_adapter_targets_that_match_no_weight_are_named(
    package: Package, tmp_path: Path, lora: dict[str, Any], key: str
) -> None:
    model = {"fusion": {"kind": "concatenation", "width": 8}}
    section = section_of(tmp_path, package, model=model, lora=lora)
    if key is None:
        check_training("pretrain", section)
        return
    with pytest.raises(RecipeError, match=rf"^pretrain\.{key}"):
        check_training("pretrain", section)


def test_adapters_without_trained_weights_are_refused(package: Package, tmp_path: Path) -> None:
    section = section_of(tmp_path, package, start=None, model=SMALLEST_MODEL | {"heads": ["classes"]}, lora={})
    with pytest.raises(RecipeError, match=r"^pretrain\.lora: "):
        check_training("pretrain", section)
