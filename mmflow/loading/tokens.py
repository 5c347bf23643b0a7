"""Captions to token ids: a word-piece tokenizer trained on the dataset's own captions, saved as plain JSON."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

PAD, UNKNOWN, FIRST, LAST, MASK = "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"
SPECIAL = [PAD, UNKNOWN, FIRST, LAST, MASK]


def train_tokenizer(captions: Iterable[str], vocabulary_size: int) -> Tokenizer:
    """A BERT-like tokenizer: lower case, accents stripped, Chinese characters apart, word pieces; `[PAD]` is id 0.

    The same captions give the same vocabulary. The trainer alone does not: it meets characters in the order of a hash
    map, which differs from call to call, and drops the rarer ones past a thousand. So every character is named to it
    beforehand, in order.
    """
    normalizer = normalizers.BertNormalizer(lowercase=True, strip_accents=True, handle_chinese_chars=True)
    splitter = pre_tokenizers.BertPreTokenizer()
    words: Counter[str] = Counter()
    for caption in captions:
        words.update(word for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(caption)))
    starts = sorted({character for word in words for character in word})
    continuations = sorted({f"##{character}" for word in words for character in word[1:]})
    tokenizer = Tokenizer(models.WordPiece(unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocabulary_size,
        special_tokens=SPECIAL + starts + continuations,
        limit_alphabet=len(starts) + len(continuations) + 1,
        show_progress=False,
    )
    tokenizer.train_from_iterator(sorted(words.elements()), trainer)
    # Built anew from the vocabulary, because characters named to the trainer stay special tokens in its own tokenizer.
    tokenizer = Tokenizer(models.WordPiece(vocab=tokenizer.get_vocab(), unk_token=UNKNOWN))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, splitter
    first, last = SPECIAL.index(FIRST), SPECIAL.index(LAST)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{FIRST} $A {LAST}", special_tokens=[(FIRST, first), (LAST, last)]
    )
    return tokenizer


def tokenise(tokenizer: Tokenizer, captions: Sequence[str], max_tokens: int) -> list[list[int]]:
    """Token ids of each caption; what is past `max_tokens` is cut, the closing token kept."""
    rows = [encoding.ids for encoding in tokenizer.encode_batch(list(captions))]
    return [row if len(row) <= max_tokens else [*row[: max_tokens - 1], row[-1]] for row in rows]


def pad(rows: Sequence[Sequence[int]]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Token ids (B, longest) padded with `[PAD]`, and their mask, 1 where real."""
    longest = max(map(len, rows))
    ids = np.zeros((len(rows), longest), dtype=np.int64)
    mask = np.zeros_like(ids)
    for row, tokens in enumerate(rows):
        ids[row, : len(tokens)] = tokens
        mask[row, : len(tokens)] = 1
    return ids, mask
