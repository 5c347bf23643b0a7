"""The loop of a recipe: its stages in order, planned, run and looked up.

corpus ─▶ shard ─▶ pretrain ─▶ distill ─▶ evaluate ─▶ promote ─▶ score
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

from mmflow.core.artifacts import Artifact, Stage
from mmflow.core.errors import MissingArtifactError, RecipeError
from mmflow.stages import LoopStage
from mmflow.stages.corpus import CORPUS
from mmflow.stages.distill import DISTILL
from mmflow.stages.evaluate import EVALUATE
from mmflow.stages.pretrain import PRETRAIN, resolve
from mmflow.stages.promote import PROMOTE
from mmflow.stages.score import SCORE
from mmflow.stages.shard import SHARD

if TYPE_CHECKING:
    from mmflow.recipe import Recipe

STAGES: Mapping[str, LoopStage] = {
    "corpus": CORPUS,
    "shard": SHARD,
    "pretrain": PRETRAIN,
    "distill": DISTILL,
    "evaluate": EVALUATE,
    "promote": PROMOTE,
    "score": SCORE,
}


class Loop:
    """The stages that a recipe has. Artifacts are remembered once found or built."""

    def __init__(self, recipe: Recipe) -> None:
        """Raises what `resolve` raises if `pretrain.start` names no package."""
        self.recipe = recipe
        self._resolved = resolve(recipe)
        self._absent = {name: reason for name, stage in STAGES.items() if (reason := stage.absent(self._resolved))}
        self.stages = tuple(name for name in STAGES if name not in self._absent)
        self._artifacts: dict[str, Artifact] = {}

    def check(self, stages: Collection[str] | None = None) -> None:
        """Find mistakes of the recipe before any of the stages (default: all) makes anything.

        Raises RecipeError naming the key. What only the data can tell, such as a split without records, is found by the
        stage that reads it.
        """
        checked = set(self.stages if stages is None else stages)
        if checked & {"pretrain", "distill"}:
            checked.add("evaluate")  # a model that cannot be examined is not trained
        if "shard" in checked:
            checked.add("corpus")  # `run` makes it first
        for name in self.stages:
            if name in checked:
                STAGES[name].check(self._resolved)

    def inputs_of(self, name: str) -> tuple[str, ...]:
        """The stages that `name` takes artifacts from."""
        return tuple(stage for stage in STAGES[name].inputs if stage in self.stages)

    def plan(self, name: str) -> Stage:
        """The stage, ready to run. Raises MissingArtifactError if a stage before it is not committed."""
        if name not in self.stages:
            raise RecipeError(f"{name}: {self._absent[name]}")
        return STAGES[name].plan(self._resolved, {stage: self.committed(stage) for stage in self.inputs_of(name)})

    def committed(self, name: str) -> Artifact:
        """The artifact that a stage has committed. Raises MissingArtifactError naming what to run."""
        if name not in self._artifacts:
            stage, workspace = self.plan(name), self.recipe.workspace
            artifact = stage.committed(workspace)
            if artifact is None:
                raise MissingArtifactError(
                    f"{stage.directory(workspace)}: stage {name} is not committed for this recipe; run `mmflow "
                    f"{name} …` first, or the whole loop with `mmflow run …`"
                )
            self._artifacts[name] = artifact
        return self._artifacts[name]

    def run(self, name: str) -> Artifact:
        """The stage's artifact, built now if it was not there."""
        if name == "shard" and "corpus" in self.stages and "corpus" not in self._artifacts:
            self.run("corpus")  # nobody runs the corpus by hand
        if name in self.stages:
            STAGES[name].prepare(self._resolved)
        self._artifacts[name] = self.plan(name).run(self.recipe.workspace)
        return self._artifacts[name]
