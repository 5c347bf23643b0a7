"""How a model is trained, and the two stages that train one: `pretrain` and `distill`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field, PositiveInt, model_validator

from mmflow.core.config import OPERATIONAL, Config, Uri
from mmflow.learning.config import ObjectivesConfig
from mmflow.learning.distillation.config import CacheConfig, DistillationLossesConfig, InitialiseConfig, TeacherConfig
from mmflow.loading.config import LoaderConfig
from mmflow.models.config import LoraConfig, ModelConfig, PackageConfig

VALIDATION = "validation/"  # before the names of what validations write


class OptimizerConfig(Config):
    """An optimizer, and its learning rate from a linear warm-up on. Norms, biases and scales are not decayed."""

    name: Literal["adamw", "muon", "lamb"] = "adamw"
    """AdamW (arXiv 1711.05101); Muon for the matrices of hidden layers, at AdamW's learning rate and decay (arXiv
    2502.16982), and AdamW for all else; LAMB (arXiv 1904.00962), for the largest batches."""
    learning_rate: float = Field(1e-3, gt=0)
    """Peak learning rate."""
    final_learning_rate: float = Field(0.0, ge=0)
    """Where the schedule ends."""
    warmup_steps: int = Field(100, ge=0)
    """Steps of linear warm-up."""
    schedule: Literal["cosine", "wsd", "linear"] = "cosine"
    """How the rate falls after the warm-up: along a cosine, on a straight line, or not at all until the last steps
    (wsd: warm-up, stable, decay)."""
    decay_share: float | None = Field(None, gt=0, le=1)
    """For wsd: the share of all steps over which it falls at the end; 0.2 where left out."""
    weight_decay: float = Field(0.05, ge=0)
    """Decoupled weight decay of matrices."""
    beta2: float = Field(0.98, gt=0, lt=1)
    """Decay of the second moment; 0.98 forgives the rare large gradient sooner than 0.999."""
    gradient_clipping: float = Field(1.0, gt=0)
    """Largest norm of the gradient over all parameters."""

    @model_validator(mode="after")
    def _decay_is_of_wsd(self) -> OptimizerConfig:
        if self.decay_share is not None and self.schedule != "wsd":
            raise ValueError(f"decay_share: schedule {self.schedule} reads none; take schedule wsd, or leave it out")
        return self


class CheckpointsConfig(Config):
    """Which checkpoints are kept, and what becomes of a run that cannot write one."""

    keep_last: int = Field(2, ge=1)
    """The newest are kept, besides the one that is being written; 2, in case the newest cannot be read."""
    keep_best: int = Field(0, ge=0)
    """Kept besides: those with the best `best_metric`."""
    best_metric: str = "loss"
    """A loss of the journal's line that ends at the checkpoint, or what a validation found there: such as
    `validation/loss` or `validation/text_to_image/R@1`, for which a checkpoint is written wherever it is the best yet.
    """
    without_room: Literal["go_on", "stop"] = "go_on"
    """A disk too full for a checkpoint: train on from the older ones and say so, or end the run."""

    @property
    def best_is_highest(self) -> bool:
        """Whether more of `best_metric` is better: of recall, not of losses."""
        return "R@" in self.best_metric


class GuardsConfig(Config):
    """What watches over a run that nobody watches."""

    on_nonfinite: Literal["stop", "skip", "rewind"] = "stop"
    """A loss or gradient that is not a number: end the run; or leave the step out, which costs a look at every
    gradient; or go back to the last checkpoint, and look only on the way to where it happened."""
    on_spike: Literal["ignore", "record", "rewind"] = "record"
    """A loss far above those before it: a line in the journal; or back to the last checkpoint, and on without the
    batches that spiked and the one before them."""
    spike_deviations: float = Field(8.0, gt=0)
    """How far above the median of the window: in deviations, by the median absolute one."""
    spike_window: int = Field(200, ge=10)
    """Steps that a loss is measured against; none is a spike before half of them are known."""
    max_rewinds: int = Field(3, ge=0)
    """Times that a run goes back; the next trouble ends it."""
    hung_after_minutes: float = Field(30.0, gt=0)
    """An exchange between workers that takes longer has failed; who did not come to it is named."""
    memory_headroom: float = Field(0.1, ge=0, lt=1)
    """Share of the machine's and the accelerator's memory below which the journal warns."""


class ValidationConfig(Config):
    """A look at held-out samples in the midst of the training: losses, and retrieval where the model has a shared
    space."""

    split: str
    """A split of the stage's own dataset, and of those of its tasks, that nothing is trained on."""
    every_steps: int = Field(500, ge=1)
    """Every so many steps, and after the last."""
    max_samples: int = Field(2_048, ge=2)
    """Of the split at most; the same ones every time, whatever the number of workers."""
    max_seconds: Annotated[float, OPERATIONAL] = Field(60.0, gt=0)
    """The longest that the workers may stand for it: then it is cut, the journal says so, and it decides nothing."""
    batch_size: int | None = Field(None, ge=2)
    """Samples at once over all workers, without gradients; null: as many as a step has, or as the fewest workers'
    micro-batches. A contrastive loss is the lower the fewer they are."""
    patience: int | None = Field(None, ge=1)
    """End the training after this many in a row without a better `checkpoints.best_metric`, and package the best
    checkpoint where `checkpoints.keep_best` keeps it, else the last weights. null trains to the last step."""
    least_gain: float = Field(0.0, ge=0)
    """What a better value must be better by."""


