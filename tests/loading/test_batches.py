"""Batches: a slot depends only on its sample and epoch, rows become tensors, and bad samples stop or are skipped."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer

from mmflow.core.errors import CorruptArtifactError, MissingArtifactError, RecipeError
from mmflow.dataset.opened import Dataset, open_dataset
from mmflow.dataset.reader import Reader
from mmflow.imaging.decode import decode
from mmflow.loading.batches import BLANK, Batch, Row, ViewSettings, assemble, load_slots, normalise, pixels_tensor
from mmflow.loading.config import AugmentConfig
from mmflow.loading.plan import LoaderState, Slots
from mmflow.loading.tokens import train_tokenizer
from mmflow.loading.transforms import centre_view
from tests.dataset.handmade import Handmade, picture, write_dataset

SIDE = 16
SETTINGS = ViewSettings(
    seed=3, image_pixels=SIDE, max_tokens=12, augment=AugmentConfig(max_zoom=1.3, token_dropout=0.2)
)
PLAIN = replace(SETTINGS, augment=AugmentConfig())
QUESTIONS = [
    {"question": "what is it", "answers": ["cat", "dog"]},
    {"question": "is it red", "answers": ["yes"]},
    {"question": "why", "answers": []},
]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Twelve samples in two shards: every third a clip of five frames, every other with questions; three classes."""

    def sample(number: int) -> Handmade:
        captions = [{"language": language, "text": f"{language} words {number}"} for language in ("en", "zh", "fr")]
        metadata = {"classes": {"group": f"group {number % 3}"}, "questions": QUESTIONS} if number % 2 else {}
        return Handmade(
            key=f"key-{number}",
            captions=captions,
            metadata=metadata,
            size=(40, 32),
            num_frames=1 + 4 * (number % 3 == 0),
        )

    shards = [("train", [sample(number) for number in range(first, first + 6)]) for first in (0, 6)]
    return write_dataset(tmp_path_factory.mktemp("load") / "dataset", shards)


@pytest.fixture(scope="module")
def reader(dataset: Dataset) -> Reader:
    return Reader(dataset, "train")


@pytest.fixture(scope="module")
def tokenizer(reader: Reader) -> Tokenizer:
    words = ["what is it", "is it red", "why", "cat", "dog", "yes"]
    return train_tokenizer([*words, *(caption.text for sample in reader for caption in sample.captions)], 300)


def slots(*rows: tuple[int, int], epoch: int = 0, real: bool = True) -> Slots:
    shard, row = np.array(rows).T
    return Slots(np.zeros_like(row), shard, row, np.full_like(row, epoch), np.full(len(rows), real))


def load(
    reader: Reader, tokenizer: Tokenizer, places: Slots, settings: ViewSettings = SETTINGS
) -> tuple[list[Row], NDArray[np.uint8]]:
    pixels = np.zeros((len(places), max(1, settings.frames), SIDE, SIDE, 3), np.uint8)
    return load_slots([reader], tokenizer, settings, places, pixels), pixels


# --- rows -------------------------------------------------------------------------------------------------------------


def test_a_slot_does_not_depend_on_its_neighbours(reader: Reader, tokenizer: Tokenizer) -> None:
    places = [(0, 4), (1, 0), (0, 1), (1, 5)]
    together, pixels = load(reader, tokenizer, slots(*places, epoch=2))
    for number, place in enumerate(places):
        (alone,), its_pixels = load(reader, tokenizer, slots(place, epoch=2))
        assert (alone.key, alone.tokens) == (together[number].key, together[number].tokens)
        assert np.array_equal(its_pixels[0], pixels[number])


def test_epochs_and_seeds_give_other_views_and_no_augmentation_the_centre_view(
    reader: Reader, tokenizer: Tokenizer
) -> None:
    places = [(shard, row) for shard in range(2) for row in range(6)]
    first, first_pixels = load(reader, tokenizer, slots(*places))
    second, second_pixels = load(reader, tokenizer, slots(*places, epoch=1))
    assert [row.tokens for row in first] != [row.tokens for row in second]
    _, other_seed = load(reader, tokenizer, slots(*places), replace(SETTINGS, seed=4))
    for other in (second_pixels, other_seed):
        assert all(not np.array_equal(a, b) for a, b in zip(first_pixels, other, strict=True))
    _, plain = load(reader, tokenizer, slots(*places), PLAIN)
    for (shard, row), view in zip(places, plain, strict=True):
        sample = reader.read(shard, row)
        assert np.array_equal(view[0], centre_view(decode(sample.image, sample.extension, SIDE), SIDE))


