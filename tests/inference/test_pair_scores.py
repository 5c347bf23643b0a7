"""A model that compares pair by pair is examined in retrieval by its scores, as one of a shared space by cosines."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from mmflow.core.errors import RecipeError
from mmflow.evaluation.asked import check_asked
from mmflow.evaluation.attention import look
from mmflow.evaluation.config import EvaluateConfig
from mmflow.evaluation.evaluate import chance, examine
from mmflow.inference import predict
from mmflow.inference.embed import image_inputs, text_inputs
from mmflow.inference.predict import pair_scores
from mmflow.models.config import ModelConfig
from mmflow.models.package import LoadedModel
from tests.evaluation.models import BASE, COLOURS, IMAGE, TEXT, captions_of, loaded_model, picture, rows

VIDEO = {"kind": "tight", "max_frames": 3, "layers": 1, "heads": 2}
FIRST, *OTHERS = (picture(colour) for colour in COLOURS)
CLIPS = [replace(FIRST, frames=tuple(other.image for other in OTHERS[:number])) for number in range(5)]


def loaded() -> LoadedModel:
    fields = {**BASE, "image": IMAGE["vit"], "text": TEXT, "embedding_width": 8, "video": VIDEO}
    return loaded_model(ModelConfig.model_validate(fields))


def settings(**sections: object) -> EvaluateConfig:
    return EvaluateConfig.model_validate({"splits": ["held_out"], "batch_size": 4, **sections})


@pytest.mark.parametrize("pairs_at_once", [1, 7, 4096])
def test_scores_are_those_of_each_pair_alone(pairs_at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(predict, "PAIRS_AT_ONCE", pairs_at_once)
    model, captions = loaded(), [text for colour in COLOURS[:2] for text in captions_of(colour)]
    scores = pair_scores(model, CLIPS, captions, batch_size=2)
    assert scores.shape == (6, 5)
    with torch.no_grad():
        for row, caption in enumerate(captions):
            text = model.model.encode_text(*text_inputs(model, [caption]))
            for column, clip in enumerate(CLIPS):
                alone = model.model.score_pairs(text.pooled_BW, model.model.encode_image(*image_inputs(model, [clip])))
                assert scores[row, column] == pytest.approx(alone.item(), abs=1e-5)


def test_retrieval_ranks_by_scores() -> None:
    model, held_out = loaded(), rows()
    found = examine(model, held_out, settings())
    assert set(found.metrics) == {"text_to_image", "image_to_text", "languages"}
    assert found.retrieved is not None
    captions = held_out.captions["en"]
    scores = pair_scores(model, held_out.samples, captions.texts, batch_size=6)
    right = scores[np.arange(len(scores)), captions.picture_of_text]
    np.testing.assert_array_equal(found.retrieved.ranks, (scores >= right[:, None] - 1e-6).sum(1))
    assert set(chance(held_out, settings(), frozenset({"retrieval"}))) >= {"text_to_image", "image_to_text"}


def test_what_needs_embeddings_is_refused_by_name() -> None:
    gives = {"pretrain.model": loaded().model.gives}
    check_asked(settings(), gives)
    with pytest.raises(RecipeError, match=r"evaluate\.long_text: pretrain\.model cannot be examined in it"):
        check_asked(settings(long_text={"truncated_tokens": 5}), gives)


def test_what_raised_a_score_is_found_in_the_captions_words() -> None:
    looked = look(loaded(), CLIPS[2], "a red square")
    assert [text for text, _ in looked.tokens]
    assert max(weight for _, weight in looked.tokens) == 1
