"""Batches: any position gives the batches that an uninterrupted run would have had, on any number of ranks."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from torch import Tensor

from mmflow.loading.batches import (
    Batch,
    BatchSettings,
    LoaderState,
    batches,
    choose_caption,
    normalise,
    pixels_tensor,
    prefetch,
)
from mmflow.loading.config import AugmentConfig
from mmflow.loading.reader import Caption, Reader
from mmflow.loading.tokens import train_tokenizer
from mmflow.loading.transforms import centre_view, decode
from mmflow.shards.dataset import Dataset

AUGMENT = AugmentConfig(max_zoom=1.3, max_shift=0.1, flip=0.5, brightness=0.2, token_dropout=0.2)
SETTINGS = BatchSettings(
    global_batch_size=7,
    image_pixels=16,
    max_tokens=8,
    window=20,
    seed=3,
    augment=AUGMENT,
    language_weights={"en": 0.5, "zh": 0.5},
)
STEPS = 5  # of an epoch: 31 samples in batches of 7, the last of them with 4 rows of padding


START = LoaderState()


@pytest.fixture(scope="module")
def reader(small_dataset: Dataset) -> Reader:
    return Reader(small_dataset, "train")


@pytest.fixture(scope="module")
def tokenizer(reader: Reader) -> Tokenizer:
    return train_tokenizer((caption.text for sample in reader for caption in sample.captions), 200)


def take(
    reader: Reader,
    tokenizer: Tokenizer,
    number: int,
    state: LoaderState = START,
    rank: int = 0,
    world_size: int = 1,
    settings: BatchSettings = SETTINGS,
) -> list[Batch]:
    return list(islice(batches(reader, tokenizer, settings, state, rank=rank, world_size=world_size), number))


def assert_same(found: Batch, expected: Batch) -> None:
    assert (found.keys, found.state) == (expected.keys, expected.state)
    for name in ("pixels", "token_ids", "token_mask", "real"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name


def test_shapes_and_types(reader: Reader, tokenizer: Tokenizer) -> None:
    (batch,) = take(reader, tokenizer, 1)
    assert (batch.pixels.shape, batch.pixels.dtype) == ((7, 3, 16, 16), torch.uint8)
    assert batch.pixels.is_contiguous(memory_format=torch.channels_last)
    assert batch.token_ids.shape == batch.token_mask.shape
    assert (batch.token_ids.dtype, batch.token_mask.dtype) == (torch.int64, torch.int64)
    assert (batch.real.shape, batch.real.dtype) == ((7,), torch.bool)


def test_an_epoch_has_every_sample_once_and_pads_its_last_batch(reader: Reader, tokenizer: Tokenizer) -> None:
    found = take(reader, tokenizer, 2 * STEPS)
    for epoch in (found[:STEPS], found[STEPS:]):
        keys = [key for batch in epoch for key, real in zip(batch.keys, batch.real, strict=True) if real]
        assert sorted(keys) == sorted(sample.key for sample in reader)
        assert [int(batch.real.sum()) for batch in epoch] == [7, 7, 7, 7, 3]
    assert [batch.keys for batch in found[:STEPS]] != [batch.keys for batch in found[STEPS:]]


def test_states_say_where_the_next_batch_begins(reader: Reader, tokenizer: Tokenizer) -> None:
    states = [batch.state for batch in take(reader, tokenizer, STEPS + 1)]
    assert states == [*(LoaderState(0, 7 * step) for step in range(1, STEPS)), LoaderState(1, 0), LoaderState(1, 7)]


def test_resume_from_any_state_gives_the_batches_of_an_uninterrupted_run(reader: Reader, tokenizer: Tokenizer) -> None:
    straight = take(reader, tokenizer, 2 * STEPS + 1)
    for done in range(len(straight) - 1):
        for found, expected in zip(
            take(reader, tokenizer, 2, straight[done].state), straight[done + 1 :], strict=False
        ):
            assert_same(found, expected)


@pytest.mark.parametrize("world_size", [2, 3, 7, 9])
def test_ranks_share_out_the_batches_of_one(reader: Reader, tokenizer: Tokenizer, world_size: int) -> None:
    whole = take(reader, tokenizer, STEPS)
    parts = [take(reader, tokenizer, STEPS, rank=rank, world_size=world_size) for rank in range(world_size)]
    for step, batch in enumerate(whole):
        ranks = [part[step] for part in parts]
        assert len({len(each.keys) for each in ranks}) == 1
        assert all(each.state == batch.state for each in ranks)
        keys = [key for each in ranks for key, real in zip(each.keys, each.real, strict=True) if real]
        assert keys == [key for key, real in zip(batch.keys, batch.real, strict=True) if real]
        pixels = torch.cat([each.pixels[each.real] for each in ranks])
        assert torch.equal(pixels, batch.pixels[batch.real])


def test_resume_on_other_world_size_repeats_nothing(reader: Reader, tokenizer: Tokenizer) -> None:
    first = [take(reader, tokenizer, 2, rank=rank, world_size=3) for rank in range(3)]
    state = first[0][-1].state
    rest = [take(reader, tokenizer, STEPS - 2, state, rank=rank, world_size=2) for rank in range(2)]
    keys = [
        key for rank in first + rest for batch in rank for key, real in zip(batch.keys, batch.real, strict=True) if real
    ]
    assert sorted(keys) == sorted(sample.key for sample in reader)


def test_a_sample_has_another_view_each_epoch_and_the_plain_one_without_augmentation(
    reader: Reader, tokenizer: Tokenizer
) -> None:
    def views(settings: BatchSettings, epoch: int) -> dict[str, Tensor]:
        found = take(reader, tokenizer, STEPS, LoaderState(epoch), settings=settings)
        return {key: pixels for batch in found for key, pixels in zip(batch.keys, batch.pixels, strict=True)}

    first, second = views(SETTINGS, 0), views(SETTINGS, 1)
    assert all(not torch.equal(first[key], second[key]) for key in first)
    plain = views(replace(SETTINGS, augment=AugmentConfig()), 0)
    for sample in reader:
        expected = centre_view(decode(sample.image, sample.extension, 16), 16)
        assert torch.equal(plain[sample.key].permute(1, 2, 0), torch.from_numpy(expected.copy()))


def test_captions_belong_to_their_pictures(reader: Reader, tokenizer: Tokenizer) -> None:
    settings = replace(SETTINGS, augment=AugmentConfig(), max_tokens=32)
    captions = {sample.key: [caption.text for caption in sample.captions] for sample in reader}
    for batch in take(reader, tokenizer, STEPS, settings=settings):
        for key, ids, mask in zip(batch.keys, batch.token_ids, batch.token_mask, strict=True):
            encoded = [tokenizer.encode(text).ids for text in captions[key]]
            assert ids[mask.bool()].tolist() in encoded


def test_seeds_give_other_orders(reader: Reader, tokenizer: Tokenizer) -> None:
    other = take(reader, tokenizer, 1, settings=replace(SETTINGS, seed=4))
    assert take(reader, tokenizer, 1)[0].keys != other[0].keys


# --- captions and pixels --------------------------------------------------------------------------------------------


def chosen(weights: dict[str, float], languages: tuple[str, ...], draws: int = 4000) -> Counter[str]:
    captions = tuple(Caption(f"{number} {language}", language) for number, language in enumerate(languages))
    random = np.random.default_rng(0)
    return Counter(choose_caption(captions, weights, random) for _ in range(draws))


@pytest.mark.parametrize(
    ("weights", "languages", "shares"),
    [
        ({"en": 0.6, "zh": 0.4}, ("en", "zh"), {"0 en": 0.6, "1 zh": 0.4}),
        ({"en": 3}, ("en", "fr"), {"0 en": 0.75, "1 fr": 0.25}),  # a language not named weighs 1
        ({}, ("en", "en", "zh", "zh"), {"0 en": 0.25, "1 en": 0.25, "2 zh": 0.25, "3 zh": 0.25}),
        ({"zh": 0}, ("en", "zh"), {"0 en": 1.0}),
        ({"en": 0}, ("en", "zh"), {"1 zh": 1.0}),
        ({"en": 0, "zh": 0}, ("en", "zh"), {"0 en": 1.0}),
    ],
)
def test_captions_are_drawn_by_their_language_s_weight(
    weights: dict[str, float], languages: tuple[str, ...], shares: dict[str, float]
) -> None:
    counts = chosen(weights, languages)
    assert set(counts) == set(shares)
    for text, share in shares.items():
        assert abs(counts[text] / 4000 - share) < 0.03  # four deviations


def test_choosing_a_caption_draws_as_much_whatever_there_is_to_choose_from() -> None:
    after = []
    for languages in (("en",), ("en", "zh"), ("zh",)):
        random = np.random.default_rng(5)
        choose_caption(tuple(Caption("text", language) for language in languages), {"zh": 0}, random)
        after.append(random.random())
    assert len(set(after)) == 1


def test_normalise_takes_mean_and_deviation_of_pixels_from_0_to_1() -> None:
    pixels = torch.randint(0, 256, (2, 3, 5, 4), dtype=torch.uint8)
    mean, std = (0.1, 0.5, 0.7), (0.2, 0.5, 0.9)
    expected = (pixels / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    torch.testing.assert_close(normalise(pixels, mean, std), expected, atol=1e-5, rtol=1e-5)


def test_pixels_tensor_turns_pictures_without_copying_order() -> None:
    views = [np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8) for seed in range(2)]
    tensor = pixels_tensor(views)
    assert tensor.shape == (2, 3, 4, 4)
    assert tensor[1, 2, 3, 0] == views[1][3, 0, 2]


# --- prefetch -------------------------------------------------------------------------------------------------------


def loader_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "mmflow-loader"]


def wait_until_no_loader_is_left() -> None:
    deadline = time.monotonic() + 20
    while loader_threads():
        assert time.monotonic() < deadline, "the loader's thread goes on"
        time.sleep(0.01)


def test_prefetched_batches_are_the_same_in_the_same_order(reader: Reader, tokenizer: Tokenizer) -> None:
    source = batches(reader, tokenizer, SETTINGS, LoaderState(), rank=0, world_size=1)
    ready = prefetch(source, 2)
    for found, expected in zip(islice(ready, STEPS + 2), take(reader, tokenizer, STEPS + 2), strict=True):
        assert_same(found, expected)
    assert len(loader_threads()) == 1
    ready.close()
    wait_until_no_loader_is_left()


def test_prefetch_raises_the_producer_s_error_after_the_batches_before_it_and_ends_its_thread(
    reader: Reader, tokenizer: Tokenizer
) -> None:
    (batch,) = take(reader, tokenizer, 1)

    def failing() -> Iterator[Batch]:
        yield batch
        yield batch
        raise ZeroDivisionError("in the thread")

    ready = prefetch(failing(), 5)
    assert next(ready) is batch
    assert next(ready) is batch
    with pytest.raises(ZeroDivisionError, match="in the thread"):
        next(ready)
    wait_until_no_loader_is_left()


def test_prefetch_of_a_source_that_ends_ends(reader: Reader, tokenizer: Tokenizer) -> None:
    two = take(reader, tokenizer, 2)
    assert list(prefetch(iter(two), 1)) == two
    wait_until_no_loader_is_left()


def test_prefetch_prepares_no_more_than_its_depth_ahead(reader: Reader, tokenizer: Tokenizer) -> None:
    (batch,) = take(reader, tokenizer, 1)
    produced = []

    def counting() -> Iterator[Batch]:
        while True:
            produced.append(1)
            yield batch

    ready = prefetch(counting(), 3)
    next(ready)
    time.sleep(0.3)
    assert len(produced) == 5  # one taken, three waiting, one in the producer's hand
    ready.close()
    wait_until_no_loader_is_left()
