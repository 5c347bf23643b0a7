"""Texts to token ids: a tokenizer trained on the dataset's own captions or read from a file, cut, and padded."""

from __future__ import annotations

import copyreg
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

from mmflow.core.errors import RecipeError
from mmflow.dataset.reader import Reader
from mmflow.loading.config import LoaderConfig
from mmflow.loading.text import label_of, questions_of, sentence_starts, sentence_window

PAD, UNKNOWN, FIRST, LAST, MASK = "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"
SPECIAL = [PAD, UNKNOWN, FIRST, LAST, MASK]
# Names in tokenizers of BERT, RoBERTa and T5, Gemma, and CLIP kind.
NAMES = {
    "pad": (PAD, "<pad>", "<|padding|>"),
    "first": (FIRST, "<s>", "<bos>", "<|startoftext|>", "<start_of_text>"),
    "last": (LAST, "</s>", "<eos>", "<|endoftext|>", "<end_of_text>"),
    "mask": (MASK, "<mask>"),
    "unknown": (UNKNOWN, "<unk>"),
}


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


@dataclass(frozen=True)
class SpecialTokens:
    """Ids of a tokenizer's special tokens; None for those that it does not have."""

    pad: int
    first: int | None
    last: int | None
    mask: int | None
    unknown: int | None


def special_tokens(tokenizer: Tokenizer) -> SpecialTokens:
    """The special tokens of a tokenizer of BERT, RoBERTa, T5, Gemma or CLIP kind, found by their names.

    One without a token of its own for padding (CLIP's) pads with the last one, as transformers does: padding is masked
    and its id is read by nobody. Raises RecipeError where there is neither.
    """
    found = {role: id_of(tokenizer, names) for role, names in NAMES.items()}
    pad = found.pop("pad")
    if pad is None:
        pad = found["last"]
    if pad is None:
        asked = ", ".join(NAMES["pad"] + NAMES["last"])
        raise RecipeError(f"tokenizer: none of {asked} is in its vocabulary, so nothing can be padded; add one of them")
    return SpecialTokens(pad=pad, **found)


def load_tokenizer(path: str | Path, key: str = "tokenizer") -> Tokenizer:
    """The tokenizer of a local tokenizer.json, or of the directory it lies in. Raises RecipeError naming the key."""
    file = Path(path)
    file = file / "tokenizer.json" if file.is_dir() else file
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "no text"
        raise RecipeError(
            f"{key}: {file}: {reason}; give a tokenizer.json as the `tokenizers` library writes it, or its directory"
        ) from error
    try:
        return read_tokenizer(text)
    except Exception as error:  # the library raises bare Exception
        raise RecipeError(
            f"{key}: {file}: not a tokenizer.json of the `tokenizers` library ({' '.join(str(error).split())[:120]}); "
            "older vocab.txt or merges.txt files are converted by transformers' save_pretrained"
        ) from error


def read_tokenizer(text: str) -> Tokenizer:
    """The tokenizer of a tokenizer.json's text, as the loader wants it.

    Files of the Hub often ask for padding and truncation to some length, which would be done before ours; and the name
    of a special token within a caption is mere text, not that token.
    """
    tokenizer = Tokenizer.from_str(text)
    tokenizer.no_padding()
    tokenizer.no_truncation()
    tokenizer.encode_special_tokens = True
    return tokenizer


def _portable(tokenizer: Tokenizer) -> tuple[Callable[[str], Tokenizer], tuple[str]]:
    return read_tokenizer, (tokenizer.to_str(),)


# By itself a tokenizer comes to another process as its JSON, which forgets that `encode_special_tokens` was set: the
# same caption would give other tokens there (tokenizers#1839).
copyreg.pickle(Tokenizer, _portable)


def tokenise(
    tokenizer: Tokenizer,
    texts: Sequence[str],
    max_tokens: int,
    randoms: Sequence[np.random.Generator] | None = None,
) -> list[list[int]]:
    """Token ids of each text, at most `max_tokens` of them, the special ones at both ends kept.

    Of a longer text the head is kept or, where `randoms` has a generator for each, a random run of whole sentences.
    """
    rows = []
    for number, encoding in enumerate(tokenizer.encode_batch_fast(list(texts))):
        ids: list[int] = encoding.ids
        if len(ids) > max_tokens:
            first, end = _text_span(encoding.special_tokens_mask)
            room = max_tokens - (len(ids) - (end - first))
            begin = 0
            if randoms is not None:
                begin, stop = _window(tokenizer, texts[number], (first, end), room, randoms[number].random())
                room = stop - begin
            ids = ids[:first] + ids[first + begin : first + begin + room] + ids[end:]
        rows.append(ids)
    return rows


