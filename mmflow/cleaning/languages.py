"""Which language a caption is in, by py3langid, whose model comes in its package: nothing is asked of a network."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

UNKNOWN = "und"  # BCP 47's word for it
NOT_LANGUAGE = "zxx"  # numbers and the like
# On 600 names of emoji each, of two or three words: from here on 98% right in English (of the 30% that reach it), 100%
# in French (70%) and 87% in Chinese (32%); below it 58, 51 and 81%.
LEAST_PROBABILITY = 0.5
MAX_CHARACTERS = 1_000  # a language shows within a paragraph


def detect_language(text: str) -> str:
    """The text's language, ISO 639-1, or "und" where the model is not sure."""
    language, probability = _identifier().classify(text[:MAX_CHARACTERS])
    return str(language) if probability >= LEAST_PROBABILITY and language != NOT_LANGUAGE else UNKNOWN


def same_language(tag: str, wanted: str) -> bool:
    """Whether two BCP 47 tags share their primary subtag: "pt-BR" and "pt"."""
    return tag.partition("-")[0].lower() == wanted.partition("-")[0].lower()


@lru_cache(maxsize=1)
def _identifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