def test_captions_are_drawn_by_their_language_s_weight(reader: Reader, tokenizer: Tokenizer) -> None:
    settings = replace(PLAIN, language_weights={"en": 0, "fr": 0})
    for epoch in range(20):
        rows, _ = load(reader, tokenizer, slots((0, 2), (1, 3), epoch=epoch), settings)
        assert [row.tokens for row in rows] == [tokenizer.encode(f"zh words {number}").ids for number in (2, 9)]


def test_questions_come_with_one_of_their_own_answers(reader: Reader, tokenizer: Tokenizer) -> None:
    settings = replace(PLAIN, text="questions", classes=("yes", "cat"))
    seen = set()
    for epoch in range(40):
        (row,), _ = load(reader, tokenizer, slots((0, 1), epoch=epoch), settings)
        answer = tokenizer.decode(row.answer_tokens[1:-1])
        seen.add((tokenizer.decode(row.tokens[1:-1]), answer, row.targets["answer"], tuple(row.scores.items())))
    assert seen == {
        ("what is it", "cat", 1, ((1, 0.5),)),
        ("what is it", "dog", -1, ((1, 0.5),)),
        ("is it red", "yes", 0, ((0, 1.0),)),
        ("why", "", -1, ()),
    }
    with pytest.raises(RecipeError, match=r"^loader\.text: questions, but sample key-0 has none"):
        load(reader, tokenizer, slots((0, 0)), settings)


def test_only_a_model_without_text_takes_samples_without_captions(tmp_path: Path, tokenizer: Tokenizer) -> None:
    samples = [Handmade(key="bare", captions=[], metadata={"classes": {"group": "a"}, "questions": QUESTIONS[1:2]})]
    reader = Reader(write_dataset(tmp_path / "dataset", [("train", samples)]), "train")
    settings = replace(PLAIN, label="group", classes=("a",))
    with pytest.raises(RecipeError, match=r"^loader\.text: captions, but sample bare has none; shard with"):
        load(reader, tokenizer, slots((0, 0)), settings)
    (row,), _ = load(reader, tokenizer, slots((0, 0)), replace(settings, reads_text=False))
    assert (row.targets, row.real) == ({"label": 0}, True)
    (row,), _ = load(reader, tokenizer, slots((0, 0)), replace(PLAIN, text="questions", classes=("yes",)))
    assert row.tokens == tokenizer.encode("is it red").ids


def test_clips_give_ascending_frames_and_are_blank_past_their_last(reader: Reader, tokenizer: Tokenizer) -> None:
    rows, pixels = load(reader, tokenizer, slots((0, 0), (0, 1), (0, 3)), replace(PLAIN, frames=3))
    assert [row.num_frames for row in rows] == [3, 1, 3]
    assert (pixels[1, 1:] == BLANK).all()
    for place, frames in (((0, 0), pixels[0]), ((0, 3), pixels[2])):
        sample = reader.read(*place)
        views = [centre_view(decode(body, sample.extension, SIDE), SIDE) for body in (sample.image, *sample.frames)]
        numbers = [next(n for n, view in enumerate(views) if np.array_equal(view, frame)) for frame in frames]
        assert numbers == sorted(set(numbers))
    (still,), _ = load(reader, tokenizer, slots((0, 0)))
    assert still.num_frames == 1


# --- bad samples ------------------------------------------------------------------------------------------------------


