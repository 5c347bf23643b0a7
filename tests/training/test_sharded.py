"""On two ranks, with real DeepSpeed engines: every ZeRO stage takes the unsharded optimizer's step, and micro-batches
have the gradient of the whole batch."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from mmflow.learning.learner import Learner, MicroBatch
from mmflow.learning.objectives import ObjectivesConfig, total
from mmflow.learning.outputs import MaskingTokens
from mmflow.learning.rows import all_ranks, gather_rows
from mmflow.loading.batches import Batch
from mmflow.models.config import ModelConfig
from mmflow.training import check
from mmflow.training.check import compare_gradients, small_check
from mmflow.training.config import TrainingConfig
from mmflow.training.engine import build_engine, descend, engine_settings, rows_of, whole_state
from tests.tiny import SMALLEST_MODEL
from tests.training.ranks import (
    dual_encoder,
    fresh_learner,
    furthest,
    main,
    mean_over_ranks,
    perform,
    random_batch,
    result_of,
    transformer,
)

SHARDED = (("adamw", 2), ("adamw", 3), *((name, stage) for name in ("muon", "lamb") for stage in (1, 2, 3)))
OFFLOADED = (("adamw", 2), ("muon", 3))
# The largest difference of a weight after steps of 1e-2. Muon computes in bf16: 2.3e-4 was seen.
TOLERANCE = {"adamw": 1e-4, "lamb": 1e-4, "muon": 5e-4}
RESTARTED = {0: "adamw", 1: "muon", 2: "lamb", 3: "muon"}
ROWS, MICRO_ROWS, TOKENS, VOCABULARY, CLASSES = 5, 2, 8, 64, 3
SPECIAL = MaskingTokens(mask=4, ids=(0, 1, 2, 3, 4), vocabulary_size=VOCABULARY)
OBJECTIVES: dict[str, Any] = {
    "contrastive": {"label_smoothing": 0.1, "weight": 0.5},
    "sigmoid": {},
    "masked_language": {"share": 0.4},
    "masked_image": {"square_pixels": 8},
    "captioning": {},
    "answering": {"targets": "scores"},
    "classification": {"weight": 2.0},
}
OF_EACH_KIND = ("contrastive", "masked_language")  # compares rows, is a mean over places

# Just wide enough that ZeRO-3 partitions weights: DeepSpeed leaves those of up to 100,000 numbers whole, and with
# smaller ones this would test ZeRO-2.
WIDE: dict[str, Any] = {"hidden_size": 320, "num_hidden_layers": 1, "num_attention_heads": 5, "intermediate_size": 320}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
BERT = {"type": "bert", "options": {**WIDE, **NO_DROPOUT, "max_position_embeddings": 20}}
VIT = {"type": "vit", "options": {**WIDE, **NO_DROPOUT, "patch_size": 8}}
DEEP = {"num_hidden_layers": 2}
WIDE_TOKENS = (6, 20)  # of each rank's texts: its windows are fewer than the other's, its calls must not be
WIDE_MODELS: dict[str, dict[str, Any]] = {
    "siglip's pooler": {
        "image": {"type": "siglip_vision_model", "options": {**WIDE, "patch_size": 8}, "pooling": "pooler"},
        "text": {
            "type": "siglip_text_model",
            "options": {**WIDE, "projection_size": 320, "max_position_embeddings": 20},
            "pooling": "pooler",
        },
    },
    "windows": {"text": {**BERT, "windows": {"tokens": 8, "layers": 1, "heads": 5}}},
    "activation checkpointing": {
        "image": {**VIT, "options": {**VIT["options"], **DEEP}, "activation_checkpointing": True},
        "text": {**BERT, "options": {**BERT["options"], **DEEP}, "activation_checkpointing": True},
    },
}


def model_config(dropout: float = 0.0, layers: int = 1) -> ModelConfig:
    attention = {"width": 8, "layers": 1, "heads": 2, "dropout": dropout}
    return dual_encoder(
        transformer(
            12, layers=layers, intermediate=18, dropout=dropout
        ),  # no number of ranks cuts 12 × 18 between rows
        vocabulary_size=VOCABULARY,
        bias=-3.0,
        fusion={"kind": "both_directions", **attention},
        heads=["masked_language", "masked_image", "classes"],
        decoder=attention,
    )


def learner(objectives: dict[str, Any], **model: Any) -> Learner:
    return fresh_learner(model_config(**model), objectives, special=SPECIAL, classes=CLASSES)


def batch(step: int, rows: int = ROWS) -> Batch:
    """This rank's rows of a global batch with texts of different lengths; the last row of all is padding."""
    everything = rows * dist.get_world_size()
    random = torch.Generator().manual_seed(1000 + step)
    lengths = torch.randint(3, TOKENS + 1, (everything, 1), generator=random)
    whole = random_batch(
        step,
        everything,
        token_mask=(torch.arange(TOKENS) < lengths).long(),
        real=torch.arange(everything) < everything - 1,
        targets={
            "label": torch.randint(-1, CLASSES, (everything,), generator=random),
            "answer_scores": torch.rand(everything, CLASSES, generator=random),
        },
    )
    return rows_of(whole, slice(dist.get_rank() * rows, (dist.get_rank() + 1) * rows))


