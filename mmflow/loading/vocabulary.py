"""What a stage learns of its data before it trains: a tokenizer of the texts, and what classes its targets are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from tokenizers import Tokenizer

from mmflow.errors import RecipeError
from mmflow.loading.config import LoaderConfig
from mmflow.loading.reader import Reader, Sample
from mmflow.loading.text import QUESTIONS
from mmflow.loading.tokens import load_tokenizer, train_tokenizer

MAX_TEXTS = 2_000_000  # a vocabulary is settled long before this many
MAX_ANSWERS = 3_129  # of a question-answering model: as many as VQA v2's models choose from (arXiv 1708.02711)


@dataclass(frozen=True)
class Vocabulary:
    """What texts and targets are numbered by."""

    tokenizer_json: str
    classes: tuple[str, ...] = ()  # labels in order of their names, or answers from the commonest


def learn_vocabulary(
    readers: Sequence[Reader], config: LoaderConfig, vocabulary_size: int, checkpoint: Path | None, key: str
) -> Vocabulary:
    """The vocabulary of a stage's data: the tokenizer of a text encoder's `checkpoint`, or one trained on the texts.

    `key` is the recipe's key of the checkpoint, for errors. Raises RecipeError where there is no text, or no class
    where classes are asked for.
    """
    tokenizer: Tokenizer | None = None if checkpoint is None else load_tokenizer(checkpoint, key)
    counts: Counter[str] = Counter()
    if tokenizer is None:
        texts = _texts(readers, config, counts)
        tokenizer = train_tokenizer(islice(texts, MAX_TEXTS), vocabulary_size)
        for _ in texts:  # the rest is gone through for its classes alone
            if not _counts_classes(config):
                break
    elif _counts_classes(config):
        for _ in _texts(readers, config, counts):
            pass
    if config.label is not None and not counts:
        raise RecipeError(
            f'loader.label: no sample of split {config.split!r} has metadata "classes": {{"{config.label}": …}}'
        )
    if config.text == "questions":
        classes = [answer for answer, _ in sorted(counts.items(), key=lambda each: (-each[1], each[0]))][:MAX_ANSWERS]
    else:
        classes = sorted(counts)
    return Vocabulary(tokenizer.to_str(), tuple(classes))


def _counts_classes(config: LoaderConfig) -> bool:
    return config.text == "questions" or config.label is not None


def _texts(readers: Sequence[Reader], config: LoaderConfig, counts: Counter[str]) -> Iterator[str]:
    """Every text that the model may read or write; labels or answers are counted on the way."""
    for reader in readers:
        for sample in reader:
            if config.text == "questions":
                yield from _questions(sample, counts)
            else:
                yield from (caption.text for caption in sample.captions)
                label = _label(sample, config.label)
                if label is not None:
                    counts[label] += 1


def _questions(sample: Sample, counts: Counter[str]) -> Iterator[str]:
    found = sample.metadata.get(QUESTIONS)
    for each in found if isinstance(found, list) else []:
        yield str(each.get("question", ""))
        for answer in each.get("answers") or []:
            counts[answer] += 1
            yield answer


def _label(sample: Sample, name: str | None) -> str | None:
    classes = sample.metadata.get("classes")
    value = classes.get(name) if isinstance(classes, dict) and name is not None else None
    return value if isinstance(value, str) else None
