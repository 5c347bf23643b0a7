"""One YAML file drives the loop: it composes each stage's own settings. A mistake is answered with its key and the
nearest valid one."""

from __future__ import annotations

import difflib
import re
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import yaml
from pydantic import BaseModel, Discriminator, Field, Tag, ValidationError, model_validator

from mmflow.core.config import Config, Uri
from mmflow.core.errors import RecipeError
from mmflow.core.storage import local_path
from mmflow.corpora import ONE_CORPUS, SEVERAL_CORPORA, CorporaConfig
from mmflow.dataset.config import ShardConfig
from mmflow.evaluation.config import EvaluateConfig
from mmflow.inference.config import ScoreConfig
from mmflow.registry.gate import PromoteConfig
from mmflow.training.config import DistillConfig, PretrainConfig, StartedConfig

Section = TypeVar("Section", bound=BaseModel)


class ScheduleConfig(Config):
    """When the loop runs by itself."""

    cron: str
    """Minute, hour, day of month, month, day of week."""
    timezone: str = "UTC"
    """An IANA name, such as Europe/Berlin."""


def _kind_of_pretrain(section: Any) -> str:
    started = section.get("start") if isinstance(section, dict) else isinstance(section, StartedConfig)
    return (StartedConfig if started else PretrainConfig).__name__


class Recipe(Config):
    """The settings of the whole loop."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")
    """Name of the MLflow experiment and of the report."""
    workspace: str
    """Where artifacts go: a path, s3:// or gs://."""
    seed: int = Field(0, ge=0)
    """Seed of initial weights, sample order, augmentation and dropout."""
    corpus: CorporaConfig | None = None
    """A demonstration corpus, or a list of them, to make first and to read in place of `shard.sources`."""
    shard: ShardConfig = ShardConfig()
    pretrain: Annotated[
        Annotated[PretrainConfig, Tag(PretrainConfig.__name__)] | Annotated[StartedConfig, Tag(StartedConfig.__name__)],
        Discriminator(_kind_of_pretrain),
    ]
    distill: DistillConfig | None = None
    """Leave it out to evaluate and promote the teacher."""
    evaluate: EvaluateConfig
    promote: PromoteConfig
    score: ScoreConfig = ScoreConfig()
    schedule: ScheduleConfig | None = None
    """When `mmflow schedule` runs the loop."""

    @model_validator(mode="after")
    def _sections_agree(self) -> Recipe:
        if (self.corpus is None) == (not self.shard.sources):
            raise ValueError("name either corpus or shard.sources, whichever the records come from")
        if self.distill is None and self.promote.candidate == "student":
            raise ValueError("promote.candidate is student, and there is no distill section; set it to teacher")
        for metric in (self.promote.metric, *self.promote.floors, *self.promote.max_drop):
            if metric.split("/")[0] not in self.evaluate.splits:
                known = ", ".join(self.evaluate.splits)
                raise ValueError(f"promote: {metric} is of no split that evaluate.splits names ({known})")
        return self


class ScoreRecipe(Config):
    """The settings of a scoring alone: any datasets by any model."""

    workspace: Uri
    """Where results and scores go: a path, s3:// or gs://."""
    score: ScoreConfig

    @model_validator(mode="after")
    def _says_what(self) -> ScoreRecipe:
        if self.score.datasets is None:
            raise ValueError("score.datasets: missing; name the datasets")
        return self


