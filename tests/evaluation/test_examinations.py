"""Classes, answers, written captions, hidden words, changes and slices: against plain loops over rows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from mmflow.dataset.opened import Dataset
from mmflow.evaluation.answering import answering_metrics
from mmflow.evaluation.captions import caption_metrics
from mmflow.evaluation.classification import class_metrics
from mmflow.evaluation.evaluate import examine
from mmflow.evaluation.robustness import preference, recall_drop
from mmflow.inference.changes import PERTURBATIONS
from mmflow.inference.generation import WritingConfig, write_texts
from mmflow.inference.tasks import classify
from mmflow.learning.retrieval import rank_one, rank_several
from tests.dataset.handmade import Handmade
from tests.evaluation.alone import Alone
from tests.evaluation.models import (
    COLOURS,
    answerer_config,
    asked,
    captioner_config,
    classifier_config,
    dual_config,
    loaded_model,
    settings,
    squares,
    write_squares,
)

FUSED_DECODER = {"memory": "fused", "width": 16, "layers": 1, "heads": 2}
CLASSES = settings(classification={"label": "colour"})


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return write_squares(tmp_path_factory.mktemp("squares") / "dataset")


def counted(answers: list[int], classes: int) -> dict[str, float]:
    """Metrics of the number of the class that each of the six rows was answered with; row i is of class i."""
    counts = np.zeros((classes, classes + 1), np.int64)
    for right, answer in enumerate(answers):
        counts[right, answer] += 1
    return class_metrics(counts)


# --- classes --------------------------------------------------------------------------------------------------------


def test_a_picture_is_of_the_class_with_the_nearest_description(dataset: Dataset, tmp_path: Path) -> None:
    prompts = {colour: [colour, f"{colour} one"] for colour in COLOURS[:5]}  # rows of the sixth are left out
    asks = settings(zero_shot={"label": "colour", "prompts": prompts, "templates": ["{}", "a {} square"]})
    loaded = loaded_model(dual_config(), seed=4)
    alone, outcome = Alone(loaded, dataset), examine(asked(tmp_path, dataset, loaded, asks), asks)
    similarity = []
    for colour, texts in prompts.items():
        sentences = [template.format(text) for template in ("{}", "a {} square") for text in texts]
        with torch.inference_mode():
            mean = torch.cat([loaded.model.embed_text(alone.text(text)) for text in sentences]).mean(0).numpy()
        similarity.append(alone.images() @ (mean / np.linalg.norm(mean)))
        assert colour in COLOURS
    answers = np.stack(similarity, axis=1).argmax(1)[:5].tolist()
    metrics = counted(answers, 5)
    assert outcome.metrics["zero_shot"] == {
        "accuracy": pytest.approx(metrics["accuracy"]),
        "mean_class_accuracy": pytest.approx(metrics["recall"]),
        "classes": 5.0,
        "rows": 5.0,
    }


@pytest.mark.parametrize("fused", [False, True])
def test_a_head_s_classes_are_those_of_each_picture_alone(fused: bool, dataset: Dataset, tmp_path: Path) -> None:
    config = answerer_config(heads=["classes"]) if fused else classifier_config()
    loaded = loaded_model(config, COLOURS, seed=5)
    alone, outcome = Alone(loaded, dataset), examine(asked(tmp_path, dataset, loaded, CLASSES), CLASSES)
    # A model that reads text with each picture is given the first caption.
    texts = [sample.captions[0].text if fused else None for sample in alone.samples]
    answers = [int(alone.classes(*pair).argmax()) for pair in zip(alone.samples, texts, strict=True)]
    assert outcome.metrics["classification"] == pytest.approx(counted(answers, 6))
    counts = np.array(outcome.details["confusion"]["counts"])
    assert [np.flatnonzero(row).tolist() for row in counts] == [[answer] for answer in answers]


def test_a_fused_classifier_reads_nothing_with_a_picture_without_a_caption(tmp_path: Path) -> None:
    samples = [*squares()[:5], replace(squares()[5], captions=[])]
    dataset = write_squares(tmp_path / "dataset", samples)
    loaded = loaded_model(answerer_config(heads=["classes"]), COLOURS, seed=5)
    asked(tmp_path, dataset, loaded, CLASSES)
    (file,) = (tmp_path / "results").glob(f"*/classify-*/{dataset.shards('held_out')[1].checksum}.parquet")
    alone = Alone(loaded, dataset)
    logits = alone.classes(alone.samples[5], "")
    assert pq.read_table(file)["labels"].to_pylist()[1][0] == COLOURS[int(logits.argmax())]


def test_a_class_that_the_model_was_never_taught_counts_as_wrong(dataset: Dataset, tmp_path: Path) -> None:
    loaded = loaded_model(classifier_config(), COLOURS[:3])
    outcome = examine(asked(tmp_path, dataset, loaded, CLASSES), CLASSES)
    assert outcome.metrics["classification"]["rows"] == 6.0
    assert outcome.metrics["classification"]["accuracy"] <= 0.5
    assert outcome.details["confusion"]["classes"] == [*COLOURS[:3], *sorted(COLOURS[3:])]


def test_a_model_that_cannot_choose_has_no_answer(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def scores(batch: Any, rows: Any, texts: Any) -> np.ndarray:
        """Sure of the first and last class of the first two rows; the first two classes share the other rows."""
        sure = np.eye(6, dtype=np.float32)[[0, 5]]
        shared = np.array([1, 1, 0, 0, 0, 0], np.float32)
        number = {colour: place for place, colour in enumerate(COLOURS)}
        return np.stack([sure[place] if (place := number[sample.key]) < 2 else shared for sample in batch.samples])

    monkeypatch.setattr(classify, "class_scores", scores)
    subject = asked(tmp_path, dataset, loaded_model(classifier_config(), COLOURS), CLASSES)
    counts = np.array(examine(subject, CLASSES).details["confusion"]["counts"])
    assert [np.flatnonzero(row).tolist() for row in counts] == [[0], [5], [6], [6], [6], [6]]  # 6 is no answer


# --- answers and captions ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decoder", [False, True])
def test_every_question_is_answered_as_alone(decoder: bool, dataset: Dataset, tmp_path: Path) -> None:
    asks = settings(answering={"max_tokens": 3})
    config = answerer_config(decoder=FUSED_DECODER) if decoder else answerer_config(heads=["classes"])
    loaded = loaded_model(config, () if decoder else COLOURS, seed=6)
    alone, outcome = Alone(loaded, dataset), examine(asked(tmp_path, dataset, loaded, asks), asks)
    question, answers = "what colour is it?", []
    for sample in alone.samples:
        if decoder:
            writing = WritingConfig(search="greedy", max_tokens=3)
            with torch.inference_mode():
                answers += write_texts(alone.predictor, alone.image(sample), [question], writing, seed=0)
        else:
            answers.append(COLOURS[int(alone.classes(sample, question).argmax())])
    people = [[colour, colour, "dark"] for colour in COLOURS]
    assert outcome.metrics["answering"] == pytest.approx(answering_metrics(answers, people))
    shown = outcome.details["answers"]
    assert [(row["key"], row["question"], row["answer"]) for row in shown] == [
        (colour, question, answer) for colour, answer in zip(COLOURS, answers, strict=True)
    ]
    assert sum(row["questions"] for row in outcome.details["by_answer"]) == len(answers)


def test_written_captions_are_compared_with_people_s_and_theirs_surprise_the_decoder(
    dataset: Dataset, tmp_path: Path
) -> None:
    asks = settings(captions={"search": "greedy", "max_tokens": 5})
    loaded = loaded_model(captioner_config(), seed=3)
    alone, outcome = Alone(loaded, dataset), examine(asked(tmp_path, dataset, loaded, asks), asks)
    writing = WritingConfig(search="greedy", max_tokens=5)
    texts, rows = alone.captions()
    people = [[text for text, row in zip(texts, rows, strict=True) if row == number] for number in range(6)]
    with torch.inference_mode():
        written = [
            write_texts(alone.predictor, alone.image(sample), None, writing, seed=0)[0] for sample in alone.samples
        ]
        nats = []
        for text, row in zip(texts, rows, strict=True):
            ids = loaded.tokenizer.encode(text).ids[:12]
            odds = loaded.model.decode(alone.image(alone.samples[row]), torch.tensor([ids])).log_softmax(-1)[0]
            nats += [-float(odds[place, ids[place + 1]]) for place in range(len(ids) - 1)]
    expected = caption_metrics(written, people)
    expected |= {"perplexity": np.exp(np.mean(nats)), "token_loss": np.mean(nats), "tokens": float(len(nats))}
    assert outcome.metrics["captions"] == pytest.approx(expected, rel=1e-4)
    assert [row["caption"] for row in outcome.details["captions"]] == written
    assert [row["people"] for row in outcome.details["captions"]] == people


# --- hidden words -----------------------------------------------------------------------------------------------------


def guesses(alone: Alone, texts: list[str], pictures: list[int]) -> tuple[list[float], list[bool]]:
    """Of every word piece of each text, hidden by itself and read with the picture of a row: nats, and whether it was
    the likeliest."""
    model, tokenizer = alone.model, alone.loaded.tokenizer
    mask, nats, right = tokenizer.token_to_id("[MASK]"), list[float](), list[bool]()
    for text, picture in zip(texts, pictures, strict=True):
        ids = alone.predictor.text_inputs([text])[0][0].tolist()
        image = alone.image(alone.samples[picture])
        for place in range(1, len(ids) - 1):
            hidden = torch.tensor([[mask if at == place else number for at, number in enumerate(ids)]])
            with torch.inference_mode():
                fused = model.fuse(image, model.encode_text(hidden, torch.ones_like(hidden)))
                odds = model.masked_language_logits(fused)[0, place].log_softmax(-1)
            nats.append(-float(odds[ids[place]]))
            right.append(int(odds.argmax()) == ids[place])
    return nats, right


def test_every_word_is_hidden_by_itself_and_read_with_another_picture_too(dataset: Dataset, tmp_path: Path) -> None:
    asks, loaded = settings(masked_language={}), loaded_model(answerer_config(heads=["masked_language"]), seed=1)
    alone, outcome = Alone(loaded, dataset), examine(asked(tmp_path, dataset, loaded, asks), asks)
    texts, rows = alone.captions()
    nats, right = guesses(alone, texts, rows.tolist())
    # The batches are the shards: rows 0 to 3, and 4 and 5.
    _, by_other = guesses(alone, texts, [[1, 2, 3, 0, 5, 4][row] for row in rows])
    assert outcome.metrics["masked_language"] == {
        "accuracy": pytest.approx(np.mean(right)),
        "accuracy_other_picture": pytest.approx(np.mean(by_other)),
        "perplexity": pytest.approx(np.exp(np.mean(nats)), rel=1e-4),
        "token_loss": pytest.approx(np.mean(nats), rel=1e-4),
        "tokens": float(len(nats)),
    }


def test_a_row_alone_in_its_batch_is_not_read_with_its_own_picture_as_another(tmp_path: Path) -> None:
    dataset = write_squares(tmp_path / "dataset", squares()[:5])  # the second shard has one row
    asks, loaded = settings(masked_language={}), loaded_model(answerer_config(heads=["masked_language"]), seed=1)
    metrics = examine(asked(tmp_path, dataset, loaded, asks), asks).metrics["masked_language"]
    alone = Alone(loaded, dataset)
    texts, rows = alone.captions()
    of_first_shard = [(text, [1, 2, 3, 0][row]) for text, row in zip(texts, rows, strict=True) if row < 4]
    _, by_other = guesses(alone, *map(list, zip(*of_first_shard, strict=True)))
    assert metrics["accuracy_other_picture"] == pytest.approx(np.mean(by_other))
    one_by_one = asks.model_copy(update={"batch_size": 1})
    metrics = examine(asked(tmp_path / "again", dataset, loaded, one_by_one), one_by_one).metrics["masked_language"]
    assert "accuracy_other_picture" not in metrics


# --- changes and slices -----------------------------------------------------------------------------------------------

PAIRS = ["a red square left of a blue circle", "the green bar under a white dog", "black", "two dogs and three cats"]


def test_changes_cost_what_a_plain_comparison_says(tmp_path: Path) -> None:
    samples = [
        Handmade(key=colour, captions=[{"language": "en", "text": text} for text in (PAIRS * 2)[place : place + 2]])
        for place, colour in enumerate(COLOURS)
    ]
    dataset, loaded = write_squares(tmp_path / "dataset", samples), loaded_model(dual_config(), seed=4)
    asks = settings(robustness={"pictures": ["jpeg", "grey"], "severity": 4})
    alone, outcome = Alone(loaded, dataset), examine(asked(tmp_path, dataset, loaded, asks), asks)
    texts, rows = alone.captions()
    texts_AW, images_NW = alone.texts(texts), alone.images()
    true_A = (texts_AW * images_NW[rows]).sum(1)
    similarity_AN, expected = texts_AW @ images_NW.T, {}
    for name in ("jpeg", "grey"):
        changed_AN = texts_AW @ alone.images(f"{name}-4").T
        expected[name] = recall_drop(*(rank_several(each.T, rows).ranks for each in (similarity_AN, changed_AN)))
    expected["missing_picture"] = preference(true_A, (texts_AW * alone.images("missing")[rows]).sum(1))
    for name, change in PERTURBATIONS.items():
        changes = [(place, text) for place, caption in enumerate(texts) if (text := change(caption)) is not None]
        places = [place for place, _ in changes]
        changed_AW = texts_AW.copy()
        changed_AW[places] = alone.texts([text for _, text in changes])
        if name == "typos":
            ranks = (rank_one(each @ images_NW.T, rows).ranks[places] for each in (texts_AW, changed_AW))
            expected[name] = recall_drop(*ranks)
        else:
            wrong_A = (changed_AW * images_NW[rows]).sum(1)
            expected["missing_caption" if name == "missing" else name] = preference(true_A[places], wrong_A[places])
    assert outcome.metrics["robustness"] == {name: pytest.approx(found) for name, found in expected.items()}
    # Neither of the captions "black" has words to swap.
    assert 0 < expected["swapped_attributes"]["rows"] < expected["shuffled_words"]["rows"] < 12


def test_slices_are_the_shares_of_captions_found_by_length_and_label(tmp_path: Path) -> None:
    words = "red green blue yellow black white"
    samples = [
        Handmade(
            key=f"key-{number}",
            captions=[{"language": "en", "text": " ".join([str(number), *([words] if number % 2 else [])])}],
            metadata={"classes": {"half": "first" if number < 25 else "second"}},
            size=(24, 20),
        )
        for number in range(50)
    ]
    dataset, loaded = write_squares(tmp_path / "dataset", samples), loaded_model(dual_config(), seed=4)
    asks = settings(slices={"label": "half"})
    alone, outcome = Alone(loaded, dataset), examine(asked(tmp_path, dataset, loaded, asks), asks)
    texts, rows = alone.captions()
    hits = rank_one(alone.texts(texts) @ alone.images().T, rows).ranks <= 10
    lengths = np.array([len(alone.predictor.text_inputs([text])[0][0]) for text in texts])
    parts = {
        "tokens": {"0-8": lengths <= 8, "9-16": lengths > 8},
        "half": {"first": rows < 25, "second": rows >= 25},
    }
    assert outcome.metrics["slices"] == {
        name: {part: pytest.approx({"R@10": hits[of].mean(), "rows": of.sum()}) for part, of in own.items()}
        for name, own in parts.items()
    }
