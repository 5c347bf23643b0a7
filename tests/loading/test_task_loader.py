"""Batches of several tasks: the weights decide the turns, and each task continues where it was."""

from __future__ import annotations

import json
from contextlib import closing
from dataclasses import asdict
from itertools import islice
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer

from mmflow.core.errors import RecipeError
from mmflow.dataset.opened import Dataset
from mmflow.loading.batches import Batch
from mmflow.loading.config import LoaderConfig
from mmflow.loading.loader import START, TaskLoader
from mmflow.loading.opening import open_loader
from mmflow.loading.plan import LoaderState
from mmflow.loading.tokens import train_tokenizer
from tests.dataset.handmade import Handmade, write_dataset

BATCH, STEPS = 4, 12
WEIGHTS = (3.0, 1.0)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(["picture 0 1 2 3 4 5 6 7 8 9", "other"], 100)


@pytest.fixture(scope="module")
def datasets(small_dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> tuple[Dataset, ...]:
    samples = [Handmade(key=f"other-{n}", captions=[{"language": "en", "text": f"other {n}"}]) for n in range(6)]
    return small_dataset, write_dataset(tmp_path_factory.mktemp("tasks") / "dataset", [("train", samples)])


def loader_of(
    datasets: tuple[Dataset, ...], tokenizer: Tokenizer, state: LoaderState = START, **ranks: Any
) -> TaskLoader:
    loaders = [
        open_loader(
            LoaderConfig(), dataset, tokenizer, global_batch_size=BATCH, image_pixels=16, max_tokens=8, seed=3, **ranks
        )
        for dataset in datasets
    ]
    return TaskLoader(loaders, WEIGHTS, state)


def batches(loader: TaskLoader, count: int) -> list[Batch]:
    with closing(iter(loader)) as source:
        return list(islice(source, count))


def test_turns_are_the_tasks_shares_and_the_same_on_every_rank(
    datasets: tuple[Dataset, ...], tokenizer: Tokenizer
) -> None:
    alone = batches(loader_of(datasets, tokenizer), STEPS)
    assert [batch.task for batch in alone].count(1) == STEPS / 4
    ranks = [batches(loader_of(datasets, tokenizer, rank=rank, world_size=2), STEPS) for rank in (0, 1)]
    for whole, *parts in zip(alone, *ranks, strict=True):
        assert {whole.task} == {batch.task for batch in parts}
        assert sorted(whole.keys) == sorted(key for batch in parts for key in batch.keys)
        assert {key.startswith("other") for key in whole.keys} == {whole.task == 1}


@pytest.mark.parametrize("step", [1, 5, 7])
def test_a_state_gives_the_batches_of_an_uninterrupted_run(
    datasets: tuple[Dataset, ...], tokenizer: Tokenizer, step: int
) -> None:
    expected = batches(loader_of(datasets, tokenizer), STEPS)
    saved = LoaderState(**json.loads(json.dumps(asdict(expected[step - 1].state))))
    for batch, again in zip(expected[step:], batches(loader_of(datasets, tokenizer, saved), STEPS - step), strict=True):
        assert (batch.task, batch.keys, batch.state) == (again.task, again.keys, again.state)
        assert torch.equal(batch.pixels, again.pixels)
    assert saved.position == BATCH * step


def test_places_tell_the_tasks_datasets_apart(datasets: tuple[Dataset, ...], tokenizer: Tokenizer) -> None:
    loader = loader_of(datasets, tokenizer)
    for batch in batches(loader, 4):
        assert batch.places is not None
        for key, (dataset, shard, row, _) in zip(batch.keys, batch.places.tolist(), strict=True):
            assert loader.readers[dataset].read(shard, row).key == key


def test_a_state_of_other_tasks_is_refused(datasets: tuple[Dataset, ...], tokenizer: Tokenizer) -> None:
    state = LoaderState(drawn=(1, 9), tasks=(START, START))
    with pytest.raises(RecipeError, match=r"^tasks: the checkpoint drew \[1, 9\], but these weights give"):
        loader_of(datasets, tokenizer, state)
