"""What a student keeps of its teacher, metric by metric, in a fixed order."""

from __future__ import annotations

from mmflow.report.figures import share_of_teacher
from mmflow.report.page import metric_words
from mmflow.report.run_page import kept_view


def test_every_metric_where_higher_is_better_is_compared() -> None:
    teacher = {
        "image_to_text": {"R@1": 0.5, "median rank": 2.0},
        "text_to_image": {"R@1": 0.4, "R@10": 0.8},
        "languages": {"zh": {"text_to_image": {"R@10": 0.5}}},
        "zero_shot": {"accuracy": 0.0},
        "captions": {"BLEU": 0.2, "perplexity": None},
        "robustness": {"jpeg": {"R@1": 0.2, "R@1_drop": 0.5}, "typos": {"R@1_drop": 0.1}},
        "slices": {"tokens": {"0-8": {"R@10": 0.9}}},
    }
    student = {
        "image_to_text": {"R@1": 0.25, "median rank": 4.0},
        "text_to_image": {"R@1": 0.3, "R@10": 0.76},
        "languages": {"zh": {"text_to_image": {"R@10": 0.6}}},
        "zero_shot": {"accuracy": 0.1},
        "captions": {"perplexity": None},
        "robustness": {"jpeg": {"R@1": 0.1, "R@1_drop": 0.6}, "typos": {"R@1_drop": 0.2}},
        "slices": {"tokens": {"0-8": {"R@10": 0.8}}},
    }
    shares = share_of_teacher(teacher, student)
    assert {name: round(share, 6) for name, share in shares.items()} == {
        "text_to_image/R@1": 0.75,
        "text_to_image/R@10": 0.95,
        "image_to_text/R@1": 0.5,
        "languages/zh/text_to_image/R@10": 1.2,
        "robustness/jpeg/R@1": 0.5,
    }


def test_rows_are_metrics_in_a_fixed_order_and_columns_are_splits() -> None:
    held_out = {
        "text_to_image/R@10": 0.9,
        "image_to_text/R@1": 0.7,
        "text_to_image/R@1": 0.8,
        "text_to_image/R@5": 0.85,
    }
    kept = kept_view({"held_out": held_out, "other": {"zero_shot/accuracy": 0.8}})
    assert kept["splits"] == ["held_out", "other"]
    assert [(row["name"], row["shares"]) for row in kept["rows"]] == [
        ("text → image R@1", [0.8, None]),
        ("text → image R@5", [0.85, None]),
        ("text → image R@10", [0.9, None]),
        ("image → text R@1", [0.7, None]),
        ("zero shot accuracy", [None, 0.8]),
    ]
    assert metric_words("languages/zh/text_to_image/R@10") == "zh text → image R@10"
