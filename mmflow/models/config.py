"""Settings of a model: its encoders, fusion, heads and decoder.

All in one file that imports no torch, so that a recipe is read and checked in a fraction of a second.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, NamedTuple

from pydantic import AfterValidator, Field, model_validator

from mmflow.core.config import OPERATIONAL, Config, Uri, absolute

IN_PACKAGE = "package:"  # prefix of a path in an installed Python package
Checkpoint = Annotated[str, AfterValidator(lambda path: path if path.startswith(IN_PACKAGE) else absolute(path))]


class PositionsConfig(Config):
    """Stretch the learned positions of a text encoder so that it reads longer text (Long-CLIP, arXiv 2403.15378)."""

    stretch: int = Field(4, ge=2)
    """Each position after the kept ones becomes this many, interpolated between its neighbours."""
    keep: int = Field(20, ge=0)
    """The first positions stay as they are: short captions have trained them well."""


class WindowsConfig(Config):
    """Read a document window by window: the encoder reads each, a small transformer reads the windows' vectors."""

    tokens: int = Field(128, ge=8)
    """Tokens in a window, including the opening token that each window starts with."""
    layers: int = Field(2, ge=1)
    """Layers of the transformer over windows."""
    heads: int = Field(4, ge=1)
    """Its attention heads; must divide the encoder's width."""


class VideoConfig(Config):
    """Clips of frames (CLIP4Clip, arXiv 2104.08860): the image encoder reads each frame, this combines them."""

    kind: Literal["mean", "sequential", "tight"] = "mean"
    """mean: a clip is the mean of its frames. sequential: the same, after a transformer has read them in order. tight:
    a transformer reads a caption and a clip's frames together and scores the pair, without embeddings. That is one
    forward pass a pair: contrastive needs B² of them a batch, retrieval one for every caption and clip."""
    max_frames: int = Field(12, ge=1)
    """Most frames in a clip."""
    layers: int | None = Field(None, ge=1)
    """Layers of the transformer (4 in the paper); leave it out for mean."""
    heads: int | None = Field(None, ge=1)
    """Its attention heads; must divide the image encoder's width, or for tight the embedding_width."""

    @model_validator(mode="after")
    def _check_layers(self) -> VideoConfig:
        for name in ("layers", "heads"):
            is_set = getattr(self, name) is not None
            if self.kind != "mean" and not is_set:
                raise ValueError(f"{name}: {self.kind} needs it; give a number")
            if self.kind == "mean" and is_set:
                raise ValueError(f"{name}: mean has none; leave it out, or choose sequential or tight")
        return self


class EncoderConfig(Config):
    """Settings of image and text encoders: a model of `transformers`, with fresh weights or from a checkpoint."""

    type: str | None = None
    """`model_type` in transformers: resnet, vit, convnext, clip_vision_model, bert, roberta, modernbert, …"""
    checkpoint: Annotated[Checkpoint | None, OPERATIONAL] = None
    """Instead of `type`: a local directory that `save_pretrained` wrote, with safetensors weights, or
    `package:NAME/PATH` for one in an installed Python package. A CLIP, SigLIP or VisionTextDualEncoder gives its
    tower."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Fields of that type's configuration; a field that the type does not have is an error."""
    frozen_layers: int | Literal["all"] = 0
    """Do not train the embeddings and this many layers after them; `all` freezes the whole encoder."""
    layer_decay: float = Field(1.0, gt=0, le=1)
    """Each layer's learning rate is this many times that of the layer above."""
    activation_checkpointing: bool = False
    """Recompute the layers in the backward pass instead of keeping their outputs: less memory, more time."""

    @model_validator(mode="after")
    def _check_origin(self) -> EncoderConfig:
        if (self.type is None) == (self.checkpoint is None):
            raise ValueError("give either type, for fresh weights, or checkpoint, a directory with trained ones")
        if self.frozen_layers != "all" and self.frozen_layers < 0:
            raise ValueError(f"frozen_layers is {self.frozen_layers}; give 0, a number of layers, or all")
        return self


class ImageEncoderConfig(EncoderConfig):
    """The image encoder."""

    pooling: Literal["pooler", "mean", "first", "attention"] = "mean"
    """How regions become one vector: the encoder's pooler, their mean, the first (class token), or a learned query."""
    patch_dropout: float = Field(0.0, ge=0, lt=1)
    """Share of a ViT's patches that a training step leaves out (FLIP, arXiv 2212.00794); evaluation reads all."""


class TextEncoderConfig(EncoderConfig):
    """The encoder of captions, questions and documents."""

    pooling: Literal["pooler", "mean", "first", "last", "eos", "attention"] = "mean"
    """How tokens become one vector: as for images, or the last token, or the closing one (eos, as in CLIP)."""
    positions: PositionsConfig | None = None
    """Stretch the learned positions, to read more tokens than the encoder was made for."""
    windows: WindowsConfig | None = None
    """Read documents of thousands of tokens window by window."""


