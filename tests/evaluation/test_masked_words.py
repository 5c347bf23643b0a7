"""Hidden words are guessed one at a time, from the rest of their caption and from the picture."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mmflow.evaluation.config import EvaluateConfig
from mmflow.evaluation.evaluate import examine
from mmflow.evaluation.masked_words import guess_words, masked_word_metrics
from mmflow.inference.embed import image_inputs
from mmflow.models.config import ModelConfig
from mmflow.models.package import LoadedModel
from tests.evaluation.models import COLOURS, answerer_config, captions_of, loaded_model, picture, rows

SAMPLES = [picture(colour) for colour in COLOURS]
CAPTIONS = [captions_of(colour)[row % 3] for row, colour in enumerate(COLOURS)]


def model() -> LoadedModel:
    return loaded_model(answerer_config(heads=["masked_language"]))


def test_every_word_is_hidden_by_itself_as_in_a_plain_loop() -> None:
    loaded = model()
    losses, right = guess_words(loaded, SAMPLES, CAPTIONS, batch_size=4)
    mask = loaded.tokenizer.token_to_id("[MASK]")
    expected = []
    for sample, caption in zip(SAMPLES, CAPTIONS, strict=True):
        ids = loaded.tokenizer.encode(caption).ids
        for place in range(1, len(ids) - 1):
            hidden = torch.tensor([[mask if at == place else number for at, number in enumerate(ids)]])
            with torch.no_grad():
                image = loaded.model.encode_image(*image_inputs(loaded, [sample]))
                text = loaded.model.encode_text(hidden, torch.ones_like(hidden))
                odds = loaded.model.masked_language_logits(loaded.model.fuse(image, text))[0, place].log_softmax(-1)
            expected.append((-float(odds[ids[place]]), int(odds.argmax()) == ids[place]))
    np.testing.assert_allclose(losses, [loss for loss, _ in expected], rtol=1e-4)
    assert right.tolist() == [each for _, each in expected]


def test_another_picture_changes_what_a_fused_model_guesses_and_no_other_model() -> None:
    alone = ModelConfig.model_validate(
        answerer_config(heads=["masked_language"]).model_dump() | {"fusion": None, "embedding_width": 8}
    )
    for loaded, reads in ((model(), True), (loaded_model(alone), False)):
        own, _ = guess_words(loaded, SAMPLES, CAPTIONS, batch_size=6)
        other, _ = guess_words(loaded, [*SAMPLES[1:], SAMPLES[0]], CAPTIONS, batch_size=6)
        assert (np.abs(own - other).max() > 1e-5) == reads


def test_the_section_is_examined_by_its_name() -> None:
    loaded, held_out = model(), rows()
    settings = EvaluateConfig.model_validate({"splits": ["held_out"], "batch_size": 4, "masked_language": {}})
    found = examine(loaded, held_out, settings).metrics
    assert set(found) == {"masked_language"}
    captions = held_out.captions["en"]
    again = masked_word_metrics(loaded, held_out.samples, captions.texts, captions.picture_of_text, batch_size=3)
    assert found["masked_language"] == pytest.approx(again)
    assert again["tokens"] == sum(len(loaded.tokenizer.encode(text).ids) - 2 for text in captions.texts)
    assert again["perplexity"] == pytest.approx(np.exp(again["token_loss"]))
