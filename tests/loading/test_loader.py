"""The loader: any state gives the batches of an uninterrupted run, with any number of ranks and any kind of worker."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from mmflow.core.errors import MissingArtifactError, MisuseError, TrainingError
from mmflow.dataset.opened import Dataset, open_dataset
from mmflow.dataset.reader import Reader
from mmflow.loading.batches import Batch, assemble, load_slots
from mmflow.loading.config import AugmentConfig, LoaderConfig, MixedDatasetConfig, MixtureConfig, WorkersConfig
from mmflow.loading.loader import Loader
from mmflow.loading.opening import open_loader, open_readers, steps_per_epoch
from mmflow.loading.plan import LoaderState, rank_slice
from mmflow.loading.tokens import special_tokens, train_tokenizer
from mmflow.loading.workers import NAME
from tests.dataset.handmade import Handmade, write_dataset
from tests.loading.conftest import worker_processes

pytestmark = pytest.mark.usefixtures("no_worker_is_left")

BATCH, STEPS = 7, 5  # of an epoch: 31 samples, the last batch with 4 rows of padding
AUGMENT = AugmentConfig(max_zoom=1.3, max_shift=0.1, flip=0.5, brightness=0.2, token_dropout=0.2)
CONFIG = LoaderConfig(window=6, lanes=3, augment=AUGMENT, language_weights={"en": 0.5, "zh": 0.5})
START = LoaderState()


@pytest.fixture(scope="module")
def tokenizer(small_dataset: Dataset) -> Tokenizer:
    samples = Reader(small_dataset, "train")
    return train_tokenizer((caption.text for sample in samples for caption in sample.captions), 200)


@pytest.fixture(scope="module")
def other_dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    samples = [Handmade(key=f"other-{n}", captions=[{"language": "en", "text": f"other {n}"}]) for n in range(11)]
    return write_dataset(tmp_path_factory.mktemp("other") / "dataset", [("train", samples[:4]), ("train", samples[4:])])


def loader_of(
    dataset: Dataset, tokenizer: Tokenizer, config: LoaderConfig = CONFIG, batch: int = BATCH, **options: Any
) -> Loader:
    return open_loader(
        config, dataset, tokenizer, global_batch_size=batch, image_pixels=16, max_tokens=8, seed=3, **options
    )


def with_workers(kind: Literal["threads", "processes"], count: int, **changes: Any) -> LoaderConfig:
    return CONFIG.model_copy(update={"workers": WorkersConfig(kind=kind, count=count), **changes})


def stored(state: LoaderState) -> LoaderState:
    """The state as a checkpoint gives it back."""
    return LoaderState(**json.loads(json.dumps(asdict(state))))


def take(loader: Loader, number: int) -> list[Batch]:
    with closing(iter(loader)) as batches:
        return list(islice(batches, number))


def batch_at(loader: Loader, state: LoaderState) -> Batch:
    """The batch that begins at `state`, without workers."""
    slots = rank_slice(loader.order.batch(state), loader.rank, loader.world_size)
    pixels = np.empty((len(slots), 1, 16, 16, 3), np.uint8)
    rows = load_slots(loader.readers, loader.tokenizer, loader.settings, slots, pixels)
    return assemble(rows, pixels, loader.order.after(state), loader.settings, special_tokens(loader.tokenizer).pad)


def straight(loader: Loader, number: int, state: LoaderState = START) -> list[Batch]:
    """Batches made one after another, without workers."""
    batches = []
    for _ in range(number):
        batches.append(batch_at(loader, state))
        state = batches[-1].state
    return batches


def real_keys(batches: Sequence[Batch]) -> list[str]:
    return [key for batch in batches for key, real in zip(batch.keys, batch.real.tolist(), strict=True) if real]


def assert_same(batch: Batch, expected: Batch) -> None:
    assert (batch.keys, batch.state, batch.skipped) == (expected.keys, expected.state, expected.skipped)
    for name in ("pixels", "token_ids", "token_mask", "real"):
        assert torch.equal(getattr(batch, name), getattr(expected, name)), name


def whole(ranks: Sequence[Batch]) -> list[tuple[str, bytes, list[int]]]:
    """The real rows of a global batch in the order of its slots: key, pixels, tokens without their padding."""
    assert len({len(batch.keys) for batch in ranks}) == 1
    assert len({batch.state for batch in ranks}) == 1
    return [
        (
            batch.keys[row],
            batch.pixels[row].numpy().tobytes(),
            batch.token_ids[row][batch.token_mask[row].bool()].tolist(),
        )
        for batch in ranks
        for row in range(len(batch.keys))
        if batch.real[row]
    ]


# --- order and resume -----------------------------------------------------------------------------------------------


def test_an_epoch_has_every_sample_once_and_pads_its_last_batch(small_dataset: Dataset, tokenizer: Tokenizer) -> None:
    batches = take(loader_of(small_dataset, tokenizer), 2 * STEPS)
    for epoch in (batches[:STEPS], batches[STEPS:]):
        assert sorted(real_keys(epoch)) == sorted(sample.key for sample in Reader(small_dataset, "train"))
        assert [int(batch.real.sum()) for batch in epoch] == [7, 7, 7, 7, 3]
    assert real_keys(batches[:STEPS]) != real_keys(batches[STEPS:])
    assert batches[STEPS - 1].state == LoaderState(1, 0)


def test_the_state_counts_consumed_batches_not_prepared_ones(small_dataset: Dataset, tokenizer: Tokenizer) -> None:
    loader = loader_of(small_dataset, tokenizer)
    with closing(iter(loader)) as batches:
        for expected in (LoaderState(0, 7), LoaderState(0, 14)):
            assert next(batches).state == loader.state == expected
            time.sleep(0.05)
    assert_same(take(loader, 1)[0], batch_at(loader, LoaderState(0, 14)))


def test_a_state_stored_as_json_resumes_at_any_step(small_dataset: Dataset, tokenizer: Tokenizer) -> None:
    expected = straight(loader_of(small_dataset, tokenizer), 2 * STEPS + 2)
    for done in range(2 * STEPS):
        before = loader_of(small_dataset, tokenizer)
        take(before, done)
        after = loader_of(small_dataset, tokenizer, state=stored(before.state))
        for resumed, uninterrupted in zip(take(after, 2), expected[done:], strict=False):
            assert_same(resumed, uninterrupted)


@settings(max_examples=25)
@given(
    batch=st.integers(1, 40),
    world_sizes=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    buckets=st.integers(1, 3),
    window=st.integers(1, 40),
    lanes=st.integers(1, 8),
    stop=st.integers(0, 40),
)
def test_any_stop_and_any_world_sizes_give_the_same_global_batches(
    small_dataset: Dataset,
    tokenizer: Tokenizer,
    batch: int,
    world_sizes: list[int],
    buckets: int,
    window: int,
    lanes: int,
    stop: int,
) -> None:
    """More ranks than samples of a batch, batches larger than the dataset, bucketed by length or not."""
    config = CONFIG.model_copy(update={"window": window, "lanes": lanes, "bucket_batches": buckets})
    alone = loader_of(small_dataset, tokenizer, config, batch)
    steps = steps_per_epoch(config, small_dataset, batch)
    expected = straight(alone, steps)
    assert sorted(real_keys(expected)) == sorted(sample.key for sample in Reader(small_dataset, "train"))
    state = START if stop % steps == 0 else expected[stop % steps - 1].state
    for number in range(stop % steps, steps):
        world_size = world_sizes[number % len(world_sizes)]
        ranks = [
            batch_at(loader_of(small_dataset, tokenizer, config, batch, rank=rank, world_size=world_size), state)
            for rank in range(world_size)
        ]
        assert whole(ranks) == whole([expected[number]])
        state = ranks[0].state
    assert state == LoaderState(1, 0)


def test_mixed_datasets_have_cursors_of_their_own(
    small_dataset: Dataset, other_dataset: Dataset, tokenizer: Tokenizer
) -> None:
    mixture = MixtureConfig(datasets=[MixedDatasetConfig(uri=other_dataset.uri)], weighting="fixed", weights=[3, 1])
    config = CONFIG.model_copy(update={"mixture": mixture})
    loader = loader_of(small_dataset, tokenizer, config, batch=8)
    expected = straight(loader, 12)
    keys = real_keys(expected)
    assert all(sum(key.startswith("other") for key in batch.keys) == 2 for batch in expected)
    times = Counter(keys)
    assert {times[key] for key in times if key.startswith("other")} == {2, 3}  # 24 of 11
    assert {times[key] for key in times if not key.startswith("other")} == {2, 3}  # 72 of 31
    assert len(times) == 11 + 31
    assert expected[4].state == LoaderState(0, 40, (30, 10))
    ranks = [
        take(loader_of(small_dataset, tokenizer, config, 8, rank=rank, world_size=2, state=expected[4].state), 3)
        for rank in range(2)
    ]
    for first, second, batch in zip(*ranks, expected[5:8], strict=True):
        assert whole([first, second]) == whole([batch])


def test_clips_and_labels_follow_the_recipe(small_dataset: Dataset, tokenizer: Tokenizer) -> None:
    config = CONFIG.model_copy(update={"frames": 2, "label": "group"})
    loader = loader_of(small_dataset, tokenizer, config, classes=("group 1", "group 0"))
    (batch,) = take(loader, 1)
    assert batch.pixels.shape == (BATCH, 2, 3, 16, 16)
    assert batch.frame_mask is not None
    assert batch.frame_mask.tolist() == [[True, False]] * BATCH  # stills have one frame
    numbers = [int(key.removeprefix("key-")) % 3 for key in batch.keys]
    assert batch.targets["label"].tolist() == [{0: 1, 1: 0, 2: -1}[number] for number in numbers]


def test_settings_of_how_batches_are_made_do_not_change_the_identity() -> None:
    changes = {"workers": {"count": 7}, "prefetch_batches": 9, "cache": {"max_bytes": 5}, "max_skipped": 3}
    changed = LoaderConfig.model_validate({**changes, "on_corrupt": "skip"})
    assert changed.identity() == LoaderConfig().identity() != LoaderConfig(window=5).identity()


# --- workers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "count"), [("threads", 1), ("threads", 5), ("processes", 1), ("processes", 3)])
def test_batches_are_bit_equal_for_all_kinds_of_workers(
    small_dataset: Dataset, tokenizer: Tokenizer, kind: Literal["threads", "processes"], count: int
) -> None:
    loader = loader_of(small_dataset, tokenizer, with_workers(kind, count, prefetch_batches=2))
    for batch, expected in zip(take(loader, STEPS + 2), straight(loader, STEPS + 2), strict=True):
        assert_same(batch, expected)


@pytest.mark.parametrize(("cores", "processes"), [(4, 0), (5, 5)])
def test_each_core_of_a_rank_is_a_worker_a_thread_up_to_four_and_a_process_above(
    small_dataset: Dataset, tokenizer: Tokenizer, cores: int, processes: int
) -> None:
    """More threads than four wait for the interpreter's lock."""
    with closing(iter(loader_of(small_dataset, tokenizer, cores=cores))) as batches:
        next(batches)
        threads = [thread for thread in threading.enumerate() if thread.name.startswith(f"{NAME}_")]
        assert len(worker_processes()) == processes
        assert processes or 1 < len(threads) <= cores