class FusionConfig(Config):
    """How text and image read each other before the heads read them."""

    kind: Literal["concatenation", "gated", "cross_attention", "both_directions", "co_attention", "single_stream"]
    """concatenation and gated (GMU, arXiv 1702.01992) mix each token with the other side's pooled vector;
    cross_attention: text reads image (ALBEF, arXiv 2107.07651); both_directions: each reads the other (ViLBERT's
    co-attentional layer, arXiv 1908.02265); co_attention: that, and each reads itself too (LXMERT's cross-modality
    layer, arXiv 1908.07490); single_stream: one transformer over both (UNITER, arXiv 1909.11740; VisualBERT, arXiv
    1908.03557)."""
    width: int = Field(256, ge=8)
    """Width of the fused vectors."""
    layers: int | None = Field(None, ge=1)
    """Number of layers; leave it out for concatenation and gated."""
    heads: int | None = Field(None, ge=1)
    """Attention heads of each layer; must divide the width. Leave it out for concatenation and gated."""
    dropout: float = Field(0.1, ge=0, lt=1)
    """Share of activations and attention weights dropped in training."""

    @model_validator(mode="after")
    def _check_layers(self) -> FusionConfig:
        attends = self.kind not in ("concatenation", "gated")
        for name in ("layers", "heads"):
            is_set = getattr(self, name) is not None
            if attends and not is_set:
                raise ValueError(f"{self.kind} needs {name}; give a number")
            if not attends and is_set:
                raise ValueError(f"{self.kind} has no {name}; leave it out")
        _check_heads(self.width, self.heads or 1)
        return self


class DecoderConfig(Config):
    """A causal text decoder that reads the image by cross-attention and writes captions or answers."""

    memory: Literal["image", "fused"] = "image"
    """What it reads: the image encoder's regions, or a question's tokens after they have read the image."""
    width: int = Field(256, ge=8)
    """Width of its vectors."""
    layers: int = Field(4, ge=1)
    """Each attends to the text so far, then to the memory."""
    heads: int = Field(4, ge=1)
    """Attention heads of each layer; must divide the width."""
    dropout: float = Field(0.1, ge=0, lt=1)
    """Share of activations and attention weights dropped in training."""

    @model_validator(mode="after")
    def _check_width(self) -> DecoderConfig:
        _check_heads(self.width, self.heads)
        return self


def _check_heads(width: int, heads: int) -> None:
    if width % heads:
        raise ValueError(f"width {width} is not a multiple of heads {heads}")


class PackageConfig(Config):
    """A model package: by its URI, or as a version of a registered model."""

    package: Annotated[Uri | None, OPERATIONAL] = None
    """URI of the model package."""
    model: Annotated[str | None, OPERATIONAL] = None
    """Name of a registered model, instead of `package`."""
    version: Annotated[int | None, OPERATIONAL] = Field(None, ge=1)
    """Its version. Always a number and never an alias: tomorrow's champion is another model."""

    @model_validator(mode="after")
    def _check_origin(self) -> PackageConfig:
        if (self.package is None) == (self.model is None) or (self.model is None) != (self.version is None):
            raise ValueError("give either package, a model package's URI, or model and version of a registered one")
        return self


class LoraConfig(Config):
    """Low-rank adapters (LoRA, arXiv 2106.09685) beside the frozen linear layers of encoders, fusion and decoder.
    Parts with fresh weights are trained in full."""

    rank: int = Field(8, ge=1)
    """Rows of the two matrices whose product is added to a layer's."""
    alpha: float = Field(16.0, gt=0)
    """The product is multiplied by this and divided by the rank."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Share of an adapter's input that is dropped in training."""
    targets: list[str] = Field(default_factory=list)
    """Layers that get adapters, by the ends of their names, such as `query` or `attention.self.query`; empty: all
    linear ones."""
    trained: list[str] | None = None
    """What is trained in full, by the start of names, such as `heads.classes`; null: projections, scale, heads."""


class HeadIO(NamedTuple):
    """What a head gives, as objectives name it, and which of the fused vectors it reads."""

    gives: str
    reads: Literal["pooled", "text", "image"]


Head = Literal["matching", "masked_language", "masked_image", "classes"]
HEADS: dict[Head, HeadIO] = {
    "matching": HeadIO("matching_logits", "pooled"),
    "masked_language": HeadIO("masked_language_logits", "text"),
    "masked_image": HeadIO("masked_image_pixels", "image"),
    "classes": HeadIO("class_logits", "pooled"),
}
VOCABULARY_SIZE = 4096  # where a recipe names none


