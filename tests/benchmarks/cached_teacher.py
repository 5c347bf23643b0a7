"""A cached teacher compared with a live one: distillation steps per second, with loader and optimizer."""

from __future__ import annotations

import time
from functools import partial
from typing import Any

from tests.benchmarks import data
from tests.benchmarks.measure import CORES, SCRATCH, SHARE, call, rounds
from tests.benchmarks.table import Row, faster

SAMPLES, SAMPLES_PER_SHARD = 1_024, 128
IMAGE_PIXELS, MAX_TOKENS, VIEWS, BATCH, SEED = 64, 24, 2, 64, 1
STUDENT, TEACHER = 256, 512  # widths: twice the width is four times the parameters
WARM_STEPS, SECONDS = 3, 20.0
GOAL = 2.0
PEERS = ()
VERSIONS = ("torch", "transformers", "ray")


def run() -> list[Row]:
    """ViT and BERT of six and four layers, the teacher twice as wide; soft labels and features."""
    prepared = call("tests.benchmarks.cached_teacher:prepare", samples=max(BATCH, round(SHARE * SAMPLES)))
    found = rounds({name: partial(_figure, name, prepared) for name in ("cached", "live")})
    ratio = prepared["teacher_parameters"] / prepared["student_parameters"]
    note = f"teacher of {ratio:.1f} times the student's parameters, fp32, batch {BATCH}, one process, {CORES} threads"
    return [
        faster("distillation step, cached teacher", found["cached"], "live teacher", found["live"], unit="steps/s",
               goal=GOAL, note=note),
    ]  # fmt: skip


def _figure(name: str, prepared: dict[str, Any]) -> float:
    caches = prepared["caches"] if name == "cached" else []
    arguments = {key: prepared[key] for key in ("dataset", "package")}
    return float(call("tests.benchmarks.cached_teacher:measure", caches=caches, **arguments))


# --- called in a process of its own -----------------------------------------------------------------------------------


def prepare(samples: int) -> dict[str, Any]:
    """Make a dataset, the teacher's package and its cache, once. Returns their folders and both models' parameters."""
    import shutil

    import ray

    from mmflow.core.storage import exists
    from mmflow.inference.runner import Pool
    from mmflow.inference.teacher_cache import with_caches
    from mmflow.learning.distillation import CacheConfig
    from mmflow.models.encoders import parameter_count
    from mmflow.models.model import build
    from mmflow.models.package import CARD, write_package
    from mmflow.training.job import TeacherPackage
    from tests.dataset.handmade import Handmade, write_dataset

    directory = SCRATCH / f"cached-teacher-{samples}-{TEACHER}"
    texts = [f"a picture of the number {number} and {number % 97} more" for number in range(samples)]
    if not exists(str(directory / "package" / CARD)):
        shutil.rmtree(directory, ignore_errors=True)
        handmade = [
            Handmade(key=f"key-{number}", captions=[{"language": "en", "text": text}], size=(96, 96))
            for number, text in enumerate(texts)
        ]
        starts = range(0, samples, SAMPLES_PER_SHARD)
        write_dataset(
            directory / "dataset", [("train", handmade[start : start + SAMPLES_PER_SHARD]) for start in starts]
        )
        tokenizer = data.tokenizer_of(str(directory / "dataset"), 500)
        config = _config(TEACHER)
        model = build("model", config, tokenizer.get_vocab_size(), seed=0)
        write_package(
            str(directory / "package"), state=model.state_dict(), config=config, tokenizer_json=tokenizer.to_str(),
            parameters=parameter_count(model), lineage={},
        )  # fmt: skip
    tokenizer = data.tokenizer_of(str(directory / "dataset"), 500)
    ray.init(address="local", num_cpus=CORES, include_dashboard=False, logging_level="ERROR")
    (cached,) = with_caches(
        [TeacherPackage(package=str(directory / "package"))], cache=CacheConfig(augmentations=VIEWS),
        dataset=str(directory / "dataset"),
        loader=_loader_config(), tokenizer=tokenizer, max_tokens=MAX_TOKENS, seed=SEED, workspace=str(directory),
        pool=Pool(num_workers=CORES), progress=lambda done, total, note: None,
    )  # fmt: skip
    ray.shutdown()
    parameters = {
        f"{who}_parameters": parameter_count(build("model", _config(width), tokenizer.get_vocab_size(), seed=0))
        for who, width in (("teacher", TEACHER), ("student", STUDENT))
    }
    return {
        "dataset": str(directory / "dataset"),
        "package": cached.package,
        "caches": list(cached.caches),
    } | parameters


def measure(dataset: str, package: str, caches: list[str]) -> float:
    """Steps per second of a student with a cached teacher or, without caches, a live one."""
    from contextlib import closing

    import torch

    from mmflow.dataset.opened import open_dataset
    from mmflow.learning.distillation import DistillationLossesConfig
    from mmflow.learning.learner import Learner
    from mmflow.learning.objectives import ObjectivesConfig
    from mmflow.learning.outputs import masking_tokens
    from mmflow.learning.student import Student
    from mmflow.loading.opening import open_loader
    from mmflow.models.model import build
    from mmflow.training.config import OptimizerConfig
    from mmflow.training.job import TeacherPackage, open_teachers
    from mmflow.training.optimizers import build_optimizer

    torch.set_num_threads(CORES)
    torch.manual_seed(0)
    opened, tokenizer = open_dataset(dataset), data.tokenizer_of(dataset, 500)
    config, losses = _config(STUDENT), DistillationLossesConfig()
    teachers = open_teachers(
        "distill", [TeacherPackage(package=package, caches=tuple(caches))], losses, tokenizer=tokenizer,
        max_tokens=MAX_TOKENS, frames=0, datasets=[opened.fingerprint],
    )  # fmt: skip
    model = build("model", config, tokenizer.get_vocab_size(), seed=0)
    learner = Learner(model, config, [ObjectivesConfig()], masking_tokens(tokenizer), seed=SEED)
    student = Student(learner, teachers, losses).train()
    descent = build_optimizer([{"params": list(student.parameters())}], OptimizerConfig())
    loader = open_loader(
        _loader_config(), opened, tokenizer, global_batch_size=BATCH, image_pixels=student.image_pixels,
        max_tokens=MAX_TOKENS, seed=SEED, stored_views=VIEWS, readings=student.readings,
    )  # fmt: skip
    with closing(iter(loader)) as batches:
        began, step = 0.0, 0
        while step <= WARM_STEPS or time.perf_counter() - began < SECONDS:
            if step == WARM_STEPS:
                began = time.perf_counter()
            loss, _ = student(next(batches), step)
            descent.zero_grad()
            loss.backward()
            descent.step()
            step += 1
        return (step - WARM_STEPS) / (time.perf_counter() - began)


def _loader_config() -> Any:
    from mmflow.loading.config import LoaderConfig

    return LoaderConfig.model_validate({"augment": {"max_zoom": 1.2, "max_shift": 0.05, "flip": 0.5}})


def _config(width: int) -> Any:
    from mmflow.models.config import ModelConfig

    options = {"hidden_size": width, "num_attention_heads": width // 64, "intermediate_size": 4 * width}
    return ModelConfig.model_validate(
        {
            "image": {"type": "vit", "options": {**options, "num_hidden_layers": 6, "patch_size": 16}},
            "text": {"type": "bert", "options": {**options, "num_hidden_layers": 4, "max_position_embeddings": 32}},
            "embedding_width": 256,
            "image_pixels": IMAGE_PIXELS,
            "max_tokens": MAX_TOKENS,
        }
    )
