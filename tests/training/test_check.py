"""Mistakes in a training section are named by their key before anything runs."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from tokenizers import Tokenizer, models

from mmflow.core.errors import MissingArtifactError, MisuseError, RecipeError
from mmflow.evaluation.config import EvaluateConfig, check_evaluation
from mmflow.loading.tokens import train_tokenizer
from mmflow.stages.training import check_held_out, identity
from mmflow.training.check import Compared, check_student, check_training, small_check
from mmflow.training.config import DistillConfig, PretrainConfig, TrainingConfig
from mmflow.training.workers import compare_gradients_on_ray
from tests.dataset.handmade import Handmade, write_dataset
from tests.tiny import SMALLEST_MODEL

DECODER = {"width": 8, "layers": 1, "heads": 2}
FUSED = {"fusion": {"kind": "concatenation", "width": 8}, "heads": ["classes"]}
PAIRS: dict[str, Any] = {"name": "pairs"}
VQA: dict[str, Any] = {"name": "vqa", "loader": {"text": "questions"}, "objectives": {"answering": {}}}
LABELS: dict[str, Any] = {"name": "labels", "loader": {"label": "kind"}, "objectives": {"classification": {}}}
TIGHT = SMALLEST_MODEL | {"video": {"kind": "tight", "max_frames": 2, "layers": 1, "heads": 2}}
LOSS = "validation/loss"


def bert(directory: Path, tokenizer: Tokenizer) -> dict[str, str]:
    """A text checkpoint as far as the check reads it: its weights are read when the model is built."""
    directory.mkdir()
    fields = SMALLEST_MODEL["text"]["options"] | {"model_type": "bert", "vocab_size": tokenizer.get_vocab_size()}
    (directory / "config.json").write_text(json.dumps(fields))
    tokenizer.save(str(directory / "tokenizer.json"))
    return {"checkpoint": str(directory)}


def one_sample(directory: Path) -> str:
    """The URI of a dataset with only a split train."""
    samples = [Handmade(key="key", captions=[{"language": "en", "text": "text"}])]
    return write_dataset(directory / "dataset", [("train", samples)]).uri


def bare_tokenizer() -> Tokenizer:
    """Without a mask token, and without tokens before and after texts."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a"]
    return Tokenizer(models.WordLevel({word: id for id, word in enumerate(words)}, unk_token="[UNK]"))


def section(model: dict[str, Any] | None = None, **fields: Any) -> PretrainConfig:
    return PretrainConfig.model_validate({"model": SMALLEST_MODEL | (model or {}), **fields})


def with_tasks(*tasks: dict[str, Any], **fields: Any) -> PretrainConfig:
    return section(FUSED, tasks=tasks, **fields)


def validated(best_metric: str = "loss", **validation: Any) -> PretrainConfig:
    training = {"checkpoints": {"best_metric": best_metric}, "validation": {"split": "held_out", **validation}}
    return section(training=training)


def assert_refused(refused: PretrainConfig | DistillConfig, key: str, *values: str) -> None:
    """An error that begins with a key of the recipe and names these values."""
    stage = key.partition(".")[0]
    with pytest.raises(RecipeError) as error:
        check_training(stage, refused)
    assert re.match(rf"{re.escape(key)}\b", str(error.value)), str(error.value)
    assert [value for value in values if value not in str(error.value)] == [], str(error.value)


# --- models and objectives ------------------------------------------------------------------------------------------


def test_a_decoder_needs_a_tokenizer_with_tokens_before_and_after_texts(tmp_path: Path) -> None:
    bare = {"vocabulary_size": None, "text": bert(tmp_path / "bare", bare_tokenizer())}
    objectives: dict[str, Any] = {"contrastive": {}, "captioning": {}}
    check_training("pretrain", section(bare))
    assert_refused(section(bare | {"decoder": DECODER}, objectives=objectives), "pretrain.model.decoder", "token")
    whole = {"vocabulary_size": None, "text": bert(tmp_path / "whole", train_tokenizer(["red apple"], 64))}
    check_training("pretrain", section(whole | {"decoder": DECODER}, objectives=objectives))


@pytest.mark.parametrize(("objective", "missing"), [("matching", "fused"), ("masked_language", "mask token")])
def test_an_objective_is_refused_if_model_or_tokenizer_lacks_what_it_needs(
    tmp_path: Path, objective: str, missing: str
) -> None:
    model = {"vocabulary_size": None, "text": bert(tmp_path / "b", bare_tokenizer()), "heads": ["masked_language"]}
    refused = section(model, objectives={"contrastive": {}, objective: {}})
    assert_refused(refused, f"pretrain.objectives.{objective}", missing)


