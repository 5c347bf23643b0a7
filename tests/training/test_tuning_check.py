"""What is wrong with several tasks, or with adapters, is named by its key before anything is made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from mmflow.core.errors import MissingArtifactError, MisuseError, RecipeError
from mmflow.evaluation.config import EvaluateConfig, check_evaluation
from mmflow.loading.tokens import train_tokenizer
from mmflow.models.config import ModelConfig
from mmflow.models.encoders import parameter_count
from mmflow.models.model import build
from mmflow.models.package import write_package
from mmflow.stages.training import identity
from mmflow.training.check import check_training
from mmflow.training.config import PretrainConfig
from tests.dataset.handmade import Handmade, write_dataset
from tests.tiny import SMALLEST_MODEL

FUSED = {"fusion": {"kind": "concatenation", "width": 8}, "heads": ["classes"]}
PAIRS: dict[str, Any] = {"name": "pairs"}
VQA: dict[str, Any] = {"name": "vqa", "loader": {"text": "questions"}, "objectives": {"answering": {}}}
LABELS: dict[str, Any] = {"name": "labels", "loader": {"label": "kind"}, "objectives": {"classification": {}}}


def section(*tasks: dict[str, Any], **fields: Any) -> PretrainConfig:
    return PretrainConfig.model_validate({"model": SMALLEST_MODEL | FUSED, "tasks": tasks} | fields)


def test_each_part_may_be_trained_by_one_of_the_tasks() -> None:
    check_training("pretrain", section(PAIRS, VQA))
    with pytest.raises(RecipeError, match=r"^pretrain\.model\.heads: classes: no objective trains it"):
        check_training("pretrain", section(PAIRS, PAIRS | {"name": "more"}))


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        (
            (PAIRS, VQA | {"loader": {}}),
            r"1\.objectives\.answering: the batches have no target; set pretrain\.tasks\.1",
        ),
        (
            (VQA, PAIRS | {"objectives": {"sigmoid": {}}}),
            r"1\.objectives\.sigmoid: needs bias; give the",
        ),
        ((PAIRS, VQA | {"loader": VQA["loader"] | {"frames": 2}}), r"1\.loader\.frames: 2, but pretrain\.model\.video"),
        ((PAIRS, VQA, LABELS), r"2\.loader: its targets are classes of kind, those of pretrain\.tasks\.1 are answers"),
    ],
)
def test_what_is_wrong_with_a_task_is_named_by_its_key(tasks: tuple[dict[str, Any], ...], message: str) -> None:
    with pytest.raises(RecipeError, match=rf"^pretrain\.tasks\.{message}"):
        check_training("pretrain", section(*tasks))


def test_a_task_s_dataset_and_split_must_be_there(tmp_path: Path) -> None:
    samples = [Handmade(key="one", captions=[{"language": "en", "text": "one"}])]
    uri = write_dataset(tmp_path / "dataset", [("train", samples)]).uri
    check_training("pretrain", section(PAIRS | {"dataset": uri}, VQA))
    with pytest.raises(MissingArtifactError, match=r"^pretrain\.tasks\.0\.dataset: "):
        check_training("pretrain", section(PAIRS | {"dataset": str(tmp_path / "nowhere")}, VQA))
    with pytest.raises(MisuseError, match=r"loader\.split: .* has no split 'test'"):
        check_training("pretrain", section(PAIRS | {"dataset": uri, "loader": {"split": "test"}}, VQA))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tasks": [PAIRS]}, "pairs is the only one; name another, or give loader and objectives instead"),
        ({"tasks": [PAIRS, PAIRS]}, "pairs, pairs has a name twice"),
        ({"tasks": [PAIRS, VQA], "loader": {"split": "dev"}}, "loader: each task has its own; move it there"),
        ({"tasks": [PAIRS, VQA], "objectives": {"matching": {}}}, "objectives: each task has its own"),
    ],
)
def test_tasks_take_the_place_of_a_loader_and_objectives(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        section(**fields)


def test_evaluation_knows_what_any_task_teaches() -> None:
    answered = EvaluateConfig.model_validate({"splits": ["test"], "answering": {}})
    check_evaluation(answered, {"pretrain": section(PAIRS, VQA)})
    with pytest.raises(RecipeError, match=r"no model here is taught answers; set pretrain\.tasks\.0\.loader\.text to"):
        check_evaluation(answered, {"pretrain": section(PAIRS, LABELS)})


def test_tasks_and_adapters_are_part_of_what_a_training_is() -> None:
    fields: dict[str, Any] = {"objectives": {"contrastive": {}, "classification": {}}, "loader": {"label": "kind"}}
    one = identity(section(**fields))
    two, three, tuned = (
        identity(section(PAIRS | {"weight": weight}, LABELS, lora=lora))
        for weight, lora in ((1, None), (2, None), (1, {}))
    )
    assert len({str(each) for each in (one, two, three, tuned)}) == 4
    busier = section(PAIRS | {"loader": {"prefetch_batches": 9}}, LABELS)
    assert identity(busier) == two


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> str:
    config, tokenizer = ModelConfig.model_validate(SMALLEST_MODEL), train_tokenizer(["red", "blue"], 64)
    model = build("model", config, tokenizer.get_vocab_size(), seed=1)
    uri = str(tmp_path_factory.mktemp("check") / "package")
    write_package(
        uri,
        state=model.state_dict(),
        config=config,
        tokenizer_json=tokenizer.to_str(),
        parameters=parameter_count(model),
        lineage={},
    )
    return uri


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({}, None),
        ({"targets": ["query", "intermediate.dense"], "trained": ["scale"]}, None),
        (
            {"targets": ["query", "quary"]},
            r"targets\.1: 'quary' ends the name of no linear layer that is trained already",
        ),
        (
            {"targets": ["fusion.mix.text"]},
            r"targets\.0: 'fusion\.mix\.text' ends the name of no linear layer that is tr",
        ),
        (
            {"trained": ["head"]},
            r"trained\.0: 'head' begins the name of nothing that is not frozen; there are fusion, ",
        ),
    ],
)
def test_adapters_that_go_nowhere_are_named(package: str, lora: dict[str, Any], message: str | None) -> None:
    tuned = section(PAIRS, VQA, start={"package": package}, lora=lora)
    if message is None:
        check_training("pretrain", tuned)
    else:
        with pytest.raises(RecipeError, match=rf"^pretrain\.lora\.{message}"):
            check_training("pretrain", tuned)


def test_adapters_beside_nothing_that_is_trained_are_refused() -> None:
    with pytest.raises(RecipeError, match=r"^pretrain\.lora: the model has no linear layer that is trained already"):
        check_training("pretrain", section(PAIRS, VQA, lora={}))