def flip_a_byte(directory: Path) -> None:
    """Damage the picture of row 2 of the first shard."""
    dataset = open_dataset(str(directory))
    entry = dataset.index(dataset.shards("train")[0]).to_pylist()[2]
    tar = directory / "shards" / "00000.tar"
    body = bytearray(tar.read_bytes())
    body[entry["image_offset"] + entry["image_bytes"] // 2] ^= 1
    tar.write_bytes(body)


@pytest.fixture
def damage(dataset: Dataset, tmp_path: Path) -> Callable[[Callable[[Path], None]], Reader]:
    """A reader of a damaged copy of the dataset."""

    def damaged(change: Callable[[Path], None]) -> Reader:
        shutil.copytree(dataset.uri, tmp_path / "copy")
        change(tmp_path / "copy")
        return Reader(open_dataset(str(tmp_path / "copy")), "train")

    return damaged


def test_a_corrupt_sample_stops_the_loading_with_its_shard_row_and_key(
    damage: Callable[[Callable[[Path], None]], Reader], tokenizer: Tokenizer
) -> None:
    with pytest.raises(CorruptArtifactError, match=r"00000\.tar: image of row 2 \(key-2\)"):
        load(damage(flip_a_byte), tokenizer, slots((0, 1), (0, 2)))


def test_a_skipped_sample_is_reported_and_becomes_padding(
    damage: Callable[[Callable[[Path], None]], Reader], tokenizer: Tokenizer, reader: Reader
) -> None:
    damaged = damage(flip_a_byte)
    settings = replace(SETTINGS, on_corrupt="skip", label="group", frames=2)
    places = slots((0, 1), (0, 2), (0, 3))
    rows, pixels = load(damaged, tokenizer, places, settings)
    sound, expected = load(reader, tokenizer, places, settings)
    assert [row.real for row in rows] == [True, False, True]
    assert (pixels[1] == BLANK).all()
    batch = assemble(rows, pixels, LoaderState(), settings, 0)
    assert (batch.keys[1], batch.targets["label"].tolist()[1]) == ("", -1)
    (line,) = batch.skipped
    assert "00000.tar: image of row 2 (key-2)" in line
    for row in (0, 2):  # its neighbours are as without the damage
        assert (rows[row].key, rows[row].tokens) == (sound[row].key, sound[row].tokens)
        assert np.array_equal(pixels[row], expected[row])
    padding, _ = load(damaged, tokenizer, slots((0, 2), real=False), settings)
    assert padding[0].skipped == ""


def test_a_picture_that_cannot_be_decoded_is_named_or_skipped(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Its hash is right, but it is not a picture: adopted tars can hold such samples."""
    captions = [{"language": "en", "text": "words"}]
    whole = Handmade(key="whole", captions=captions)
    written = write_dataset(tmp_path / "dataset", [("train", [whole, replace(whole, key="cut")])])
    reader = Reader(written, "train")
    sample = reader.read(0, 1)
    cut = replace(sample, image=picture(1, (64, 48))[:200])
    reader.read = lambda shard, row: cut if row else sample  # type: ignore[method-assign]
    with pytest.raises(CorruptArtifactError, match=r"00000\.tar: row 1 \(cut\): a \.jpg of 200 bytes cannot be"):
        load(reader, tokenizer, slots((0, 0), (0, 1)))
    rows, _ = load(reader, tokenizer, slots((0, 0), (0, 1)), replace(SETTINGS, on_corrupt="skip"))
    assert [row.real for row in rows] == [True, False]
    assert "row 1 (cut)" in rows[1].skipped


def test_a_missing_shard_stops_the_loading_even_when_samples_are_skipped(
    damage: Callable[[Callable[[Path], None]], Reader], tokenizer: Tokenizer
) -> None:
    reader = damage(lambda directory: (directory / "shards" / "00001.tar").unlink())
    with pytest.raises(MissingArtifactError, match=r"00001\.tar: no such file"):
        load(reader, tokenizer, slots((0, 0), (1, 0)), replace(SETTINGS, on_corrupt="skip"))


# --- tensors ----------------------------------------------------------------------------------------------------------

AFTER = LoaderState(2, 6)
PAD = 9


def row(number: int) -> Row:
    return Row(
        place=(0, 0, number, 0),
        real=number != 3,
        key=f"key-{number}",
        num_frames=number,
        tokens=[1] * number,
        answer_tokens=[7] * (number - 1),
        targets={"label": number - 2, "answer": number},
        scores={0: 0.5, number - 1: 1.0},
        skipped="key-3 is damaged" if number == 3 else "",
    )


def batch_of(*numbers: int, frames: int = 0, label: bool = False) -> tuple[Batch, NDArray[np.uint8]]:
    pixels = np.random.default_rng(0).integers(0, 256, (len(numbers), max(1, frames), 4, 4, 3), np.uint8)
    text = "captions" if label else "questions"
    settings = ViewSettings(
        seed=0,
        image_pixels=4,
        max_tokens=9,
        frames=frames,
        label="kind" if label else None,
        text=text,
        classes=("a",) * 3,
    )
    return assemble([row(number) for number in numbers], pixels, AFTER, settings, PAD), pixels


def test_a_batch_holds_its_rows_padded_to_the_longest_text() -> None:
    batch, buffer = batch_of(1, 3, 2, 1)
    assert batch.keys == ("key-1", "key-3", "key-2", "key-1")
    assert batch.token_ids.tolist() == [[1, PAD, PAD], [1, 1, 1], [1, 1, PAD], [1, PAD, PAD]]
    assert batch.token_mask.tolist() == [[1, 0, 0], [1, 1, 1], [1, 1, 0], [1, 0, 0]]
    assert batch.real.tolist() == [True, False, True, True]
    assert batch.targets["answer"].tolist() == [1, 3, 2, 1]
    assert batch.targets["answer_ids"].tolist() == [[PAD, PAD], [7, 7], [7, PAD], [PAD, PAD]]
    assert batch.targets["answer_mask"].tolist() == [[0, 0], [1, 1], [1, 0], [0, 0]]
    assert batch.targets["answer_scores"].tolist() == [[1, 0, 0], [0.5, 0, 1], [0.5, 1, 0], [1, 0, 0]]
    assert (batch.skipped, batch.state) == (("key-3 is damaged",), AFTER)
    assert (batch.pixels.shape, batch.pixels.dtype) == ((4, 3, 4, 4), torch.uint8)
    assert batch.pixels.is_contiguous(memory_format=torch.channels_last)
    assert batch.frame_mask is None
    assert batch.pixels[2, 1, 3, 0] == buffer[2, 0, 3, 0, 1]
    integers = (batch.token_ids, batch.token_mask, *(batch.targets[name] for name in ("answer", "answer_ids")))
    assert {tensor.dtype for tensor in integers} == {torch.int64}
    assert batch.real.dtype == torch.bool
    labelled, _ = batch_of(1, 3, label=True)
    assert {name: target.tolist() for name, target in labelled.targets.items()} == {"label": [-1, 1]}


def test_a_batch_without_answers_has_answers_of_one_padding_token() -> None:
    batch, buffer = batch_of(1, 1)
    assert batch.targets["answer_ids"].tolist() == [[PAD], [PAD]]
    assert batch.targets["answer_mask"].tolist() == [[0], [0]]
    before = batch.pixels.clone()
    buffer[:] = 0  # filled again for a later batch
    assert torch.equal(batch.pixels, before)


def test_clips_have_a_frame_axis_and_a_mask_of_their_frames() -> None:
    batch, buffer = batch_of(1, 2, 3, frames=2)
    assert batch.pixels.shape == (3, 2, 3, 4, 4)
    assert batch.frame_mask is not None
    assert batch.frame_mask.tolist() == [[True, False], [True, True], [True, True]]
    assert batch.pixels[1, 1, 2, 0, 3] == buffer[1, 1, 0, 3, 2]


def test_map_tensors_reaches_every_tensor() -> None:
    batch, _ = batch_of(1, 2, frames=2)
    changed = batch.map_tensors(lambda tensor: tensor.to("meta"))
    tensors = [changed.pixels, changed.frame_mask, changed.token_ids, changed.token_mask, changed.real]
    assert all(tensor is not None and tensor.is_meta for tensor in [*tensors, *changed.targets.values()])
    assert (changed.keys, changed.state) == (batch.keys, batch.state)


def test_normalise_takes_mean_and_deviation_of_pixels_from_0_to_1() -> None:
    pictures = torch.randint(0, 256, (2, 3, 5, 4), dtype=torch.uint8)
    mean, std = (0.1, 0.5, 0.7), (0.2, 0.5, 0.9)
    expected = (pictures / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    torch.testing.assert_close(normalise(pictures, mean, std), expected, atol=1e-5, rtol=1e-5)
    clips = pictures[:, None]
    torch.testing.assert_close(normalise(clips, mean, std), expected[:, None], atol=1e-5, rtol=1e-5)


def test_pixels_tensor_puts_the_colours_before_height_and_width() -> None:
    views = [np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8) for seed in range(2)]
    tensor = pixels_tensor(views)
    assert tensor.shape == (2, 3, 4, 4)
    assert tensor[1, 2, 3, 0] == views[1][3, 0, 2]
