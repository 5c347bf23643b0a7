"""A cached teacher gives what the live one does for the views that the student is shown; another cache is refused."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from mmflow.core.artifacts import Stage
from mmflow.core.errors import CorruptArtifactError, MissingArtifactError
from mmflow.dataset.opened import Dataset
from mmflow.inference.runner import Pool
from mmflow.inference.teacher_cache import TeacherCache, cache_stage, with_caches
from mmflow.learning.cached_embeddings import KIND, CachedTeacher, file_uri
from mmflow.learning.distillation import CacheConfig, DistillationLossesConfig
from mmflow.learning.learner import Learner
from mmflow.learning.objectives import ObjectivesConfig
from mmflow.learning.outputs import masking_tokens
from mmflow.learning.student import Student, Teacher
from mmflow.loading.batches import Batch
from mmflow.loading.config import LoaderConfig
from mmflow.loading.opening import open_loader, views_of
from mmflow.loading.tokens import tokenise, train_tokenizer
from mmflow.models.config import ModelConfig
from mmflow.models.model import build
from mmflow.models.package import LoadedModel, Package, load_package
from mmflow.training.job import TeacherPackage, open_teachers, views_of_teacher
from tests.dataset.handmade import Handmade, write_dataset
from tests.evaluation.models import written_package
from tests.learning.teaching import attending

SEED, VIEWS, BATCH = 5, 2, 8
LOADER = LoaderConfig.model_validate(
    {"window": 8, "lanes": 2, "augment": {"max_zoom": 1.3, "flip": 0.5, "token_dropout": 0.3}}
)
TEXTS = [f"a picture of number {number} in {colour}" for number, colour in enumerate(["red", "blue", "green"] * 8)]


def words(*more: str) -> Tokenizer:
    return train_tokenizer([*TEXTS, *more], 80)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """22 samples in three shards, the second of which is empty."""
    samples = [
        Handmade(key=f"key-{number}", captions=[{"language": "en", "text": TEXTS[number]}], size=(40, 32))
        for number in range(22)
    ]
    shards = [("train", samples[:13]), ("train", []), ("train", samples[13:])]
    return write_dataset(tmp_path_factory.mktemp("cached") / "dataset", shards)


def write_teacher(uri: Path, tokenizer: Tokenizer, seed: int = 1, **changes: Any) -> Package:
    config = ModelConfig.model_validate(attending(**changes))
    model = build("model", config, tokenizer.get_vocab_size(), seed=seed)
    return written_package(uri, LoadedModel(model, tokenizer, config))


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Package:
    return write_teacher(tmp_path_factory.mktemp("cached-teacher") / "package", words())


def task_of(dataset: Dataset, package: Package, precision: str = "fp16", **changes: Any) -> TeacherCache:
    """What `cached` caches, with changes of its views."""
    views = views_of_teacher(views_of(LOADER, image_pixels=0, max_tokens=8, seed=SEED), package, words())
    return TeacherCache(
        dataset=dataset.uri,
        split="train",
        package=package.uri,
        loader=LOADER,
        views=replace(views, **{"stored_views": VIEWS} | changes),
        precision=precision,
    )


def stage_of(task: TeacherCache) -> Stage:
    return cache_stage(task, Pool(), lambda done, total, note: None)


def cached(workspace: Path, dataset: Dataset, package: Package, precision: str = "fp16") -> TeacherPackage:
    (teacher,) = with_caches(
        [TeacherPackage(package=package.uri)],
        cache=CacheConfig.model_validate({"augmentations": VIEWS, "precision": precision}),
        dataset=dataset.uri,
        loader=LOADER,
        tokenizer=words(),
        max_tokens=8,
        seed=SEED,
        workspace=str(workspace),
        pool=Pool(),
        progress=lambda done, total, note: None,
    )
    return teacher


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory, dataset: Dataset, package: Package) -> Path:
    """With the caches of the package in both precisions. Read only."""
    path = tmp_path_factory.mktemp("cached-workspace")
    for precision in ("fp16", "bf16"):
        cached(path, dataset, package, precision)
    return path


def teachers(
    of: TeacherPackage, dataset: Dataset, losses: dict[str, Any], tokenizer: Tokenizer | None = None
) -> tuple[Teacher, ...]:
    return open_teachers(
        "distill",
        [of],
        DistillationLossesConfig.model_validate(losses),
        tokenizer=tokenizer or words(),
        max_tokens=8,
        frames=0,
        datasets=[dataset.fingerprint],
    )


def student(taught: tuple[Teacher, ...], losses: dict[str, Any]) -> Student:
    config = ModelConfig.model_validate(attending(layers=1))
    tokenizer = words()
    model = build("model", config, tokenizer.get_vocab_size(), seed=0)
    learner = Learner(model, config, [ObjectivesConfig()], masking_tokens(tokenizer), seed=0)
    return Student(learner, taught, DistillationLossesConfig.model_validate(losses))


def batches(dataset: Dataset, module: Student, count: int, stored_views: int = VIEWS) -> Iterator[Batch]:
    loader = open_loader(
        LOADER, dataset, words(), global_batch_size=BATCH, image_pixels=module.image_pixels, max_tokens=8, seed=SEED,
        stored_views=stored_views, readings=module.readings,
    )  # fmt: skip
    with closing(iter(loader)) as ready:
        for _ in range(count):
            yield next(ready)


@pytest.mark.parametrize(("precision", "close"), [("fp16", 1e-3), ("bf16", 1e-2)])
def test_a_cached_teacher_teaches_what_the_live_one_does(
    workspace: Path, dataset: Dataset, package: Package, precision: str, close: float
) -> None:
    """In every epoch, those past the stored augmentations among them."""
    losses = {"soft_labels": 1, "features": 1, "similarities": 1, "interactive": 1}
    of = cached(workspace, dataset, package, precision)
    from_cache = student(teachers(of, dataset, losses), losses)
    live = student(teachers(TeacherPackage(package=package.uri), dataset, losses), losses)
    seen = 0
    for batch in batches(dataset, live, 12):  # four epochs of three batches
        (loss, parts), (expected, wanted) = from_cache(batch, 1), live(batch, 1)
        torch.testing.assert_close(loss, expected, atol=close, rtol=close)
        assert parts.keys() == wanted.keys()
        seen += 1
    assert seen == 12


def test_the_teacher_is_only_loaded_for_what_its_cache_does_not_hold(
    workspace: Path, dataset: Dataset, package: Package
) -> None:
    of = cached(workspace, dataset, package)
    (alone,) = teachers(of, dataset, {"soft_labels": 1})
    assert alone.loaded is None
    losses = {"features": 1, "attention": {"sides": ["text"]}}
    (both,) = teachers(of, dataset, losses)
    assert both.loaded is not None
    assert both.cached is not None
    mixed = student((both,), losses)
    live = student(teachers(TeacherPackage(package=package.uri), dataset, losses), losses)
    for batch in batches(dataset, live, 2):
        torch.testing.assert_close(mixed(batch, 1)[0], live(batch, 1)[0], atol=1e-3, rtol=1e-3)


def test_stored_views_come_again_and_are_not_each_other(workspace: Path, dataset: Dataset, package: Package) -> None:
    module = student(teachers(cached(workspace, dataset, package), dataset, {"features": 1}), {"features": 1})
    views: dict[tuple[str, int], Any] = {}
    for batch in batches(dataset, module, 3 * 2 * VIEWS):  # each of them in two epochs
        assert batch.places is not None
        for row, key in enumerate(batch.keys):
            place = (key, int(batch.places[row, 3]))
            shown = (batch.pixels[row].numpy(), batch.token_ids[row][batch.token_mask[row].bool()].tolist())
            if place in views:
                assert np.array_equal(views[place][0], shown[0])
                assert views[place][1] == shown[1]
            views[place] = shown
    assert {view for _, view in views} == set(range(VIEWS))
    assert all(not np.array_equal(views[f"key-{n}", 0][0], views[f"key-{n}", 1][0]) for n in range(22))


def test_a_cache_is_built_once_and_again_for_what_would_be_other_views(
    workspace: Path, dataset: Dataset, package: Package, tmp_path: Path
) -> None:
    of = cached(workspace, dataset, package)
    stamp = (Path(of.caches[0]) / "manifest.json").stat().st_mtime_ns
    assert cached(workspace, dataset, package) == of
    assert (Path(of.caches[0]) / "manifest.json").stat().st_mtime_ns == stamp
    same = stage_of(task_of(dataset, package)).identity
    assert of.caches[0].endswith(f"{KIND}/{same}")
    other = write_teacher(tmp_path / "other", words(), seed=2)
    changes: list[dict[str, Any]] = [
        {"seed": 6},
        {"stored_views": 3},
        {"image_pixels": 24},
        {"max_tokens": 7},
        {"augment": LOADER.augment.model_copy(update={"flip": 0.0})},
        {"language_weights": {"en": 0.5}},
    ]
    found = {same, stage_of(task_of(dataset, other)).identity, stage_of(task_of(dataset, package, "bf16")).identity}
    found |= {stage_of(task_of(dataset, package, **change)).identity for change in changes}
    assert len(found) == 3 + len(changes)


def test_a_killed_build_goes_on_with_the_missing_shards(dataset: Dataset, package: Package, tmp_path: Path) -> None:
    (uri,) = cached(tmp_path, dataset, package).caches
    kept, gone = (Path(file_uri(uri, name)) for name in ("00000", "00002"))
    manifest, data, stamp = Path(uri, "manifest.json").read_bytes(), gone.read_bytes(), kept.stat().st_mtime_ns
    gone.unlink()
    Path(uri, "manifest.json").unlink()
    assert cached(tmp_path, dataset, package).caches == (uri,)
    assert (Path(uri, "manifest.json").read_bytes(), gone.read_bytes()) == (manifest, data)
    assert kept.stat().st_mtime_ns == stamp


@pytest.mark.parametrize("what", ["dataset", "teacher"])
def test_a_stale_cache_is_refused_by_digest(workspace: Path, dataset: Dataset, package: Package, what: str) -> None:
    of = cached(workspace, dataset, package)
    digests = {"dataset": dataset.fingerprint, "teacher": package.digest} | {what: "0" * 64}
    with pytest.raises(CorruptArtifactError, match=f"made of {what} .*, but this stage has 000000000000; delete it"):
        CachedTeacher(of.caches, [digests["dataset"]], digests["teacher"])


def test_a_damaged_file_is_refused_and_one_that_is_gone_is_named(
    workspace: Path, dataset: Dataset, package: Package, tmp_path: Path
) -> None:
    of = cached(workspace, dataset, package)
    copy = Path(shutil.copytree(of.caches[0], tmp_path / "copy"))
    path = Path(file_uri(str(copy), "00000"))
    whole = path.read_bytes()
    places = np.zeros((1, 4), np.int64)

    def read() -> None:
        CachedTeacher([str(copy)], [dataset.fingerprint], package.digest).read(places)

    read()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(CorruptArtifactError, match="damaged; delete"):
        read()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CorruptArtifactError, match="damaged"):
        read()
    path.unlink()
    with pytest.raises(MissingArtifactError, match="no such file; delete the cache and rerun"):
        read()


def test_a_teacher_of_another_tokenizer_and_size_is_cached_in_its_own(dataset: Dataset, tmp_path: Path) -> None:
    """The live one is shown the batch's other reading, at the size that is its own."""
    own = words("quite another vocabulary entirely")
    other = write_teacher(tmp_path / "package", own, image_pixels=24, max_tokens=10)
    views = task_of(dataset, other).views
    assert (views.image_pixels, views.max_tokens, views.augment.token_dropout) == (24, 10, 0.0)
    of = cached(tmp_path, dataset, other)
    (alone,) = teachers(of, dataset, {"features": 1})
    assert alone.cached is not None
    live = student(teachers(TeacherPackage(package=other.uri), dataset, {"features": 1}), {"features": 1})
    assert live.image_pixels == 24
    assert len(live.readings) == 1
    model = load_package(other)
    for batch in batches(dataset, live, 4):
        assert batch.places is not None
        ids, mask = batch.readings[0]
        for row, key in enumerate(batch.keys):
            text = TEXTS[int(key.removeprefix("key-"))]
            assert ids[row][mask[row].bool()].tolist() == tokenise(model.tokenizer, [text], 10)[0]
        image, text_embedding, scale = alone.cached.read(batch.places)
        learner = live.learner
        whole = replace(batch, token_ids=ids, token_mask=mask)
        outputs = learner.outputs(model.model, model.config, whole, 1, learner.rows(batch))
        torch.testing.assert_close(image, outputs.image_embedding, atol=1e-3, rtol=1e-2)
        torch.testing.assert_close(text_embedding, outputs.text_embedding, atol=1e-3, rtol=1e-2)
        torch.testing.assert_close(scale, outputs.scale.logit_scale)


def test_without_stored_views_every_epoch_has_its_own(dataset: Dataset, package: Package) -> None:
    live = student(teachers(TeacherPackage(package=package.uri), dataset, {"features": 1}), {"features": 1})
    epochs = {int(view) for batch in batches(dataset, live, 9, stored_views=0) for view in batch.places[:, 3]}  # type: ignore[index]
    assert epochs == {0, 1, 2}
