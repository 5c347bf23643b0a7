"""What a packaged model says of held-out rows: classes, text of its own, the odds of given text, which pairs belong."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders
from torch import Tensor

from mmflow.errors import RecipeError
from mmflow.evaluation.config import WritingConfig
from mmflow.loading.reader import Sample
from mmflow.loading.tokens import special_tokens
from mmflow.models.embed import batched, device_of, image_inputs, text_inputs
from mmflow.models.encoders import Encoded
from mmflow.models.generate import Marks, Memory, beam, greedy, nucleus
from mmflow.models.package import LoadedModel

# Shapes: N rows, C classes, B batch, T tokens, V vocabulary, Q captions, P pictures.

Scores = NDArray[np.float32]


@torch.inference_mode()
def class_scores(
    loaded: LoadedModel, samples: Sequence[Sample], questions: Sequence[str] | None, batch_size: int
) -> Scores:
    """(N, C) logits of the classes or answers that the package names, of each picture or picture and question."""
    rows = []
    for start in range(0, len(samples), batch_size):
        image, text = _encoded(loaded, samples, questions, slice(start, start + batch_size))
        rows.append(loaded.model.class_logits(loaded.model.fuse(image, text)).float().cpu().numpy())
    return np.concatenate(rows) if rows else np.zeros((0, len(loaded.classes)), np.float32)


def write_texts(
    loaded: LoadedModel,
    samples: Sequence[Sample],
    questions: Sequence[str] | None,
    writing: WritingConfig,
    batch_size: int,
    seed: int,
) -> list[str]:
    """(N,) what the decoder writes of each picture, or in answer to each question. Raises RecipeError where the
    tokenizer has no token to begin or to end with."""
    marks = marks_of(loaded.tokenizer)
    longest = min(writing.max_tokens or loaded.config.max_tokens - 1, loaded.config.max_tokens)
    generator = torch.Generator().manual_seed(seed)
    decoder = loaded.model.decoder
    assert decoder is not None
    texts: list[str] = []
    for start in range(0, len(samples), batch_size):
        with torch.inference_mode():
            image, text = _encoded(loaded, samples, questions, slice(start, start + batch_size))
            read = loaded.model.memory(image, text)
        memory = Memory(read.sequence_BTW, read.mask_BT)
        if writing.search == "greedy":
            written = greedy(decoder, memory, marks, longest)
        elif writing.search == "beam":
            written = beam(decoder, memory, marks, longest, width=writing.beams, length_penalty=writing.length_penalty)
        else:
            written = nucleus(decoder, memory, marks, longest, share=writing.nucleus, generator=generator)
        texts += [text_of(loaded.tokenizer, ids) for ids in written.token_ids_BT.tolist()]
    return texts


def marks_of(tokenizer: Tokenizer) -> Marks:
    """What text begins, ends and is padded with. Raises RecipeError where the tokenizer lacks one of them."""
    special = special_tokens(tokenizer)
    if special.first is None or special.last is None:
        raise RecipeError("model.decoder: the tokenizer has no token to begin and end text with; use one that has both")
    return Marks(special.first, special.last, special.pad)


def text_of(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """Written token ids as text, up to the closing token, special ones left out."""
    special = special_tokens(tokenizer)
    ids = list(takewhile(lambda number: number != special.last, ids))
    left_out = {special.pad, special.first, special.last, special.mask, special.unknown}
    kept = [number for number in ids if number not in left_out]
    if tokenizer.decoder is not None:
        return str(tokenizer.decode(kept)).strip()
    # A tokenizer that `train_tokenizer` made has none of its own.
    pieces = [str(tokenizer.id_to_token(number)) for number in kept]
    return str(decoders.WordPiece(prefix="##").decode(pieces)).strip()


@torch.inference_mode()
def token_losses(
    loaded: LoadedModel, samples: Sequence[Sample], captions: Sequence[str], batch_size: int
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """(N,) nats that each caption costs the decoder given its picture, the closing token's among them, and (N,) how
    many tokens that is."""
    losses, counts = [], []
    for start in range(0, len(samples), batch_size):
        rows = slice(start, start + batch_size)
        image, _ = _encoded(loaded, samples, None, rows)
        ids_BT, mask_BT = text_inputs(loaded, captions[rows])
        log_BTV = loaded.model.decode(loaded.model.memory(image), ids_BT[:, :-1]).double().log_softmax(-1)
        nats_BT = -log_BTV.gather(-1, ids_BT[:, 1:, None]).squeeze(-1)
        losses.append(nats_BT.masked_fill(mask_BT[:, 1:] == 0, 0.0).sum(1).cpu().numpy())
        counts.append(mask_BT[:, 1:].sum(1).cpu().numpy())
    if not losses:
        return np.zeros(0), np.zeros(0, np.int64)
    return np.concatenate(losses), np.concatenate(counts)


@torch.inference_mode()
def matching_scores(
    loaded: LoadedModel,
    samples: Sequence[Sample],
    captions: Sequence[str],
    pairs: NDArray[np.bool_],
    batch_size: int,
) -> Scores:
    """(Q, P): the log-odds that caption q and picture p belong together where `pairs` (Q, P) is True, else -inf."""
    images = _concatenated([_encoded(loaded, batch, None, slice(None))[0] for batch in batched(samples, batch_size)])
    texts = loaded.model.encode_text(*text_inputs(loaded, captions))
    scores = np.full(pairs.shape, -np.inf, dtype=np.float32)
    chosen = np.argwhere(pairs)
    for start in range(0, len(chosen), batch_size):
        text_rows, image_rows = (
            torch.from_numpy(column).to(device_of(loaded)) for column in chosen[start : start + batch_size].T
        )
        fused = loaded.model.fuse(_take(images, image_rows), _take(texts, text_rows))
        odds_B2 = loaded.model.matching_logits(fused).float()
        scores[tuple(chosen[start : start + batch_size].T)] = (odds_B2[:, 1] - odds_B2[:, 0]).cpu().numpy()
    return scores


def _encoded(
    loaded: LoadedModel, samples: Sequence[Sample], texts: Sequence[str] | None, rows: slice
) -> tuple[Encoded, Encoded | None]:
    image = loaded.model.encode_image(*image_inputs(loaded, samples[rows]))
    return image, None if texts is None else loaded.model.encode_text(*text_inputs(loaded, texts[rows]))


def _concatenated(parts: Sequence[Encoded]) -> Encoded:
    # Clips of a batch are as long as its longest: pad to the longest of all.
    longest = max(part.sequence_BTW.shape[1] for part in parts)

    def padded(rows_BT: Tensor) -> Tensor:
        more = (0, 0) * (rows_BT.dim() - 2) + (0, longest - rows_BT.shape[1])
        return torch.nn.functional.pad(rows_BT, more)

    masks = [part.mask_BT for part in parts if part.mask_BT is not None]
    return Encoded(
        torch.cat([padded(part.sequence_BTW) for part in parts]),
        torch.cat([part.pooled_BW for part in parts]),
        torch.cat([padded(mask) for mask in masks]) if masks else None,
    )


def _take(encoded: Encoded, rows: Tensor) -> Encoded:
    mask = encoded.mask_BT
    return Encoded(encoded.sequence_BTW[rows], encoded.pooled_BW[rows], None if mask is None else mask[rows])
