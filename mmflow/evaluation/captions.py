"""Captions against what people wrote: BLEU, ROUGE-L and CIDEr as the COCO caption server has them (arXiv 1504.00325).

BLEU is sacrebleu's. The other two are written here: pycocoevalcap, which the server's code became, has had no release
since 2020 and splits words by a Java program, and rouge-score knows neither several references nor Chinese.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from mmflow.core.errors import MisuseError

Words = list[str]
References = Sequence[Sequence[str]]  # of each caption, at least one

ORDERS = (1, 2, 3, 4)  # n-grams of so many words
BETA = 1.2  # how much more recall weighs than precision in ROUGE-L, as the server has it
TYPICAL_OF = 500  # captions that are compared with each other, which is quadratic
SIGMA = 6.0  # words by which lengths may differ before CIDEr-D's penalty bites (arXiv 1411.5726, section 7)

_WORD = re.compile(
    r"[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]"  # of scripts that put no spaces between words, each character is one
    r"|\w+(?=n['\u2019]t\b)|n['\u2019]t\b|['\u2019](?:s|re|ve|ll|d|m)\b"  # did n't, it 's, as the Penn Treebank has it
    r"|\d+(?:[.,:]\d+)+|[^\W_\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]+(?:-[^\W_]+)*"
    r"|[^\w\s.,:;!?'\"`\u2018-\u201f()\[\]{}…。，、；：！？（）《》「」-]"
)


def words(caption: str) -> Words:
    """A caption's words in lower case without punctuation, near to what the server's tokenizer makes of English."""
    return _WORD.findall(caption.lower())


def caption_metrics(captions: Sequence[str], references: References) -> dict[str, float]:
    """{"BLEU-1", "BLEU-4", "ROUGE-L"} from 0 to 1, {"CIDEr"} from 0 to 10, {"words", "distinct"}: mean length, and the
    share of captions that no other row has, which shows a model that says one thing of every picture.

    CIDEr weighs words by the references of all rows: of one row alone it is 0. All are 0 without a row.
    """
    said, written = _tokenised(captions, references)
    if not said:
        return dict.fromkeys(("BLEU-1", "BLEU-4", "ROUGE-L", "CIDEr", "words", "distinct"), 0.0)
    counts = Counter(map(tuple, said))
    return {
        "BLEU-1": bleu(said, written, 1),
        "BLEU-4": bleu(said, written, 4),
        "ROUGE-L": float(np.mean([rouge_l(one, theirs) for one, theirs in zip(said, written, strict=True)])),
        "CIDEr": float(np.mean(cider(said, written))),
        "words": float(np.mean([len(one) for one in said])),
        "distinct": sum(count == 1 for count in counts.values()) / len(said),
    }


def typical_caption(captions: Sequence[str]) -> str:
    """What describes best without looking: the caption that has most in common with all, by the mean Dice coefficient
    of their words; "" without one. Of many captions some, spread evenly, are compared."""
    compared = captions[:: 1 + len(captions) // TYPICAL_OF]
    said = [frozenset(words(caption)) for caption in compared]

    def in_common(one: frozenset[str]) -> float:
        return sum(2 * len(one & other) / max(1, len(one) + len(other)) for other in said)

    return max(zip(compared, said, strict=True), key=lambda each: in_common(each[1]), default=("", frozenset()))[0]


def _tokenised(captions: Sequence[str], references: References) -> tuple[list[Words], list[list[Words]]]:
    said = [words(caption) for caption in captions]
    written = [[found for each in theirs if (found := words(each))] for theirs in references]
    kept = [row for row, theirs in enumerate(written) if theirs]
    return [said[row] for row in kept], [written[row] for row in kept]


def bleu(captions: Sequence[Words], references: Sequence[Sequence[Words]], order: int) -> float:
    """Of the whole corpus, from 0 to 1, up to n-grams of `order` words, unsmoothed, against the reference nearest in
    length (Papineni et al., ACL 2002). Raises MisuseError where sacrebleu is not installed."""
    try:
        from sacrebleu.metrics.bleu import BLEU
    except ModuleNotFoundError as error:
        raise MisuseError("BLEU needs sacrebleu, which is not installed: pip install 'mmflow[evaluation]'") from error

    most = max(map(len, references))
    # sacrebleu wants a column a reference, None where a row has fewer.
    columns = [
        [" ".join(theirs[number]) if number < len(theirs) else None for theirs in references] for number in range(most)
    ]
    # Words are split already; `force` only silences the warning that they look so.
    metric = BLEU(tokenize="none", smooth_method="none", max_ngram_order=order, force=True)
    found = metric.corpus_score([" ".join(caption) for caption in captions], columns)  # type: ignore[arg-type]
    return float(found.score) / 100


def rouge_l(caption: Words, references: Sequence[Words]) -> float:
    """F of the longest common subsequence's best precision and best recall over the references (Lin, ACL 2004)."""
    common = [_common_subsequence(caption, reference) for reference in references]
    precision = max(common) / max(1, len(caption))
    recall = max(length / len(reference) for length, reference in zip(common, references, strict=True))
    if not precision or not recall:
        return 0.0
    return (1 + BETA**2) * precision * recall / (recall + BETA**2 * precision)


def _common_subsequence(one: Words, other: Words) -> int:
    above = [0] * (len(other) + 1)
    for word in one:
        row = [0]
        for place, another in enumerate(other, start=1):
            row.append(above[place - 1] + 1 if word == another else max(above[place], row[-1]))
        above = row
    return above[-1]


def cider(captions: Sequence[Words], references: Sequence[Sequence[Words]]) -> list[float]:
    """CIDEr-D of each row, from 0 to 10 (arXiv 1411.5726, equations 1 to 4 and section 7).

    Cosines of n-grams weighed by how few rows' references have them, clipped at the reference's own counts so that
    repeating a rare word does not pay, times a penalty for another length, mean over n and references, times 10.
    """
    rows_with: Counter[str] = Counter()
    for theirs in references:
        rows_with.update({gram for reference in theirs for order in ORDERS for gram in _grams(reference, order)})
    total = np.log(len(references))

    def weighed(text: Words, order: int) -> dict[str, float]:
        return {gram: count * (total - np.log(max(1, rows_with[gram]))) for gram, count in _grams(text, order).items()}

    scores = []
    for caption, theirs in zip(captions, references, strict=True):
        said = {order: weighed(caption, order) for order in ORDERS}
        found = [
            _clipped_cosine(said[order], weighed(reference, order))
            * np.exp(-((len(caption) - len(reference)) ** 2) / (2 * SIGMA**2))
            for reference in theirs
            for order in ORDERS
        ]
        scores.append(10 * float(np.mean(found)))
    return scores


def _grams(text: Words, order: int) -> Counter[str]:
    return Counter(" ".join(text[start : start + order]) for start in range(len(text) - order + 1))


def _clipped_cosine(said: Mapping[str, float], written: Mapping[str, float]) -> float:
    lengths = np.sqrt(sum(value**2 for value in said.values()) * sum(value**2 for value in written.values()))
    shared = sum(min(value, written[gram]) * written[gram] for gram, value in said.items() if gram in written)
    return float(shared / lengths) if lengths else 0.0
