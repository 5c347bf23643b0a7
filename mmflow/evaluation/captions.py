"""Written captions against people's: BLEU, ROUGE-L and CIDEr as on the COCO caption server (arXiv 1504.00325), and
perplexity.

BLEU is sacrebleu's. ROUGE-L and CIDEr are written here: pycocoevalcap, which the server's code became, has had no
release since 2020 and splits words by a Java program, and rouge-score takes neither several references nor Chinese.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib.util import find_spec

import numpy as np
from numpy.typing import NDArray

from mmflow.core.errors import MisuseError, RecipeError
from mmflow.evaluation.examination import Examination, Metrics, Outcome, Rows, Subject, Trained, spread
from mmflow.inference.generation import WritingConfig
from mmflow.inference.result import Gives, Result
from mmflow.inference.tasks.caption import Caption
from mmflow.inference.tasks.perplexity import Perplexity

Words = list[str]
References = Sequence[Sequence[str]]  # the texts of people, at least one a caption

ORDERS = (1, 2, 3, 4)  # lengths of n-grams, in words
BETA = 1.2  # weight of recall against precision in ROUGE-L, as on the server
TYPICAL_OF = 500  # captions compared with each other, which is quadratic
SIGMA = 6.0  # words by which lengths may differ before CIDEr-D's penalty bites (arXiv 1411.5726, section 7)

_WORD = re.compile(
    r"[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]"  # scripts without spaces between words: each character is one
    r"|\w+(?=n['\u2019]t\b)|n['\u2019]t\b|['\u2019](?:s|re|ve|ll|d|m)\b"  # did n't, it 's, as in the Penn Treebank
    r"|\d+(?:[.,:]\d+)+|[^\W_\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]+(?:-[^\W_]+)*"
    r"|[^\w\s.,:;!?'\"`\u2018-\u201f()\[\]{}…。，、；：！？（）《》「」-]"
)


def words(caption: str) -> Words:
    """A caption's words in lower case without punctuation, close to the server's tokenizer for English."""
    return _WORD.findall(caption.lower())


def caption_metrics(captions: Sequence[str], references: References) -> dict[str, float]:
    """{"BLEU-1", "BLEU-4", "ROUGE-L"} from 0 to 1, {"CIDEr"} from 0 to 10, {"words", "distinct"}: mean length, and the
    share of captions that no other row has. A low share shows a model that writes the same for every picture.

    CIDEr weighs words by the references of all rows, so for a single row it is 0. All are 0 without a row. References
    of punctuation alone are left out, and so are rows without another.
    """
    texts = [words(caption) for caption in captions]
    people = [[split for text in theirs if (split := words(text))] for theirs in references]
    texts = [text for text, theirs in zip(texts, people, strict=True) if theirs]
    people = [theirs for theirs in people if theirs]
    if not texts:
        return dict.fromkeys(("BLEU-1", "BLEU-4", "ROUGE-L", "CIDEr", "words", "distinct"), 0.0)
    counts = Counter(map(tuple, texts))
    return {
        "BLEU-1": bleu(texts, people, 1),
        "BLEU-4": bleu(texts, people, 4),
        "ROUGE-L": float(np.mean([rouge_l(text, theirs) for text, theirs in zip(texts, people, strict=True)])),
        "CIDEr": float(np.mean(cider(texts, people))),
        "words": float(np.mean([len(text) for text in texts])),
        "distinct": sum(count == 1 for count in counts.values()) / len(texts),
    }


def typical_caption(captions: Sequence[str]) -> str:
    """The caption that has most in common with all others, by the mean Dice coefficient of their words; "" without one.

    It is the best description without looking. Of many captions a part, evenly spread, is compared.
    """
    compared = captions[:: 1 + len(captions) // TYPICAL_OF]
    sets = [frozenset(words(caption)) for caption in compared]

    def in_common(place: int) -> float:
        own = sets[place]
        return sum(2 * len(own & other) / max(1, len(own) + len(other)) for other in sets)

    return compared[max(range(len(compared)), key=in_common)] if compared else ""


def bleu(captions: Sequence[Words], references: Sequence[Sequence[Words]], order: int) -> float:
    """BLEU of the whole corpus, from 0 to 1: n-grams of up to `order` words, unsmoothed, against the reference nearest
    in length (Papineni et al., ACL 2002). Raises MisuseError where sacrebleu is not installed."""
    try:
        from sacrebleu.metrics.bleu import BLEU
    except ModuleNotFoundError as error:
        raise MisuseError("BLEU needs sacrebleu, which is not installed: pip install 'mmflow[evaluation]'") from error

    most = max(map(len, references))
    # sacrebleu takes a column per reference, with None where a row has fewer.
    columns = [
        [" ".join(theirs[number]) if number < len(theirs) else None for theirs in references] for number in range(most)
    ]
    # The words are split already; `force` only silences the warning about that.
    metric = BLEU(tokenize="none", smooth_method="none", max_ngram_order=order, force=True)
    scored = metric.corpus_score([" ".join(caption) for caption in captions], columns)  # type: ignore[arg-type]
    return float(scored.score) / 100


def rouge_l(caption: Words, references: Sequence[Words]) -> float:
    """The F-measure of the longest common subsequence, with the best precision and the best recall over the references
    (Lin, ACL 2004)."""
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

    The cosine of n-grams, each weighed by how few rows' references have it and clipped at the reference's own count so
    that repeating a rare word does not pay, times a penalty for another length; the mean over n and references, times
    10.
    """
    rows_with: Counter[str] = Counter()
    for theirs in references:
        rows_with.update({gram for reference in theirs for order in ORDERS for gram in _grams(reference, order)})
    total = np.log(len(references))

    def weighed(text: Words, order: int) -> dict[str, float]:
        return {gram: count * (total - np.log(max(1, rows_with[gram]))) for gram, count in _grams(text, order).items()}

    scores = []
    for caption, theirs in zip(captions, references, strict=True):
        grams = {order: weighed(caption, order) for order in ORDERS}
        cosines = [
            _clipped_cosine(grams[order], weighed(reference, order))
            * np.exp(-((len(caption) - len(reference)) ** 2) / (2 * SIGMA**2))
            for reference in theirs
            for order in ORDERS
        ]
        scores.append(10 * float(np.mean(cosines)))
    return scores