def test_a_killed_worker_ends_the_iteration_with_its_name(small_dataset: Dataset, tokenizer: Tokenizer) -> None:
    loader = loader_of(small_dataset, tokenizer, with_workers("processes", 2))
    with closing(iter(loader)) as batches:
        next(batches)
        victim = worker_processes()[0]
        os.kill(victim, signal.SIGKILL)
        began = time.monotonic()
        with pytest.raises(TrainingError, match=rf"loader worker process {victim} was killed by SIGKILL"):
            list(islice(batches, 100))
        assert time.monotonic() - began < 10


# --- bad input ------------------------------------------------------------------------------------------------------


@pytest.fixture
def damaged(small_dataset: Dataset, tmp_path: Path) -> Dataset:
    """One byte of one picture is not what was written."""
    shutil.copytree(small_dataset.uri, tmp_path / "copy")
    entry = small_dataset.index(small_dataset.shards("train")[1]).to_pylist()[5]
    tar = tmp_path / "copy" / "shards" / "00001.tar"
    body = bytearray(tar.read_bytes())
    body[entry["image_offset"] + 40] ^= 1
    tar.write_bytes(body)
    return open_dataset(str(tmp_path / "copy"))


def test_too_many_skipped_samples_end_the_iteration(damaged: Dataset, tokenizer: Tokenizer) -> None:
    with pytest.raises(TrainingError) as caught:
        take(loader_of(damaged, tokenizer, CONFIG.model_copy(update={"on_corrupt": "skip", "max_skipped": 0})), STEPS)
    assert "loader.max_skipped: 1 samples were skipped since the start, at most 0 may be" in str(caught.value)
    assert "key-14" in str(caught.value)
    # A sample is counted once, however many epochs it is met in.
    loader = loader_of(damaged, tokenizer, CONFIG.model_copy(update={"on_corrupt": "skip", "max_skipped": 1}))
    take(loader, 3 * STEPS)
    assert loader.state.epoch == 3


