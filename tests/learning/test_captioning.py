"""The next-token loss is that of transformers' BLIP decoder, padding left out."""

from __future__ import annotations

import pytest
import torch

from mmflow.learning.objectives.captioning import Captioning, next_token_loss
from tests.learning.tiny import TinyModel, all_real, alone, batch, outputs_of

LENGTHS = torch.tensor([6, 2, 4])


def test_loss_and_gradient_equal_those_of_transformers_blip() -> None:
    """Its text decoder's own loss, labels −100 where there is padding; and label smoothing, which it has at 0.1."""
    from transformers import BlipTextConfig
    from transformers.models.blip.modeling_blip_text import BlipTextLMHeadModel

    torch.manual_seed(0)
    config = BlipTextConfig(
        vocab_size=20,
        hidden_size=8,
        encoder_hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        max_position_embeddings=8,
        is_decoder=True,
    )
    for smoothing in (0.0, 0.1):
        config.label_smoothing = smoothing
        decoder = BlipTextLMHeadModel(config).eval()
        decoder.label_smoothing = smoothing
        ids = torch.randint(1, 20, (3, 6))
        there = torch.arange(6) < LENGTHS[:, None]
        output = decoder(
            ids,
            attention_mask=there.long(),
            encoder_hidden_states=torch.randn(3, 4, 8),
            labels=ids.masked_fill(~there, -100),
            is_decoder=True,
        )
        expected = torch.autograd.grad(output.loss, output.logits, retain_graph=True)[0]
        loss = next_token_loss(output.logits, ids, there, alone, smoothing)
        torch.testing.assert_close(loss, output.loss, atol=1e-6, rtol=1e-5)
        gradient = torch.autograd.grad(loss, output.logits)[0]
        torch.testing.assert_close(gradient, expected, atol=1e-6, rtol=1e-5)


def test_every_word_counts_alike_and_padding_nowhere() -> None:
    logits = torch.randn(3, 6, 9, generator=torch.Generator().manual_seed(1))
    ids = torch.randint(0, 9, (3, 6), generator=torch.Generator().manual_seed(2))
    there = torch.arange(6) < LENGTHS[:, None]
    by_hand = [
        -logits[row, place - 1].log_softmax(0)[ids[row, place]]
        for row, length in enumerate(LENGTHS.tolist())
        for place in range(1, length)
    ]
    loss = next_token_loss(logits, ids, there, alone)
    torch.testing.assert_close(loss, torch.stack(by_hand).mean())
    garbled = ids.masked_fill(~there, 8), logits.masked_fill(~there[..., None], 1e4)
    torch.testing.assert_close(next_token_loss(garbled[1], garbled[0], there, alone), loss)
    torch.testing.assert_close(next_token_loss(logits.bfloat16(), ids, there, alone), loss, atol=0.02, rtol=0.01)


def test_captions_of_one_token_have_no_loss() -> None:
    loss = next_token_loss(
        torch.randn(2, 1, 9, requires_grad=True), torch.zeros(2, 1, dtype=torch.int64), torch.ones(2, 1).bool(), alone
    )
    loss.backward()
    assert loss == 0


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_the_decoder_reads_the_picture(smoothing: float) -> None:
    model, arguments = TinyModel(), batch(4)
    config = Captioning(label_smoothing=smoothing)
    outputs = outputs_of(model, arguments, all_real(4))
    logits = model.decode(model.encode_image(arguments["pixels"]), arguments["token_ids"])
    expected = next_token_loss(logits, arguments["token_ids"], arguments["token_mask"].bool(), alone, smoothing)
    torch.testing.assert_close(config.loss(outputs), expected)
