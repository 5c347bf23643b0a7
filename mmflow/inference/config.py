"""Stage `score`: its settings, and what a model can be asked."""

from __future__ import annotations

from collections.abc import Collection
from typing import Annotated, Any

from pydantic import Field, model_validator

from mmflow.core.config import OPERATIONAL, Config, Uri
from mmflow.core.errors import RecipeError
from mmflow.inference.result import Gives, Result
from mmflow.inference.runner import Pool
from mmflow.inference.tasks import TASKS
from mmflow.inference.tasks.answer import Answer
from mmflow.inference.tasks.caption import Caption
from mmflow.inference.tasks.classify import Classify
from mmflow.inference.tasks.embed import CaptionEmbeddings, Dtype, ImageEmbeddings
from mmflow.inference.tasks.match import Match
from mmflow.inference.tasks.neighbours import Neighbours
from mmflow.inference.tasks.perplexity import Perplexity
from mmflow.inference.tasks.zero_shot import ZeroShot
from mmflow.models.config import ModelConfig


class EmbedConfig(Config):
    """Pictures and captions as vectors of the shared space, and the cosine of each picture with its caption."""

    language: str = "en"
    """Which caption is read: the first in this language, or else the first of all."""
    dtype: Dtype = "float16"
    """Of the vectors."""
    width: int | None = Field(None, ge=1)
    """Keep the first so many numbers of each vector, at unit length, for a model that was trained for it (Matryoshka,
    arXiv 2205.13147)."""


class TasksConfig(Config):
    """What the model is asked about every row. Without any, all that it can do without settings."""

    embed: EmbedConfig | None = None
    zero_shot: ZeroShot | None = None
    classify: Classify | None = None
    match: Match | None = None
    caption: Caption | None = None
    answer: Answer | None = None
    perplexity: Perplexity | None = None
    neighbours: Neighbours | None = None

    @property
    def named(self) -> dict[str, Config]:
        """The tasks that are asked for."""
        sections = {name: getattr(self, name) for name in TASKS}
        return {name: section for name, section in sections.items() if section is not None}

    @property
    def results(self) -> tuple[Result, ...]:
        """What is computed for them."""
        embed = self.embed
        results = list[Result]()
        if embed is not None:
            results = [
                ImageEmbeddings(dtype=embed.dtype),
                CaptionEmbeddings(language=embed.language, dtype=embed.dtype),
            ]
        return (*results, *(section for section in self.named.values() if isinstance(section, Result)))


class ModelReference(Config):
    """Which model: an alias or a version of a registered one, or a package."""

    name: str | None = None
    """The registered model; None: `promote.model`."""
    alias: str | None = None
    version: int | None = Field(None, ge=1)
    package: Uri | None = None
    """A model package's directory or URI."""

    @model_validator(mode="before")
    @classmethod
    def _of_text(cls, value: Any) -> Any:
        return {"alias": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _one_of_them(self) -> ModelReference:
        if sum(part is not None for part in (self.alias, self.version, self.package)) != 1:
            raise ValueError("name one of alias, version and package, such as champion or {version: 7}")
        return self


class ScoreConfig(Pool):
    """Stage `score`: what a model says of every row of whole datasets."""

    datasets: list[Uri] | None = Field(None, min_length=1)
    """Datasets, or tars of others (paths, globs, brace ranges ending in .tar); None: the recipe's own dataset."""
    splits: list[str] | None = Field(None, min_length=1)
    """None: all."""
    model: ModelReference = ModelReference(alias="champion")
    """champion (or another alias), {version: 7}, or {package: URI}."""
    tasks: TasksConfig = TasksConfig()
    batch_size: Annotated[int, OPERATIONAL] = Field(256, ge=1)
    """Rows computed at a time."""
    max_errors: Annotated[float, OPERATIONAL] = Field(0.01, ge=0, le=1)
    """Largest share of rows that may fail, such as pictures that cannot be decoded."""


def possible_tasks(gives: Collection[str], zero_shot: ZeroShot | None, language: str) -> TasksConfig:
    """What a model can be asked without settings, and zero-shot classes where there are some."""
    able = {name for name, results in TASKS.items() if all(_fits(result, gives) for result in results)}
    sections: dict[str, Any] = {name: {} for name in able - {"zero_shot", "neighbours"}}
    sections |= {name: {"language": language} for name in able & {"embed", "classify", "match", "perplexity"}}
    if zero_shot is not None and "zero_shot" in able:
        sections["zero_shot"] = zero_shot
    return TasksConfig.model_validate(sections)


def check_tasks(tasks: TasksConfig, config: ModelConfig, model: str) -> None:
    """Raise RecipeError for a task that the model cannot do, and where there is none that it can."""
    for name in tasks.named:
        lacking = next((result for result in TASKS[name] if not _fits(result, config.gives)), None)
        if lacking is not None:
            raise RecipeError(
                f"score.tasks.{name}: {model} lacks {lacking.remedy}; leave {name} out, or use another model"
            )
    width = None if tasks.embed is None else tasks.embed.width
    if width is not None and width > (config.embedding_width or 0):
        raise RecipeError(f"score.tasks.embed.width: {width}, but the vectors of {model} have {config.embedding_width}")
    if not tasks.named:
        raise RecipeError(
            f"score.tasks: {model} can do none of {', '.join(TASKS)} without settings; name one with its settings"
        )


def _fits(result: type[Result], gives: Collection[str]) -> bool:
    return any(needed <= Gives(gives) for needed in result.needs)