def test_a_part_that_no_objective_trains_is_refused() -> None:
    assert_refused(section({"heads": ["masked_language"]}), "pretrain.model.heads", "masked_language")
    fields = {"model": SMALLEST_MODEL | {"heads": ["masked_language"]}, "objectives": {"masked_language": {}}}
    check_training("distill", DistillConfig.model_validate(fields))  # its losses compare embeddings
    fields["losses"] = {"hidden": {"sides": ["text"]}}
    assert_refused(DistillConfig.model_validate(fields), "distill.model.embedding_width", "contrastive")


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"training": {"micro_batch_size": 4}}, "training.micro_batch_size"),
        ({"objectives": {"sigmoid": {}}}, "objectives.sigmoid"),
        ({"loader": {"frames": 3}}, "loader.frames"),
    ],
)
def test_video_of_kind_tight_needs_whole_batches_and_its_own_frames(changes: dict[str, Any], key: str) -> None:
    fields = {"model": TIGHT, "loader": {"frames": 2}}
    check_training("pretrain", PretrainConfig.model_validate(fields))
    assert_refused(PretrainConfig.model_validate(fields | changes), f"pretrain.{key}")


# --- students -------------------------------------------------------------------------------------------------------


def student(**model: Any) -> DistillConfig:
    return DistillConfig.model_validate({"model": SMALLEST_MODEL | {"vocabulary_size": None} | model})


def test_a_student_has_its_teacher_s_tokenizer(tmp_path: Path) -> None:
    words, other_words = (train_tokenizer([text], 64) for text in ("red apple", "green pear"))
    text = bert(tmp_path / "teacher", words)
    teacher = section({"vocabulary_size": None, "text": text})
    for model in ({}, {"text": text}, {"text": bert(tmp_path / "same", words)}):
        check_student(teacher, student(**model))
    other = bert(tmp_path / "other", other_words)
    for refusing in (teacher, section()):
        with pytest.raises(RecipeError, match=r"^distill\.model\.text\.checkpoint: .*/other"):
            check_student(refusing, student(text=other))
    check_student(section(), student(vocabulary_size=64))
    with pytest.raises(RecipeError, match=r"^distill\.model\.vocabulary_size: 70"):
        check_student(section(), student(vocabulary_size=70))


def test_a_student_s_decoder_needs_the_teacher_s_tokenizer_to_open_texts(tmp_path: Path) -> None:
    teacher = section({"vocabulary_size": None, "text": bert(tmp_path / "bare", bare_tokenizer())})
    check_student(teacher, student())
    with pytest.raises(RecipeError, match=r"^distill\.model\.decoder: "):
        check_student(teacher, student(decoder=DECODER))


# --- several tasks --------------------------------------------------------------------------------------------------


def test_each_part_may_be_trained_by_one_of_the_tasks() -> None:
    check_training("pretrain", with_tasks(PAIRS, VQA))
    assert_refused(with_tasks(PAIRS, PAIRS | {"name": "more"}), "pretrain.model.heads", "classes")


@pytest.mark.parametrize(
    ("tasks", "key"),
    [
        ((PAIRS, VQA | {"loader": {}}), "1.objectives.answering"),
        ((VQA, PAIRS | {"objectives": {"sigmoid": {}}}), "1.objectives.sigmoid"),
        ((PAIRS, VQA | {"loader": VQA["loader"] | {"frames": 2}}), "1.loader.frames"),
        ((PAIRS, VQA, LABELS), "2.loader"),  # two kinds of targets
    ],
)
def test_a_mistake_in_a_task_is_named_by_its_key(tasks: tuple[dict[str, Any], ...], key: str) -> None:
    assert_refused(with_tasks(*tasks), f"pretrain.tasks.{key}")


