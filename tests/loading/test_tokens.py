"""Captions to ids: the same vocabulary from the same captions, and rows that always end as they should."""

from __future__ import annotations

import os
import subprocess
import sys
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from mmflow.core.errors import CorruptArtifactError, RecipeError
from mmflow.dataset.format import index_uri, read_index, tar_uri
from mmflow.dataset.opened import Dataset
from mmflow.dataset.reader import Reader
from mmflow.loading.config import LoaderConfig
from mmflow.loading.tokens import (
    SPECIAL,
    SpecialTokens,
    Texts,
    Vocabulary,
    learn_vocabulary,
    load_tokenizer,
    pad,
    read_tokenizer,
    special_tokens,
    tokenise,
    train_tokenizer,
)
from tests.dataset.handmade import Handmade, write_dataset

# More than a thousand different characters: the trainer alone would drop some of them, others at each call.
CAPTIONS = [
    "A red apple", "red apples", "the reddest APPLE of all", "Crème brûlée", "flag: Åland Islands",
    *(f"{chr(0x4E00 + number)}{chr(0x4E00 + 7 * number % 1500)} {number}" for number in range(1500)),
]  # fmt: skip
PAD_ID, UNKNOWN_ID, FIRST_ID, LAST_ID, _ = range(5)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(CAPTIONS, 4000)


def trained_in_a_process(hash_seed: str) -> str:
    program = """
import sys
sys.stdin.reconfigure(encoding="utf-8")
from mmflow.loading.tokens import train_tokenizer
sys.stdout.buffer.write(train_tokenizer(sys.stdin.read().split("\\n"), 4000).to_str().encode())
"""
    environment = os.environ | {"PYTHONHASHSEED": hash_seed, "TOKENIZERS_PARALLELISM": "true"}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, input="\n".join(CAPTIONS).encode(), capture_output=True, check=True, env=environment)
    return done.stdout.decode()


def test_same_captions_give_the_same_tokenizer_in_every_process(tokenizer: Tokenizer) -> None:
    assert trained_in_a_process("1") == trained_in_a_process("2") == tokenizer.to_str()
    assert train_tokenizer(reversed(CAPTIONS), 4000).to_str() == tokenizer.to_str()


def test_only_characters_without_a_caption_are_unknown_and_case_and_accents_do_not_matter(tokenizer: Tokenizer) -> None:
    assert [tokenizer.token_to_id(token) for token in SPECIAL] == [PAD_ID, UNKNOWN_ID, FIRST_ID, LAST_ID, 4]
    assert all(UNKNOWN_ID not in row for row in tokenise(tokenizer, CAPTIONS, 64))
    unknown, known, accented = tokenise(tokenizer, ["red \u2603 apple", "red apple", "RÉD âpple"], 64)
    assert unknown == [*known[:2], UNKNOWN_ID, *known[2:]]
    assert accented == known


def test_vocabulary_is_no_larger_than_asked() -> None:
    captions = [
        f"{first}{second} word{number}" for number, (first, second) in enumerate(zip("abcdef", "ghijkl", strict=True))
    ]
    assert train_tokenizer(captions, 64).get_vocab_size() <= 64


@given(captions=st.lists(st.text(max_size=60), min_size=1, max_size=5), max_tokens=st.integers(4, 20))
def test_rows_begin_and_end_as_they_should_however_long(captions: list[str], max_tokens: int) -> None:
    full = tokenise(SMALL, captions, 10_000)
    for row, whole in zip(tokenise(SMALL, captions, max_tokens), full, strict=True):
        assert len(row) == min(len(whole), max_tokens)
        assert (row[0], row[-1]) == (FIRST_ID, LAST_ID)
        assert row[:-1] == whole[: len(row) - 1]


SMALL = train_tokenizer(["red apple", "green pear"], 64)


@given(
    rows=st.lists(st.lists(st.integers(1, 99), min_size=1, max_size=12), min_size=1, max_size=6),
    pad_id=st.integers(0, 99),
)
def test_padding_is_the_tokenizer_s_own_and_masked(rows: list[list[int]], pad_id: int) -> None:
    ids, mask = pad(rows, pad_id)
    assert ids.shape == mask.shape == (len(rows), max(map(len, rows)))
    assert ids.dtype == mask.dtype == np.int64
    for row, id_row, mask_row in zip(rows, ids.tolist(), mask.tolist(), strict=True):
        assert id_row == row + [pad_id] * (len(id_row) - len(row))
        assert mask_row == [1] * len(row) + [0] * (len(id_row) - len(row))


# --- sentences ------------------------------------------------------------------------------------------------------

LONG = "A red apple. Two green pears! Is it 3.5 cm? 一只红苹果。两只梨！ The last one has some more words than others."


def rows_by_windows(tokenizer: Tokenizer, text: str, max_tokens: int, draws: int = 200) -> set[tuple[int, ...]]:
    randoms = [np.random.default_rng(seed) for seed in range(draws)]
    return {tuple(row) for row in tokenise(tokenizer, [text] * draws, max_tokens, randoms)}


