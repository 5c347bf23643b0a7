"""What a model is made of: encoders of `transformers`, the space they meet in, what fuses them and reads the result."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from mmflow.core.config import OPERATIONAL, Config, Uri, absolute

IN_PACKAGE = "package:"  # begins a path within an installed Python package
Checkpoint = Annotated[str, AfterValidator(lambda path: path if path.startswith(IN_PACKAGE) else absolute(path))]


class PositionsConfig(Config):
    """A text encoder with learned absolute positions made to read longer text (Long-CLIP, arXiv 2403.15378)."""

    stretch: int = Field(4, ge=2)
    """Every position past the kept ones becomes this many, interpolated between its neighbours."""
    keep: int = Field(20, ge=0)
    """The first positions stay as they are: they are the ones that short captions have trained well."""


class WindowsConfig(Config):
    """Documents read window by window: the encoder reads each, a small transformer reads the windows' vectors."""

    tokens: int = Field(128, ge=8)
    """Tokens of a window, the opening token that each begins with among them."""
    layers: int = Field(2, ge=1)
    """Layers of the transformer over windows."""
    heads: int = Field(4, ge=1)
    """Its attention heads; they divide the encoder's width."""


class VideoConfig(Config):
    """Clips of frames (CLIP4Clip, arXiv 2104.08860): the image encoder reads each, this compares them with text."""

    kind: Literal["mean", "sequential", "tight"] = "mean"
    """mean: a clip is the mean of its frames. sequential: the same after a transformer has put them in order. tight: a
    transformer reads a caption and a clip's frames together and scores the pair, without embeddings. Each pair is then
    a forward: contrastive reads B² of them a batch, retrieval every caption with every clip."""
    max_frames: int = Field(12, ge=1)
    """Frames that a clip has at most."""
    layers: int | None = Field(None, ge=1)
    """Layers of the transformer, of which a mean has none; the paper has 4."""
    heads: int | None = Field(None, ge=1)
    """Its attention heads. They divide the image encoder's width; of tight, which reads captions too, the
    embedding_width."""

    @model_validator(mode="after")
    def _transformer_has_layers(self) -> VideoConfig:
        for name in ("layers", "heads"):
            if self.kind != "mean" and getattr(self, name) is None:
                raise ValueError(f"{name}: {self.kind} needs their number; give it")
            if self.kind == "mean" and getattr(self, name) is not None:
                raise ValueError(f"{name}: a mean has none; leave it out, or take sequential or tight")
        return self


class EncoderConfig(Config):
    """What image and text encoders have in common: a model of `transformers`, made anew or from a checkpoint."""

    type: str | None = None
    """`model_type` in transformers: resnet, vit, convnext, clip_vision_model, bert, roberta, modernbert, …"""
    checkpoint: Annotated[Checkpoint | None, OPERATIONAL] = None
    """A local directory as `save_pretrained` writes it, with its weights as safetensors, or `package:NAME/PATH` for one
    within an installed Python package; a CLIP, SigLIP or VisionTextDualEncoder gives its tower. In place of `type`."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Fields of that type's configuration; a field that the type does not have is an error."""
    frozen_layers: int | Literal["all"] = 0
    """The embeddings and this many layers after them are not trained; `all` for the whole encoder."""
    layer_decay: float = Field(1.0, gt=0, le=1)
    """Each layer learns this many times as fast as the one above it."""
    activation_checkpointing: bool = False
    """Compute the layers again in the backward pass instead of keeping what they gave: less memory, more time."""

    @model_validator(mode="after")
    def _one_origin(self) -> EncoderConfig:
        if (self.type is None) == (self.checkpoint is None):
            raise ValueError("give either type, for fresh weights, or checkpoint, a directory with trained ones")
        if self.frozen_layers != "all" and self.frozen_layers < 0:
            raise ValueError(f"frozen_layers is {self.frozen_layers}; give 0, a number of layers, or all")
        return self


class ImageEncoderConfig(EncoderConfig):
    """The encoder of pictures."""

    pooling: Literal["pooler", "mean", "first", "attention"] = "mean"
    """How regions become one vector: the encoder's own pooler, their mean, the first (a ViT's class token), or a
    learned query's attention."""
    patch_dropout: float = Field(0.0, ge=0, lt=1)
    """The share of a ViT's patches that a training step leaves out (FLIP, arXiv 2212.00794); evaluation sees all."""


class TextEncoderConfig(EncoderConfig):
    """The encoder of captions, questions and documents."""

    pooling: Literal["pooler", "mean", "first", "last", "eos", "attention"] = "mean"
    """How tokens become one vector: the encoder's own pooler, their mean, the first, the last, the closing token
    (CLIP), or a learned query's attention."""
    positions: PositionsConfig | None = None
    """Stretch the learned positions, to read more tokens than the encoder was made for."""
    windows: WindowsConfig | None = None
    """Read documents of thousands of tokens window by window."""


