"""Pictures and captions shown with what the model looked at when it compared them."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from mmflow.core.config import Config
from mmflow.evaluation.examination import Examination, Outcome, Subject, spread
from mmflow.inference.result import Gives


class AttentionConfig(Config):
    """Pictures and captions shown with what the model looked at when it compared them."""

    rows: int = Field(6, ge=1)
    """Rows of the first split, spread evenly over it."""


def _look(subject: Subject, section: AttentionConfig) -> Outcome:
    """Some pictures with their own first captions."""
    from mmflow.inference.attention import look

    rows, captions = subject.rows, subject.rows.main_captions
    shown: list[dict[str, Any]] = []
    for place in spread(len(captions.pictures), section.rows):
        row, caption = captions.pictures[place], captions.texts_of_picture[place][0]
        looked = look(subject.predictor, rows.with_picture(row), caption)
        shown.append(
            {
                **rows.reference(row),
                "caption": caption,
                "score": round(looked.score, 4),
                "picture": looked.picture,
                "rollout": looked.rollout,
                "tokens": [{"text": piece, "weight": weight} for piece, weight in looked.tokens],
            }
        )
    return Outcome(details={"attention": shown})


ATTENTION = Examination(
    needs=(Gives({"embeddings"}), Gives({"pair_scores"}), Gives({"matching_logits"})),
    remedy="a text encoder and an embedding_width, or a fusion and the head matching",
    examine=_look,
    measures=False,
)
