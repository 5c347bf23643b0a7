"""Documents read window by window: every token changes the output, padding does not, and memory stays constant."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mmflow.core.errors import RecipeError
from tests.models.backbones import TEXT, text_encoder

TOKENS = 8  # of a window: its opening token and seven more


def encoder(max_tokens: int, model_type: str = "bert", **settings: Any) -> Any:
    torch.manual_seed(2)
    windows = {"tokens": TOKENS, "layers": 1, "heads": 2} | settings.pop("windows", {})
    return text_encoder(model_type, max_tokens, windows=windows, **settings)


def document(length: int, seed: int = 0) -> Tensor:
    ids = torch.randint(5, 64, (1, length), generator=torch.Generator().manual_seed(seed))
    ids[:, 0] = 2
    return ids


@pytest.mark.parametrize("model_type", TEXT)
@pytest.mark.parametrize("length", [1, 2, 8, 9, 22, 29])
def test_padding_changes_nothing(model_type: str, length: int) -> None:
    read = encoder(29, model_type).eval()
    plain = read(document(length))
    padded = torch.cat([document(length), torch.randint(0, 64, (1, 29 - length))], 1)
    mask = torch.ones(2, 29, dtype=torch.int64)
    mask[0, length:] = 0
    both = read(torch.cat([padded, document(29, seed=1)]), mask)
    torch.testing.assert_close(both.pooled_BW[:1], plain.pooled_BW, atol=1e-6, rtol=1e-5)
    windows = max(1, -(-(length - 1) // (TOKENS - 1)))
    assert plain.mask_BT.sum() == both.mask_BT[0].sum() == windows
    torch.testing.assert_close(both.sequence_BTW[:1, :windows], plain.sequence_BTW[:, :windows], atol=1e-6, rtol=1e-5)


def test_windows_equal_the_encoder_on_each_slice() -> None:
    read, ids = encoder(22).eval(), document(20)
    slices = [torch.cat([ids[:, :1], ids[:, start : start + 7]], 1) for start in (1, 8, 15)]
    vectors = torch.stack([read.encoder(window).pooled_BW for window in slices], 1)
    expected, _ = read.windows(vectors, None)
    encoded = read(ids, attentions=True)
    torch.testing.assert_close(encoded.sequence_BTW, expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(read(ids).sequence_BTW, expected)
    torch.testing.assert_close(read(ids).pooled_BW, expected.mean(1))
    assert [map_BHNN.shape for map_BHNN in encoded.attentions] == [(1, 2, 3, 3)]


def test_every_token_counts() -> None:
    read, ids = encoder(29).eval(), document(29)
    plain = read(ids).pooled_BW
    for place in range(29):
        other = ids.clone()
        other[0, place] = 4
        assert not torch.allclose(read(other).pooled_BW, plain, atol=1e-6), place


def test_gradients_equal_those_without_recomputation(monkeypatch: pytest.MonkeyPatch) -> None:
    gradients = []
    ids, mask = torch.cat([document(22), document(22, 1)]), torch.ones(2, 22, dtype=torch.int64)
    mask[1, 5:] = 0
    for recompute in (True, False):
        read = encoder(29, options={"hidden_dropout_prob": 0.2})
        if not recompute:
            monkeypatch.setattr("mmflow.models.encoders.checkpoint", lambda function, *args, **_: function(*args))
        torch.manual_seed(4)
        read(ids, mask).pooled_BW.square().sum().backward()
        gradients.append({name: weight.grad for name, weight in read.named_parameters()})
    for name, gradient in gradients[0].items():
        assert gradient is not None, name
        torch.testing.assert_close(gradient, gradients[1][name], msg=name)


def test_the_encoder_is_called_equally_often_for_every_batch() -> None:
    """Ranks with documents of different lengths must gather ZeRO-3's weights equally often."""
    read = encoder(29)
    calls = []
    read.encoder.register_forward_pre_hook(lambda module, args: calls.append(args[0].shape))
    for ids in (document(3), torch.cat([document(29), document(29, 1)])):
        calls.clear()
        read(ids).pooled_BW.sum().backward()
        assert len(calls) == 2 * 4  # each window once forward, once again backward


def test_memory_holds_one_window_however_long_the_document() -> None:
    saved = []
    for length in (57, 225):
        read = encoder(length)
        total = 0

        def pack(tensor: Tensor) -> Tensor:
            nonlocal total
            if not isinstance(tensor, torch.nn.Parameter):
                total += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            read(document(length)).pooled_BW.sum()
        saved.append(total)
    # 8 and 32 windows: a few vectors a window and the small transformer are kept, not the encoder's layers.
    layers_of_24_windows = 24 * TOKENS * 8 * 10
    assert saved[1] - saved[0] < layers_of_24_windows


def test_windows_that_do_not_fit_the_encoder_are_refused() -> None:
    with pytest.raises(RecipeError, match=r"^m.text.windows.tokens: 30 tokens, but bert has 24 positions"):
        encoder(100, windows={"tokens": 30})
    encoder(2000, windows={"tokens": 24})
    with pytest.raises(RecipeError, match=r"^m.text.windows.heads: 3 does not divide the width, 8"):
        encoder(29, windows={"heads": 3})
