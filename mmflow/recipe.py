"""One YAML file drives the loop: each stage's own settings, composed; mistakes answered with the key and the nearest
right one."""

from __future__ import annotations

import difflib
import re
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator

from mmflow.core.config import Config
from mmflow.core.errors import MissingArtifactError, RecipeError, named
from mmflow.core.storage import local_path
from mmflow.corpora.config import ONE_CORPUS, SEVERAL_CORPORA, CorporaConfig
from mmflow.dataset.config import ShardConfig
from mmflow.evaluation.config import EvaluateConfig
from mmflow.inference.config import ScoreConfig
from mmflow.models.config import PackageConfig
from mmflow.registry.config import PromoteConfig
from mmflow.training.config import DistillConfig, PretrainConfig


class ScheduleConfig(Config):
    """When the loop runs by itself."""

    cron: str
    """Minute, hour, day of month, month, day of week."""
    timezone: str = "UTC"
    """An IANA name, such as Europe/Berlin."""


class Recipe(Config):
    """The whole loop's settings."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")
    """Names the MLflow experiment and the report."""
    workspace: str
    """Where artifacts go: a path, s3:// or gs://."""
    seed: int = Field(0, ge=0)
    """Of initial weights, sample order, augmentation and dropout."""
    corpus: CorporaConfig | None = None
    """A demonstration corpus to make first, or a list of them, which `shard` then reads as its sources; leave it out
    and name `shard.sources`."""
    shard: ShardConfig = ShardConfig()
    pretrain: PretrainConfig
    distill: DistillConfig | None = None
    """Leave it out to evaluate and promote the teacher itself."""
    evaluate: EvaluateConfig
    promote: PromoteConfig
    score: ScoreConfig = ScoreConfig()
    schedule: ScheduleConfig | None = None
    """When `mmflow schedule` runs the loop."""

    @model_validator(mode="after")
    def _whole(self) -> Recipe:
        if (self.corpus is None) == (not self.shard.sources):
            raise ValueError("name either corpus or shard.sources, whichever the records come from")
        if self.distill is None and self.promote.candidate == "student":
            raise ValueError("promote.candidate is student, and there is no distill section; set it to teacher")
        for metric in (self.promote.metric, *self.promote.floors, *self.promote.max_drop):
            if metric.split("/")[0] not in self.evaluate.splits:
                known = ", ".join(self.evaluate.splits)
                raise ValueError(f"promote: {metric} is of no split that evaluate.splits names ({known})")
        return self