class FusionConfig(Config):
    """How text and image read each other; what the heads of the model then read."""

    kind: Literal["concatenation", "gated", "cross_attention", "both_directions", "co_attention", "single_stream"]
    """concatenation and gated (GMU, arXiv 1702.01992) mix each token with the other side's pooled vector;
    cross_attention: text reads image (ALBEF, arXiv 2107.07651); both_directions: each reads the other (ViLBERT's
    co-attentional layer, arXiv 1908.02265); co_attention: that, and each reads itself too (LXMERT's cross-modality
    layer, arXiv 1908.07490); single_stream: one transformer over both (UNITER, arXiv 1909.11740; VisualBERT, arXiv
    1908.03557)."""
    width: int = Field(256, ge=8)
    """Width of the fused vectors."""
    layers: int | None = Field(None, ge=1)
    """Layers of the kinds that attend; the two others have none."""
    heads: int | None = Field(None, ge=1)
    """Attention heads of each layer, into which the width is divided."""
    dropout: float = Field(0.1, ge=0, lt=1)
    """Share of activations and attention weights dropped in training."""

    @model_validator(mode="after")
    def _attention_has_layers(self) -> FusionConfig:
        attends = self.kind not in ("concatenation", "gated")
        for name in ("layers", "heads"):
            if attends and getattr(self, name) is None:
                raise ValueError(f"{self.kind} needs {name}; give their number")
            if not attends and getattr(self, name) is not None:
                raise ValueError(f"{self.kind} has no {name}; leave them out")
        if self.heads and self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        return self


class DecoderConfig(Config):
    """A causal text decoder that reads the picture by cross-attention: what writes captions and answers."""

    memory: Literal["image", "fused"] = "image"
    """What it reads: the image encoder's regions, or the fused tokens of a question after they read the picture."""
    width: int = Field(256, ge=8)
    """Width of its vectors."""
    layers: int = Field(4, ge=1)
    """Each attends to the text so far, then to the memory."""
    heads: int = Field(4, ge=1)
    """Attention heads of each layer, into which the width is divided."""
    dropout: float = Field(0.1, ge=0, lt=1)
    """Share of activations and attention weights dropped in training."""

    @model_validator(mode="after")
    def _heads_divide(self) -> DecoderConfig:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        return self


class PackageConfig(Config):
    """A model package, where it lies or as a version of a registered model."""

    package: Annotated[Uri | None, OPERATIONAL] = None
    """URI of the model package."""
    model: Annotated[str | None, OPERATIONAL] = None
    """Name of a registered model, in place of `package`."""
    version: Annotated[int | None, OPERATIONAL] = Field(None, ge=1)
    """Its version: a fixed one, because the champion of today is another tomorrow."""

    @model_validator(mode="after")
    def _one_origin(self) -> PackageConfig:
        if (self.package is None) == (self.model is None) or (self.model is None) != (self.version is None):
            raise ValueError("give either package, a model package's URI, or model and version of a registered one")
        return self


class LoraConfig(Config):
    """Low-rank adapters (LoRA, arXiv 2106.09685) beside linear layers of encoders, fusion and decoder, which stay as
    they are. What begins fresh is trained in full."""

    rank: int = Field(8, ge=1)
    """Rows of the two matrices whose product is added to a layer's."""
    alpha: float = Field(16.0, gt=0)
    """The product is multiplied by this and divided by the rank."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Share of what an adapter reads that is dropped in training."""
    targets: list[str] = Field(default_factory=list)
    """The layers, by the ends of their names, such as `query` or `attention.self.query`; none: all linear ones."""
    trained: list[str] | None = None
    """What is trained in full, by the beginnings of names, such as `heads.classes`; null: projections, scale, heads."""


Head = Literal["matching", "masked_language", "masked_image", "classes"]
GIVES: dict[Head, str] = {
    "matching": "matching_logits",
    "masked_language": "masked_language_logits",
    "masked_image": "masked_image_pixels",
    "classes": "class_logits",
}
VOCABULARY_SIZE = 4096  # where a recipe names none


