"""Task `perplexity`: how much the decoder is surprised by the sample's own captions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pyarrow as pa

from mmflow.inference.result import Columns, Gives, Result, column, lists_of
from mmflow.inference.tasks.embed import captions_in

if TYPE_CHECKING:
    from mmflow.inference.predict import Batch
    from mmflow.models.package import LoadedModel


class Perplexity(Result):
    """How much the decoder is surprised by the sample's own captions, given the picture."""

    task: ClassVar[str] = "perplexity"
    needs: ClassVar[tuple[Gives, ...]] = (Gives({"decoded from the image"}),)
    remedy: ClassVar[str] = "a decoder with memory: image"
    language: str = "en"
    """Of the captions."""

    def fields(self, loaded: LoadedModel) -> list[pa.Field]:
        """Lists of the same length, an item for each caption in the language."""
        nats = "nats that each caption in the language costs the decoder, the closing token's included"
        return [
            column("caption_nats", pa.list_(pa.float32()), nats),
            column("caption_tokens", pa.list_(pa.int32()), "how many tokens that is; perplexity is exp(nats / tokens)"),
        ]

    def run(self, batch: Batch, started: Any) -> Columns:
        """All captions of the batch, a batch of them at a time."""
        import torch

        from mmflow.inference.predict import take

        predictor = batch.predictor
        own = [captions_in(sample.captions, self.language) for sample in batch.samples]
        texts, lengths = [text for theirs in own for text in theirs], list(map(len, own))
        rows = torch.from_numpy(np.repeat(np.arange(len(own)), lengths)).to(predictor.device)
        nats, counts = [np.zeros(0)], [np.zeros(0, np.int64)]
        for first in range(0, len(texts), predictor.batch_size):
            some = slice(first, first + predictor.batch_size)
            ids_BT, mask_BT = predictor.text_inputs(texts[some])
            memory = predictor.model.memory(take(batch.image(), rows[some]))
            log_BTV = predictor.model.decode(memory, ids_BT[:, :-1]).double().log_softmax(-1)
            nats_BT = -log_BTV.gather(-1, ids_BT[:, 1:, None]).squeeze(-1)
            nats.append(nats_BT.masked_fill(mask_BT[:, 1:] == 0, 0.0).sum(1).cpu().numpy())
            counts.append(mask_BT[:, 1:].sum(1).cpu().numpy())
        return {
            "caption_nats": lists_of(pa.array(np.concatenate(nats), pa.float32()), lengths),
            "caption_tokens": lists_of(pa.array(np.concatenate(counts), pa.int32()), lengths),
        }
