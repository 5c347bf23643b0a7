"""Texts to token ids, by a tokenizer trained on the dataset's texts or read from a file; and the classes of targets."""

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
# Names in tokenizers like those of BERT, RoBERTa and T5, Gemma, and CLIP.
NAMES = {
    "pad": (PAD, "<pad>", "<|padding|>"),
    "first": (FIRST, "<s>", "<bos>", "<|startoftext|>", "<start_of_text>"),
    "last": (LAST, "</s>", "<eos>", "<|endoftext|>", "<end_of_text>"),
    "mask": (MASK, "<mask>"),
    "unknown": (UNKNOWN, "<unk>"),
}
MAX_TEXTS = 2_000_000  # a vocabulary no longer changes long before this many
MAX_ANSWERS = 3_129  # classes of a question-answering model, as many as VQA v2's models choose from (arXiv 1708.02711)


def train_tokenizer(texts: Iterable[str], vocabulary_size: int) -> Tokenizer:
    """A BERT-like tokenizer: lower case, accents stripped, Chinese characters apart, word pieces; `[PAD]` is id 0.

    The same texts give the same vocabulary. The trainer alone does not ensure that: it visits characters in the order
    of a hash map, which differs between calls, and drops the rarer ones past a thousand. So the trainer is given every
    character beforehand, in order.
    """
    normalizer = normalizers.BertNormalizer(lowercase=True, strip_accents=True, handle_chinese_chars=True)
    splitter = pre_tokenizers.BertPreTokenizer()
    words: Counter[str] = Counter()
    for text in texts:
        words.update(word for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(text)))
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
    # Rebuilt from the vocabulary: in the trainer's own tokenizer those characters would stay special tokens.
    tokenizer = Tokenizer(models.WordPiece(vocab=tokenizer.get_vocab(), unk_token=UNKNOWN))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, splitter
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{FIRST} $A {LAST}", special_tokens=[(token, SPECIAL.index(token)) for token in (FIRST, LAST)]
    )
    return tokenizer


@dataclass(frozen=True)
class SpecialTokens:
    """Ids of a tokenizer's special tokens, None for those that it does not have."""

    pad: int
    first: int | None
    last: int | None
    mask: int | None
    unknown: int | None


def special_tokens(tokenizer: Tokenizer) -> SpecialTokens:
    """The special tokens of a tokenizer like BERT's, RoBERTa's, T5's, Gemma's or CLIP's, found by their names.

    Without a padding token (CLIP) the last token pads, as in transformers: padding is masked, so its id does not
    matter. Raises RecipeError if there is neither.
    """
    ids = {role: id_of(tokenizer, names) for role, names in NAMES.items()}
    pad = ids.pop("pad")
    if pad is None:
        pad = ids["last"]
    if pad is None:
        names = ", ".join(NAMES["pad"] + NAMES["last"])
        raise RecipeError(f"tokenizer: its vocabulary has none of {names}, so it cannot pad; add one of them")
    return SpecialTokens(pad=pad, **ids)


def id_of(tokenizer: Tokenizer, names: Sequence[str]) -> int | None:
    """The id of the first of these tokens that the tokenizer has."""
    return next((number for name in names if (number := tokenizer.token_to_id(name)) is not None), None)


def load_tokenizer(path: str | Path, key: str = "tokenizer") -> Tokenizer:
    """The tokenizer of a local tokenizer.json, or of the directory that holds it. Raises RecipeError naming the key."""
    file = Path(path)
    file = file / "tokenizer.json" if file.is_dir() else file
    try:
        return read_tokenizer(file.read_text(encoding="utf-8"))
    except Exception as error:  # the library raises bare Exception
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:120]
        raise RecipeError(
            f"{key}: {file}: {reason}; give a tokenizer.json of the `tokenizers` library, or its directory "
            "(transformers' save_pretrained converts older vocab.txt or merges.txt files)"
        ) from error


def read_tokenizer(text: str) -> Tokenizer:
    """The tokenizer of a tokenizer.json's text, set up for the loader.

    Files from the Hub often pad and truncate to some length, which would happen before the loader does it. The name of
    a special token within a caption is plain text, not that token.
    """
    tokenizer = Tokenizer.from_str(text)
    tokenizer.no_padding()
    tokenizer.no_truncation()
    tokenizer.encode_special_tokens = True
    return tokenizer