class TrainingConfig(Config):
    """Where and how long."""

    epochs: int = Field(10, ge=1)
    """Passes over the split."""
    global_batch_size: int = Field(256, ge=2)
    """Samples of a step over all workers; the same whatever their number."""
    micro_batch_size: Annotated[int | None, OPERATIONAL] = Field(None, ge=1)
    """Most samples that a worker takes through the model at once; its share of a batch comes in as many parts, with the
    gradient of the whole (GradCache, arXiv 2101.06983): less memory, and where an objective compares all samples of a
    batch one more forward pass. Batch norms see a part. null takes all at once."""
    optimizer: OptimizerConfig = OptimizerConfig()
    ema_decay: float | None = Field(None, gt=0, lt=1)
    """Keep a running average of the weights, of which a step leaves this share, and package it in their place. In the
    first steps it is younger: (1 + step) / (10 + step)."""
    zero_stage: Literal[0, 1, 2, 3] = 2
    """What DeepSpeed shards over the workers: 1 optimizer states, 2 and gradients, 3 and parameters."""
    offload_optimizer: Annotated[bool, OPERATIONAL] = False
    """Keep the optimizer's states in the CPU's memory and step there; zero_stage 1 to 3."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Of forward and backward; the optimizer always keeps fp32 masters. fp16, with a loss scale, is for GPUs that have
    no bf16; zero_stage 1 to 3."""
    compile: Annotated[bool, OPERATIONAL] = False
    """Compile encoders, fusion and decoder with torch.compile: minutes at the start, faster steps after. Not with
    zero_stage 3."""
    num_workers: Annotated[PositiveInt | tuple[PositiveInt, PositiveInt], OPERATIONAL] = 1
    """Ray Train workers, one accelerator each where there are any. [least, most] goes on with the nodes there are: a
    lost one shrinks the group, one that returns grows it, batches and their order stay."""
    cpus_per_worker: Annotated[int, OPERATIONAL] = Field(1, ge=1)
    """CPU cores each worker reserves; also its torch threads where there is no accelerator."""
    checkpoint_every_steps: Annotated[int, OPERATIONAL] = Field(500, ge=1)
    """A killed worker costs at most this many steps."""
    checkpoint_every_minutes: Annotated[float | None, OPERATIONAL] = Field(None, gt=0)
    """A checkpoint also where the last one is this old, at the next line of the journal."""
    checkpoints: Annotated[CheckpointsConfig, OPERATIONAL] = CheckpointsConfig()
    validation: ValidationConfig | None = None
    """Leave it out for a training that looks at its own loss alone."""
    guards: Annotated[GuardsConfig, OPERATIONAL] = GuardsConfig()
    max_restarts: Annotated[int, OPERATIONAL] = Field(3, ge=0)
    """Times that the workers are restarted from the last checkpoint before the stage fails."""
    log_every_steps: Annotated[int, OPERATIONAL] = Field(10, ge=1)
    """A line of the journal is the mean of this many steps."""
    peak_tflops: Annotated[float | None, OPERATIONAL] = Field(None, gt=0)
    """Dense peak of a worker's accelerator in this precision, for `mfu`; null: as its maker says, where it is known."""

    @property
    def least_workers(self) -> int:
        """The fewest workers that the training goes on with."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[0]

    @property
    def most_workers(self) -> int:
        """The most workers that there is work for."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[1]

    @model_validator(mode="after")
    def _workers_in_order(self) -> TrainingConfig:
        if self.least_workers > self.most_workers:
            raise ValueError(f"num_workers: {self.num_workers} is not [least, most]; turn it round")
        return self

    @model_validator(mode="after")
    def _zero_stage_fits(self) -> TrainingConfig:
        if self.zero_stage == 0 and (self.offload_optimizer or self.precision == "fp16"):
            asked = "offload_optimizer" if self.offload_optimizer else "precision: fp16"
            raise ValueError(f"{asked}: at zero_stage 0 there is none; take zero_stage 1, 2 or 3, or leave it out")
        if self.zero_stage == 3 and self.compile:
            raise ValueError("compile: zero_stage 3 gathers parameters in midst of a graph; take 2, or leave it out")
        return self


