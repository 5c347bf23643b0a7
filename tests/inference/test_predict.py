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
from mmflow.inference.generation import WritingConfig, text_of, write_texts
from mmflow.inference.predict import Batch, Predictor
from mmflow.inference.prepare import Prepared, decode_views
from mmflow.inference.tasks import pairs
from mmflow.inference.tasks.pairs import GivenMatches, PairScores
from mmflow.loading.tokens import train_tokenizer
from mmflow.models.decoder import decoder_tokens
from mmflow.models.model import Model
from tests.evaluation.models import (
    COLOURS,
    TEXT,
    altered,
    answerer_config,
    captioner_config,
    captions_of,
    dual_config,
    matcher_config,
    picture,
    predictor,
    tight_config,
    tokenizer,
)

SAMPLES = [picture(colour) for colour in COLOURS]
CAPTIONS = [captions_of(colour)[row % 3] for row, colour in enumerate(COLOURS)]


def batch_of(model: Predictor, samples: Sequence[Sample]) -> Batch:
    """The samples as good rows of shard 00000."""
    clips = [decode_views(sample, model.looks()) for sample in samples]
    pixels = {"": np.stack([view for clip in clips for view in clip])}
    frames, rows = np.array([len(clip) for clip in clips]), np.arange(len(clips))
    keys = [sample.key for sample in samples]
    prepared = Prepared(keys, [None] * len(keys), 0, rows, list(samples), pixels, frames)
    return Batch(model, prepared, "00000", 0, 0, {})


def alone(model: Predictor) -> Predictor:
    """The model with batches of one row."""
    return Predictor(model.loaded, 1)


def test_texts_of_all_lengths_are_embedded_as_each_alone_in_their_order() -> None:
    config = dual_config()
    text = {**TEXT, "options": {**TEXT["options"], "max_position_embeddings": 128}}
    model = predictor(altered(config, text=text, max_tokens=100), batch_size=2)
    texts = [" ".join(CAPTIONS[: 1 + number % 6] * (1 + number % 3)) for number in range(11)]
    embedded = model.embed_texts(texts)
    np.testing.assert_allclose(np.linalg.norm(embedded, axis=1), 1, atol=1e-5)
    for row, text_of_row in enumerate(texts):
        np.testing.assert_allclose(embedded[row], alone(model).embed_texts([text_of_row])[0], atol=1e-5)
    cut = model.embed_texts(texts, max_tokens=4)
    beginnings = [" ".join(text.split()[:2]) for text in texts]  # between the first and the closing token
    np.testing.assert_allclose(cut, model.embed_texts(beginnings), atol=1e-5)
    assert model.embed_texts([]).shape == (0, 8)


def test_a_class_is_the_unit_mean_of_its_prompts_in_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = {"cat": (1.0, 0.0), "kitten": (0.0, 1.0), "dog": (0.6, -0.8)}

    def embed(self: Predictor, texts: Sequence[str]) -> np.ndarray:
        return np.array([vectors[text] for text in texts], np.float32)

    monkeypatch.setattr(Predictor, "embed_texts", embed)
    classes = predictor(dual_config()).embed_classes({"dog": ["dog"], "cat": ["cat", "kitten"]})
    np.testing.assert_allclose(classes, [[0.6, -0.8], [2**-0.5, 2**-0.5]], atol=1e-6)


def written(model: Predictor, texts: Sequence[str] | None, **writing: Any) -> list[str]:
    with torch.inference_mode():
        image, _ = model.encode(SAMPLES)
        return write_texts(model, image, texts, WritingConfig.model_validate(writing), seed=3)


@pytest.mark.parametrize("search", ["greedy", "beam", "nucleus"])
def test_a_captioner_writes_one_text_per_picture_and_the_same_again(search: str) -> None:
    model = predictor(captioner_config())
    texts = written(model, None, search=search, max_tokens=5)
    assert len(texts) == 6
    assert texts == written(model, None, search=search, max_tokens=5)
    assert not any("[" in text for text in texts)


def test_a_model_refuses_what_it_was_not_made_for() -> None:
    answerer = answerer_config(decoder={"memory": "fused", "width": 16, "layers": 1, "heads": 2})
    with pytest.raises(MisuseError, match=r"^model\.decoder\.memory: fused, but there is no question"):
        written(predictor(answerer), None, search="greedy", max_tokens=4)
    captioner = predictor(captioner_config())
    image, _ = captioner.encode(SAMPLES)
    with pytest.raises(MisuseError, match=r"^model\.decoder\.memory: image, but there is a question"):
        captioner.model.memory(image, image)
    fused = predictor(answerer_config(heads=["classes"]), ("red", "green"))
    image, _ = fused.encode(SAMPLES)
    with pytest.raises(MisuseError, match=r"^model\.fusion: it reads text with each picture"):
        fused.model.fuse(image, None)


@pytest.mark.parametrize("pairs_at_once", [1, 7, 4096])
def test_pairs_are_scored_as_each_alone(pairs_at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pairs, "PAIRS_AT_ONCE", pairs_at_once)
    first, *others = SAMPLES
    clips = [replace(first, frames=tuple(other.image for other in others[:number])) for number in range(5)]
    model, captions = predictor(tight_config(), batch_size=2), captions_of("red") + captions_of("green")
    result = PairScores.of(tuple(captions))
    with torch.inference_mode():
        column = result.run(batch_of(model, clips), result.start(model))["pair_scores"]
        for row, clip in enumerate(clips):
            for place, caption in enumerate(captions):
                image, text = model.encode([clip], [caption])
                assert text is not None
                score = model.model.score_pairs(text.pooled_BW, image).item()
                assert column[row][place].as_py() == pytest.approx(score, abs=1e-5)


def test_a_picture_is_encoded_once_for_all_its_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: dict[str, list[int]] = {"encode_image": [], "encode_text": []}

    def spied(name: str) -> Any:
        plain = getattr(Model, name)

        def encode(self: Model, inputs: torch.Tensor, *rest: Any) -> Any:
            sizes[name].append(len(inputs))
            return plain(self, inputs, *rest)

        return encode

    for name in sizes:
        monkeypatch.setattr(Model, name, spied(name))
    texts = [text for colour in COLOURS for text in captions_of(colour)]
    given = GivenMatches.of({"00000": [texts for _ in SAMPLES]})
    with torch.inference_mode():
        given.run(batch_of(predictor(matcher_config(), batch_size=6), SAMPLES), None)
    assert sizes == {"encode_image": [6], "encode_text": [6] * 18}  # all pairs of six pictures and 18 texts


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
    with torch.inference_mode():
        both, one = (batch_of(model, samples).embed_images() for samples in ([still, clip], [still]))
    np.testing.assert_allclose(both[0], one[0], atol=1e-5)
