"""Words of captions hidden one at a time and guessed by the head `masked_language` (the pseudo-perplexity of arXiv
1910.14659).

Each caption is read with its own picture and with another's: what accuracy drops by, the model had read off the
picture.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from mmflow.core.config import Config
from mmflow.evaluation.captions import perplexity_metrics
from mmflow.evaluation.examination import Examination, Outcome, Subject
from mmflow.inference.result import Gives, Result
from mmflow.inference.tasks.guess_words import GuessWords


class MaskedLanguageConfig(Config):
    """Words of captions hidden one at a time and guessed by the head `masked_language`. It has no settings."""


def _asks(section: MaskedLanguageConfig, languages: Sequence[str], gives: Gives) -> tuple[Result, ...]:
    return (GuessWords(language=languages[0]),)


def _guess(subject: Subject, section: MaskedLanguageConfig) -> Outcome:
    """Over every word piece of every caption; `accuracy_other_picture` is that with another row's picture."""
    result = GuessWords(language=subject.language)
    nats, right, right_by_other = (
        subject.column(result, name).combine_chunks().flatten().drop_null().to_numpy(zero_copy_only=False)
        for name in ("word_nats", "word_right", "word_right_by_other")
    )
    metrics = {"accuracy": _share(right)}
    if len(right_by_other):
        metrics["accuracy_other_picture"] = _share(right_by_other)
    return Outcome({"masked_language": metrics | perplexity_metrics(nats, np.ones_like(nats, dtype=np.int64))})


def _share(right: NDArray[np.bool_]) -> float:
    return float(right.mean()) if len(right) else 0.0


MASKED_LANGUAGE = Examination(needs=GuessWords.needs, remedy=GuessWords.remedy, asks=_asks, examine=_guess)
