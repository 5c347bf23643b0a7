"""What a student keeps of its teacher, metric by metric."""

from __future__ import annotations

from mmflow.report.run import share_of_teacher
from mmflow.report.run_page import kept_view, metric_words


def test_every_metric_that_is_the_better_the_higher_is_compared() -> None:
    teacher = {
        "image_to_text": {"R@1": 0.5, "median rank": 2.0},
        "text_to_image": {"R@1": 0.4, "R@10": 0.8},
        "languages": {"zh": {"text_to_image": {"R@10": 0.5}}},
        "zero_shot": {"accuracy": 0.0},
        "captions": {"BLEU": 0.2, "perplexity": None},
    }
    student = {
        "image_to_text": {"R@1": 0.25, "median rank": 4.0},
        "text_to_image": {"R@1": 0.3, "R@10": 0.76},
        "languages": {"zh": {"text_to_image": {"R@10": 0.6}}},
        "zero_shot": {"accuracy": 0.1},
        "captions": {"perplexity": None},
    }
    found = share_of_teacher(teacher, student)
    assert {name: round(share, 6) for name, share in found.items()} == {
        "text_to_image/R@10": 0.95,
        "text_to_image/R@1": 0.75,
        "image_to_text/R@1": 0.5,
        "languages/zh/text_to_image/R@10": 1.2,
    }
    assert next(iter(found)) == "text_to_image/R@10"  # the figure that the page opens with


def test_a_row_a_metric_and_a_column_a_split() -> None:
    assert metric_words("languages/zh/text_to_image/R@10") == "zh text → image R@10"
    kept = kept_view({"held_out": {"text_to_image/R@10": 0.9}, "other": {"zero_shot/accuracy": 0.8}})
    assert kept["splits"] == ["held_out", "other"]
    assert [(row["name"], row["shares"]) for row in kept["rows"]] == [
        ("text → image R@10", [0.9, None]),
        ("zero shot accuracy", [None, 0.8]),
    ]
