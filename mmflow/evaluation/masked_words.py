"""Words of captions hidden one at a time and guessed by the head `masked_language`: how many are right, and how much
they surprise (the pseudo-perplexity of arXiv 1910.14659).

Each caption is read once with its own picture and once with another's: what the second loses, the model had read off
the picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mmflow.dataset.reader import Sample
from mmflow.evaluation.perplexity import perplexity_metrics
from mmflow.inference.embed import image_inputs, text_inputs
from mmflow.learning.outputs import masking_tokens
from mmflow.models.encoders import Encoded
from mmflow.models.package import LoadedModel

# Shapes: M hidden words of all captions, B captions of a batch, C hidden words of a batch, T tokens, V vocabulary.


def masked_word_metrics(
    loaded: LoadedModel,
    pictures: Sequence[Sample],
    captions: Sequence[str],
    picture_of_text: NDArray[np.int64],
    batch_size: int,
) -> dict[str, Any]:
    """{"accuracy", "perplexity", "token_loss", "tokens"} over every word piece of every caption, and
    {"accuracy_other_picture"}: with the picture after its own."""
    losses_M, right_M = guess_words(loaded, [pictures[place] for place in picture_of_text], captions, batch_size)
    others = [pictures[(place + 1) % len(pictures)] for place in picture_of_text]
    _, by_other_M = guess_words(loaded, others, captions, batch_size)
    return {
        "accuracy": _share(right_M),
        "accuracy_other_picture": _share(by_other_M),
        **perplexity_metrics(losses_M, np.ones_like(losses_M, dtype=np.int64)),
    }


def _share(right_M: NDArray[np.bool_]) -> float:
    return float(right_M.mean()) if len(right_M) else 0.0


@torch.inference_mode()
def guess_words(
    loaded: LoadedModel, samples: Sequence[Sample], captions: Sequence[str], batch_size: int
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """(M,) nats that each word piece costs, hidden by itself, and (M,) whether it was thought likeliest. Caption q is
    read with the picture of `samples[q]`."""
    special = masking_tokens(loaded.tokenizer)
    assert special.mask is not None, "a model with this head was trained with a tokenizer that has one"
    losses, right = [np.zeros(0)], [np.zeros(0, dtype=np.bool_)]
    for start in range(0, len(captions), batch_size):
        rows = slice(start, start + batch_size)
        image = loaded.model.encode_image(*image_inputs(loaded, samples[rows]))
        ids_BT, mask_BT = text_inputs(loaded, captions[rows])
        is_word_BT = mask_BT.bool() & ~torch.isin(ids_BT, ids_BT.new_tensor(special.ids))
        for chosen_C2 in torch.split(is_word_BT.nonzero(), batch_size):
            caption_C, place_C = chosen_C2.unbind(1)
            each_C = torch.arange(len(chosen_C2), device=ids_BT.device)
            word_C, hidden_CT = ids_BT[caption_C, place_C], ids_BT[caption_C]
            hidden_CT[each_C, place_C] = special.mask
            text = loaded.model.encode_text(hidden_CT, mask_BT[caption_C])
            fused = loaded.model.fuse(_rows(image, caption_C), text)
            assert fused.text_BTW is not None, "`build` gives the head what it reads"
            guess = fused._replace(text_BTW=fused.text_BTW[each_C, place_C][None])
            log_CV = loaded.model.masked_language_logits(guess)[0].double().log_softmax(-1)
            losses.append(-log_CV[each_C, word_C].cpu().numpy())
            right.append((log_CV.argmax(-1) == word_C).cpu().numpy())
    return np.concatenate(losses), np.concatenate(right)


def _rows(encoded: Encoded, chosen_C: torch.Tensor) -> Encoded:
    mask_BT = encoded.mask_BT
    return Encoded(
        encoded.sequence_BTW[chosen_C], encoded.pooled_BW[chosen_C], None if mask_BT is None else mask_BT[chosen_C]
    )