class ModelConfig(Config):
    """What the model is made of. A part that is not named here does not exist: all that is trained has a gradient."""

    image: ImageEncoderConfig
    text: TextEncoderConfig | None = None
    """Leave it out for a captioner or a classifier of pictures."""
    embedding_width: int | None = Field(256, ge=1)
    """Width of the space in which image and text are compared by cosine, or of what reads both where `video` is tight;
    null where the model has neither."""
    image_pixels: int = Field(64, ge=8)
    """Side of the square picture that the image encoder sees."""
    max_tokens: int = Field(32, ge=4)
    """Tokens of a caption past this many are cut, the closing one kept."""
    vocabulary_size: int | None = Field(None, ge=64)
    """Word pieces of the tokenizer that is trained on the dataset's captions, fewer where it has fewer; None: 4,096. A
    text checkpoint brings its own tokenizer, and a student has its teacher's: leave it out there."""
    pixel_mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    """Of red, green and blue between 0 and 1; a pretrained image encoder wants those that it was trained with."""
    pixel_std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    """What the pixels less their mean are divided by."""
    temperature: float = Field(0.07, gt=0)
    """Where the learned temperature starts: similarities are divided by it."""
    bias: float | None = None
    """Where a learned bias of the similarities starts, for the sigmoid objective (SigLIP, arXiv 2303.15343: -10, with
    temperature 0.1); none where it is left out."""
    fusion: FusionConfig | None = None
    """Leave it out where image and text meet in the shared space alone."""
    heads: tuple[Head, ...] = ()
    """What is read from the fused vectors: matching (do they belong together), masked_language (the words that were
    hidden), masked_image (the pixels of patches that were hidden), classes (labels or answers). Without a fusion each
    head but matching reads its own side's encoder."""
    video: VideoConfig | None = None
    """Reads clips of frames; leave it out for stills."""
    decoder: DecoderConfig | None = None
    """Writes text about the picture: a caption, or with memory: fused the answer to a question."""

    @property
    def encoders(self) -> dict[str, ImageEncoderConfig | TextEncoderConfig]:
        """Its encoders by the keys of their sections."""
        return {"image": self.image} | ({"text": self.text} if self.text is not None else {})

    @property
    def tight(self) -> bool:
        """Whether text and clips are compared pair by pair, and not by embeddings."""
        return self.video is not None and self.video.kind == "tight"

    @property
    def gives(self) -> frozenset[str]:
        """The names of what such a model can compute, by which objectives and examinations find what they need."""
        memory = None if self.decoder is None else self.decoder.memory
        parts = {
            "embeddings": self.embedding_width is not None and not self.tight,
            "bias": self.bias is not None,
            "pair_scores": self.tight,
            "fused": self.fusion is not None,
            "decoded": self.decoder is not None,
            "decoded from the image": memory == "image",
            "decoded from the question": memory == "fused",
        }
        return frozenset(name for name, there in parts.items() if there) | {GIVES[head] for head in self.heads}

    @model_validator(mode="after")
    def _not_set_twice(self) -> ModelConfig:
        for name in ("vocab_size", "image_size"):
            for encoder in (self.image, self.text):
                if encoder is not None and name in encoder.options:
                    raise ValueError(f"{name} follows from vocabulary_size and image_pixels; leave it out of options")
        if self.text is not None and self.text.checkpoint is not None and self.vocabulary_size is not None:
            raise ValueError(
                f"vocabulary_size: {self.vocabulary_size}, and text.checkpoint brings its own tokenizer; leave it out"
            )
        return self

    @model_validator(mode="after")
    def _parts_fit(self) -> ModelConfig:
        if self.text is None and self.embedding_width is not None:
            raise ValueError("embedding_width: a shared space needs a text encoder; name one or set it to null")
        if self.text is None and self.fusion is not None:
            raise ValueError("fusion: there is no text encoder to fuse with; name one under text")
        if self.bias is not None and self.embedding_width is None:
            raise ValueError("bias: there are no similarities without embedding_width; leave it out")
        if self.tight and self.embedding_width is None:
            raise ValueError("video: tight reads captions and frames in one width; give embedding_width")
        if self.tight and self.bias is not None:
            raise ValueError("bias: it shifts cosines, and video of kind tight has none; leave it out")
        if len(set(self.heads)) < len(self.heads):
            raise ValueError(f"heads: {', '.join(self.heads)} names one twice")
        if "matching" in self.heads and self.fusion is None:
            raise ValueError("heads: matching reads image and text together; name a fusion")
        if self.decoder is not None and self.decoder.memory == "fused" and self.fusion is None:
            raise ValueError("decoder.memory: fused needs a fusion; name one, or let the decoder read the image")
        if "masked_language" in self.heads and self.text is None:
            raise ValueError("heads: masked_language needs a text encoder; name one under text")
        if "masked_language" in self.heads and self.text is not None and self.text.windows is not None:
            raise ValueError("heads: masked_language needs tokens, and text.windows gives windows; leave one out")
        if "masked_image" in self.heads and self.video is not None:
            raise ValueError("heads: masked_image needs patches, and video gives frames; leave one out")
        if "masked_image" in self.heads and self.fusion is not None and self.fusion.kind == "cross_attention":
            raise ValueError(
                "heads: in cross_attention no patch reads the text; take both_directions or another fusion"
            )
        meets = self.embedding_width is not None or self.fusion is not None
        if self.text is not None and not meets and "masked_language" not in self.heads:
            raise ValueError("text: nothing reads it; leave it out, or name embedding_width, fusion or masked_language")
        if not meets and self.decoder is None and set(self.heads) <= {"masked_language"}:
            raise ValueError(
                "image: nothing reads it; name embedding_width, fusion, decoder, or heads masked_image or classes"
            )
        return self