def engine_of(module: Learner, zero_stage: int, name: str = "adamw", **changes: Any) -> Any:
    settings: dict[str, Any] = {
        "optimizer": {"name": name, "learning_rate": 0.01, "warmup_steps": 0, "gradient_clipping": 0.3},
        "zero_stage": zero_stage,
        "global_batch_size": ROWS * dist.get_world_size(),
        "ema_decay": 0.5,
    }
    return build_engine(module, TrainingConfig.model_validate(settings | changes), total_steps=6)


def train(engine: Any, first: int, last: int) -> list[float]:
    """The steps after `first`; their losses over all ranks."""
    losses = []
    for step in range(first + 1, last + 1):
        loss, _ = descend(engine, batch(step), step)
        engine.step()
        losses += mean_over_ranks(loss)
    return losses


def states(engine: Any) -> dict[str, dict[str, Tensor]]:
    model = engine.module.model
    return {"last": whole_state(model), "average": whole_state(model, engine)}


# --- the acts -------------------------------------------------------------------------------------------------------


def optimizers(directory: Path) -> dict[Any, Any]:
    """Three steps by each optimizer at each ZeRO stage, and with its states offloaded."""
    results = {}
    whole = [(name, 0) for name in ("adamw", "muon", "lamb")]
    for offload, cases in ((False, (*whole, *SHARDED)), (True, OFFLOADED)):
        for name, stage in cases:
            engine = engine_of(learner({"contrastive": {}}), stage, name, offload_optimizer=offload)
            losses = train(engine, 0, 3)
            results[name, stage, offload] = {**states(engine), "losses": losses}
    return results


def restarts(directory: Path) -> dict[Any, Any]:
    """Four steps, and two with two more by an engine that loads what the first one saved."""
    results = {}
    for stage, name in RESTARTED.items():
        engine = engine_of(learner({"contrastive": {}}), stage, name)
        train(engine, 0, 2)
        engine.save_checkpoint(str(directory / f"saved-{stage}"), tag="state", save_latest=False)
        train(engine, 2, 4)
        results[stage, "straight"] = states(engine)
        engine = engine_of(learner({"contrastive": {}}), stage, name)
        engine.load_checkpoint(str(directory / f"saved-{stage}"), tag="state")
        train(engine, 2, 4)
        results[stage, "restarted"] = states(engine)
    return results


def gradients(directory: Path) -> dict[Any, Any]:
    """Each objective's gradient against one process's, in micro-batches; of each kind one at each ZeRO stage."""
    results = compared(OBJECTIVES, 2, micro_batch_size=2)
    for stage in (0, 1, 3):
        results |= compared({name: OBJECTIVES[name] for name in OF_EACH_KIND}, stage, micro_batch_size=2)
    return results


def compared(objectives: dict[str, Any], stage: int, micro_batch_size: int | None) -> dict[Any, Any]:
    training = TrainingConfig(zero_stage=stage, micro_batch_size=micro_batch_size)
    check = small_check(model_config(), ObjectivesConfig.model_validate(objectives), training)
    return {
        (result.objective, stage): (result.error, result.largest, result.equal) for result in compare_gradients(check)
    }


def broken(directory: Path) -> dict[Any, Any]:
    """At once, by ranks that exchange rows without gradients."""
    check.all_ranks = lambda: replace(all_ranks(), gather=lambda rows: gather_rows(rows.detach()))
    return compared({"contrastive": {}, "classification": {}}, 2, micro_batch_size=None)


def together(directory: Path) -> dict[Any, Any]:
    """All objectives at once: losses and their parts over three steps, whole and in uneven micro-batches."""
    results = {}
    for micro_rows in (None, MICRO_ROWS):
        engine = engine_of(learner(OBJECTIVES), 2, micro_batch_size=micro_rows)
        steps = []
        for step in range(1, 4):
            loss, parts = descend(engine, batch(step), step)
            engine.step()
            steps.append(dict(zip(("loss", *parts), mean_over_ranks(loss, *parts.values()), strict=True)))
        results[micro_rows] = (steps, engine.global_steps, engine.gradient_accumulation_steps())
    return results


