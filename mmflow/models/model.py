"""The composed model: encoders, the space they meet in, a fusion, heads and a decoder, as the recipe names them.

A dual encoder (CLIP, arXiv 2103.00020) is the smallest; with a fusion on top it aligns before it fuses (ALBEF, arXiv
2107.07651). Each part is a module that is called through its forward, so that ZeRO-3 gathers its parameters in time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mmflow.core.errors import MisuseError
from mmflow.models.config import ModelConfig
from mmflow.models.decoder import Cache, Decoder
from mmflow.models.encoders import Encoded
from mmflow.models.fused import Fused
from mmflow.models.fusion import READS, Fusion, build_fusion
from mmflow.models.heads import build_head
from mmflow.models.scale import LogitScale, Scale
from mmflow.models.tight import TightSimilarity
from mmflow.models.towers import ImageTower, TextTower, build_image_encoder, build_text_encoder

# Shapes: B batch, A captions, T tokens, R regions, W width, H and S height and width in pixels, E the width of the
# shared space.


class Model(nn.Module):
    """What is trained. `image` is always there; every other part is None or empty where the recipe leaves it out."""

    def __init__(
        self,
        image: ImageTower,
        text: TextTower | None,
        *,
        embedding_width: int | None,
        temperature: float,
        bias: float | None,
        gives: frozenset[str],
    ) -> None:
        super().__init__()
        self.gives = gives  # as ModelConfig names it
        self.image = image
        self.text = text
        self.embedding_width = embedding_width
        self.image_projection: nn.Linear | None = None
        self.text_projection: nn.Linear | None = None
        self.scale: LogitScale | None = None
        if text is not None and embedding_width is not None and "embeddings" in gives:
            self.image_projection = nn.Linear(image.width, embedding_width, bias=False)
            self.text_projection = nn.Linear(text.width, embedding_width, bias=False)
            self.scale = LogitScale(temperature, bias)
        self.similarity: TightSimilarity | None = None
        self.fusion: Fusion | None = None
        self.heads = nn.ModuleDict()
        self.decoder: Decoder | None = None
        self.register_load_state_dict_pre_hook(_accept_older_names)  # type: ignore[no-untyped-call]

    def encode_image(self, pixels: Tensor, frame_mask_BF: Tensor | None = None, *, attentions: bool = False) -> Encoded:
        """Normalised pictures (B, 3, H, S), or clips (B, F, 3, H, S) with the mask of their frames (B, F)."""
        encoded: Encoded = self.image(pixels, frame_mask_BF, attentions=attentions)
        return encoded

    def encode_text(self, token_ids_BT: Tensor, token_mask_BT: Tensor, *, attentions: bool = False) -> Encoded:
        """Token ids and their mask, 1 or True where real."""
        encoded: Encoded = _there(self.text, "text encoder")(token_ids_BT, token_mask_BT, attentions=attentions)
        return encoded

    def embed_image(self, image: Encoded) -> Tensor:
        """(B, E) of unit length, fp32."""
        return _unit(_there(self.image_projection, "shared space")(image.pooled_BW))

    def embed_text(self, text: Encoded) -> Tensor:
        """(B, E) of unit length, fp32."""
        return _unit(_there(self.text_projection, "shared space")(text.pooled_BW))

    def score_pairs(self, captions_AW: Tensor, clips: Encoded) -> Tensor:
        """(A, B): the score of each of some captions' pooled vectors with each clip, a forward for each pair."""
        scores_AB: Tensor = _there(self.similarity, "tight similarity")(captions_AW, clips.sequence_BTW, clips.mask_BT)
        return scores_AB

    def fuse(self, image: Encoded, text: Encoded | None, *, attentions: bool = False) -> Fused:
        """Image and text after they read each other; without a fusion each side as its encoder left it, pooled the
        image's. Raises MisuseError where there is a fusion and no text."""
        if self.fusion is None:
            return Fused(None if text is None else text.sequence_BTW, image.sequence_BTW, image.pooled_BW, None)
        if text is None:
            raise MisuseError("model.fusion: it reads text with each picture, and none is given; give captions")
        fused: Fused = self.fusion(image, text, attentions=attentions)
        return fused

    def matching_logits(self, fused: Fused) -> Tensor:
        """(B, 2): not a pair, a pair."""
        return self._head("matching", fused.pooled_BW)

    def masked_language_logits(self, fused: Fused) -> Tensor:
        """(B, T, vocabulary)."""
        return self._head("masked_language", fused.text_BTW)

    def masked_image_pixels(self, fused: Fused) -> Tensor:
        """(B, patches, 3 · side²), as `heads.patches` cuts pictures with the `side` of `heads["masked_image"]`."""
        return self._head("masked_image", fused.image_BRW)

    def class_logits(self, fused: Fused) -> Tensor:
        """(B, classes)."""
        return self._head("classes", fused.pooled_BW)

    def _head(self, name: str, read: Tensor | None) -> Tensor:
        output: Tensor = _there(dict(self.heads).get(name), f"head {name}")(read)
        return output

    def memory(self, image: Encoded, text: Encoded | None = None) -> Encoded:
        """What the decoder reads: the picture, or the tokens of a question after they read the picture. Raises
        MisuseError for a question that the decoder does not read, and where it lacks the one that it does."""
        asks = "decoded from the question" in self.gives
        if asks == (text is None):
            reads, given = ("fused", "there is no question") if asks else ("image", "there is a question")
            raise MisuseError(f"model.decoder.memory: {reads}, and {given}; examine a model in what it was trained for")
        if text is None:
            return image
        sequence_BTW = self.fuse(image, text).text_BTW
        assert sequence_BTW is not None  # `build` has seen to it
        return text._replace(sequence_BTW=sequence_BTW)

    def decode(self, memory: Encoded, token_ids_BT: Tensor, cache: Cache | None = None) -> Tensor:
        """Logits (B, T, vocabulary) of the token after each of `token_ids_BT`, which are padded on the right only."""
        decoder = _there(self.decoder, "decoder")
        logits: Tensor = decoder(token_ids_BT, memory.sequence_BTW, memory.mask_BT, cache)
        return logits

    def forward(self, pixels: Tensor, token_ids_BT: Tensor, token_mask_BT: Tensor) -> dict[str, Tensor]:
        """The shared space: `image_embedding` and `text_embedding` (B, E), `logit_scale` (1,) and, where there is one,
        `logit_bias` (1,)."""
        outputs = {
            "image_embedding": self.embed_image(self.encode_image(pixels)),
            "text_embedding": self.embed_text(self.encode_text(token_ids_BT, token_mask_BT)),
        }
        scale: Scale = _there(self.scale, "shared space")()
        return outputs | {name: value for name, value in scale._asdict().items() if value is not None}