def _pickled(tokenizer: Tokenizer) -> tuple[Callable[[str], Tokenizer], tuple[str]]:
    return read_tokenizer, (tokenizer.to_str(),)


# By default a tokenizer pickles as its JSON, which loses `encode_special_tokens`: the same caption would give other
# tokens in another process (tokenizers#1839).
copyreg.pickle(Tokenizer, _pickled)


def tokenise(
    tokenizer: Tokenizer,
    texts: Sequence[str],
    max_tokens: int,
    randoms: Sequence[np.random.Generator] | None = None,
) -> list[list[int]]:
    """At most `max_tokens` token ids of each text. The special tokens at both ends are always kept.

    A longer text keeps its head or, with a generator per text in `randoms`, a random run of whole sentences.
    """
    rows = []
    for number, encoding in enumerate(tokenizer.encode_batch_fast(list(texts))):
        ids: list[int] = encoding.ids
        if len(ids) > max_tokens:
            special = encoding.special_tokens_mask
            # The text's first token, and the one after its last
            first, end = len(ids), len(ids)
            if 0 in special:
                first, end = special.index(0), len(ids) - special[::-1].index(0)
            begin, stop = 0, max_tokens - (len(ids) - (end - first))
            if randoms is not None:
                # Encoded again: the fast call above does not give the tokens' places in the text.
                places = [start for start, _ in tokenizer.encode(texts[number]).offsets[first:end]]
                starts = np.searchsorted(places, sentence_starts(texts[number])).tolist()
                begin, stop = sentence_window(starts, len(places), stop, randoms[number].random())
            ids = ids[:first] + ids[first + begin : first + stop] + ids[end:]
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


# --- what a stage takes from its data before it trains ----------------------------------------------------------------


@dataclass(frozen=True)
class Vocabulary:
    """A stage's tokenizer and the classes that number its targets."""

    tokenizer_json: str
    classes: tuple[str, ...] = ()  # labels in alphabetical order, or answers from the most frequent on


@dataclass(frozen=True)
class Texts:
    """The data of one task of a stage, and how it is read."""

    key: str  # the recipe's key of the loader, for errors
    readers: Sequence[Reader]
    config: LoaderConfig


def learn_vocabulary(data: Sequence[Texts], vocabulary_size: int, tokenizer: Tokenizer | None = None) -> Vocabulary:
    """The vocabulary of a stage's data, with the given tokenizer or one trained on the texts.

    Raises RecipeError when classes are needed and there are none, and as `questions_of`.
    """
    counts: list[Counter[str]] = [Counter() for _ in data]
    streams = [_texts(task, counter) for task, counter in zip(data, counts, strict=True)]
    if tokenizer is None:
        tokenizer = train_tokenizer(islice(chain(*streams), MAX_TEXTS), vocabulary_size)
    for task, stream, counter in zip(data, streams, counts, strict=True):
        if task.config.text == "questions" or task.config.label is not None:
            deque(stream, maxlen=0)  # the texts past MAX_TEXTS, for their classes
        if task.config.label is not None and not counter:
            raise RecipeError(
                f"{task.key}.label: no sample of split {task.config.split!r} has a class of that name; its metadata "
                f'needs "classes": {{"{task.config.label}": "…"}}'
            )
    total = sum(counts, Counter())
    classes = sorted(total)
    if any(task.config.text == "questions" for task in data):
        classes = sorted(classes, key=lambda answer: -total[answer])[:MAX_ANSWERS]
    return Vocabulary(tokenizer.to_str(), tuple(classes))


def _texts(task: Texts, counts: Counter[str]) -> Iterator[str]:
    """Every text that the model may read or write. Counts labels or answers on the way."""
    for reader in task.readers:
        for sample in reader.texts(skip_corrupt=task.config.on_corrupt == "skip"):
            if task.config.text == "questions":
                for question in questions_of(sample.key, sample.metadata):
                    yield question.text
                    counts.update(question.answers)
                    yield from question.answers
            else:
                yield from (caption.text for caption in sample.captions)
                label = label_of(sample.metadata, task.config.label)
                if label is not None:
                    counts[label] += 1