def dropout(directory: Path) -> dict[Any, Any]:
    """A gradient in micro-batches of two where units are dropped, and the same of one graph over all of them."""
    import deepspeed

    objectives = {"contrastive": {}, "masked_language": {"share": 0.4}}
    rate, rows, cuts = 1024.0, 6, [slice(0, 2), slice(2, 4), slice(4, 6)]
    module = learner(objectives, dropout=0.3)
    one_graph = copy.deepcopy(module)
    engine, *_ = deepspeed.initialize(
        model=module,
        optimizer=torch.optim.SGD(module.parameters(), lr=rate),
        config=engine_settings(TrainingConfig(zero_stage=1, micro_batch_size=2), rows, clipped=False),
        dist_init_required=False,
    )
    before = whole_state(module.model)
    torch.manual_seed(dist.get_rank())
    descend(engine, batch(1, rows), 1)
    engine.step()
    after = whole_state(module.model)

    whole = batch(1, rows)
    known = one_graph.rows(whole)
    places = one_graph.count_places(whole, 1, known, cuts)
    micro = [MicroBatch(known.micro_batch(cut, 3), places, gradients={}) for cut in cuts]
    torch.manual_seed(dist.get_rank())
    drawn, embedded = [], []
    for cut, micro_batch in zip(cuts, micro, strict=True):
        drawn.append(torch.get_rng_state())
        embedded.append(one_graph(rows_of(whole, cut), 1, MicroBatch(micro_batch.rows, places))[1])
    outputs = one_graph.outputs(one_graph.model, one_graph.config, whole, 1, known, shapes_only=True)
    outputs.image_embedding = torch.cat([parts["image_embedding"] for parts in embedded])
    outputs.text_embedding = torch.cat([parts["text_embedding"] for parts in embedded])
    loss = total(outputs, ObjectivesConfig.model_validate({"contrastive": {}}).named, 1)[0]
    for cut, micro_batch, state in zip(cuts, micro, drawn, strict=True):
        torch.set_rng_state(state)
        loss = loss + one_graph(rows_of(whole, cut), 1, micro_batch)[0] / 3
    loss.backward()
    weights = one_graph.model.named_parameters()
    expected = {name: weight.grad for name, weight in weights if weight.grad is not None}
    for gradient in expected.values():
        dist.all_reduce(gradient)
        gradient /= dist.get_world_size()
    return {"found": {name: (before[name] - after[name]) / rate for name in expected if after}, "expected": expected}


class Kept:
    """A tensor that a graph keeps for its backward pass; the bytes of all of them, now and at most."""

    now = most = 0

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        Kept.now += tensor.numel() * tensor.element_size()
        Kept.most = max(Kept.most, Kept.now)

    def __del__(self) -> None:
        Kept.now -= self.tensor.numel() * self.tensor.element_size()


def memory(directory: Path) -> dict[Any, Any]:
    """The most bytes that graphs keep in a step of 32 rows a rank, all at once and by fours."""
    results = {}
    for micro_rows in (None, 4):
        module = learner({"contrastive": {}}, layers=3)
        engine = engine_of(module, 2, global_batch_size=32 * dist.get_world_size(), micro_batch_size=micro_rows)
        Kept.now = Kept.most = 0
        with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor):
            descend(engine, batch(1, 32), 1)
        engine.step()
        results[micro_rows] = Kept.most
    return results


def partitioned(directory: Path) -> dict[Any, Any]:
    """Two steps of parts that use their weights in unusual ways, whole and with half of every weight on each rank."""
    results = {}
    for name, changes in WIDE_MODELS.items():
        for stage in (0, 3):
            fields = SMALLEST_MODEL | {"max_tokens": 20, "vocabulary_size": None} | changes
            module = fresh_learner(ModelConfig.model_validate(fields), {}, special=MaskingTokens(None, (), 400))
            engine = engine_of(module, stage, global_batch_size=6)
            weights = [getattr(weight, "ds_tensor", weight).numel() for weight in module.parameters()]
            whole = [getattr(weight, "ds_numel", weight.numel()) for weight in module.parameters()]
            assert (weights != whole) == (stage == 3), "weights are too small, or too large"
            rank, losses = dist.get_rank(), []
            for step in range(2):
                loss, _ = descend(engine, random_batch(rank, 3, tokens=WIDE_TOKENS[rank], vocabulary=400), step)
                engine.step()
                losses += mean_over_ranks(loss)
            results[name, stage] = losses
    return results