def load_recipe(path: str, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of a YAML file with `dotted.key=value` overrides, a local workspace made absolute.

    Raises RecipeError: one line with the file, the key, the value seen and what to do. Where `pretrain.start` names a
    package that is damaged, or a registered version, raises as `read_package` and `located` besides.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read ({error.strerror}); give a recipe's path") from error
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from error
    fields = _parse(text, path)
    if not isinstance(fields, dict):
        raise RecipeError(f"{path}: a recipe is a mapping of sections, this is a {type(fields).__name__}")
    for override in overrides:
        _override(fields, override)
    _begin_from_package(fields, path)
    try:
        recipe = Recipe.model_validate(fields)
    except ValidationError as error:
        raise RecipeError(f"{path}: {_explain(error)}") from error
    workspace = local_path(recipe.workspace)
    return recipe.model_copy(update={"workspace": str(workspace)}) if workspace else recipe


def _begin_from_package(fields: dict[str, Any], path: str) -> None:
    """Complete `pretrain.model` by what the package that `pretrain.start` names is made of.

    Raises RecipeError where there is no such package, and as `located` and `read_package`. What is wrong with the keys
    is for the recipe's own check.
    """
    section, workspace = fields.get("pretrain"), fields.get("workspace")
    if not isinstance(section, dict) or not isinstance(section.get("model", {}), dict) or not section.get("start"):
        return
    if not isinstance(workspace, str):
        return
    try:
        start = PackageConfig.model_validate(section["start"])
    except ValidationError:
        return
    from mmflow.models.package import read_config, read_package
    from mmflow.registry.versions import located

    try:
        with named(f"{path}: pretrain.start"):
            found = read_config(read_package(str(located(start, workspace).package)))
    except MissingArtifactError as error:  # named wrongly
        raise RecipeError(str(error)) from error
    section["model"] = _completed(section.get("model", {}), found.model_dump(mode="json"))


def _completed(said: dict[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
    """What is said, and what is known where nothing is said, key by key; of a part of another kind all is said."""
    if any(said.get(name, known.get(name)) != known.get(name) for name in ("kind", "type", "checkpoint")):
        return said
    both = {name: (value, known[name]) for name, value in said.items() if name in known}
    sections = {
        name: _completed(ours, theirs)
        for name, (ours, theirs) in both.items()
        if isinstance(ours, dict) and isinstance(theirs, dict)
    }
    return {**known, **said, **sections}


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML, every default spelled out."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=100)


class _StrictLoader(yaml.SafeLoader):
    """YAML that refuses a key given twice, of which the plain loader keeps the last without a word.

    It also reads 1e-3 as the number that everybody means by it, where YAML 1.1 asks for a point and takes it for text.
    """

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        # Before merge keys (<<) are flattened, after which a key that overrides a merged one stands twice by right.
        node = super().compose_mapping_node(anchor)
        assert isinstance(node, yaml.MappingNode)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} is given twice", key.start_mark)
                seen.add(key.value)
        return node


_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def _parse(text: str, where: str) -> Any:
    try:
        return yaml.load(text, Loader=_StrictLoader)  # noqa: S506 — a SafeLoader with one more check
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise RecipeError(f"{where}{line}: not YAML: {error.problem}") from error
    except yaml.YAMLError as error:
        raise RecipeError(f"{where}: not YAML: {' '.join(str(error).split())}") from error


def _override(fields: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise RecipeError(f"{override!r}: an override is key=value, such as pretrain.training.epochs=3")
    above: Any = fields
    *sections, last = key.split(".")
    for section in sections:
        place = _place(above, section, key)
        inner = above.get(place) if isinstance(above, dict) else above[place]
        if inner is None:
            inner = above[place] = {}
        if not isinstance(inner, (dict, list)):
            raise RecipeError(f"{key}: {section} is {inner!r}, it has no keys of its own")
        above = inner
    above[_place(above, last, key)] = _parse(text, key)


def _place(above: dict[str, Any] | list[Any], part: str, key: str) -> str | int:
    """A part of a key, such as the 1 of corpus.1.seed, as what it stands in is asked for it."""
    if isinstance(above, dict):
        return part
    if not part.isdecimal() or int(part) >= len(above):
        raise RecipeError(f"{key}: {part} is none of the {len(above)} items there, which count from 0")
    return int(part)


# What pydantic puts into a location beside keys.
NOT_A_KEY = re.compile(f"function-|({ONE_CORPUS}|{SEVERAL_CORPORA})$")


def _explain(error: ValidationError) -> str:
    """The first mistake in words, and how many more there are; a misspelt key before the missing one it stands for."""
    first, *others = sorted(error.errors(), key=lambda each: each["type"] != "extra_forbidden")
    location = [part for part in first["loc"] if not (isinstance(part, str) and NOT_A_KEY.match(part))]
    written, section = _as_written(location)
    key = ".".join(map(str, written))
    if first["type"] == "extra_forbidden":
        known = list(section.model_fields)
        nearest = difflib.get_close_matches(str(location[-1]), known, n=1, cutoff=0.5)
        hint = f"did you mean {nearest[0]!r}?" if nearest else f"the keys here are {', '.join(known)}"
        told = f"{key}: unknown key; {hint}"
    elif first["type"] == "missing":
        told = f"{key}: missing; it is required"
    elif first["type"] == "union_tag_not_found":
        told = f"{key}.name: missing; it is required"
    elif first["type"] == "union_tag_invalid":
        told = f"{key}.name: {first['ctx']['tag']!r} is none of {first['ctx']['expected_tags']}"
    elif first["type"] == "value_error":
        told = f"{key}: {first['ctx']['error']}" if key else str(first["ctx"]["error"])
    else:
        told = f"{key}: {first['msg'][0].lower()}{first['msg'][1:]}, not {first['input']!r}"
    return told + (f" (and {len(others)} more)" if others else "")


def _as_written(location: Sequence[int | str]) -> tuple[list[int | str], type[BaseModel]]:
    """The keys of a location as the file has them, and the section that the last of them stands in.

    Where a section is of several kinds, pydantic's location names the kind behind the key (`corpus.openmoji.seed`).
    """
    written: list[int | str] = []
    section: type[BaseModel] = Recipe
    kinds: list[type[BaseModel]] = [Recipe]
    for part in location:
        if isinstance(part, int):  # an item of a list of sections
            written.append(part)
            continue
        if len(kinds) > 1:
            kinds = [kind for kind in kinds if part in typing.get_args(kind.model_fields["name"].annotation)]
            continue
        written.append(part)
        if not kinds:  # a key of a plain mapping
            continue
        section = kinds[0]
        field = section.model_fields.get(part)
        kinds = _sections_of(field.annotation) if field else []
    return written, section


def _sections_of(annotation: Any) -> list[type[BaseModel]]:
    """The Configs within an annotation such as `DistillConfig | None` or `list[SourceConfig]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    # Once each: a corpus may be one or a list of the same kinds.
    return list(dict.fromkeys(found for each in typing.get_args(annotation) for found in _sections_of(each)))


def settings_of(section: Config | None) -> Mapping[str, Any]:
    """A section as plain JSON values, for a stage's identity."""
    return {} if section is None else section.model_dump(mode="json")