class ModelConfig(Config):
    """The parts of a model. Parts that are not named do not exist, so every trained parameter gets a gradient."""

    image: ImageEncoderConfig
    text: TextEncoderConfig | None = None
    """Leave it out for a captioner or an image classifier."""
    embedding_width: int | None = Field(256, ge=1)
    """Width of the space in which image and text are compared by cosine; with `video.kind: tight` the width in which
    both are read. null for a model with neither."""
    image_pixels: int = Field(64, ge=8)
    """Side of the square picture that the image encoder reads."""
    max_tokens: int = Field(32, ge=4)
    """Longer captions are cut to this many tokens; the closing token is kept."""
    vocabulary_size: int | None = Field(None, ge=64)
    """Word pieces of the tokenizer that is trained on the dataset's captions (fewer if it has fewer); default 4,096.
    Leave it out with a text checkpoint, which brings its own tokenizer, and for a student, which has its teacher's."""
    pixel_mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    """Of red, green and blue between 0 and 1; a pretrained image encoder needs the values it was trained with."""
    pixel_std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    """Pixels minus the mean are divided by this."""
    temperature: float = Field(0.07, gt=0)
    """Initial value of the learned temperature, which divides similarities."""
    bias: float | None = None
    """Initial value of a learned bias of the similarities, for the sigmoid objective (SigLIP, arXiv 2303.15343: -10,
    with temperature 0.1); without a value there is no bias."""
    fusion: FusionConfig | None = None
    """Leave it out if image and text only meet in the shared space."""
    heads: tuple[Head, ...] = ()
    """What is predicted from the fused vectors: matching (do they belong together), masked_language (the hidden
    words), masked_image (the pixels of hidden patches), classes (labels or answers). Without a fusion each head except
    matching reads its own side's encoder."""
    video: VideoConfig | None = None
    """Reads clips of frames; leave it out for still images."""
    decoder: DecoderConfig | None = None
    """Writes text about the image: a caption, or with `memory: fused` the answer to a question."""

    @property
    def encoders(self) -> dict[str, ImageEncoderConfig | TextEncoderConfig]:
        """The encoders by the keys of their sections."""
        return {"image": self.image} | ({"text": self.text} if self.text is not None else {})

    @property
    def tight(self) -> bool:
        """Whether text and clips are scored pair by pair instead of by embeddings."""
        return self.video is not None and self.video.kind == "tight"

    @property
    def gives(self) -> frozenset[str]:
        """Names of what the model can compute; objectives and examinations look up what they need here."""
        memory = None if self.decoder is None else self.decoder.memory
        parts = {
            "embeddings": self.embedding_width is not None and not self.tight,
            "bias": self.bias is not None,
            "pair_scores": self.tight,
            "fused": self.fusion is not None,
            "decoded": memory is not None,
            "decoded from the image": memory == "image",
            "decoded from the question": memory == "fused",
        }
        return frozenset(name for name, exists in parts.items() if exists) | {HEADS[head].gives for head in self.heads}

    @model_validator(mode="after")
    def _check_set_once(self) -> ModelConfig:
        for name in ("vocab_size", "image_size"):
            for encoder in self.encoders.values():
                if name in encoder.options:
                    raise ValueError(f"{name} follows from vocabulary_size and image_pixels; leave it out of options")
        if self.text is not None and self.text.checkpoint is not None and self.vocabulary_size is not None:
            raise ValueError("vocabulary_size: text.checkpoint brings its own tokenizer; leave it out")
        return self

    @model_validator(mode="after")
    def _check_parts_fit(self) -> ModelConfig:
        text, fusion, decoder, heads = self.text, self.fusion, self.decoder, self.heads
        has_space = self.embedding_width is not None
        meets = has_space or fusion is not None
        if text is None and has_space:
            raise ValueError("embedding_width: a shared space needs a text encoder; name one or set it to null")
        if text is None and fusion is not None:
            raise ValueError("fusion: there is no text encoder to fuse with; name one under text")
        if self.bias is not None and not has_space:
            raise ValueError("bias: there are no similarities without embedding_width; leave it out")
        if self.tight and not has_space:
            raise ValueError("video: tight reads captions and frames in one width; give embedding_width")
        if self.tight and self.bias is not None:
            raise ValueError("bias: it shifts cosines, and video of kind tight has none; leave it out")
        if len(set(heads)) < len(heads):
            raise ValueError(f"heads: {', '.join(heads)} names one twice")
        if "matching" in heads and fusion is None:
            raise ValueError("heads: matching reads image and text together; name a fusion")
        if decoder is not None and decoder.memory == "fused" and fusion is None:
            raise ValueError("decoder.memory: fused needs a fusion; name one, or let the decoder read the image")
        if "masked_language" in heads and text is None:
            raise ValueError("heads: masked_language needs a text encoder; name one under text")
        if "masked_language" in heads and text is not None and text.windows is not None:
            raise ValueError("heads: masked_language needs tokens, but text.windows gives windows; leave one out")
        if "masked_image" in heads and self.video is not None:
            raise ValueError("heads: masked_image needs patches, but video gives frames; leave one out")
        if "masked_image" in heads and fusion is not None and fusion.kind == "cross_attention":
            raise ValueError("heads: in cross_attention no patch reads the text; name another fusion")
        if text is not None and not meets and "masked_language" not in heads:
            raise ValueError("text: nothing reads it; leave it out, or name embedding_width, fusion or masked_language")
        if not meets and decoder is None and set(heads) <= {"masked_language"}:
            raise ValueError("image: nothing reads it; name embedding_width, fusion, decoder, or a head that reads it")
        return self
