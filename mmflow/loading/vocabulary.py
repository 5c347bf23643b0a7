"""What a stage learns of its data before it trains: a tokenizer of the texts, and what classes its targets are."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from mmflow.errors import RecipeError
from mmflow.loading.config import LoaderConfig
from mmflow.loading.reader import Reader
from mmflow.loading.text import label_of, questions_of
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

    `key` is the recipe's key of the stage, for errors. Raises RecipeError where classes are asked for and there are
    none, and as `questions_of`.
    """
    counts: Counter[str] = Counter()
    texts = _texts(readers, config, counts)
    if checkpoint is not None:
        tokenizer = load_tokenizer(checkpoint, f"{key}.model.text.checkpoint")
    else:
        tokenizer = train_tokenizer(islice(texts, MAX_TEXTS), vocabulary_size)
    if config.text == "questions" or config.label is not None:
        deque(texts, maxlen=0)  # what is left of them, for its classes
    if config.label is not None and not counts:
        raise RecipeError(
            f"{key}.loader.label: no sample of split {config.split!r} has a class of that name; its metadata needs "
            f'"classes": {{"{config.label}": "…"}}'
        )
    if config.text == "questions":
        classes = [answer for answer, _ in sorted(counts.items(), key=lambda each: (-each[1], each[0]))][:MAX_ANSWERS]
    else:
        classes = sorted(counts)
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
