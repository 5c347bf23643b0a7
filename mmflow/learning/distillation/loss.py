"""The base of the distillation losses, and what they compare: embeddings, attention maps and layers of a student and
its teachers."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from mmflow.learning import Loss

if TYPE_CHECKING:
    from torch import Tensor, nn

    from mmflow.learning.outputs import Embeddings, Outputs
    from mmflow.learning.rows import Gather, GlobalRows
    from mmflow.models.encoders import ImageEncoder, TextEncoder
    from mmflow.models.model import Model

# Shapes: B rows of this rank, N rows of all ranks, T tokens or regions, W width of a layer, E that of the shared space.

Side = Literal["image", "text"]
SIDES: tuple[Side, Side] = ("image", "text")

Pairs = Annotated[list[tuple[int, int]], Field(min_length=1)]
"""[student's, teacher's], both counted from 1."""

Layers = Literal["last", "even"] | Pairs


class DistillationLoss(Loss):
    """The base of all distillation losses. Each is registered by its field in `DistillationLossesConfig`."""

    PROJECTS_EMBEDDINGS: ClassVar[bool] = False
    """Whether it compares embeddings in the teacher's width, through a projection if the student's is another."""
    NEEDS_TEACHER_MODEL: ClassVar[bool] = False
    """Whether it reads more of a teacher than the embeddings that a cache holds."""
    READS_LAYERS: ClassVar[bool] = False
    """Whether it reads the layers of encoders, which `training.compile` would hide."""
    TRAINS: ClassVar[Sequence[str]] = ("embedding_width",)
    """The parts of the student that it trains, besides encoders."""

    def missing(self, student: ModelTraits, teacher: ModelTraits) -> str | None:
        """Why this teacher cannot teach this student, and the remedy; None if it can."""
        return no_embeddings("student", student) or no_embeddings("teacher", teacher)

    def attention_sides(self) -> Collection[Side]:
        """The sides (image, text) where it reads the attention maps of the encoders."""
        return ()

    def layer_pairs(self, student: ModelTraits, teacher: ModelTraits) -> dict[Side, list[tuple[int, int]]]:
        """By side the pairs of layers with outputs to compare: (student's, teacher's), counted from 0."""
        return {}

    def loss(self, batch: DistillationBatch) -> Tensor:
        """This rank's part of the loss, (): the mean over ranks is the loss of the global batch."""
        raise NotImplementedError


@dataclass(frozen=True)
class ModelTraits:
    """What can be known of a student or a teacher before the first batch."""

    gives: frozenset[str]
    model: Model | None  # None: a teacher with nothing but cached embeddings
    image_pixels: int = 0
    own_tokens: bool = False  # a teacher with another tokenizer than the student

    @cached_property
    def layers(self) -> Mapping[str, EncoderLayers | None]:
        """The layers of each side's encoder; None if they cannot be compared."""
        if self.model is None:
            return dict.fromkeys(SIDES)
        return {side: encoder_layers(encoder_of(self.model, side), self.image_pixels) for side in SIDES}


def no_embeddings(name: str, model: ModelTraits) -> str | None:
    """The remedy for a model without embeddings; None for one that has them."""
    if "embeddings" in model.gives:
        return None
    return f"the {name} gives no embeddings; use a model with a text encoder and an embedding_width"


@dataclass(frozen=True)
class TeacherOutputs:
    """What one teacher gives for a batch, and its share of a loss; the shares of a loss sum to 1."""

    outputs: Outputs | None  # None: only its cached embeddings are read
    cached: Embeddings | None
    projections: nn.ModuleDict  # from the student's widths to this teacher's, where they differ
    layer_pairs: Mapping[Side, Sequence[tuple[int, int]]]  # the compared layers: (student's, teacher's)
    share: float = 1.0

    @property
    def embeddings(self) -> Embeddings:
        """From the cache if there is one."""
        return self.live.embeddings if self.cached is None else self.cached

    @property
    def live(self) -> Outputs:
        """The outputs of the model."""
        assert self.outputs is not None, "a teacher is loaded if a loss has NEEDS_TEACHER_MODEL"
        return self.outputs

    def project(self, student: Embeddings) -> Embeddings:
        """The student's embeddings in this teacher's width, of unit length."""
        from torch.nn.functional import normalize

        image_BE, text_BE = (
            normalize(self.projections[side](tensor) if side in self.projections else tensor, dim=-1)
            for side, tensor in zip(SIDES, student[:2], strict=True)
        )
        return student._replace(image_BE=image_BE, text_BE=text_BE)

    def project_layer(self, side: Side, pair: int, student_BTW: Tensor) -> Tensor:
        """The output of the student's layer, of the pair with this number, in the teacher's width."""
        name = f"{side}_{pair}"
        projected: Tensor = self.projections[name](student_BTW) if name in self.projections else student_BTW
        return projected


