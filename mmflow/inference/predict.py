"""A packaged model applied to samples in batches: embeddings, classes, the odds of text and of pairs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mmflow.dataset.reader import Sample
from mmflow.imaging.decode import decode
from mmflow.learning.outputs import masking_tokens
from mmflow.loading.batches import normalise, pixels_tensor
from mmflow.loading.tokens import pad, special_tokens, tokenise
from mmflow.loading.transforms import centre_view, choose_frames
from mmflow.models.encoders import Encoded
from mmflow.models.package import LoadedModel

# Shapes: N samples, A captions, P pairs, C classes, B batch, F frames, S side of a picture in pixels, T tokens,
# V vocabulary, W the width of the shared space.

Floats = NDArray[np.float32]

PAIRS_AT_ONCE = 4096  # of a caption and 12 frames, 512 wide: a tenth of a gigabyte a layer


class Predictor:
    """A loaded model and how many rows it takes at a time. Results are numpy arrays on the CPU, in the rows' order."""

    def __init__(self, loaded: LoadedModel, batch_size: int) -> None:
        self.loaded = loaded
        self.model = loaded.model
        self.batch_size = batch_size

    @property
    def gives(self) -> frozenset[str]:
        """What the model can be asked for (`ModelConfig.gives`)."""
        return self.model.gives

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    def batches(self, num_rows: int) -> Iterator[slice]:
        """The rows, a batch at a time."""
        return (slice(start, start + self.batch_size) for start in range(0, num_rows, self.batch_size))

    def image_inputs(self, samples: Sequence[Sample]) -> tuple[Tensor, Tensor | None]:
        """The centre views as the model reads them: pictures (B, 3, S, S) and None. A model of clips reads frames
        evenly spread over each clip (B, F, 3, S, S) and which of them are real (B, F)."""
        config = self.loaded.config
        side, video = config.image_pixels, config.video
        bodies: list[list[bytes]] = [[sample.image] for sample in samples]
        if video is not None:
            clips = [(sample.image, *sample.frames) for sample in samples]
            bodies = [[clip[number] for number in choose_frames(len(clip), video.max_frames)] for clip in clips]
        views = [
            [centre_view(decode(body, sample.extension, side), side) for body in frames]
            for sample, frames in zip(samples, bodies, strict=True)
        ]
        flat = pixels_tensor([view for frames in views for view in frames]).to(self.device)
        pixels = normalise(flat, config.pixel_mean, config.pixel_std)
        if video is None:
            return pixels, None
        lengths = torch.tensor([len(frames) for frames in views], device=pixels.device)
        frame_mask = torch.arange(int(lengths.max()), device=pixels.device) < lengths[:, None]
        padded = pixels.new_zeros(*frame_mask.shape, *pixels.shape[1:])
        padded[frame_mask] = pixels
        return padded, frame_mask

    def text_inputs(self, texts: Sequence[str], max_tokens: int | None = None) -> tuple[Tensor, Tensor]:
        """Token ids (B, T) and their mask; longer texts are cut to `max_tokens`, or to the model's own length."""
        tokenizer = self.loaded.tokenizer
        rows = tokenise(tokenizer, texts, max_tokens or self.loaded.config.max_tokens)
        ids, mask = pad(rows, special_tokens(tokenizer).pad)
        return torch.from_numpy(ids).to(self.device), torch.from_numpy(mask).to(self.device)

    def lengths(self, texts: Sequence[str]) -> list[int]:
        """The number of tokens that the model reads of each text."""
        return [len(ids) for ids in tokenise(self.loaded.tokenizer, texts, self.loaded.config.max_tokens)]

    def encode(self, samples: Sequence[Sample], texts: Sequence[str] | None = None) -> tuple[Encoded, Encoded | None]:
        """One batch of pictures or clips through their encoder, and of texts where there are any."""
        image = self.model.encode_image(*self.image_inputs(samples))
        return image, None if texts is None else self.model.encode_text(*self.text_inputs(texts))

    @torch.inference_mode()
    def embed_images(self, samples: Sequence[Sample]) -> Floats:
        """(N, W) of unit length."""
        rows = [self.model.embed_image(self.encode(samples[rows])[0]) for rows in self.batches(len(samples))]
        return self._stacked(rows)

    @torch.inference_mode()
    def embed_captions(self, captions: Sequence[str], max_tokens: int | None = None) -> Floats:
        """(A, W) of unit length; captions are cut as in `text_inputs`."""
        rows = [
            self.model.embed_text(self.model.encode_text(*self.text_inputs(captions[rows], max_tokens)))
            for rows in self.batches(len(captions))
        ]
        return self._stacked(rows)

    def _stacked(self, rows: Sequence[Tensor]) -> Floats:
        empty = np.zeros((0, self.loaded.config.embedding_width or 0), np.float32)
        return np.concatenate([row.cpu().numpy() for row in rows]) if rows else empty

    def embed_classes(self, prompts: Mapping[str, Sequence[str]]) -> Floats:
        """(C, W) of unit length: the mean embedding of each class's prompts, in the order of `prompts`."""
        means = np.stack([self.embed_captions(texts).mean(axis=0) for texts in prompts.values()])
        unit: Floats = means / np.linalg.norm(means, axis=1, keepdims=True)
        return unit

    @torch.inference_mode()
    def class_scores(self, samples: Sequence[Sample], texts: Sequence[str] | None) -> Floats:
        """(N, C) logits of the package's classes or answers for each picture, read with its text where there is one."""
        scores = [np.zeros((0, len(self.loaded.classes)), np.float32)]
        for rows in self.batches(len(samples)):
            fused = self.model.fuse(*self.encode(samples[rows], texts and texts[rows]))
            scores.append(self.model.class_logits(fused).float().cpu().numpy())
        return np.concatenate(scores)

    @torch.inference_mode()
    def token_losses(
        self, samples: Sequence[Sample], captions: Sequence[str]
    ) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """(N,) nats that each caption costs the decoder given its picture, the closing token's included, and (N,) how
        many tokens that is."""
        losses, counts = [np.zeros(0)], [np.zeros(0, np.int64)]
        for rows in self.batches(len(samples)):
            image, _ = self.encode(samples[rows])
            ids_BT, mask_BT = self.text_inputs(captions[rows])
            log_BTV = self.model.decode(self.model.memory(image), ids_BT[:, :-1]).double().log_softmax(-1)
            nats_BT = -log_BTV.gather(-1, ids_BT[:, 1:, None]).squeeze(-1)
            losses.append(nats_BT.masked_fill(mask_BT[:, 1:] == 0, 0.0).sum(1).cpu().numpy())
            counts.append(mask_BT[:, 1:].sum(1).cpu().numpy())
        return np.concatenate(losses), np.concatenate(counts)

    @torch.inference_mode()
    def guess_words(
        self, samples: Sequence[Sample], captions: Sequence[str]
    ) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        """Hide each word piece of each caption by itself and have the head `masked_language` guess it.

        Returns, over the word pieces of all captions in their order, the nats that each costs and whether it was the
        likeliest. Caption i is read with the picture of sample i.
        """
        special = masking_tokens(self.loaded.tokenizer)
        assert special.mask is not None, "a model with this head was trained with a tokenizer that has a mask token"
        losses, right = [np.zeros(0)], [np.zeros(0, dtype=np.bool_)]
        for rows in self.batches(len(captions)):
            image, _ = self.encode(samples[rows])
            ids_BT, mask_BT = self.text_inputs(captions[rows])
            is_word_BT = mask_BT.bool() & ~torch.isin(ids_BT, ids_BT.new_tensor(special.ids))
            for chosen_H2 in torch.split(is_word_BT.nonzero(), self.batch_size):  # H hidden words
                caption_H, place_H = chosen_H2.unbind(1)
                row_H = torch.arange(len(chosen_H2), device=ids_BT.device)
                word_H, hidden_HT = ids_BT[caption_H, place_H], ids_BT[caption_H]
                hidden_HT[row_H, place_H] = special.mask
                text = self.model.encode_text(hidden_HT, mask_BT[caption_H])
                fused = self.model.fuse(_take(image, caption_H), text)
                assert fused.text_BTW is not None, "`build` gives the head what it reads"
                at_word = fused._replace(text_BTW=fused.text_BTW[row_H, place_H][None])
                log_HV = self.model.masked_language_logits(at_word)[0].double().log_softmax(-1)
                losses.append(-log_HV[row_H, word_H].cpu().numpy())
                right.append((log_HV.argmax(-1) == word_H).cpu().numpy())
        return np.concatenate(losses), np.concatenate(right)

    @torch.inference_mode()
    def match(self, samples: Sequence[Sample], captions: Sequence[str], pairs_P2: NDArray[np.int64]) -> Floats:
        """(P,) log-odds that the caption and the picture of each pair (index into `captions`, index into `samples`)
        belong together.

        Only one batch of pictures and one of captions is held encoded: the sequences of a whole split would be
        gigabytes.
        """
        scores_P = np.zeros(len(pairs_P2), dtype=np.float32)
        for rows in self.batches(len(samples)):
            here = np.flatnonzero((pairs_P2[:, 1] >= rows.start) & (pairs_P2[:, 1] < rows.stop))
            if not len(here):
                continue
            images, _ = self.encode(samples[rows])
            here = here[np.argsort(pairs_P2[here, 0], kind="stable")]  # pairs of one caption stand together
            for batch in self.batches(len(here)):
                chosen = here[batch]
                caption_rows, text_rows = np.unique(pairs_P2[chosen, 0], return_inverse=True)
                text = self.model.encode_text(*self.text_inputs([captions[row] for row in caption_rows]))
                image_rows = torch.from_numpy(pairs_P2[chosen, 1] - rows.start).to(self.device)
                fused = self.model.fuse(
                    _take(images, image_rows), _take(text, torch.from_numpy(text_rows).to(self.device))
                )
                odds_B2 = self.model.matching_logits(fused).float()
                scores_P[chosen] = (odds_B2[:, 1] - odds_B2[:, 0]).cpu().numpy()
        return scores_P

    @torch.inference_mode()
    def score_pairs(self, samples: Sequence[Sample], captions: Sequence[str], max_tokens: int | None = None) -> Floats:
        """(A, N): the score of every caption with every clip, from a model that compares pair by pair."""
        texts_AW = torch.cat(
            [
                self.model.encode_text(*self.text_inputs(captions[rows], max_tokens)).pooled_BW
                for rows in self.batches(len(captions))
            ]
        )
        columns = []
        for rows in self.batches(len(samples)):
            clips, _ = self.encode(samples[rows])
            size = max(1, PAIRS_AT_ONCE // len(samples[rows]))
            parts = [
                self.model.score_pairs(texts_AW[start : start + size], clips) for start in range(0, len(texts_AW), size)
            ]
            columns.append(torch.cat(parts).float().cpu().numpy())
        return np.concatenate(columns, axis=1)


def _take(encoded: Encoded, rows_B: Tensor) -> Encoded:
    mask = encoded.mask_BT
    return Encoded(encoded.sequence_BTW[rows_B], encoded.pooled_BW[rows_B], None if mask is None else mask[rows_B])