@pytest.mark.parametrize("kind", ["bert", "roberta", "clip"])
def test_windows_are_whole_sentences_between_the_special_tokens(kind: str) -> None:
    tokenizer = TOKENIZERS[kind]()
    (whole,) = tokenise(tokenizer, [LONG], 1000)
    sentences = ["A red apple.", " Two green pears!", " Is it 3.5 cm?", " 一只红苹果。", "两只梨！",
                 " The last one has some more words than others."]  # fmt: skip
    bodies = [tokenise(tokenizer, [sentence], 1000)[0][1:-1] for sentence in sentences]
    if kind != "roberta":  # which writes a space before a word into its token: the sentence's own first word differs
        assert [token for body in bodies for token in body] == whole[1:-1]
    room = max(map(len, bodies)) + 3
    ends = np.cumsum([0, *map(len, bodies)])
    runs = {
        tuple(whole[1 + ends[first] : 1 + ends[last]])
        for first in range(len(bodies)) for last in range(first + 1, len(bodies) + 1)
    }  # fmt: skip
    windows = rows_by_windows(tokenizer, LONG, room + 2)
    assert len(windows) >= 3
    for row in windows:
        assert len(row) <= room + 2
        assert (row[0], row[-1]) == (whole[0], whole[-1])
        assert row[1:-1] in runs
    assert {token for row in windows for token in row} == set(whole)


def test_a_text_that_fits_is_whole_and_the_head_is_kept_without_draws(tokenizer: Tokenizer) -> None:
    assert len(rows_by_windows(tokenizer, "A red apple. Red apples.", 64)) == 1
    (whole,) = tokenise(tokenizer, [LONG], 1000)
    assert tokenise(tokenizer, [LONG], 12) == [[*whole[:11], whole[-1]]]


def test_a_long_text_without_ends_is_read_in_pieces(tokenizer: Tokenizer) -> None:
    text = " ".join(f"apple {number}" for number in range(60))
    (whole,) = tokenise(tokenizer, [text], 1000)
    windows = rows_by_windows(tokenizer, text, 12)
    assert {token for row in windows for token in row} == set(whole)
    assert all(len(row) == 12 or row[-2] == whole[-2] for row in windows)


# --- tokenizers of other kinds ---------------------------------------------------------------------------------------


def bert() -> Tokenizer:
    return train_tokenizer([*CAPTIONS[:200], LONG], 4000)


