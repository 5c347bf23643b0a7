"""Words of captions hidden one at a time and guessed by the head `masked_language`, for evaluation (the
pseudo-perplexity of arXiv 1910.14659)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pyarrow as pa

from mmflow.inference.result import Columns, Gives, Result, column, lists_of
from mmflow.inference.tasks.embed import captions_in

if TYPE_CHECKING:
    from mmflow.inference.predict import Batch
    from mmflow.models.package import LoadedModel


class GuessWords(Result):
    """Each word piece of each caption is hidden by itself and guessed, with the caption's own picture and with that of
    the batch's next row: what accuracy drops by, the model had read off the picture."""

    task: ClassVar[str] = "guess_words"
    needs: ClassVar[tuple[Gives, ...]] = (Gives({"masked_language_logits"}),)
    remedy: ClassVar[str] = "the head masked_language"
    language: str

    def fields(self, loaded: LoadedModel) -> list[pa.Field]:
        """Lists of the same length, an item for each word piece of all captions of a row."""
        return [
            column("word_nats", pa.list_(pa.float32()), "nats that each hidden word piece costs"),
            column("word_right", pa.list_(pa.bool_()), "whether it was the likeliest"),
            column(
                "word_right_by_other", pa.list_(pa.bool_()), "whether it was, with another row's picture; null alone"
            ),
        ]

    def run(self, batch: Batch, started: Any) -> Columns:
        """All captions of the batch, a batch of them at a time."""
        own = [captions_in(sample.captions, self.language) for sample in batch.samples]
        texts = [text for theirs in own for text in theirs]
        rows = np.repeat(np.arange(len(own)), list(map(len, own)))
        nats, right, owners = self._guess(batch, rows, texts, rows)
        by_other = pa.nulls(len(right), pa.bool_())
        if len(own) > 1:
            _, right_by_other, _ = self._guess(batch, (rows + 1) % len(own), texts, rows)
            by_other = pa.array(right_by_other)
        lengths = np.bincount(owners, minlength=len(own)).tolist()
        return {
            "word_nats": lists_of(pa.array(nats, pa.float32()), lengths),
            "word_right": lists_of(pa.array(right), lengths),
            "word_right_by_other": lists_of(by_other, lengths),
        }

    def _guess(
        self, batch: Batch, pictures: np.ndarray[Any, Any], texts: list[str], rows: np.ndarray[Any, Any]
    ) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """Over all word pieces: nats, whether right, and the row of each."""
        parts, size = [(np.zeros(0), np.zeros(0, np.bool_), np.zeros(0, np.int64))], batch.predictor.batch_size
        for first in range(0, len(texts), size):
            some = slice(first, first + size)
            nats, right, captions = self._hide_each(batch, pictures[some], texts[some])
            parts.append((nats, right, rows[some][captions]))
        nats, right, owners = (np.concatenate(column) for column in zip(*parts, strict=True))
        return nats, right, owners

    def _hide_each(
        self, batch: Batch, pictures: np.ndarray[Any, Any], texts: list[str]
    ) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """Of a batch of captions: nats, whether right, and the caption of each word piece."""
        import torch

        from mmflow.inference.predict import take
        from mmflow.learning.outputs import masking_tokens

        predictor = batch.predictor
        special = masking_tokens(predictor.loaded.tokenizer)
        assert special.mask is not None, "a model with this head was trained with a tokenizer that has a mask token"
        images = take(batch.image(), torch.from_numpy(pictures).to(predictor.device))
        ids_BT, mask_BT = predictor.text_inputs(texts)
        is_word_BT = mask_BT.bool() & ~torch.isin(ids_BT, ids_BT.new_tensor(special.ids))
        nats, right = list[torch.Tensor](), list[torch.Tensor]()
        words_N2 = is_word_BT.nonzero()
        for chosen_H2 in torch.split(words_N2, predictor.batch_size):  # H hidden words
            caption_H, place_H = chosen_H2.unbind(1)
            row_H = torch.arange(len(chosen_H2), device=ids_BT.device)
            word_H, hidden_HT = ids_BT[caption_H, place_H], ids_BT[caption_H]
            hidden_HT[row_H, place_H] = special.mask
            text = predictor.model.encode_text(hidden_HT, mask_BT[caption_H])
            fused = predictor.model.fuse(take(images, caption_H), text)
            assert fused.text_BTW is not None, "`build` gives the head what it reads"
            at_word = fused._replace(text_BTW=fused.text_BTW[row_H, place_H][None])
            log_HV = predictor.model.masked_language_logits(at_word)[0].double().log_softmax(-1)
            nats.append(-log_HV[row_H, word_H])
            right.append(log_HV.argmax(-1) == word_H)
        captions = words_N2[:, 0].cpu().numpy()
        if not nats:
            return np.zeros(0), np.zeros(0, np.bool_), captions
        return torch.cat(nats).cpu().numpy(), torch.cat(right).cpu().numpy(), captions
