"""Words are hidden as BERT hides them, and the loss over them is that of transformers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models

from mmflow.learning.objectives.masked_language import MaskedLanguage, hide_words
from mmflow.learning.outputs import MaskingTokens, masking_tokens
from mmflow.learning.rows import uniform
from mmflow.loading.tokens import train_tokenizer
from mmflow.models.encoders import Fused
from tests.learning.tiny import SPECIAL, VOCABULARY, TinyModel, batch, gradients, outputs_of, rows_of

MANY = MaskingTokens(mask=4, ids=(0, 1, 2, 3, 4), vocabulary_size=1000)


def test_words_are_hidden_eighty_ten_ten() -> None:
    """Of 300,000 words; the bounds are five deviations."""
    ids = torch.randint(5, 1000, (3000, 100), generator=torch.Generator().manual_seed(0))
    there = torch.ones_like(ids, dtype=torch.bool)
    hidden, chosen = hide_words(ids, there, MANY, 0.15, uniform(11, torch.arange(3000), 300))
    assert torch.equal(hidden[~chosen], ids[~chosen])
    assert chosen.float().mean().item() == pytest.approx(0.15, abs=0.0033)
    of_chosen, was = hidden[chosen], ids[chosen]
    masked, same = of_chosen == 4, of_chosen == was
    assert masked.float().mean().item() == pytest.approx(0.8, abs=0.01)
    assert same.float().mean().item() == pytest.approx(0.1, abs=0.0075)
    replaced = of_chosen[~masked & ~same]
    assert replaced.min() >= 5
    counts = replaced.float().histc(bins=5, min=5, max=1000)  # drawn over the whole vocabulary
    assert (counts / counts.sum() - 0.2).abs().max() < 0.04


@given(
    rows=st.integers(1, 6),
    first=st.integers(0, 2**20),
    share=st.sampled_from([0.15, 0.9]),
    seed=st.integers(0, 2**32 - 1),
)
def test_special_tokens_and_padding_are_never_hidden(rows: int, first: int, share: float, seed: int) -> None:
    arguments = batch(rows, seed % 1000)
    ids, there = arguments["token_ids"], arguments["token_mask"].bool()
    there[0] = False
    hidden, chosen = hide_words(
        ids, there, SPECIAL, share, uniform(seed, torch.arange(first, first + rows), 3 * ids.shape[1])
    )
    assert not chosen[~there | (ids < 5)].any()
    assert torch.equal(hidden[~chosen], ids[~chosen])
    assert not ((hidden < 4) & chosen).any()


@given(padding=st.integers(1, 5), seed=st.integers(0, 2**32 - 1))
def test_hidden_words_of_a_row_do_not_depend_on_other_rows(padding: int, seed: int) -> None:
    """Neither on the rows beside it nor on what they are padded to."""
    arguments = batch(6)
    ids, there = arguments["token_ids"], arguments["token_mask"].bool()
    hidden, chosen = hide_words(ids, there, SPECIAL, 0.5, uniform(seed, torch.arange(6), 3 * ids.shape[1]))
    longer = [torch.nn.functional.pad(whole[4:5], (0, padding)) for whole in (ids, there)]
    hidden_alone, chosen_alone = hide_words(
        *longer, SPECIAL, 0.5, uniform(seed, torch.tensor([4]), 3 * longer[0].shape[1])
    )
    assert torch.equal(hidden_alone[0, : ids.shape[1]], hidden[4])
    assert torch.equal(chosen_alone[0, : ids.shape[1]], chosen[4])


def test_loss_and_gradient_equal_those_of_transformers() -> None:
    """Its masked LM loss over the whole sequence, −100 where nothing is asked, on the same hidden words."""
    from transformers.loss.loss_utils import ForMaskedLMLoss

    model, arguments, rows = TinyModel(), batch(6), rows_of(torch.arange(6) != 2)
    outputs = outputs_of(model, arguments, rows)
    loss = MaskedLanguage(share=0.5).loss(outputs)
    actual = gradients(loss, model)
    again = outputs_of(model, arguments, rows)
    seed = int(torch.randint(1 << 32, (), generator=again.generator))
    there = arguments["token_mask"].bool() & rows.real_B[:, None]
    hidden, chosen = hide_words(
        arguments["token_ids"], there, SPECIAL, 0.5, uniform(seed, torch.arange(6), 3 * there.shape[1])
    )
    assert chosen.any()
    logits = model.words(model.fuse(again.image, model.encode_text(hidden, arguments["token_mask"])).text_BTW)
    expected = ForMaskedLMLoss(logits, arguments["token_ids"].masked_fill(~chosen, -100), VOCABULARY)
    torch.testing.assert_close(loss, expected, atol=1e-6, rtol=1e-5)
    for name, gradient in gradients(expected, model).items():
        torch.testing.assert_close(actual[name], gradient, atol=1e-6, rtol=1e-5)


def test_bf16_logits_are_summed_in_fp32() -> None:
    class Half(TinyModel):
        def masked_language_logits(self, fused: Fused) -> torch.Tensor:
            return super().masked_language_logits(fused).bfloat16()

    actual, expected = (
        MaskedLanguage().loss(outputs_of(model, batch(6), rows_of(torch.ones(6, dtype=torch.bool))))
        for model in (Half(), TinyModel())
    )
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, expected, atol=0.02, rtol=0.01)


def test_special_tokens_of_our_own_tokenizer_and_of_a_marked_one() -> None:
    ours = masking_tokens(train_tokenizer(["red apple", "green pear"], 64))
    assert (ours.mask, ours.ids) == (4, (0, 1, 2, 3, 4))
    marked = Tokenizer(models.WordLevel({"red": 0, "apple": 1}, unk_token="red"))
    marked.add_special_tokens(["<s>", "<mask>"])
    assert masking_tokens(marked) == MaskingTokens(mask=3, ids=(2, 3), vocabulary_size=4)
    unmarked = Tokenizer(models.WordLevel({"red": 0, "apple": 1}, unk_token="red"))
    assert masking_tokens(unmarked) == MaskingTokens(mask=None, ids=(), vocabulary_size=2)