def byte_level(special: list[str]) -> Tokenizer:
    """A byte-level BPE tokenizer without merges."""
    vocabulary = {name: number for number, name in enumerate([*special, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token=special[-1]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    return tokenizer


def roberta() -> Tokenizer:
    tokenizer = byte_level(["<s>", "<pad>", "</s>", "<mask>", "<unk>"])
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
    tokenizer.enable_padding(pad_id=1, pad_token="<pad>", length=64)
    tokenizer.enable_truncation(8)
    return read_tokenizer(tokenizer.to_str())


def clip() -> Tokenizer:
    tokenizer = byte_level(["<|startoftext|>", "<|endoftext|>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|startoftext|> $A <|endoftext|>", special_tokens=[("<|startoftext|>", 0), ("<|endoftext|>", 1)]
    )
    return read_tokenizer(tokenizer.to_str())


TOKENIZERS = {"bert": bert, "roberta": roberta, "clip": clip}


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("bert", SpecialTokens(pad=0, first=2, last=3, mask=4, unknown=1)),
        ("roberta", SpecialTokens(pad=1, first=0, last=2, mask=3, unknown=4)),
        ("clip", SpecialTokens(pad=1, first=0, last=1, mask=None, unknown=None)),
    ],
)
def test_special_tokens_are_found_by_their_names(kind: str, expected: SpecialTokens) -> None:
    tokenizer = TOKENIZERS[kind]()
    assert special_tokens(tokenizer) == expected
    for row in tokenise(tokenizer, ["apple", ""], 16):
        assert (row[0], row[-1]) == (expected.first, expected.last)


def test_a_tokenizer_that_cannot_pad_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"its vocabulary has none of \[PAD\], <pad>, "):
        special_tokens(Tokenizer(models.WordLevel({"apple": 0}, unk_token="apple")))


def test_a_tokenizer_read_from_a_file_neither_pads_nor_cuts_by_itself(tmp_path: Path) -> None:
    tokenizer = byte_level(["<s>", "<pad>", "</s>", "<mask>", "<unk>"])
    tokenizer.enable_padding(pad_id=1, pad_token="<pad>", length=64)
    tokenizer.enable_truncation(8)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    for path in (tmp_path, tmp_path / "tokenizer.json", str(tmp_path)):
        loaded = load_tokenizer(path)
        assert [len(row) for row in tokenise(loaded, ["apple", "one red apple"], 100)] == [5, 13]


@pytest.mark.parametrize("kind", ["bert", "roberta", "clip"])
def test_names_of_special_tokens_within_a_text_are_plain_text_in_every_process(kind: str) -> None:
    tokenizer = TOKENIZERS[kind]()
    special = special_tokens(tokenizer)
    text = "red </s> <|endoftext|> <mask> [PAD] [MASK] [CLS] [SEP] apple"
    for copy in (read_tokenizer(tokenizer.to_str()), ForkingPickler.loads(ForkingPickler.dumps(tokenizer))):
        (row,) = tokenise(copy, [text], 1000)
        assert not {special.pad, special.first, special.last, special.mask} & set(row[1:-1])


def test_a_missing_or_invalid_tokenizer_names_the_key_and_the_file(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"^pretrain.tokenizer: .*tokenizer.json: No such file or directory; give"):
        load_tokenizer(tmp_path, "pretrain.tokenizer")
    (tmp_path / "tokenizer.json").write_text('{"model": 1}')
    with pytest.raises(RecipeError, match=r"tokenizer.json: .*; give a tokenizer.json of the"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes(b"\xff\xfe")
    with pytest.raises(RecipeError, match=r"codec can't decode"):
        load_tokenizer(tmp_path)


# --- vocabulary -------------------------------------------------------------------------------------------------------


def dataset_of(directory: Path, *metadata: dict[str, Any]) -> Dataset:
    samples = [
        Handmade(key=f"key-{number}", captions=[{"language": "en", "text": f"words {number}"}], metadata=fields)
        for number, fields in enumerate(metadata)
    ]
    return write_dataset(directory / "dataset", [("train", samples)])


def learn(dataset: Dataset, **loader: Any) -> Vocabulary:
    config = LoaderConfig.model_validate(loader)
    return learn_vocabulary([Texts("pretrain.loader", [Reader(dataset, "train", frames=False)], config)], 200)


def questions(*pairs: tuple[str, list[str]]) -> dict[str, Any]:
    return {"questions": [{"question": question, "answers": answers} for question, answers in pairs]}


def flip(dataset: Dataset, member: str, row: int) -> None:
    entry = read_index(index_uri(dataset.uri, "00000"))[0].to_pylist()[row]
    path = Path(tar_uri(dataset.uri, "00000"))
    data = bytearray(path.read_bytes())
    data[entry[f"{member}_offset"]] ^= 1
    path.write_bytes(data)


def test_labels_are_classes_in_the_order_of_their_names(tmp_path: Path) -> None:
    dataset = dataset_of(tmp_path, {"classes": {"kind": "b"}}, {"classes": {"kind": "a"}}, {}, {"classes": {"kind": 3}})
    assert learn(dataset, label="kind").classes == ("a", "b")
    assert learn(dataset).classes == ()


def test_classes_are_learnt_where_no_sample_has_a_caption(tmp_path: Path) -> None:
    samples = [Handmade(key=f"key-{kind}", captions=[], metadata={"classes": {"kind": kind}}) for kind in "ba"]
    vocabulary = learn(write_dataset(tmp_path / "dataset", [("train", samples)]), label="kind")
    assert vocabulary.classes == ("a", "b")
    assert read_tokenizer(vocabulary.tokenizer_json).get_vocab_size() == 5  # the special tokens alone


def test_answers_are_classes_from_the_commonest(tmp_path: Path) -> None:
    dataset = dataset_of(
        tmp_path, questions(("what", ["dog"]), ("why", [])), questions(("who", ["cat", "yes"]), ("is it", ["yes"]))
    )
    vocabulary = learn(dataset, text="questions")
    assert vocabulary.classes == ("yes", "cat", "dog")
    encoded = read_tokenizer(vocabulary.tokenizer_json).encode("what cat")
    assert "[UNK]" not in encoded.tokens  # questions and answers are read, captions are not
    assert "[UNK]" in read_tokenizer(vocabulary.tokenizer_json).encode("words").tokens


def test_missing_labels_and_questions_are_named(tmp_path: Path) -> None:
    dataset = dataset_of(tmp_path, {})
    with pytest.raises(
        RecipeError, match=r"^pretrain.loader.label: no sample of split 'train' has a class of that name"
    ):
        learn(dataset, label="kind")
    with pytest.raises(RecipeError, match=r"^loader.text: questions, but sample key-0 has none; its metadata needs"):
        learn(dataset, text="questions")


def test_pictures_are_not_read(tmp_path: Path) -> None:
    dataset = dataset_of(tmp_path, {}, {})
    whole = learn(dataset)
    flip(dataset, "image", 1)
    assert learn(dataset) == whole


def test_a_damaged_text_stops_or_is_skipped_as_the_recipe_says(tmp_path: Path) -> None:
    dataset = dataset_of(tmp_path, {"classes": {"kind": "a"}}, {"classes": {"kind": "b"}})
    flip(dataset, "json", 0)
    with pytest.raises(CorruptArtifactError, match=r"json of row 0 \(key-0\) is not what was written"):
        learn(dataset, label="kind")
    assert learn(dataset, label="kind", on_corrupt="skip").classes == ("b",)
