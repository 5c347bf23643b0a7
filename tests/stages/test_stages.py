"""Which stages a recipe's loop has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mmflow.core.errors import MissingArtifactError, RecipeError
from mmflow.recipe import load_recipe
from mmflow.stages.loop import Loop
from tests.tiny import tiny_fields, write_recipe


def loop_of(tmp_path: Path, **changes: Any) -> Loop:
    fields = tiny_fields(tmp_path / "workspace", "records.jsonl") | changes
    return Loop(load_recipe(write_recipe(tmp_path / "recipe.yaml", fields)))


def test_a_classifier_is_promoted_and_scored(tmp_path: Path) -> None:
    fields: dict[str, Any] = tiny_fields(tmp_path, "records.jsonl")
    classifier = {"image": fields["pretrain"]["model"]["image"], "embedding_width": None, "heads": ["classes"]}
    changes = {
        "pretrain": {"model": classifier, "loader": {"label": "shape"}, "objectives": {"classification": {}}},
        "distill": None,
        "evaluate": {"splits": ["held_out"], "classification": {"label": "shape"}},
        "promote": {"model": "m", "candidate": "teacher", "metric": "held_out/classification/accuracy"},
    }
    loop = loop_of(tmp_path, **changes)
    assert loop.stages == ("shard", "pretrain", "evaluate", "promote", "score")


def test_a_dual_encoder_is_scored_whichever_of_the_two_it_is(tmp_path: Path) -> None:
    assert "score" in loop_of(tmp_path).stages
    with pytest.raises(RecipeError, match=r"^corpus: this recipe has no such section"):
        loop_of(tmp_path).plan("corpus")


def test_a_model_that_compares_pairs_is_not_scored_unless_another_model_is_named(tmp_path: Path) -> None:
    fields: dict[str, Any] = tiny_fields(tmp_path, "records.jsonl")
    video = {"kind": "tight", "max_frames": 2, "layers": 1, "heads": 2}
    pretrain = {"model": fields["pretrain"]["model"] | {"video": video}, "loader": {"frames": 2}}
    promote = fields["promote"] | {"candidate": "teacher"}
    loop = loop_of(tmp_path, pretrain=pretrain, distill=None, promote=promote)
    with pytest.raises(RecipeError, match=r"^score: pretrain\.model can do no task without settings, and score\.tasks"):
        loop.plan("score")
    score = {"model": {"package": str(tmp_path / "package")}}
    assert "score" in loop_of(tmp_path, pretrain=pretrain, distill=None, promote=promote, score=score).stages


def test_a_corpus_in_an_object_store_is_refused_before_anything_is_drawn(tmp_path: Path) -> None:
    loop = loop_of(tmp_path, corpus={"name": "openmoji"}, shard={}, workspace="s3://bucket/w")
    with pytest.raises(RecipeError, match=r"^corpus: a demonstration corpus needs a local workspace"):
        loop.check(["shard"])


def test_a_teacher_that_is_not_there_is_named_by_its_key(tmp_path: Path) -> None:
    records = tmp_path / "records.jsonl"
    records.touch()
    fields: dict[str, Any] = tiny_fields(tmp_path / "workspace", str(records))
    teachers = [{"model": "registered", "version": 1}, {"package": str(tmp_path / "nowhere")}]
    distill = fields["distill"] | {"teachers": teachers}
    with pytest.raises(MissingArtifactError, match=r"^distill\.teachers\.1: .*/nowhere: no mmflow\.json, so no model"):
        loop_of(tmp_path, shard=fields["shard"], distill=distill).check(["distill"])
