"""Named changes of pictures and captions, under which a model is looked at."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, get_args

from mmflow.imaging.corruptions import CORRUPTIONS, Severity, blank, corrupt
from mmflow.imaging.decode import Pixels
from mmflow.inference.perturbations import shuffled_words, typos
from mmflow.inference.swaps import swapped_attributes, swapped_objects

MISSING = "missing"  # a picture that is not there: a grey one
Perturbation = Literal["typos", "shuffled_words", "swapped_attributes", "swapped_objects", "missing"]

PERTURBATIONS: dict[Perturbation, Callable[[str], str | None]] = {
    "typos": typos,
    "shuffled_words": shuffled_words,
    "swapped_attributes": swapped_attributes,
    "swapped_objects": swapped_objects,
    "missing": lambda caption: "" if caption else None,
}
"""Name → a changed caption, or None where there is nothing to change."""


def changed(views: Sequence[Pixels], change: str, key: str) -> list[Pixels]:
    """Views after a change: "" for none, "missing", or the name of a corruption and its severity, such as jpeg-3."""
    if not change:
        return list(views)
    if change == MISSING:
        return [blank(view) for view in views]
    for name in CORRUPTIONS:
        for severity in get_args(Severity):
            if change == f"{name}-{severity}":
                return [corrupt(view, name, severity, key) for view in views]
    raise ValueError(f"{change}: no such change of a picture")