@dataclass(frozen=True)
class DistillationBatch:
    """A batch as one loss compares it: with the teachers that give what it reads."""

    student: Outputs
    teachers: Sequence[TeacherOutputs]

    @property
    def rows(self) -> GlobalRows:
        return self.student.rows

    @property
    def gather(self) -> Gather:
        return self.student.ranks.gather

    @property
    def teacher_embeddings(self) -> list[tuple[float, Embeddings]]:
        """The share and the embeddings of each teacher."""
        return [(teacher.share, teacher.embeddings) for teacher in self.teachers]

    @property
    def projected(self) -> list[Embeddings]:
        """The student's embeddings in the width of each teacher."""
        return [teacher.project(self.student.embeddings) for teacher in self.teachers]

    def real_places(self, side: Side, num_places: int) -> Tensor:
        """(B, T) bool: the tokens or regions that are not padding."""
        real_BT = self.student.rows.real_B[:, None].expand(-1, num_places)
        return real_BT & self.student.token_mask.bool() if side == "text" else real_BT


def scaled_products(rows_BE: Tensor, columns_NE: Tensor, logit_scale: Tensor | float, allowed: Tensor) -> Tensor:
    """(B, N) fp32 scaled products. Columns outside `allowed`, (N,) or (B, N), are the lowest finite number, so that
    softmax gives them 0."""
    import torch

    with torch.autocast(rows_BE.device.type, enabled=False):
        logits_BN = logit_scale * rows_BE.float() @ columns_NE.float().T
    return logits_BN.masked_fill(~allowed, torch.finfo(logits_BN.dtype).min)


def mean_log_probabilities(log_probabilities: Sequence[tuple[float, Tensor]]) -> Tensor:
    """The logarithm of the mean of the teachers' probabilities, weighted by their shares: averaged after the softmax
    (MobileCLIP, arXiv 2311.17049, section 3.2), so that a confident teacher counts more than an unsure one."""
    import torch

    return torch.stack([tensor + math.log(share) for share, tensor in log_probabilities]).logsumexp(0)


def divergence(student_BN: Tensor, teacher_BN: Tensor, allowed: Tensor) -> Tensor:
    """(B,) KL(teacher ‖ student) of rows of log-probabilities over the `allowed` columns."""
    return (teacher_BN.exp() * (teacher_BN - student_BN)).masked_fill(~allowed, 0.0).sum(-1)


# --- layers of encoders -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EncoderLayers:
    """The layers of an encoder, known without a forward pass of its weights."""

    widths: tuple[int, ...]
    num_places: tuple[int, ...] | None  # regions of each layer; None: one for each token
    num_heads: int | None  # of attention; None: it gives no attention maps

    def __len__(self) -> int:
        return len(self.widths)


def encoder_of(model: Model, side: str) -> ImageEncoder | TextEncoder | None:
    """The encoder of a side if its layers can be compared: those of clips and of text windows cannot."""
    from mmflow.models.encoders import ImageEncoder, TextEncoder

    encoder = getattr(model, side)
    return encoder if isinstance(encoder, ImageEncoder | TextEncoder) else None


