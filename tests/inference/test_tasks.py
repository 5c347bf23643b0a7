"""Every task gives a row, computed in a batch of a shard, what a plain loop gives for the row alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mmflow.core.errors import RecipeError
from mmflow.dataset.opened import Dataset
from mmflow.dataset.reader import Reader, Sample
from mmflow.inference.config import TasksConfig, check_tasks, possible_tasks
from mmflow.inference.generation import WritingConfig, write_texts
from mmflow.inference.predict import Predictor
from mmflow.inference.result import Result
from mmflow.inference.tasks import TASKS
from mmflow.inference.tasks.answer import Answer
from mmflow.inference.tasks.caption import Caption
from mmflow.inference.tasks.classify import Classify
from mmflow.inference.tasks.embed import CaptionEmbeddings, ImageEmbeddings
from mmflow.inference.tasks.match import Match
from mmflow.inference.tasks.perplexity import Perplexity
from mmflow.inference.tasks.zero_shot import ZeroShot
from mmflow.models.config import ModelConfig
from mmflow.models.package import LoadedModel
from tests.dataset.handmade import handmade, write_dataset
from tests.evaluation.models import (
    COLOURS,
    altered,
    answerer_config,
    captioner_config,
    classifier_config,
    dual_config,
    loaded_model,
    matcher_config,
    ranker_config,
    written_package,
)
from tests.inference.asking import answers, ask, varied

ANSWERER = answerer_config(decoder={"memory": "fused", "width": 16, "layers": 1, "heads": 2})
CLASSES = COLOURS[:4]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return varied(tmp_path_factory.mktemp("tasks") / "dataset")


class Asked:
    """A model in a package, asked about a dataset."""

    def __init__(self, dataset: Dataset, folder: Path) -> None:
        self.dataset, self.folder = dataset, folder

    def about(self, loaded: LoadedModel, result: Result) -> Iterator[tuple[dict[str, Any], Predictor, Sample]]:
        """Each row of the result, a predictor of one row at a time, and the sample."""
        package = written_package(self.folder / "package", loaded).uri
        done = ask(self.folder / "results", package, self.dataset, result)
        rows = answers(self.folder / "results", package, self.dataset, result)
        samples = list(Reader(self.dataset, "train"))
        assert [row["key"] for row in rows] == [sample.key for sample in samples]
        places = [row for shard in self.dataset.shards("train") for row in range(shard.samples)]
        assert [row["row"] for row in rows] == places
        assert [row["error"] for row in rows] == [None] * len(rows)
        assert (done.rows, done.errors) == (len(rows), 0)
        yield from zip(rows, [Predictor(loaded, 1)] * len(rows), samples, strict=True)


@pytest.fixture
def asked(dataset: Dataset, tmp_path: Path) -> Asked:
    return Asked(dataset, tmp_path)


def caption_of(sample: Sample, language: str) -> str | None:
    texts = [caption.text for caption in sample.captions if caption.language == language]
    return next(iter(texts or [caption.text for caption in sample.captions]), None)


def image_of(one: Predictor, sample: Sample) -> np.ndarray[Any, Any]:
    with torch.no_grad():
        return one.model.embed_image(one.model.encode_image(*one.image_inputs([sample])))[0].numpy()


def text_of(one: Predictor, text: str) -> np.ndarray[Any, Any]:
    ids = torch.tensor([one.loaded.tokenizer.encode(text).ids])
    with torch.no_grad():
        return one.model.embed_text(one.model.encode_text(ids, torch.ones_like(ids)))[0].numpy()


def fused(one: Predictor, sample: Sample, text: str) -> Any:
    with torch.no_grad():
        image, encoded = one.encode([sample], [text])
        return one.model.fuse(image, encoded)


def is_null(vector: Any) -> bool:
    return vector is None or all(number is None for number in vector)


@pytest.mark.parametrize(("dtype", "close"), [("float16", 1e-3), ("float32", 1e-6)])
def test_pictures_are_embedded(asked: Asked, dtype: Any, close: float) -> None:
    for row, one, sample in asked.about(loaded_model(dual_config(), seed=4), ImageEmbeddings(dtype=dtype)):
        np.testing.assert_allclose(row["image_embedding"], image_of(one, sample), atol=close)
        assert np.linalg.norm(row["image_embedding"]) == pytest.approx(1, abs=close)


@pytest.mark.parametrize("language", ["en", "zh"])
def test_captions_are_embedded_in_the_language_or_else_the_first(asked: Asked, language: str) -> None:
    result = CaptionEmbeddings(language=language, dtype="float32")
    for row, one, sample in asked.about(loaded_model(dual_config(), seed=4), result):
        caption = caption_of(sample, language)
        if sample.key == "silent":
            assert is_null(row["caption_embedding"])
        elif sample.key != "long":  # it is cut to the model's length
            np.testing.assert_allclose(row["caption_embedding"], text_of(one, str(caption)), atol=1e-5)


def test_a_clip_is_embedded_from_its_frames(tmp_path: Path) -> None:
    clips = write_dataset(tmp_path / "clips", [("train", [handmade(number) for number in (5, 6, 13)])])
    config = altered(dual_config(), video={"kind": "mean", "max_frames": 2})
    for row, one, sample in Asked(clips, tmp_path).about(loaded_model(config), ImageEmbeddings(dtype="float32")):
        assert len(sample.frames) == (0 if sample.key == "key-5" else 2)
        np.testing.assert_allclose(row["image_embedding"], image_of(one, sample), atol=1e-5)


def test_the_nearest_classes_are_those_of_their_mean_prompts_in_all_templates(asked: Asked) -> None:
    prompts = {colour: [colour, f"{colour} one"] for colour in CLASSES}
    templates = ["a {} square", "square in {}"]
    result = ZeroShot(prompts=prompts, templates=templates, top=3)
    for row, one, sample in asked.about(loaded_model(dual_config(), seed=4), result):
        means = [
            np.mean([text_of(one, template.format(text)) for template in templates for text in texts], 0)
            for texts in prompts.values()
        ]
        cosines = np.array([mean @ image_of(one, sample) / np.linalg.norm(mean) for mean in means])
        scale = one.model.scale
        assert scale is not None
        odds = torch.tensor(cosines * scale().logit_scale.item()).softmax(0).numpy()
        best = np.argsort(-cosines)[:3]
        assert row["classes"] == [CLASSES[number] for number in best]
        np.testing.assert_allclose(row["class_similarity"], cosines[best], atol=1e-3)
        np.testing.assert_allclose(row["class_odds"], odds[best], atol=1e-2)
    with pytest.raises(ValueError, match=r"'a square' has no \{\} for the text to stand in"):
        ZeroShot(prompts=prompts, templates=["a square"])


@pytest.mark.parametrize("config", [classifier_config(), answerer_config(heads=["classes"])])
def test_the_likeliest_classes_are_those_of_the_head(asked: Asked, config: ModelConfig) -> None:
    for row, one, sample in asked.about(loaded_model(config, CLASSES), Classify(top=2)):
        with torch.no_grad():
            if "fused" in one.gives:
                seen = fused(one, sample, caption_of(sample, "en") or "")
            else:
                seen = one.model.fuse(one.encode([sample])[0], None)
            odds = one.model.class_logits(seen)[0].softmax(-1)
        best = odds.topk(2)
        assert row["labels"] == [CLASSES[number] for number in best.indices]
        np.testing.assert_allclose(row["label_odds"], best.values, atol=1e-5)


@pytest.mark.parametrize("config", [matcher_config(), ranker_config()])
def test_a_caption_matches_its_picture_by_the_head(asked: Asked, config: ModelConfig) -> None:
    for row, one, sample in asked.about(loaded_model(config), Match(language="zh")):
        caption = caption_of(sample, "zh")
        if caption is None:
            assert row["match"] is None
        else:
            with torch.no_grad():
                logits = one.model.matching_logits(fused(one, sample, caption))[0]
            assert row["match"] == pytest.approx(float(logits[1] - logits[0]), abs=1e-5)


@pytest.mark.parametrize("search", ["greedy", "beam"])
def test_the_decoder_writes_a_caption(asked: Asked, search: Any) -> None:
    result = Caption(search=search, beams=2, max_tokens=5)
    for row, one, sample in asked.about(loaded_model(captioner_config()), result):
        with torch.no_grad():
            assert row["written_captions"] == write_texts(one, one.encode([sample])[0], None, result, seed=0)


def test_candidates_are_drawn_by_nucleus(asked: Asked) -> None:
    loaded = loaded_model(captioner_config())
    drawn = Caption(search="nucleus", candidates=5, max_tokens=5)
    assert max(len(set(row["written_captions"])) for row, _, _ in asked.about(loaded, drawn)) > 2
    # From the single likeliest token, all draws are alike.
    narrow = drawn.model_copy(update={"nucleus": 1e-6})
    greedy = WritingConfig(search="greedy", max_tokens=5)
    for row, one, sample in asked.about(loaded, narrow):
        with torch.no_grad():
            (written,) = write_texts(one, one.encode([sample])[0], None, greedy, seed=0)
        assert row["written_captions"] == [written] * 5
    with pytest.raises(ValueError, match="candidates: 2 equal captions; set search to nucleus"):
        Caption(candidates=2)


@pytest.mark.parametrize("questions", [None, ["what is it?", "a red one?", "is it round?"]])
@pytest.mark.parametrize("config", [ANSWERER, answerer_config(heads=["classes"])])
def test_questions_of_the_sample_or_given_ones_are_answered(
    asked: Asked, questions: list[str] | None, config: ModelConfig
) -> None:
    result = Answer(questions=questions, max_tokens=4)
    own = {"several": ["what colour is it?", "is it round?"], "silent": ["is it round?"]}
    for row, one, sample in asked.about(loaded_model(config, CLASSES), result):
        assert row["questions"] == (questions or own.get(sample.key, []))
        expected = []
        for question in row["questions"]:
            with torch.no_grad():
                if "class_logits" in one.gives:
                    logits = one.model.class_logits(fused(one, sample, question))[0]
                    expected.append(CLASSES[int(logits.argmax())])
                else:
                    expected += write_texts(one, one.encode([sample])[0], [question], result, seed=0)
        assert row["answers"] == expected


def test_perplexity_is_the_sum_over_the_tokens_of_each_caption_in_the_language(asked: Asked) -> None:
    for row, one, sample in asked.about(loaded_model(captioner_config()), Perplexity()):
        texts = [caption.text for caption in sample.captions if caption.language == "en"]
        ids = [one.text_inputs([text])[0] for text in texts]
        assert row["caption_tokens"] == [tokens.shape[1] - 1 for tokens in ids]
        for nats, tokens in zip(row["caption_nats"], ids, strict=True):
            assert nats == pytest.approx(float(surprise(one, sample, tokens)), rel=1e-4)


def surprise(one: Predictor, sample: Sample, ids: Tensor) -> Tensor:
    with torch.no_grad():
        odds = one.model.decode(one.encode([sample])[0], ids[:, :-1])[0].log_softmax(-1)
    return -sum((odds[place, token] for place, token in enumerate(ids[0, 1:])), torch.tensor(0.0))


# --- what a model can be asked ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "able"),
    [
        (dual_config(), {"embed"}),
        (ranker_config(), {"embed", "match"}),
        (classifier_config(), {"classify"}),
        (captioner_config(), {"caption", "perplexity"}),
        (ANSWERER, {"answer"}),
        (answerer_config(heads=["classes"]), {"classify", "answer"}),
    ],
)
def test_without_tasks_a_model_does_all_that_it_can(config: ModelConfig, able: set[str]) -> None:
    assert set(possible_tasks(config.gives, None, "zh").named) == able
    classes = ZeroShot(prompts={"red": ["red"], "blue": ["blue"]})
    tasks = possible_tasks(config.gives, classes, "zh")
    assert set(tasks.named) == able | ({"zero_shot"} if "embed" in able else set())
    assert {section.language for section in tasks.named.values() if hasattr(section, "language")} <= {"zh"}
    check_tasks(tasks, config, "the model")


@pytest.mark.parametrize(
    ("task", "settings", "config", "message"),
    [
        ("embed", {}, captioner_config(), "lacks a text encoder and an embedding_width"),
        ("zero_shot", {"prompts": {"a": ["a"], "b": ["b"]}}, classifier_config(), "lacks a text encoder"),
        ("classify", {}, dual_config(), "lacks the head classes"),
        ("match", {}, dual_config(), "lacks a fusion and the head matching"),
        ("caption", {}, ANSWERER, "lacks a decoder with memory: image"),
        ("answer", {}, matcher_config(), "lacks a fusion, and the head classes or a decoder"),
        ("perplexity", {}, dual_config(), "lacks a decoder with memory: image"),
        ("embed", {"width": 9}, dual_config(), r"width: 9, but the vectors of pretrain\.model have 8"),
    ],
)
def test_what_a_model_cannot_do_is_refused(task: str, settings: Any, config: ModelConfig, message: str) -> None:
    tasks = TasksConfig.model_validate({task: settings})
    with pytest.raises(RecipeError, match=rf"^score\.tasks\.{task}.*{message}"):
        check_tasks(tasks, config, "pretrain.model")


def test_a_model_that_can_do_nothing_is_refused_with_the_tasks_there_are() -> None:
    config = answerer_config(heads=["masked_language"])
    with pytest.raises(RecipeError, match=rf"can do none of {', '.join(TASKS)} without settings"):
        check_tasks(possible_tasks(config.gives, None, "en"), config, "the model")
