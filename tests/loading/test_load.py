"""What fills a slot: the view, words and targets that its sample and epoch decide, and what becomes of a bad sample."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from tokenizers import Tokenizer

from mmflow.core.errors import CorruptArtifactError, MissingArtifactError, RecipeError
from mmflow.dataset.opened import Dataset, open_dataset
from mmflow.dataset.reader import Reader
from mmflow.imaging.decode import decode
from mmflow.loading.batches import BLANK, Loaded, ViewSettings, load_slots
from mmflow.loading.config import AugmentConfig
from mmflow.loading.plan import Slots
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
    """Twelve samples in two shards: every third a clip of five frames, every other with questions; two classes."""

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


@pytest.fixture
def damage(dataset: Dataset, tmp_path: Path) -> Callable[[Callable[[Path], None]], Reader]:
    """A reader of a copy of the dataset to which something was done."""

    def damaged(change: Callable[[Path], None]) -> Reader:
        shutil.copytree(dataset.uri, tmp_path / "copy")
        change(tmp_path / "copy")
        return Reader(open_dataset(str(tmp_path / "copy")), "train")

    return damaged


def slots(*rows: tuple[int, int], epoch: int = 0, real: bool = True) -> Slots:
    shard, row = np.array(rows).T
    return Slots(np.zeros_like(row), shard, row, np.full_like(row, epoch), np.full(len(rows), real))


def load(
    reader: Reader, tokenizer: Tokenizer, wanted: Slots, settings: ViewSettings = SETTINGS
) -> tuple[Loaded, NDArray[np.uint8]]:
    pixels = np.zeros((len(wanted), max(1, settings.frames), SIDE, SIDE, 3), np.uint8)
    return load_slots([reader], tokenizer, settings, wanted, pixels), pixels


def test_a_slot_is_the_same_whoever_is_beside_it(reader: Reader, tokenizer: Tokenizer) -> None:
    places = [(0, 4), (1, 0), (0, 1), (1, 5)]
    together, pixels = load(reader, tokenizer, slots(*places, epoch=2))
    for number, place in enumerate(places):
        alone, its_pixels = load(reader, tokenizer, slots(place, epoch=2))
        assert (alone.keys[0], alone.tokens[0]) == (together.keys[number], together.tokens[number])
        assert np.array_equal(its_pixels[0], pixels[number])


def test_epochs_and_seeds_give_other_views_and_no_augmentation_the_plain_one(
    reader: Reader, tokenizer: Tokenizer
) -> None:
    places = [(shard, row) for shard in range(2) for row in range(6)]
    first, one = load(reader, tokenizer, slots(*places))
    second, two = load(reader, tokenizer, slots(*places, epoch=1))
    assert all(not np.array_equal(a, b) for a, b in zip(one, two, strict=True))
    assert first.tokens != second.tokens
    _, other = load(reader, tokenizer, slots(*places), replace(SETTINGS, seed=4))
    assert all(not np.array_equal(a, b) for a, b in zip(one, other, strict=True))
    _, plain = load(reader, tokenizer, slots(*places), PLAIN)
    for (shard, row), found in zip(places, plain, strict=True):
        sample = reader.read(shard, row)
        assert np.array_equal(found[0], centre_view(decode(sample.image, sample.extension, SIDE), SIDE))


def test_the_text_is_one_of_the_sample_s_captions_by_its_language_s_weight(
    reader: Reader, tokenizer: Tokenizer
) -> None:
    settings = replace(PLAIN, language_weights={"en": 0, "fr": 0})
    for epoch in range(20):
        loaded, _ = load(reader, tokenizer, slots((0, 2), (1, 3), epoch=epoch), settings)
        assert loaded.tokens == [tokenizer.encode(f"zh words {number}").ids for number in (2, 9)]


def test_labels_are_numbered_by_the_classes_and_unknown_ones_are_told_apart(
    reader: Reader, tokenizer: Tokenizer
) -> None:
    settings = replace(PLAIN, label="group", classes=("group 2", "group 1"))
    loaded, _ = load(reader, tokenizer, slots((0, 0), (0, 1), (0, 3), (0, 5), (1, 1)), settings)
    assert loaded.targets == {"label": [-1, 1, -1, 0, 1]}  # without classes, group 1, 0, 2 and 1
    assert loaded.answers is None


def test_questions_come_with_one_of_their_own_answers(reader: Reader, tokenizer: Tokenizer) -> None:
    settings = replace(PLAIN, text="questions", classes=("yes", "cat"))
    seen = set()
    for epoch in range(40):
        loaded, _ = load(reader, tokenizer, slots((0, 1), epoch=epoch), settings)
        assert loaded.answers is not None
        (question,), (answer,), (number,) = loaded.tokens, loaded.answers, loaded.targets["answer"]
        seen.add((tokenizer.decode(question[1:-1]), tokenizer.decode(answer[1:-1]), number))
    assert seen == {("what is it", "cat", 1), ("what is it", "dog", -1), ("is it red", "yes", 0), ("why", "", -1)}
    with pytest.raises(RecipeError, match=r"^loader\.text: questions, but sample key-0 has none"):
        load(reader, tokenizer, slots((0, 0)), settings)


def test_a_sample_without_a_caption_is_for_models_that_read_none(tmp_path: Path, tokenizer: Tokenizer) -> None:
    samples = [Handmade(key="bare", captions=[], metadata={"classes": {"group": "a"}, "questions": QUESTIONS[1:2]})]
    reader = Reader(write_dataset(tmp_path / "dataset", [("train", samples)]), "train")
    settings = replace(PLAIN, label="group", classes=("a",))
    with pytest.raises(RecipeError, match=r"^loader\.text: captions, but sample bare has none; shard with"):
        load(reader, tokenizer, slots((0, 0)), settings)
    loaded, _ = load(reader, tokenizer, slots((0, 0)), replace(settings, reads_text=False))
    assert (loaded.targets, loaded.real) == ({"label": [0]}, [True])
    loaded, _ = load(reader, tokenizer, slots((0, 0)), replace(PLAIN, text="questions", classes=("yes",)))
    assert loaded.tokens == [tokenizer.encode("is it red").ids]


def test_clips_give_ascending_frames_and_are_blank_past_their_last(reader: Reader, tokenizer: Tokenizer) -> None:
    settings = replace(PLAIN, frames=3)
    loaded, pixels = load(reader, tokenizer, slots((0, 0), (0, 1), (0, 3)), settings)
    assert loaded.frames == [3, 1, 3]
    assert (pixels[1, 1:] == BLANK).all()
    for place, found in (((0, 0), pixels[0]), ((0, 3), pixels[2])):
        sample = reader.read(*place)
        views = [centre_view(decode(body, sample.extension, SIDE), SIDE) for body in (sample.image, *sample.frames)]
        numbers = [next(n for n, view in enumerate(views) if np.array_equal(view, frame)) for frame in found]
        assert numbers == sorted(set(numbers))
    still, _ = load(reader, tokenizer, slots((0, 0)))
    assert still.frames == [1]


# --- bad samples ----------------------------------------------------------------------------------------------------


def flip_a_byte(directory: Path) -> None:
    """Of the picture of row 2 of the first shard."""
    entry = open_dataset(str(directory)).index(open_dataset(str(directory)).shards("train")[0]).to_pylist()[2]
    tar = directory / "shards" / "00000.tar"
    body = bytearray(tar.read_bytes())
    body[entry["image_offset"] + entry["image_bytes"] // 2] ^= 1
    tar.write_bytes(body)


def test_a_corrupt_sample_stops_the_loading_with_its_shard_row_and_key(
    damage: Callable[[Callable[[Path], None]], Reader], tokenizer: Tokenizer
) -> None:
    reader = damage(flip_a_byte)
    with pytest.raises(CorruptArtifactError, match=r"00000\.tar: image of row 2 \(key-2\) is not what was written"):
        load(reader, tokenizer, slots((0, 1), (0, 2)))


def test_a_corrupt_sample_that_is_skipped_is_padding_and_is_told(
    damage: Callable[[Callable[[Path], None]], Reader], tokenizer: Tokenizer, reader: Reader
) -> None:
    damaged = damage(flip_a_byte)
    settings = replace(SETTINGS, on_corrupt="skip", label="group", frames=2)
    wanted = slots((0, 1), (0, 2), (0, 3))
    loaded, pixels = load(damaged, tokenizer, wanted, settings)
    whole, expected = load(reader, tokenizer, wanted, settings)
    assert loaded.real == [True, False, True]
    assert (loaded.keys[1], loaded.frames[1], loaded.targets["label"][1]) == ("", 0, -1)
    assert (pixels[1] == BLANK).all()
    (line,) = loaded.skipped
    assert "00000.tar: image of row 2 (key-2) is not what was written" in line
    for row in (0, 2):  # its neighbours are what they would have been
        assert (loaded.keys[row], loaded.tokens[row]) == (whole.keys[row], whole.tokens[row])
        assert np.array_equal(pixels[row], expected[row])
    assert load(damaged, tokenizer, slots((0, 2), real=False), settings)[0].skipped == []


def test_a_picture_that_cannot_be_decoded_is_named_or_skipped(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Sound by its hash, and no picture: adopted tars can hold such."""
    captions = [{"language": "en", "text": "words"}]
    whole = Handmade(key="whole", captions=captions)
    written = write_dataset(tmp_path / "dataset", [("train", [whole, replace(whole, key="cut")])])
    reader = Reader(written, "train")
    sample = reader.read(0, 1)
    cut = replace(sample, image=picture(1, (64, 48))[:200])
    reader.read = lambda shard, row: cut if row else sample  # type: ignore[method-assign]
    with pytest.raises(
        CorruptArtifactError, match=r"00000\.tar: row 1 \(cut\): a \.jpg of 200 bytes cannot be decoded"
    ):
        load(reader, tokenizer, slots((0, 0), (0, 1)))
    loaded, _ = load(reader, tokenizer, slots((0, 0), (0, 1)), replace(SETTINGS, on_corrupt="skip"))
    assert loaded.real == [True, False]
    assert "row 1 (cut)" in loaded.skipped[0]


def test_a_shard_that_is_gone_ends_the_loading_even_where_samples_are_skipped(
    damage: Callable[[Callable[[Path], None]], Reader], tokenizer: Tokenizer
) -> None:
    reader = damage(lambda directory: (directory / "shards" / "00001.tar").unlink())
    with pytest.raises(MissingArtifactError, match=r"00001\.tar: no such file"):
        load(reader, tokenizer, slots((0, 0), (1, 0)), replace(SETTINGS, on_corrupt="skip"))
