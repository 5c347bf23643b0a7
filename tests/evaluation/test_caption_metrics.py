"""Caption metrics against the values of the COCO server's own code, where a metric must not be fooled; perplexity."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmflow.evaluation.captions import bleu, caption_metrics, cider, perplexity_metrics, rouge_l, typical_caption, words

CAPTIONS = [
    "a brown dog runs through the grass",
    "two people riding bikes on a street in the rain",
    "a cat",
    "a red double-decker bus is parked near a building.",
    "a man a man a man a man is standing",
    "people don't walk on the beach at night",
]
REFERENCES = [
    ["A brown dog is running through tall grass.", "the dog runs across a green field", "A dog in the grass"],
    ["Two men ride bicycles down a wet street.", "people riding bikes in the rain"],
    ["A black cat sleeping on a sofa", "a cat lies on the couch next to a pillow", "the cat is asleep"],
    ["A red double-decker bus parked by a building.", "red bus on the side of the road", "the bus is red", "a bus"],
    ["A man in a suit is standing at a podium.", "man speaking into a microphone"],
    ["Nobody's walking on the beach, it's too dark.", "an empty beach at night"],
]
TEXTS = [words(caption) for caption in CAPTIONS]
PEOPLE = [[words(text) for text in theirs] for theirs in REFERENCES]

# pycocoevalcap 1.2 on these captions, split into the same words: BLEU-1 to BLEU-4, and by row ROUGE-L and CIDEr-D.
COCO_BLEU = [0.78723404, 0.61969073, 0.42506955, 0.22493896]
COCO_ROUGE_L = [0.76250000, 0.78540773, 0.40397351, 0.89517820, 0.50000000, 0.45185185]
COCO_CIDER = [2.13310429, 2.08120861, 1.09800916, 1.83825514, 0.56671546, 1.56331547]


def test_bleu_is_that_of_the_coco_server() -> None:
    assert [bleu(TEXTS, PEOPLE, order) for order in (1, 2, 3, 4)] == pytest.approx(COCO_BLEU, abs=1e-6)


def test_rouge_l_is_that_of_the_coco_server() -> None:
    found = [rouge_l(said, written) for said, written in zip(TEXTS, PEOPLE, strict=True)]
    assert found == pytest.approx(COCO_ROUGE_L, abs=1e-6)


def test_cider_is_that_of_the_coco_server() -> None:
    assert cider(TEXTS, PEOPLE) == pytest.approx(COCO_CIDER, abs=1e-6)


def test_metrics_are_means_over_pictures() -> None:
    found = caption_metrics(CAPTIONS, REFERENCES)
    assert found["BLEU-4"] == pytest.approx(COCO_BLEU[3], abs=1e-6)
    assert found["ROUGE-L"] == pytest.approx(sum(COCO_ROUGE_L) / 6, abs=1e-6)
    assert found["CIDEr"] == pytest.approx(sum(COCO_CIDER) / 6, abs=1e-6)
    assert found["words"] == pytest.approx(sum(map(len, TEXTS)) / 6)
    assert found["distinct"] == 1.0


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("A dog, running (fast)!", "a dog running fast"),
        ("it's the man's; don't can't", "it 's the man 's do n't ca n't"),
        ("a double-decker bus - red", "a double-decker bus red"),
        ("1,000 people at 11:30 p.m.", "1,000 people at 11:30 p m"),
        ("“Stop”\u2026 says the sign", "stop says the sign"),
        ("红色的圆。", "红 色 的 圆"),
        ("cats & dogs, 50%", "cats & dogs 50 %"),
        ("", ""),
    ],
)
def test_captions_are_split_near_to_the_penn_treebank_without_punctuation(caption: str, expected: str) -> None:
    assert words(caption) == expected.split()


def test_a_caption_that_is_a_reference_has_the_most_of_everything() -> None:
    theirs = [[text] for text in ("a red bus on a street", "two cats sleep in the sun", "an old man reads a book")]
    found = caption_metrics([text for (text,) in theirs], theirs)
    assert [found[name] for name in ("BLEU-1", "BLEU-4", "ROUGE-L")] == pytest.approx([1.0, 1.0, 1.0])
    assert found["CIDEr"] == pytest.approx(10.0)


def test_one_caption_for_every_picture_shows() -> None:
    found = caption_metrics(["a dog in the grass"] * 6, REFERENCES)
    assert found["distinct"] == 0.0
    assert found["CIDEr"] < sum(COCO_CIDER) / 6


def test_the_typical_caption_shares_most_words_with_the_others() -> None:
    assert typical_caption(["a blue sky", "a red car", "a red bus", "red car, parked", "snow"]) == "a red car"
    assert typical_caption(["cat", *["a dog"] * 600]) == "a dog"
    assert typical_caption([]) == ""


def test_saying_nothing_earns_nothing() -> None:
    found = caption_metrics([""] * 6, REFERENCES)
    assert {name: value for name, value in found.items() if value} == {}
    assert caption_metrics([], []) == dict.fromkeys(found, 0.0)


def test_references_of_punctuation_alone_are_left_out() -> None:
    with_more = [[*theirs, "!?"] for theirs in REFERENCES]
    assert caption_metrics([*CAPTIONS, "a dog"], [*with_more, ["…"]]) == caption_metrics(CAPTIONS, REFERENCES)


def test_one_row_alone_has_no_rare_words() -> None:
    assert caption_metrics(CAPTIONS[:1], REFERENCES[:1])["CIDEr"] == 0.0


def plain_subsequence(one: Sequence[str], other: Sequence[str]) -> int:
    if not one or not other:
        return 0
    if one[0] == other[0]:
        return 1 + plain_subsequence(one[1:], other[1:])
    return max(plain_subsequence(one[1:], other), plain_subsequence(one, other[1:]))


TEXT = st.lists(st.sampled_from("abc"), min_size=1, max_size=6)


@given(said=TEXT, written=st.lists(TEXT, min_size=1, max_size=3))
def test_rouge_l_equals_its_definition(said: list[str], written: list[list[str]]) -> None:
    common = [plain_subsequence(said, each) for each in written]
    precision = max(common) / len(said)
    recall = max(length / len(each) for length, each in zip(common, written, strict=True))
    expected = 2.44 * precision * recall / (recall + 1.44 * precision) if max(common) else 0.0
    assert rouge_l(said, written) == pytest.approx(expected)


@given(data=st.data(), rows=st.integers(2, 4))
def test_cider_stays_in_its_bounds_and_repeating_a_rare_word_does_not_pay(data: st.DataObject, rows: int) -> None:
    said = data.draw(st.lists(TEXT, min_size=rows, max_size=rows))
    written = data.draw(st.lists(st.lists(TEXT, min_size=1, max_size=3), min_size=rows, max_size=rows))
    scores = cider(said, written)
    assert all(-1e-9 <= score <= 10 + 1e-9 and math.isfinite(score) for score in scores)
    once = [["rare", *text] for text in said]
    written = [[["rare", *text] for text in theirs] if row == 0 else theirs for row, theirs in enumerate(written)]
    repeated = [["rare"] * 20 + text for text in said]
    assert cider(repeated, written)[0] <= cider(once, written)[0] + 1e-9


def test_bleu_without_its_package_says_what_to_install() -> None:
    program = (
        "import sys; sys.modules['sacrebleu'] = None\n"
        "from mmflow.evaluation.captions import bleu\n"
        "bleu([['a']], [[['a']]], 1)"
    )
    failed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (
        "MisuseError: BLEU needs sacrebleu, which is not installed: pip install 'mmflow[evaluation]'" in failed.stderr
    )


def test_a_text_weighs_by_its_tokens() -> None:
    found = perplexity_metrics(np.array([2.0, 1.0]), np.array([1, 4]))
    assert found == {"perplexity": pytest.approx(math.exp(3 / 5)), "token_loss": pytest.approx(3 / 5), "tokens": 5.0}
    assert perplexity_metrics(np.full(3, 7 * math.log(6)), np.full(3, 7))["perplexity"] == pytest.approx(6.0)


@pytest.mark.parametrize(
    ("losses", "tokens"), [([math.nan, 1.0], [2, 2]), ([math.inf, 1.0], [2, 2]), ([1e9], [1]), ([], []), ([0.0], [0])]
)
def test_a_perplexity_that_is_no_number_too_large_or_of_nothing_is_infinite(
    losses: list[float], tokens: list[int]
) -> None:
    assert perplexity_metrics(np.array(losses), np.array(tokens, dtype=np.int64))["perplexity"] == math.inf
