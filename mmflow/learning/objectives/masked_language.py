"""Masked language modelling (BERT, arXiv 1810.04805, section 3.1, task 1), given the image where the model has a fusion
(ALBEF, arXiv 2107.07651, eq. 3).

    loss = −mean over chosen words of log p(word | the text with those words hidden, image)

15% of the words are chosen; 80% of those become the mask token, 10% another word, and 10% stay.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from mmflow.learning import MASK_TOKEN, Objective

if TYPE_CHECKING:
    from torch import Tensor

    from mmflow.learning.outputs import MaskingTokens, Outputs

# Shapes: B rows of this rank, T tokens, M chosen tokens of all rows, W width, V vocabulary.


class MaskedLanguage(Objective):
    """Predict hidden words from the rest and, with a fusion, from the image."""

    share: float = Field(0.15, gt=0, lt=1)
    """Share of the words to predict."""

    TRAINS: ClassVar = {"masked_language": {}}

    def needs(self) -> dict[str, str]:
        return {
            "masked_language_logits": "add masked_language to the model's heads",
            MASK_TOKEN: "use a tokenizer with [MASK] or <mask>",
        }

    def places(self, outputs: Outputs) -> Tensor:
        """(B, T) bool: the words to predict."""
        return self._hidden(outputs)[1]

    def loss(self, outputs: Outputs) -> Tensor:
        import torch

        model = outputs.model
        hidden_BT, chosen_BT = self._hidden(outputs)
        fused = model.fuse(outputs.image, model.encode_text(hidden_BT, outputs.token_mask))
        assert fused.text_BTW is not None, "needs() names the head that reads it"
        # The head sees only the chosen words, as one long text: logits of all the words would cost six times as much.
        logits_MV = model.masked_language_logits(fused._replace(text_BTW=fused.text_BTW[chosen_BT][None]))[0]
        words_M = outputs.token_ids[chosen_BT]
        everywhere_M = torch.ones_like(words_M, dtype=torch.bool)
        return outputs.mean_cross_entropy("masked_language", logits_MV, words_M, everywhere_M)

    def _hidden(self, outputs: Outputs) -> tuple[Tensor, Tensor]:
        real_BT = outputs.token_mask.bool() & outputs.rows.real_B[:, None]
        uniform_B = outputs.draw_uniform(3 * outputs.token_ids.shape[1])
        return hide_words(outputs.token_ids, real_BT, outputs.special, self.share, uniform_B)


def hide_words(
    token_ids_BT: Tensor, real_BT: Tensor, special: MaskingTokens, share: float, uniform_B: Tensor
) -> tuple[Tensor, Tensor]:
    """Token ids (B, T) with words hidden, and the words to predict (B, T) bool.

    Special tokens and those outside `real_BT` are never chosen, and no special token replaces a word. `uniform_B` holds
    three numbers in (0, 1) for each token, (B, 3·T): so a token's fate depends on nothing but its row and its place.
    """
    import torch

    assert special.mask is not None, "needs() names it"
    is_special_V = torch.zeros(special.vocabulary_size, dtype=torch.bool, device=token_ids_BT.device)
    is_special_V[list(special.ids)] = True
    words = (~is_special_V).nonzero()[:, 0]
    choice_BT, kind_BT, word_BT = uniform_B.view(*token_ids_BT.shape, 3).unbind(2)
    chosen_BT = real_BT & ~is_special_V[token_ids_BT] & (choice_BT < share)
    other_BT = words[(word_BT * len(words)).long()]
    hidden_BT = torch.where(kind_BT < 0.8, special.mask, torch.where(kind_BT < 0.9, other_BT, token_ids_BT))
    return torch.where(chosen_BT, hidden_BT, token_ids_BT), chosen_BT
