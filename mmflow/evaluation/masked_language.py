"""Words of captions hidden one at a time and guessed by the head `masked_language` (the pseudo-perplexity of arXiv
1910.14659).

Each caption is read with its own picture and with another's: what accuracy drops by, the model had read off the
picture.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mmflow.core.config import Config
from mmflow.evaluation.captions import perplexity_metrics
from mmflow.evaluation.examination import Examination, Gives, Outcome, Subject


class MaskedLanguageConfig(Config):
    """Words of captions hidden one at a time and guessed by the head `masked_language`. It has no settings."""


def _guess(subject: Subject, section: MaskedLanguageConfig) -> Outcome:
    """Over every word piece of every caption; `accuracy_other_picture` is that with the next picture."""
    captions = subject.rows.main_captions
    pictures = [subject.rows.samples[row] for row in captions.pictures]
    own = [pictures[place] for place in captions.picture_of_text]
    others = [pictures[(place + 1) % len(pictures)] for place in captions.picture_of_text]
    losses, right = subject.model.guess_words(own, captions.texts)
    _, right_by_other = subject.model.guess_words(others, captions.texts)
    metrics = {"accuracy": _share(right), "accuracy_other_picture": _share(right_by_other)}
    return Outcome({"masked_language": metrics | perplexity_metrics(losses, np.ones_like(losses, dtype=np.int64))})


def _share(right: NDArray[np.bool_]) -> float:
    return float(right.mean()) if len(right) else 0.0


MASKED_LANGUAGE = Examination(
    needs=(Gives({"masked_language_logits"}),), remedy="the head masked_language", examine=_guess
)
