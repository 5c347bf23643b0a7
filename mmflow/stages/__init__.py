"""What a stage of the loop is. Each stage has one file; `loop.py` lists them in order."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mmflow.core.artifacts import Artifact, Stage

if TYPE_CHECKING:
    from mmflow.recipe import Recipe

Inputs = Mapping[str, Artifact]  # stage → what it committed
Manifest = Mapping[str, Any]
NO_SECTION = "this recipe has no such section"


@dataclass(frozen=True, kw_only=True)
class LoopStage:
    """One stage of the loop: what it takes, checks, builds and reports."""

    purpose: str  # for the command's help and Dagster's pages
    inputs: tuple[str, ...] = ()  # stages whose artifacts it takes, where the recipe has them
    absent: Callable[[Recipe], str] = lambda recipe: ""  # why this recipe's loop does without the stage
    check: Callable[[Recipe], None] = lambda recipe: None  # raises RecipeError before anything runs
    prepare: Callable[[Recipe], None] = lambda recipe: None  # makes what the stage's identity depends on
    plan: Callable[[Recipe, Inputs], Stage]
    summary: Callable[[Manifest], str]  # one line about a committed artifact