def load_recipe(path: str, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of a YAML file with `dotted.key=value` overrides. A local workspace is made absolute.

    Raises RecipeError: one line with the file, the key, the value seen and what to do.
    """
    recipe = _load(Recipe, path, read_fields(path, overrides))
    workspace = local_path(recipe.workspace)
    return recipe.model_copy(update={"workspace": str(workspace)}) if workspace else recipe


def load_scoring(path: str, overrides: Sequence[str] = ()) -> Recipe | ScoreRecipe:
    """The recipe of a loop, or one that has the sections of `ScoreRecipe` alone. Raises as `load_recipe`."""
    fields = read_fields(path, overrides)
    if fields.keys() <= ScoreRecipe.model_fields.keys():
        return _load(ScoreRecipe, path, fields)
    return load_recipe(path, overrides)


def _load(kind: type[Section], path: str, fields: Mapping[str, Any]) -> Section:
    try:
        return validated(kind, fields)
    except RecipeError as error:
        raise RecipeError(f"{path}: {error}") from error


def read_fields(path: str, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The sections of a recipe's file, with overrides, as they are written. Raises RecipeError."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read ({error.strerror}); give a recipe's path") from error
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from error
    fields = parse(text, path)
    if not isinstance(fields, dict):
        raise RecipeError(f"{path}: a recipe is a mapping of sections, this is a {type(fields).__name__}")
    for override in overrides:
        _override(fields, override)
    return fields


def dump_recipe(recipe: Recipe | ScoreRecipe) -> str:
    """The recipe as YAML, every default spelled out."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=100)


# --- YAML -----------------------------------------------------------------------------------------------------------


class _StrictLoader(yaml.SafeLoader):
    """YAML that refuses a repeated key, where the plain loader silently keeps the last.

    It also reads 1e-3 as a number, which YAML 1.1 takes for text because it has no decimal point.
    """

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        # Before merge keys (<<) are flattened: after that, a key that overrides a merged one rightly occurs twice.
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


def parse(text: str, place: str) -> Any:
    """The value of a YAML text. Raises RecipeError with `place` and the line."""
    try:
        return yaml.load(text, Loader=_StrictLoader)  # noqa: S506 — a SafeLoader with one more check
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise RecipeError(f"{place}{line}: not YAML: {error.problem}") from error
    except yaml.YAMLError as error:
        raise RecipeError(f"{place}: not YAML: {' '.join(str(error).split())}") from error


def _override(fields: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise RecipeError(f"{override!r}: an override is key=value, such as pretrain.training.epochs=3")
    parent: Any = fields
    *sections, last = key.split(".")
    for section in sections:
        index = _index(parent, section, key)
        child = parent.get(index) if isinstance(parent, dict) else parent[index]
        if child is None:
            child = parent[index] = {}
        if not isinstance(child, (dict, list)):
            raise RecipeError(f"{key}: {section} is {child!r}, it has no keys of its own")
        parent = child
    parent[_index(parent, last, key)] = parse(text, key)


def _index(parent: dict[str, Any] | list[Any], part: str, key: str) -> str | int:
    """One part of a dotted key: a key of a mapping, or a position in a list, such as the 1 of corpus.1.seed."""
    if isinstance(parent, dict):
        return part
    if not part.isdecimal() or int(part) >= len(parent):
        raise RecipeError(f"{key}: {part} is none of the {len(parent)} items there, which count from 0")
    return int(part)


# --- validation -----------------------------------------------------------------------------------------------------

# What pydantic puts into a location beside keys: names of validators, and the tags of `corpus`.
NOT_A_KEY = re.compile(f"function-|({ONE_CORPUS}|{SEVERAL_CORPORA})$")


def validated(kind: type[Section], fields: Mapping[str, Any], key: str = "") -> Section:
    """The section of these fields. `key` is its place in the recipe.

    Raises RecipeError with the first mistake and the number of others. A misspelt key comes before the missing one that
    it stands for.
    """
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        first, *others = sorted(error.errors(), key=lambda mistake: mistake["type"] != "extra_forbidden")
        location = [part for part in first["loc"] if not (isinstance(part, str) and NOT_A_KEY.match(part))]
        keys, section = _as_written(location, kind)
        message = _explained(first, ".".join(map(str, [key, *keys] if key else keys)), section)
        raise RecipeError(message + (f" (and {len(others)} more)" if others else "")) from error


def _explained(mistake: Any, key: str, section: type[BaseModel]) -> str:
    """A pydantic error in words. `section` is the one that the key's last part stands in."""
    match mistake["type"]:
        case "extra_forbidden":
            known = list(section.model_fields)
            nearest = difflib.get_close_matches(str(mistake["loc"][-1]), known, n=1, cutoff=0.5)
            hint = f"did you mean {nearest[0]!r}?" if nearest else f"the keys here are {', '.join(known)}"
            return f"{key}: unknown key; {hint}"
        case "missing":
            return f"{key}: missing; it is required"
        case "union_tag_not_found":
            return f"{key}.name: missing; it is required"
        case "union_tag_invalid":
            return f"{key}.name: {mistake['ctx']['tag']!r} is none of {mistake['ctx']['expected_tags']}"
        case "value_error":
            return f"{key}: {mistake['ctx']['error']}" if key else str(mistake["ctx"]["error"])
        case _:
            return f"{key}: {mistake['msg'][0].lower()}{mistake['msg'][1:]}, not {mistake['input']!r}"


def _as_written(location: Sequence[int | str], kind: type[BaseModel]) -> tuple[list[int | str], type[BaseModel]]:
    """The keys of a pydantic location as the file has them, and the section that the last key stands in.

    For a section of several kinds, the location has the kind's tag after the key (`corpus.openmoji.seed`).
    """
    keys: list[int | str] = []
    section, kinds = kind, [kind]
    for part in location:
        if isinstance(part, int):  # an item of a list of sections
            keys.append(part)
        elif len(kinds) > 1:
            kinds = [kind for kind in kinds if part in _tags(kind)]
        else:
            keys.append(part)
            if kinds:  # else a key of a plain mapping
                section = kinds[0]
                field = section.model_fields.get(part)
                kinds = _sections_of(field.annotation) if field else []
    return keys, section


def _tags(kind: type[BaseModel]) -> set[str]:
    name = kind.model_fields.get("name")
    return {kind.__name__, *typing.get_args(name.annotation if name else None)}


def _sections_of(annotation: Any) -> list[type[BaseModel]]:
    """The section classes within an annotation such as `DistillConfig | None` or `list[SourceConfig]`, once each."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    kinds = (kind for argument in typing.get_args(annotation) for kind in _sections_of(argument))
    return list(dict.fromkeys(kinds))