# --- what they show -------------------------------------------------------------------------------------------------

ACTS = (optimizers, restarts, gradients, together, broken, dropout, memory, partitioned)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("sharded")
    perform("test_sharded", 2, directory, *(act.__name__ for act in ACTS))
    return directory


@pytest.mark.parametrize(("name", "stage"), SHARDED)
def test_a_sharded_optimizer_takes_the_step_of_the_whole_one(directory: Path, name: str, stage: int) -> None:
    by_case = result_of(directory, "optimizers")
    whole, sharded = by_case[name, 0, False], by_case[name, stage, False]
    assert sharded["losses"] == pytest.approx(whole["losses"], rel=1e-4)
    assert furthest(sharded["last"], whole["last"]) < TOLERANCE[name]
    assert furthest(sharded["average"], whole["average"]) < TOLERANCE[name]
    assert furthest(whole["last"], whole["average"]) > 1e-3


@pytest.mark.parametrize(("name", "stage"), OFFLOADED)
def test_offloaded_states_take_the_same_step(directory: Path, name: str, stage: int) -> None:
    offloaded, here = (result_of(directory, "optimizers")[name, stage, offload] for offload in (True, False))
    assert furthest(offloaded["last"], here["last"]) < TOLERANCE[name]
    assert furthest(offloaded["average"], here["average"]) < TOLERANCE[name]


def test_optimizers_differ(directory: Path) -> None:
    by_case = result_of(directory, "optimizers")
    for one, other in (("adamw", "muon"), ("muon", "lamb")):
        assert furthest(by_case[one, 2, False]["last"], by_case[other, 2, False]["last"]) > 1e-3


@pytest.mark.parametrize("stage", RESTARTED)
def test_weights_and_averages_after_a_restart_equal_an_unbroken_run_s(directory: Path, stage: int) -> None:
    by_case = result_of(directory, "restarts")
    for kind in ("last", "average"):
        assert furthest(by_case[stage, "straight"][kind], by_case[stage, "restarted"][kind]) == 0.0


@pytest.mark.parametrize(
    ("objective", "stage"),
    [*((name, 2) for name in OBJECTIVES), *((name, stage) for name in OF_EACH_KIND for stage in (0, 1, 3))],
)
def test_micro_batches_have_the_gradient_of_the_whole_batch(directory: Path, objective: str, stage: int) -> None:
    error, largest, equal = result_of(directory, "gradients")[objective, stage]
    assert largest > 1e-2
    assert error < 1e-6 * largest
    assert equal


def test_the_selfcheck_finds_a_gather_that_loses_its_gradient(directory: Path) -> None:
    by_case = result_of(directory, "broken")
    assert not by_case["contrastive", 2][2]
    assert by_case["classification", 2][2]


def test_micro_batches_report_the_losses_of_the_whole_batch(directory: Path) -> None:
    by_size = result_of(directory, "together")
    whole, steps, parts = by_size[None]
    micro, micro_steps, micro_parts = by_size[MICRO_ROWS]
    assert (steps, parts) == (3, 1)
    assert (micro_steps, micro_parts) == (3, 3)  # five rows by twos
    for one, other in zip(micro, whole, strict=True):
        assert one == pytest.approx(other, rel=1e-4)
    assert set(whole[0]) == {"loss", *OBJECTIVES, "logit_scale", "logit_bias"}


def test_both_passes_of_a_micro_batch_drop_the_same_units(directory: Path) -> None:
    result = result_of(directory, "dropout")
    largest = max(float(gradient.abs().max()) for gradient in result["expected"].values())
    assert furthest(result["found"], result["expected"]) < 1e-6 * largest


def test_micro_batches_keep_less(directory: Path) -> None:
    most = result_of(directory, "memory")
    assert most[4] < 0.2 * most[None]  # an eighth of the rows, and the loss's own


@pytest.mark.parametrize("name", WIDE_MODELS)
def test_zero_3_trains_partitioned_weights_as_zero_0_does(directory: Path, name: str) -> None:
    by_case = result_of(directory, "partitioned")
    assert all(math.isfinite(loss) for loss in by_case[name, 3])
    assert by_case[name, 3] == pytest.approx(by_case[name, 0], rel=1e-5)
    assert by_case[name, 3][0] != pytest.approx(by_case[name, 3][1], rel=1e-5)  # the first step did train


if __name__ == "__main__":
    main(*ACTS)