def test_a_missing_shard_is_named_before_the_first_batch(
    small_dataset: Dataset, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    shutil.copytree(small_dataset.uri, tmp_path / "copy")
    (tmp_path / "copy" / "shards" / "00003.tar").unlink()
    with pytest.raises(MissingArtifactError, match=r"00003\.tar: no such file"):
        loader_of(open_dataset(str(tmp_path / "copy")), tokenizer)


# --- opening ----------------------------------------------------------------------------------------------------------


def mixed(*datasets: dict[str, str]) -> LoaderConfig:
    return LoaderConfig.model_validate({"mixture": {"datasets": datasets}})


def test_a_missing_split_is_named_by_its_key(small_dataset: Dataset) -> None:
    with pytest.raises(MisuseError, match=r"^loader\.split: .* has no split 'trian'; it has dev, train$"):
        open_readers(LoaderConfig(split="trian"), small_dataset)
    here = {"uri": small_dataset.uri}
    with pytest.raises(MisuseError, match=r"^loader\.mixture\.datasets\.1\.split: .* has no split 'test'; it has"):
        open_readers(mixed(here, here | {"split": "test"}), small_dataset)


def test_a_missing_mixed_dataset_is_named_by_its_key(small_dataset: Dataset, tmp_path: Path) -> None:
    with pytest.raises(MissingArtifactError, match=rf"^loader\.mixture\.datasets\.0\.uri: {tmp_path}/nowhere"):
        open_readers(mixed({"uri": str(tmp_path / "nowhere")}), small_dataset)