def pad(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Token ids (B, longest) padded at their ends, and their mask, 1 where real."""
    longest = max(map(len, rows))
    ids = np.full((len(rows), longest), pad_id, dtype=np.int64)
    mask = np.zeros_like(ids)
    for row, tokens in enumerate(rows):
        ids[row, : len(tokens)] = tokens
        mask[row, : len(tokens)] = 1
    return ids, mask


def id_of(tokenizer: Tokenizer, names: Sequence[str]) -> int | None:
    return next((found for name in names if (found := tokenizer.token_to_id(name)) is not None), None)


def _text_span(special: Sequence[int]) -> tuple[int, int]:
    """First token of the text and the one after its last, between the special tokens at both ends."""
    if 0 not in special:
        return len(special), len(special)
    return special.index(0), len(special) - special[::-1].index(0)


def _window(tokenizer: Tokenizer, text: str, span: tuple[int, int], room: int, draw: float) -> tuple[int, int]:
    # Encoded once more: the faster call above does not tell where tokens lie in the text.
    places = [start for start, _ in tokenizer.encode(text).offsets[slice(*span)]]
    starts = np.searchsorted(places, sentence_starts(text)).tolist()
    return sentence_window(starts, len(places), room, draw)


MAX_TEXTS = 2_000_000  # a vocabulary is settled long before this many
MAX_ANSWERS = 3_129  # of a question-answering model: as many as VQA v2's models choose from (arXiv 1708.02711)


@dataclass(frozen=True)
class Vocabulary:
    """What texts and targets are numbered by."""

    tokenizer_json: str
    classes: tuple[str, ...] = ()  # labels in order of their names, or answers from the commonest


@dataclass(frozen=True)
class Texts:
    """Data that a stage is trained on, and what of it is read."""

    key: str  # the recipe's key of the loader, for errors
    readers: Sequence[Reader]
    config: LoaderConfig


def learn_vocabulary(data: Sequence[Texts], vocabulary_size: int, tokenizer: Tokenizer | None = None) -> Vocabulary:
    """The vocabulary of a stage's data, with the `tokenizer` that is given or one trained on the texts.

    Raises RecipeError where classes are asked for and there are none, and as `questions_of`.
    """
    counts: list[Counter[str]] = [Counter() for _ in data]
    texts = [_texts(each.readers, each.config, counted) for each, counted in zip(data, counts, strict=True)]
    if tokenizer is None:
        tokenizer = train_tokenizer(islice(chain(*texts), MAX_TEXTS), vocabulary_size)
    for each, read, counted in zip(data, texts, counts, strict=True):
        if each.config.text == "questions" or each.config.label is not None:
            deque(read, maxlen=0)  # what is left of them, for its classes
        if each.config.label is not None and not counted:
            raise RecipeError(
                f"{each.key}.label: no sample of split {each.config.split!r} has a class of that name; its metadata "
                f'needs "classes": {{"{each.config.label}": "…"}}'
            )
    total = sum(counts, Counter())
    if any(each.config.text == "questions" for each in data):
        classes = [answer for answer, _ in sorted(total.items(), key=lambda each: (-each[1], each[0]))][:MAX_ANSWERS]
    else:
        classes = sorted(total)
    return Vocabulary(tokenizer.to_str(), tuple(classes))


def _texts(readers: Sequence[Reader], config: LoaderConfig, counts: Counter[str]) -> Iterator[str]:
    """Every text that the model may read or write; labels or answers are counted on the way."""
    for reader in readers:
        for sample in reader.texts(skip_corrupt=config.on_corrupt == "skip"):
            if config.text == "questions":
                for question in questions_of(sample.key, sample.metadata):
                    yield question.text
                    counts.update(question.answers)
                    yield from question.answers
            else:
                yield from (caption.text for caption in sample.captions)
                label = label_of(sample.metadata, config.label)
                if label is not None:
                    counts[label] += 1