def _grams(text: Words, order: int) -> Counter[str]:
    return Counter(" ".join(text[start : start + order]) for start in range(len(text) - order + 1))


def _clipped_cosine(caption: Mapping[str, float], reference: Mapping[str, float]) -> float:
    lengths = np.sqrt(sum(value**2 for value in caption.values()) * sum(value**2 for value in reference.values()))
    shared = sum(min(value, reference[gram]) * reference[gram] for gram, value in caption.items() if gram in reference)
    return float(shared / lengths) if lengths else 0.0


def perplexity_metrics(losses_N: NDArray[np.floating], tokens_N: NDArray[np.integer]) -> dict[str, float]:
    """{"perplexity", "token_loss", "tokens"} from each text's loss in nats and its number of tokens.

    `token_loss` is the mean loss a token over all texts, so a long text weighs by its length; perplexity is its exp.
    Infinite without a token and where a loss is not a number.
    """
    tokens = int(tokens_N.sum())
    mean = float(losses_N.sum()) / tokens if tokens else math.inf
    mean = math.inf if math.isnan(mean) else mean
    return {"perplexity": math.exp(mean) if mean < 700 else math.inf, "token_loss": mean, "tokens": float(tokens)}


# --- the examination ------------------------------------------------------------------------------------------------


def _asks(section: WritingConfig, languages: Sequence[str], gives: Gives) -> tuple[Result, ...]:
    return Caption(**section.model_dump()), Perplexity(language=languages[0])


def _write(subject: Subject, section: WritingConfig) -> Outcome:
    """Captions written by the decoder against people's, and how likely it finds theirs."""
    rows, captions = subject.rows, subject.rows.main_captions
    write, read = _asks(section, [subject.language], subject.gives)
    by_row = subject.column(write, "written_captions").to_pylist()
    written = [by_row[row][0] for row in captions.pictures]
    losses, tokens = (
        subject.column(read, name).combine_chunks().flatten().to_numpy() for name in ("caption_nats", "caption_tokens")
    )
    people = captions.texts_of_picture
    shown = [
        {**rows.reference(captions.pictures[place]), "caption": written[place], "people": people[place]}
        for place in spread(len(written))
    ]
    metrics = caption_metrics(written, people) | perplexity_metrics(losses, tokens)
    return Outcome({"captions": metrics}, {"captions": shown})


def _chance(rows: Rows, section: WritingConfig) -> Metrics:
    captions = rows.main_captions
    typical = [typical_caption(captions.texts)] * len(captions.pictures)
    return {"captions": caption_metrics(typical, captions.texts_of_picture)}


def _check_sacrebleu(section: WritingConfig, trained: Trained) -> None:
    """Raise RecipeError where BLEU cannot be computed."""
    if find_spec("sacrebleu") is None:
        raise RecipeError(
            "evaluate.captions: BLEU needs sacrebleu, which is not installed: pip install 'mmflow[evaluation]', or "
            "leave captions out"
        )


CAPTIONS = Examination(
    needs=Caption.needs,
    remedy=Caption.remedy,
    asks=_asks,
    examine=_write,
    chance=_chance,
    check=_check_sacrebleu,
)
