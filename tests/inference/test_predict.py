"""What a model gives for rows in batches is what it gives for each row alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from mmflow.core.errors import MisuseError
from mmflow.dataset.reader import Sample
from mmflow.inference import predict
from mmflow.inference.generation import WritingConfig, text_of, write_texts
from mmflow.inference.predict import Predictor
from mmflow.loading.tokens import train_tokenizer
from mmflow.models.decoder import decoder_tokens
from mmflow.models.model import Model
from tests.evaluation.models import (
    COLOURS,
    altered,
    answerer_config,
    captioner_config,
    captions_of,
    classifier_config,
    dual_config,
    matcher_config,
    picture,
    predictor,
    tight_config,
    tokenizer,
)

SAMPLES = [picture(colour) for colour in COLOURS]
CAPTIONS = [captions_of(colour)[row % 3] for row, colour in enumerate(COLOURS)]
ANSWERER = answerer_config(decoder={"memory": "fused", "width": 16, "layers": 1, "heads": 2})


def alone(model: Predictor) -> Predictor:
    """The model with batches of one row."""
    return Predictor(model.loaded, 1)


@pytest.mark.parametrize(
    ("model", "texts"),
    [
        (predictor(classifier_config(), COLOURS), None),
        (predictor(answerer_config(heads=["classes"]), COLOURS), CAPTIONS),
    ],
)
def test_classes_are_those_of_each_row_alone(model: Predictor, texts: list[str] | None) -> None:
    scores = model.class_scores(SAMPLES, texts)
    assert scores.shape == (6, 6)
    np.testing.assert_allclose(scores, alone(model).class_scores(SAMPLES, texts), atol=1e-5)
    assert np.ptp(scores, axis=0).max() > 0
    if texts is not None:
        assert np.abs(model.class_scores(SAMPLES, texts[::-1]) - scores).max() > 1e-4


def test_a_class_is_the_unit_mean_of_its_prompts_in_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = {"cat": (1.0, 0.0), "kitten": (0.0, 1.0), "dog": (0.6, -0.8)}

    def embed(self: Predictor, texts: Sequence[str]) -> np.ndarray:
        return np.array([vectors[text] for text in texts], np.float32)

    monkeypatch.setattr(Predictor, "embed_captions", embed)
    classes = predictor(dual_config()).embed_classes({"dog": ["dog"], "cat": ["cat", "kitten"]})
    np.testing.assert_allclose(classes, [[0.6, -0.8], [2**-0.5, 2**-0.5]], atol=1e-6)


@pytest.mark.parametrize("search", ["greedy", "beam", "nucleus"])
def test_a_captioner_writes_one_text_per_picture_and_the_same_again(search: str) -> None:
    model = predictor(captioner_config())
    writing = WritingConfig.model_validate({"search": search, "max_tokens": 5})
    texts = write_texts(model, SAMPLES, None, writing, seed=3)
    assert len(texts) == 6
    assert texts == write_texts(model, SAMPLES, None, writing, seed=3)
    assert not any("[" in text for text in texts)


def test_a_decoder_of_the_fused_question_answers_each_row_as_alone() -> None:
    model = predictor(ANSWERER)
    writing = WritingConfig(search="greedy", max_tokens=4)
    answers = write_texts(model, SAMPLES, CAPTIONS, writing, seed=0)
    assert answers == write_texts(alone(model), SAMPLES, CAPTIONS, writing, seed=0)


def test_token_losses_are_those_of_a_plain_loop_over_each_caption() -> None:
    model = predictor(captioner_config())
    losses, counts = model.token_losses(SAMPLES, CAPTIONS)
    for row, (sample, caption) in enumerate(zip(SAMPLES, CAPTIONS, strict=True)):
        ids = model.loaded.tokenizer.encode(caption).ids
        with torch.no_grad():
            odds = model.model.decode(model.encode([sample])[0], torch.tensor([ids])).log_softmax(-1)[0]
        assert counts[row] == len(ids) - 1
        assert losses[row] == pytest.approx(-sum(float(odds[at, ids[at + 1]]) for at in range(len(ids) - 1)), rel=1e-4)


def test_every_word_is_hidden_by_itself_as_in_a_plain_loop() -> None:
    model = predictor(answerer_config(heads=["masked_language"]))
    losses, right = model.guess_words(SAMPLES, CAPTIONS)
    mask = model.loaded.tokenizer.token_to_id("[MASK]")
    expected = []
    for sample, caption in zip(SAMPLES, CAPTIONS, strict=True):
        ids = model.loaded.tokenizer.encode(caption).ids
        for place in range(1, len(ids) - 1):
            hidden = torch.tensor([[mask if at == place else number for at, number in enumerate(ids)]])
            with torch.no_grad():
                text = model.model.encode_text(hidden, torch.ones_like(hidden))
                fused = model.model.fuse(model.encode([sample])[0], text)
                odds = model.model.masked_language_logits(fused)[0, place].log_softmax(-1)
            expected.append((-float(odds[ids[place]]), int(odds.argmax()) == ids[place]))
    np.testing.assert_allclose(losses, [loss for loss, _ in expected], rtol=1e-4)
    assert right.tolist() == [is_right for _, is_right in expected]


def test_another_picture_changes_the_guesses_of_a_fused_model_alone() -> None:
    fused = answerer_config(heads=["masked_language"])
    for config, reads in ((fused, True), (altered(fused, fusion=None, embedding_width=8), False)):
        model = predictor(config)
        own, _ = model.guess_words(SAMPLES, CAPTIONS)
        other, _ = model.guess_words([*SAMPLES[1:], SAMPLES[0]], CAPTIONS)
        assert (np.abs(own - other).max() > 1e-5) == reads


def test_a_model_refuses_what_it_was_not_made_for() -> None:
    writing = WritingConfig(search="greedy", max_tokens=4)
    with pytest.raises(MisuseError, match=r"^model\.decoder\.memory: fused, but there is no question"):
        write_texts(predictor(ANSWERER), SAMPLES, None, writing, seed=0)
    captioner = predictor(captioner_config())
    image, _ = captioner.encode(SAMPLES)
    with pytest.raises(MisuseError, match=r"^model\.decoder\.memory: image, but there is a question"):
        captioner.model.memory(image, image)
    with pytest.raises(MisuseError, match=r"^model\.fusion: it reads text with each picture"):
        predictor(answerer_config(heads=["classes"]), ("red", "green")).class_scores(SAMPLES, None)


def test_pairs_are_matched_as_each_alone_whatever_their_order_and_the_batch() -> None:
    model = predictor(matcher_config())
    captions = [text for colour in COLOURS for text in captions_of(colour)[:2]]
    random = np.random.default_rng(0)
    pairs = random.permutation(np.argwhere(random.random((12, 6)) < 0.5))
    scores = model.match(SAMPLES, captions, pairs)
    np.testing.assert_allclose(scores, Predictor(model.loaded, 100).match(SAMPLES, captions, pairs), atol=1e-5)
    for number, (query, place) in list(enumerate(pairs))[::5]:
        with torch.no_grad():
            image, text = model.encode([SAMPLES[place]], [captions[query]])
            odds = model.model.matching_logits(model.model.fuse(image, text))[0]
        assert scores[number] == pytest.approx(float(odds[1] - odds[0]), abs=1e-5)


def test_no_more_than_a_batch_is_encoded_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []

    def spied(plain: Any) -> Any:
        def encode(self: Model, inputs: torch.Tensor, *rest: Any) -> Any:
            sizes.append(len(inputs))
            return plain(self, inputs, *rest)

        return encode

    for name in ("encode_image", "encode_text"):
        monkeypatch.setattr(Model, name, spied(getattr(Model, name)))
    captions = [text for colour in COLOURS for text in captions_of(colour)]
    predictor(matcher_config(), batch_size=2).match(SAMPLES, captions, np.argwhere(np.ones((18, 6))))
    assert max(sizes) == 2


@pytest.mark.parametrize("pairs_at_once", [1, 7, 4096])
def test_pair_scores_are_those_of_each_pair_alone(pairs_at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(predict, "PAIRS_AT_ONCE", pairs_at_once)
    first, *others = SAMPLES
    clips = [replace(first, frames=tuple(other.image for other in others[:number])) for number in range(5)]
    model, captions = predictor(tight_config(), batch_size=2), captions_of("red") + captions_of("green")
    scores = model.score_pairs(clips, captions)
    assert scores.shape == (6, 5)
    with torch.no_grad():
        for row, caption in enumerate(captions):
            for column, clip in enumerate(clips):
                image, text = model.encode([clip], [caption])
                assert text is not None
                assert scores[row, column] == pytest.approx(
                    model.model.score_pairs(text.pooled_BW, image).item(), abs=1e-5
                )


def test_written_ids_are_text_up_to_the_closing_token() -> None:
    made = tokenizer()
    marks = decoder_tokens("model", made)
    ids = made.encode("a red square on it").ids
    assert text_of(made, [*ids[1:], marks.pad, ids[2]]) == "a red square on it"
    assert text_of(made, [marks.last]) == ""
    text = "medium-light skin, not dark"
    hyphenated = train_tokenizer([text], 200)
    assert text_of(hyphenated, hyphenated.encode(text).ids[1:]) == text


def test_clips_are_read_frame_by_frame_and_shorter_ones_masked() -> None:
    model = predictor(altered(dual_config(), video={"kind": "mean", "max_frames": 2}))
    still: Sample = SAMPLES[0]
    clip = replace(SAMPLES[1], frames=tuple(sample.image for sample in SAMPLES[2:5]))
    pixels, mask = model.image_inputs([still, clip])
    assert mask is not None
    assert mask.tolist() == [[True, False], [True, True]]
    # Two of the clip's four frames, from the middles of its halves: the second and the last.
    torch.testing.assert_close(pixels[1], model.image_inputs([SAMPLES[2], SAMPLES[4]])[0][:, 0])
    np.testing.assert_allclose(model.embed_images([still, clip])[0], model.embed_images([still])[0], atol=1e-5)
