"""What a model says of rows, in batches, is what it says of each row alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from mmflow.core.errors import MisuseError
from mmflow.inference.config import WritingConfig
from mmflow.inference.embed import embed_images, image_inputs, text_inputs
from mmflow.inference.predict import class_scores, matching_scores, text_of, token_losses, write_texts
from mmflow.loading.tokens import train_tokenizer
from mmflow.models.config import ModelConfig
from mmflow.models.marks import marks_of
from mmflow.models.model import Model
from tests.evaluation.models import (
    COLOURS,
    answerer_config,
    captioner_config,
    captions_of,
    classifier_config,
    dual_config,
    loaded_model,
    matcher_config,
    picture,
    tokenizer,
)

SAMPLES = [picture(colour) for colour in COLOURS]


def test_classes_of_pictures_are_those_of_each_alone() -> None:
    loaded = loaded_model(classifier_config(), COLOURS)
    scores = class_scores(loaded, SAMPLES, None, batch_size=4)
    assert scores.shape == (6, 6)
    alone = [class_scores(loaded, [sample], None, batch_size=1)[0] for sample in SAMPLES]
    np.testing.assert_allclose(scores, alone, atol=1e-5)
    assert np.ptp(scores, axis=0).max() > 0


def test_answers_read_the_question_with_its_own_picture() -> None:
    loaded = loaded_model(answerer_config(heads=["classes"]), ("red", "green"))
    questions = [text for colour in COLOURS for text in captions_of(colour)[:1]]
    scores = class_scores(loaded, SAMPLES, questions, batch_size=4)
    alone = [
        class_scores(loaded, [sample], [question], batch_size=1)[0]
        for sample, question in zip(SAMPLES, questions, strict=True)
    ]
    np.testing.assert_allclose(scores, alone, atol=1e-5)
    assert np.abs(class_scores(loaded, SAMPLES, questions[::-1], batch_size=6) - scores).max() > 1e-4


@pytest.mark.parametrize("search", ["greedy", "beam", "nucleus"])
def test_a_captioner_writes_a_text_a_picture_and_the_same_one_again(search: str) -> None:
    loaded = loaded_model(captioner_config())
    writing = WritingConfig.model_validate({"search": search, "max_tokens": 5})
    texts = write_texts(loaded, SAMPLES, None, writing, batch_size=4, seed=3)
    assert len(texts) == 6
    assert texts == write_texts(loaded, SAMPLES, None, writing, batch_size=4, seed=3)
    assert not any("[" in text for text in texts)


def test_a_decoder_of_the_fused_question_answers_in_words() -> None:
    decoder = {"memory": "fused", "width": 16, "layers": 1, "heads": 2}
    loaded = loaded_model(answerer_config(decoder=decoder))
    writing = WritingConfig(search="greedy", max_tokens=4)
    asked = [captions_of("red")[0]] * 6
    together = write_texts(loaded, SAMPLES, asked, writing, batch_size=6, seed=0)
    assert together == [write_texts(loaded, [each], asked[:1], writing, batch_size=1, seed=0)[0] for each in SAMPLES]


def test_token_losses_are_those_of_a_plain_loop_over_each_caption() -> None:
    loaded = loaded_model(captioner_config())
    captions = [captions_of(colour)[row % 3] for row, colour in enumerate(COLOURS)]
    losses, counts = token_losses(loaded, SAMPLES, captions, batch_size=4)
    for row, (sample, caption) in enumerate(zip(SAMPLES, captions, strict=True)):
        ids = loaded.tokenizer.encode(caption).ids
        with torch.no_grad():
            image = loaded.model.encode_image(*image_inputs(loaded, [sample]))
            odds = loaded.model.decode(image, torch.tensor([ids])).log_softmax(-1)[0]
        assert counts[row] == len(ids) - 1
        assert losses[row] == pytest.approx(-sum(float(odds[at, ids[at + 1]]) for at in range(len(ids) - 1)), rel=1e-4)


def test_a_model_is_not_asked_for_what_it_was_not_made_for() -> None:
    writing = WritingConfig(search="greedy", max_tokens=4)
    decoder = {"memory": "fused", "width": 16, "layers": 1, "heads": 2}
    with pytest.raises(MisuseError, match=r"^model\.decoder\.memory: fused, and there is no question; "):
        write_texts(loaded_model(answerer_config(decoder=decoder)), SAMPLES, None, writing, batch_size=6, seed=0)
    captioner = loaded_model(captioner_config()).model
    image = captioner.encode_image(torch.zeros(1, 3, 16, 16))
    with pytest.raises(MisuseError, match=r"^model\.decoder\.memory: image, and there is a question; "):
        captioner.memory(image, image)
    with pytest.raises(MisuseError, match=r"^model\.fusion: it reads text with each picture, and none is given; "):
        class_scores(loaded_model(answerer_config(heads=["classes"]), ("red", "green")), SAMPLES, None, batch_size=6)


def test_pairs_are_scored_as_each_alone_whatever_their_order_and_the_batch() -> None:
    loaded = loaded_model(matcher_config())
    captions = [text for colour in COLOURS for text in captions_of(colour)[:2]]
    random = np.random.default_rng(0)
    pairs = random.permutation(np.argwhere(random.random((12, 6)) < 0.5))
    scores = matching_scores(loaded, SAMPLES, captions, pairs, batch_size=4)
    np.testing.assert_allclose(scores, matching_scores(loaded, SAMPLES, captions, pairs, batch_size=100), atol=1e-5)
    for number, (query, place) in list(enumerate(pairs))[::5]:
        with torch.no_grad():
            image = loaded.model.encode_image(*image_inputs(loaded, [SAMPLES[place]]))
            text = loaded.model.encode_text(*text_inputs(loaded, [captions[query]]))
            odds = loaded.model.matching_logits(loaded.model.fuse(image, text))[0]
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
    matching_scores(loaded_model(matcher_config()), SAMPLES, captions, np.argwhere(np.ones((18, 6))), batch_size=2)
    assert max(sizes) == 2


def test_written_ids_are_text_up_to_the_closing_token() -> None:
    made = tokenizer()
    marks = marks_of("model", made)
    ids = made.encode("a red square on it").ids
    assert text_of(made, [*ids[1:], marks.pad, ids[2]]) == "a red square on it"
    assert text_of(made, [marks.last]) == ""
    said = "medium-light skin, not dark"
    hyphenated = train_tokenizer([said], 200)
    assert text_of(hyphenated, hyphenated.encode(said).ids[1:]) == said


def test_clips_are_read_frame_by_frame_and_shorter_ones_masked() -> None:
    config = dual_config().model_dump() | {"video": {"kind": "mean", "max_frames": 2}}
    loaded = loaded_model(ModelConfig.model_validate(config))
    still, clip = SAMPLES[0], replace(SAMPLES[1], frames=tuple(sample.image for sample in SAMPLES[2:5]))
    pixels, mask = image_inputs(loaded, [still, clip])
    assert mask is not None
    assert mask.tolist() == [[True, False], [True, True]]
    # Two of the clip's four frames, from the middles of its halves: the second and the last.
    torch.testing.assert_close(pixels[1], image_inputs(loaded, [SAMPLES[2], SAMPLES[4]])[0][:, 0])
    together = embed_images(loaded, [still, clip], 2)
    np.testing.assert_allclose(together[0], embed_images(loaded, [still], 1)[0], atol=1e-5)
