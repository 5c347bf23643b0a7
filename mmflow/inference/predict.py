"""What a packaged model says of held-out rows: classes, text of its own, the odds of given text, which pairs belong."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import takewhile

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders

from mmflow.dataset.reader import Sample
from mmflow.inference.config import WritingConfig
from mmflow.inference.embed import batched, image_inputs, text_inputs
from mmflow.loading.tokens import special_tokens
from mmflow.models.encoders import Encoded
from mmflow.models.generate import Memory, beam, greedy, nucleus
from mmflow.models.marks import marks_of
from mmflow.models.package import LoadedModel

# Shapes: N rows or pairs, C classes, B batch, T tokens, V vocabulary.

Scores = NDArray[np.float32]

_HYPHEN = re.compile(r"(?<=\w) - (?=\w)")
PAIRS_AT_ONCE = 4096  # of a caption and 12 frames, 512 wide: a tenth of a gigabyte a layer


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
    """(N,) what the decoder writes of each picture, or in answer to each question. Raises RecipeError as
    `marks_of`."""
    marks = marks_of("model", loaded.tokenizer)
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
    # It sets every mark apart and loses where spaces were: a hyphen between words is taken to join them.
    return _HYPHEN.sub("-", str(decoders.WordPiece(prefix="##").decode(pieces)).strip())


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
    pairs_N2: NDArray[np.int64],
    batch_size: int,
) -> Scores:
    """(N,): the log-odds that the caption and the picture of each pair, places in `captions` and in `samples`, belong
    together.

    A batch of pictures is encoded at a time, with the captions of a batch of its pairs, so that memory holds no more
    sequences than that: those of a whole split would be gigabytes.
    """
    scores_N = np.zeros(len(pairs_N2), dtype=np.float32)
    for first in range(0, len(samples), batch_size):
        here = np.flatnonzero((pairs_N2[:, 1] >= first) & (pairs_N2[:, 1] < first + batch_size))
        if not len(here):
            continue
        images, _ = _encoded(loaded, samples, None, slice(first, first + batch_size))
        here = here[np.argsort(pairs_N2[here, 0], kind="stable")]  # pairs of one caption stand together
        for start in range(0, len(here), batch_size):
            chosen = here[start : start + batch_size]
            texts, text_rows = np.unique(pairs_N2[chosen, 0], return_inverse=True)
            text = loaded.model.encode_text(*text_inputs(loaded, [captions[place] for place in texts]))
            fused = loaded.model.fuse(_take(images, pairs_N2[chosen, 1] - first), _take(text, text_rows))
            odds_B2 = loaded.model.matching_logits(fused).float()
            scores_N[chosen] = (odds_B2[:, 1] - odds_B2[:, 0]).cpu().numpy()
    return scores_N


@torch.inference_mode()
def pair_scores(
    loaded: LoadedModel,
    samples: Sequence[Sample],
    captions: Sequence[str],
    batch_size: int,
    max_tokens: int | None = None,
) -> Scores:
    """(captions, samples): what a model that compares pair by pair gives each caption with each clip."""
    texts_AW = torch.cat(
        [
            loaded.model.encode_text(*text_inputs(loaded, batch, max_tokens)).pooled_BW
            for batch in batched(captions, batch_size)
        ]
    )
    columns = []
    for batch in batched(samples, batch_size):
        clips = loaded.model.encode_image(*image_inputs(loaded, batch))
        size = max(1, PAIRS_AT_ONCE // len(batch))
        parts = [
            loaded.model.score_pairs(texts_AW[start : start + size], clips) for start in range(0, len(texts_AW), size)
        ]
        columns.append(torch.cat(parts).float().cpu().numpy())
    return np.concatenate(columns, axis=1)


def _encoded(
    loaded: LoadedModel, samples: Sequence[Sample], texts: Sequence[str] | None, rows: slice
) -> tuple[Encoded, Encoded | None]:
    image = loaded.model.encode_image(*image_inputs(loaded, samples[rows]))
    return image, None if texts is None else loaded.model.encode_text(*text_inputs(loaded, texts[rows]))


def _take(encoded: Encoded, rows: NDArray[np.integer]) -> Encoded:
    rows_B, mask = torch.from_numpy(rows).to(encoded.sequence_BTW.device), encoded.mask_BT
    return Encoded(encoded.sequence_BTW[rows_B], encoded.pooled_BW[rows_B], None if mask is None else mask[rows_B])
