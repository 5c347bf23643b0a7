"""Captions to ids: the same vocabulary from the same captions, and rows that always end as they should."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from mmflow.loading.tokens import FIRST, LAST, PAD, SPECIAL, UNKNOWN, pad, tokenise, train_tokenizer

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


def test_order_of_captions_does_not_matter(tokenizer: Tokenizer) -> None:
    assert train_tokenizer(reversed(CAPTIONS), 4000).to_str() == tokenizer.to_str()


def test_special_tokens_are_the_first_ids(tokenizer: Tokenizer) -> None:
    assert [tokenizer.token_to_id(token) for token in SPECIAL] == [0, 1, 2, 3, 4]


def test_every_character_of_the_captions_is_known(tokenizer: Tokenizer) -> None:
    for row in tokenise(tokenizer, CAPTIONS, 64):
        assert UNKNOWN_ID not in row


def test_unknown_characters_are_unknown_and_nothing_else_is(tokenizer: Tokenizer) -> None:
    (row,) = tokenise(tokenizer, ["red \u2603 apple"], 64)
    known = tokenise(tokenizer, ["red apple"], 64)[0]
    assert row.count(UNKNOWN_ID) == 1
    assert [token for token in row if token != UNKNOWN_ID] == known


def test_case_and_accents_do_not_matter(tokenizer: Tokenizer) -> None:
    assert tokenise(tokenizer, ["CRÈME brûlée"], 64) == tokenise(tokenizer, ["creme BRULEE"], 64)


def test_special_tokens_within_a_caption_are_mere_text(tokenizer: Tokenizer) -> None:
    (row,) = tokenise(tokenizer, [f"{LAST} {FIRST} {PAD} red"], 64)
    assert row[0] == FIRST_ID
    assert row[-1] == LAST_ID
    assert not {PAD_ID, FIRST_ID, LAST_ID} & set(row[1:-1])


def test_tokenizer_survives_its_file(tokenizer: Tokenizer) -> None:
    again = Tokenizer.from_str(tokenizer.to_str())
    texts = [*CAPTIONS[:20], "zzz", ""]
    assert tokenise(again, texts, 16) == tokenise(tokenizer, texts, 16)
    assert again.get_vocab_size() == tokenizer.get_vocab_size() <= 4000


def test_vocabulary_is_no_larger_than_asked() -> None:
    captions = [
        f"{first}{second} word{number}" for number, (first, second) in enumerate(zip("abcdef", "ghijkl", strict=True))
    ]
    assert train_tokenizer(captions, 64).get_vocab_size() <= 64


@given(captions=st.lists(st.text(max_size=60), min_size=1, max_size=5), max_tokens=st.integers(4, 20))
def test_rows_begin_and_end_as_they_should_however_long(captions: list[str], max_tokens: int) -> None:
    small = small_tokenizer()
    full = tokenise(small, captions, 10_000)
    for row, whole in zip(tokenise(small, captions, max_tokens), full, strict=True):
        assert len(row) == min(len(whole), max_tokens)
        assert (row[0], row[-1]) == (FIRST_ID, LAST_ID)
        assert row[:-1] == whole[: len(row) - 1]


_small: list[Tokenizer] = []


def small_tokenizer() -> Tokenizer:
    if not _small:
        _small.append(train_tokenizer(["red apple", "green pear"], 64))
    return _small[0]


@given(rows=st.lists(st.lists(st.integers(1, 99), min_size=1, max_size=12), min_size=1, max_size=6))
def test_padding_is_zero_and_masked(rows: list[list[int]]) -> None:
    ids, mask = pad(rows)
    assert ids.shape == mask.shape == (len(rows), max(map(len, rows)))
    assert ids.dtype == mask.dtype == np.int64
    for row, id_row, mask_row in zip(rows, ids.tolist(), mask.tolist(), strict=True):
        assert id_row == row + [PAD_ID] * (len(id_row) - len(row))
        assert mask_row == [1] * len(row) + [0] * (len(id_row) - len(row))


def test_unknown_is_the_token_of_that_name(tokenizer: Tokenizer) -> None:
    assert tokenizer.id_to_token(UNKNOWN_ID) == UNKNOWN