class TaskConfig(Config):
    """One of several tasks that a model learns at once."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")
    """Stands before its metrics, as in `vqa/answering`."""
    weight: float = Field(1.0, gt=0)
    """Its share of the steps, beside the weights of the others. A step is of one task."""
    dataset: Annotated[Uri | None, OPERATIONAL] = None
    """URI of a committed dataset; the stage's own where it is left out."""
    loader: LoaderConfig = LoaderConfig()
    objectives: ObjectivesConfig = ObjectivesConfig()


class _PretrainConfig(Config):
    lora: LoraConfig | None = None
    """Train adapters in place of the weights that are trained already; leave it out to train all weights."""
    loader: LoaderConfig = LoaderConfig()
    objectives: ObjectivesConfig = ObjectivesConfig()
    tasks: list[TaskConfig] = Field(default_factory=list)
    """Several tasks at once, each with a loader and objectives of its own, in place of those two."""
    training: TrainingConfig = TrainingConfig()

    @model_validator(mode="after")
    def _tasks_are_several(self) -> _PretrainConfig:
        names = [task.name for task in self.tasks]
        if len(names) == 1:
            raise ValueError(f"tasks: {names[0]} is the only one; name another, or give loader and objectives instead")
        if len(set(names)) < len(names):
            raise ValueError(f"tasks: {', '.join(names)} names one twice; metrics are told apart by name")
        for name in ("loader", "objectives"):
            if self.tasks and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name}: each of the tasks has its own; move it there")
        return self


class PretrainConfig(_PretrainConfig):
    """Stage `pretrain`: the teacher, from scratch, from encoders that others trained, or from a model package."""

    start: PackageConfig | None = None
    """The model package that it begins with: weights, tokenizer and settings; `model` then only lists what changes.
    What the package lacks has fresh weights."""
    model: ModelConfig


class StartedConfig(_PretrainConfig):
    """Section `pretrain` with a `start`, as a recipe has it: the package is read when the stage is planned."""

    start: PackageConfig
    """The model package that it begins with: weights, tokenizer and settings. What it lacks has fresh weights."""
    model: dict[str, Any] = Field(default_factory=dict)
    """Changes to the package's own settings."""


class DistillConfig(Config):
    """Stage `distill`: a smaller model that learns from its teachers' packages and from the pairs. It uses the
    tokenizer of the teacher that `pretrain` trained."""

    model: ModelConfig
    losses: DistillationLossesConfig = DistillationLossesConfig()
    teachers: list[TeacherConfig] = Field(default_factory=list)
    """Teachers beside that one; their probabilities are averaged. They may have tokenizers and image sizes of their
    own."""
    cache: CacheConfig | None = None
    """Leave it out for teachers that are live at every step."""
    initialise: InitialiseConfig | None = None
    """Leave it out for a student that begins from scratch, or from its encoders' checkpoints."""
    loader: LoaderConfig = LoaderConfig()
    objectives: ObjectivesConfig = ObjectivesConfig()
    training: TrainingConfig = TrainingConfig()

    @model_validator(mode="after")
    def _layers_can_be_listened_to(self) -> DistillConfig:
        if self.training.compile and (self.losses.hidden or self.losses.attention):
            raise ValueError("training.compile: attention and hidden losses listen within encoders; leave one out")
        return self

    @model_validator(mode="after")
    def _cache_is_read(self) -> DistillConfig:
        if self.cache is not None and set(self.losses.named) <= {"attention", "hidden", "ranking"}:
            raise ValueError("cache: it holds embeddings, and no loss reads them; leave cache out, or name features")
        return self


@dataclass(frozen=True, kw_only=True)
class Task:
    """What batches are made of and what is learnt of them; plain data, so that it travels to other machines."""

    key: str  # of the recipe's section, for errors
    name: str = ""  # before its metrics; none where it is the only one
    weight: float = 1.0  # its share of the steps, beside the others'
    dataset: str | None = None  # URI; None: the stage's own
    loader: LoaderConfig
    objectives: ObjectivesConfig


def tasks_of(key: str, section: PretrainConfig | DistillConfig) -> tuple[Task, ...]:
    """The tasks of a section, whose key is the recipe's."""
    if isinstance(section, DistillConfig) or not section.tasks:
        return (Task(key=key, loader=section.loader, objectives=section.objectives),)
    return tuple(
        Task(
            key=f"{key}.tasks.{number}",
            name=each.name,
            weight=each.weight,
            dataset=each.dataset,
            loader=each.loader,
            objectives=each.objectives,
        )
        for number, each in enumerate(section.tasks)
    )