def _there(part: nn.Module | None, name: str) -> nn.Module:
    if part is None:
        raise MisuseError(f"the model has no {name}; name it in the recipe's model section and train one that has it")
    return part


def _unit(rows_BE: Tensor) -> Tensor:
    # fp32 from here on, losses included: in bf16 a cosine has three digits, and the logit scale multiplies its error.
    return nn.functional.normalize(rows_BE.float(), dim=-1)


def _accept_older_names(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    accept_older_names(state, prefix)


def accept_older_names(state: dict[str, Any], prefix: str = "") -> None:
    """Rename what packages call otherwise that are from before the scale was a module of its own."""
    if f"{prefix}logit_scale" in state:
        state[f"{prefix}scale.logit_scale"] = state.pop(f"{prefix}logit_scale")


def build(key: str, config: ModelConfig, vocabulary_size: int, seed: int, num_classes: int = 0) -> Model:
    """A model with fresh weights, the same for the same seed. `key` is the recipe's key, for errors.

    `vocabulary_size` is the tokenizer's, `num_classes` that of the labels or answers of the head `classes`. Raises
    RecipeError naming the key.
    """
    # Encoders and projections come first and in this order: a dual encoder's weights then do not depend on what else
    # the model is made of.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        image = build_image_encoder(f"{key}.image", config.image, config.image_pixels, config.video)
        text = None
        if config.text is not None:
            text = build_text_encoder(f"{key}.text", config.text, vocabulary_size, config.max_tokens)
        model = Model(
            image,
            text,
            embedding_width=config.embedding_width,
            temperature=config.temperature,
            bias=config.bias,
            gives=config.gives,
        )
        if config.tight and config.video is not None and text is not None:
            assert config.embedding_width is not None  # `ModelConfig` has seen to these
            assert config.video.layers is not None
            assert config.video.heads is not None
            model.similarity = TightSimilarity(
                f"{key}.video",
                config.embedding_width,
                image_width=image.width,
                text_width=text.width,
                layers=config.video.layers,
                heads=config.video.heads,
                max_frames=config.video.max_frames,
            )
        decodes_fused = "decoded from the question" in model.gives
        if config.fusion is not None and text is not None:
            reads = {READS[head] for head in config.heads} | ({"text"} if decodes_fused else set())
            model.fusion = build_fusion(f"{key}.fusion", config.fusion, image.width, text.width, frozenset(reads))
        for name in config.heads:
            model.heads[name] = build_head(f"{key}.heads", name, config, image, text, vocabulary_size, num_classes)
        if config.decoder is not None:
            width = config.fusion.width if config.fusion and decodes_fused else image.width
            model.decoder = Decoder(
                config.decoder, memory_width=width, vocabulary_size=vocabulary_size, max_tokens=config.max_tokens
            )
        return model
