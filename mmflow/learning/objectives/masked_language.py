"""Masked language modelling (BERT, arXiv 1810.04805, section 3.1, task 1), given the image where the model fuses
(ALBEF, arXiv 2107.07651, eq. 3).

    loss = −mean over chosen words of log p(word | the text with those words hidden, image)

Of the words 15% are chosen; of those 80% become the mask, 10% another word, and 10% stay.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmflow.learning.chance import draw_seed, uniform
from mmflow.learning.config import MaskedLanguageConfig
from mmflow.learning.outputs import MaskingTokens, Outputs
from mmflow.learning.rows import mean_cross_entropy

# Shapes: B rows of this rank, T tokens, M chosen ones of all rows, W width, V vocabulary.


def masked_language(outputs: Outputs, config: MaskedLanguageConfig) -> Tensor:
    """The objective of a batch, ()."""
    model, token_ids_BT = outputs.model, outputs.token_ids
    hidden_BT, chosen_BT = _hidden(outputs, config)
    fused = model.fuse(outputs.image, model.encode_text(hidden_BT, outputs.token_mask))
    assert fused.text_BTW is not None, "check() has seen that the model has the head"
    # The head sees the chosen words alone, as one long text: a vocabulary's logits for all the others cost six times
    # as much.
    logits_MV = model.masked_language_logits(fused._replace(text_BTW=fused.text_BTW[chosen_BT][None]))[0]
    words_M = token_ids_BT[chosen_BT]
    everywhere_M = torch.ones_like(words_M, dtype=torch.bool)
    return mean_cross_entropy(logits_MV, words_M, everywhere_M, outputs.gather_places("masked_language"))


def masked_language_places(outputs: Outputs, config: MaskedLanguageConfig) -> Tensor:
    """(B, T) bool: the words to be guessed."""
    return _hidden(outputs, config)[1]


def _hidden(outputs: Outputs, config: MaskedLanguageConfig) -> tuple[Tensor, Tensor]:
    there_BT = outputs.token_mask.bool() & outputs.rows.real_B[:, None]
    seed = draw_seed(outputs.generator)
    return hide_words(outputs.token_ids, there_BT, outputs.rows.columns_B, outputs.special, config.share, seed)


def hide_words(
    token_ids_BT: Tensor, there_BT: Tensor, rows_B: Tensor, special: MaskingTokens, share: float, seed: int
) -> tuple[Tensor, Tensor]:
    """Token ids (B, T) with words hidden, and where they must be guessed (B, T) bool.

    Special tokens and those not `there_BT` are never chosen, nor is a special one drawn in place of a word. A token's
    fate depends on the seed, its row's number `rows_B` in the global batch and its place alone.
    """
    assert special.mask is not None, "check() has seen that the tokenizer has one"
    num_tokens = token_ids_BT.shape[1]
    is_special_V = torch.zeros(special.vocabulary_size, dtype=torch.bool, device=token_ids_BT.device)
    is_special_V[list(special.ids)] = True
    words = (~is_special_V).nonzero()[:, 0]
    chance_BT, kind_BT, word_BT = uniform(seed, rows_B, 3 * num_tokens).view(-1, num_tokens, 3).unbind(2)
    chosen_BT = there_BT & ~is_special_V[token_ids_BT] & (chance_BT < share)
    other_BT = words[(word_BT * len(words)).long()]
    hidden_BT = torch.where(kind_BT < 0.8, special.mask, torch.where(kind_BT < 0.9, other_BT, token_ids_BT))
    return torch.where(chosen_BT, hidden_BT, token_ids_BT), chosen_BT