def encoder_layers(encoder: ImageEncoder | TextEncoder | None, image_pixels: int) -> EncoderLayers | None:
    """The layers of an encoder; None without an encoder, or if its backbone has no list of them."""
    from mmflow.models.backbones import layers_of
    from mmflow.models.encoders import TextEncoder

    listed = None if encoder is None else layers_of(encoder.backbone)
    if encoder is None or listed is None:
        return None
    num_heads = getattr(encoder.backbone.config, "num_attention_heads", None)
    num_heads = num_heads if isinstance(num_heads, int) else None
    if isinstance(encoder, TextEncoder):
        return EncoderLayers((encoder.width,) * len(listed[1]), None, num_heads)
    shapes = _layer_shapes(encoder, len(listed[1]), image_pixels)
    return EncoderLayers(tuple(width for _, width in shapes), tuple(places for places, _ in shapes), num_heads)


def pair_layers(layers: Layers, num_student: int, num_teacher: int) -> list[tuple[int, int]]:
    """(student's, teacher's), counted from 0. "even" is TinyBERT's g(m) = m · N / M, counted from 1 and rounded up, so
    that the last layers are a pair."""
    if layers == "last":
        return [(num_student - 1, num_teacher - 1)]
    if layers == "even":
        return [(number - 1, -(-number * num_teacher // num_student) - 1) for number in range(1, num_student + 1)]
    return [(student - 1, teacher - 1) for student, teacher in layers]


def layers_apart(side: Side, layers: Layers, student: ModelTraits, teacher: ModelTraits) -> str | None:
    """Why the layers of one side cannot be compared, and the remedy; None if they can."""
    from mmflow.models.encoders import ImageEncoder

    ours, theirs = student.layers[side], teacher.layers[side]
    if ours is None or theirs is None:
        model = "student" if ours is None else "teacher"
        return f"the {model}'s {side} side has no layers to compare (nor have clips and windows); remove it from sides"
    encoder = encoder_of(student.model, side) if student.model else None
    if isinstance(encoder, ImageEncoder) and encoder.patch_dropout is not None:
        return "the student drops patches that the teacher sees; set its image.patch_dropout to 0"
    if side == "text" and teacher.own_tokens:
        return "the teacher reads other tokens than the student; remove text from sides"
    for here, there in pair_layers(layers, len(ours), len(theirs)):
        if not (0 <= here < len(ours) and 0 <= there < len(theirs)):
            return (
                f"layers: [{here + 1}, {there + 1}], but the student's {side} encoder has {len(ours)} layers and the "
                f"teacher's {len(theirs)}; name others"
            )
        if ours.num_places and theirs.num_places and ours.num_places[here] != theirs.num_places[there]:
            return (
                f"the student's layer {here + 1} has {ours.num_places[here]} regions and the teacher's layer "
                f"{there + 1} has {theirs.num_places[there]}; make image_pixels / patch_size equal, or name others"
            )
    return None


@contextmanager
def capture_layers(backbone: Any, numbers: Collection[int]) -> Iterator[dict[int, Tensor]]:
    """Within the block, the outputs of these layers in the latest forward pass, (B, T, W) by number."""
    from mmflow.models.backbones import layers_of

    listed = layers_of(backbone)
    assert listed is not None, "layers_apart() names it"
    outputs: dict[int, Tensor] = {}

    def keep(number: int) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            # Stages of a convolutional backbone give a map (B, W, h, w).
            outputs[number] = hidden.flatten(2).transpose(1, 2) if hidden.dim() == 4 else hidden

        return hook

    with ExitStack() as hooks:
        for number in set(numbers):
            hooks.callback(listed[1][number].register_forward_hook(keep(number)).remove)
        yield outputs


def _layer_shapes(encoder: ImageEncoder, num_layers: int, image_pixels: int) -> list[tuple[int, int]]:
    """(places, width) of each layer for one image, from tensors without storage."""
    import torch

    backbone = encoder.backbone
    tensors = dict(backbone.named_parameters()) | dict(backbone.named_buffers())
    weightless = {name: tensor.to("meta") for name, tensor in tensors.items()}
    image = torch.empty(1, 3, image_pixels, image_pixels, device="meta")
    was_training = encoder.training
    encoder.eval()  # batch norms would count an empty image
    try:
        with capture_layers(backbone, range(num_layers)) as outputs, torch.no_grad():
            torch.func.functional_call(backbone, weightless, (image,))
    finally:
        encoder.train(was_training)
    return [(outputs[number].shape[1], outputs[number].shape[2]) for number in range(num_layers)]
