"""What a stage learns of its data before it trains: a tokenizer of the texts, and what classes its targets are."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice

from tokenizers import Tokenizer

from mmflow.core.errors import RecipeError
from mmflow.dataset.reader import Reader
from mmflow.loading.config import LoaderConfig
from mmflow.loading.text import label_of, questions_of
from mmflow.loading.tokens import train_tokenizer

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