def test_a_task_s_dataset_and_split_must_exist(tmp_path: Path) -> None:
    uri = one_sample(tmp_path)
    check_training("pretrain", with_tasks(PAIRS | {"dataset": uri}, VQA))
    with pytest.raises(MissingArtifactError, match=r"^pretrain\.tasks\.0\.dataset: "):
        check_training("pretrain", with_tasks(PAIRS | {"dataset": str(tmp_path / "nowhere")}, VQA))
    with pytest.raises(MisuseError, match=r"loader\.split: .* has no split 'test'"):
        check_training("pretrain", with_tasks(PAIRS | {"dataset": uri, "loader": {"split": "test"}}, VQA))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tasks": [PAIRS]}, "pairs is the only one"),
        ({"tasks": [PAIRS, PAIRS]}, "pairs, pairs has a name twice"),
        ({"tasks": [PAIRS, VQA], "loader": {"split": "dev"}}, "loader: each task has its own"),
        ({"tasks": [PAIRS, VQA], "objectives": {"matching": {}}}, "objectives: each task has its own"),
    ],
)
def test_tasks_replace_a_section_s_loader_and_objectives(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        section(FUSED, **fields)


def test_evaluation_accepts_the_answers_of_any_task() -> None:
    answering = EvaluateConfig.model_validate({"splits": ["test"], "answering": {}})
    check_evaluation(answering, {"pretrain": with_tasks(PAIRS, VQA)})
    with pytest.raises(RecipeError, match=r"pretrain\.tasks\.0\.loader\.text"):
        check_evaluation(answering, {"pretrain": with_tasks(PAIRS, LABELS)})


# --- validation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("refused", "key", "value"),
    [
        (validated("perplexity"), "checkpoints.best_metric", "perplexity"),
        (validated("validation/R@1"), "checkpoints.best_metric", "validation/R@1"),
        (section(training={"checkpoints": {"best_metric": LOSS}}), "checkpoints.best_metric", LOSS),
        (validated(split="train"), "validation.split", "pretrain.loader"),
        (validated(patience=2), "validation.patience", "loss"),
    ],
)
def test_unknown_metrics_and_validation_on_the_training_split_are_refused(
    refused: PretrainConfig, key: str, value: str
) -> None:
    check_training("pretrain", validated(LOSS, patience=2))
    check_training("pretrain", validated("validation/image_to_text/R@5"))
    assert_refused(refused, f"pretrain.training.{key}", value)


def test_a_missing_validation_split_is_named(tmp_path: Path) -> None:
    with pytest.raises(MisuseError, match=r"^pretrain\.training\.validation\.split: .*'held_out'.* train"):
        check_held_out("pretrain", validated(), one_sample(tmp_path))


# --- identity -------------------------------------------------------------------------------------------------------


def test_operational_settings_do_not_change_the_identity_of_a_training() -> None:
    plain = identity(section())
    assert identity(section(training={"micro_batch_size": 4, "offload_optimizer": True, "compile": True})) == plain
    assert identity(validated()) == plain  # it only looks
    different = [
        section(training={"ema_decay": 0.99}),
        section(training={"optimizer": {"name": "lamb"}}),
        section(training={"optimizer": {"schedule": "wsd", "decay_share": 0.1}}),
        *(validated(LOSS, patience=patience) for patience in (2, 3)),  # these can end it
        section(FUSED, objectives={"contrastive": {}, "classification": {}}, loader={"label": "kind"}),
        *(with_tasks(PAIRS | {"weight": weight}, LABELS) for weight in (1, 2)),
        with_tasks(PAIRS, LABELS, lora={}),
    ]
    identities = [plain, *map(identity, different)]
    assert all(digest not in identities[:number] for number, digest in enumerate(identities))
    assert identity(with_tasks(PAIRS | {"loader": {"prefetch_batches": 9}}, LABELS)) == identity(
        with_tasks(PAIRS, LABELS)
    )


@pytest.mark.parametrize(
    ("fields", "key"),
    [
        ({"zero_stage": 0, "offload_optimizer": True}, "offload_optimizer"),
        ({"zero_stage": 0, "precision": "fp16"}, "precision: fp16"),
        ({"zero_stage": 3, "compile": True}, "compile"),
        ({"num_workers": [3, 2]}, "num_workers"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(fields: dict[str, Any], key: str) -> None:
    with pytest.raises(ValidationError, match=f"{key}: "):
        TrainingConfig.model_validate(fields)


# --- the gradient ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "largest", "equal"),
    [(1e-9, 1e-2, True), (1e-5, 1e-2, False), (0, 0, False), (float("nan"), 1, False), (0, float("nan"), False)],
)
def test_gradients_are_equal_up_to_rounding(error: float, largest: float, equal: bool) -> None:
    assert Compared("contrastive", error, largest).equal == equal


@pytest.mark.slow  # a test of README's commands has workers compared too
def test_workers_descend_the_gradient_of_one_process(ray_cluster: None, tmp_path: Path) -> None:
    objectives = {"contrastive": {"weight": 0}, "sigmoid": {}}
    recipe = section({"bias": -10.0}, objectives=objectives, training={"num_workers": 2, "micro_batch_size": 8})
    results = compare_gradients_on_ray(small_check(recipe.model, recipe.objectives, recipe.training), str(tmp_path))
    assert [result.objective for result in results] == ["contrastive", "sigmoid"]
    assert all(result.equal for result in results), results
