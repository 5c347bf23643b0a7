"""Settings of a training, and of the two stages that train a model: `pretrain` and `distill`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field, PositiveInt, model_validator

from mmflow.core.config import OPERATIONAL, Config, Uri
from mmflow.learning.distillation import CacheConfig, DistillationLossesConfig, InitialiseConfig, TeacherConfig
from mmflow.learning.objectives import ObjectivesConfig
from mmflow.loading.config import LoaderConfig
from mmflow.models.config import LoraConfig, ModelConfig, PackageConfig

VALIDATION = "validation/"  # prefix of the metrics of validations


class OptimizerConfig(Config):
    """An optimizer and its learning rate. Norms, biases and scales do not decay."""

    name: Literal["adamw", "muon", "lamb"] = "adamw"
    """AdamW (arXiv 1711.05101); Muon for the matrices of hidden layers, at AdamW's learning rate and decay (arXiv
    2502.16982), and AdamW for the rest; LAMB (arXiv 1904.00962), for the largest batches."""
    learning_rate: float = Field(1e-3, gt=0)
    """Peak learning rate."""
    final_learning_rate: float = Field(0.0, ge=0)
    """The learning rate at the end of the schedule."""
    warmup_steps: int = Field(100, ge=0)
    """Steps of linear warm-up."""
    schedule: Literal["cosine", "wsd", "linear"] = "cosine"
    """How the rate falls after the warm-up: along a cosine, on a straight line, or only in the last steps (wsd:
    warm-up, stable, decay)."""
    decay_share: float | None = Field(None, gt=0, le=1)
    """For wsd: the share of all steps over which the rate falls at the end; 0.2 by default."""
    weight_decay: float = Field(0.05, ge=0)
    """Decoupled weight decay of matrices."""
    beta2: float = Field(0.98, gt=0, lt=1)
    """Decay of the second moment; 0.98 recovers from a rare large gradient sooner than 0.999."""
    gradient_clipping: float = Field(1.0, gt=0)
    """Largest norm of the gradient over all parameters."""

    @model_validator(mode="after")
    def _check_decay_share(self) -> OptimizerConfig:
        if self.decay_share is not None and self.schedule != "wsd":
            raise ValueError(
                f"decay_share: schedule {self.schedule} does not use it; set schedule to wsd, or leave it out"
            )
        return self


class CheckpointsConfig(Config):
    """Which checkpoints are kept, and what happens when one cannot be written."""

    keep_last: int = Field(2, ge=1)
    """The newest are kept, besides the one that is being written; 2, in case the newest cannot be read."""
    keep_best: int = Field(0, ge=0)
    """How many with the best `best_metric` are kept as well."""
    best_metric: str = "loss"
    """A loss in the journal's line that ends at the checkpoint, or a metric of the validation there, such as
    `validation/loss` or `validation/text_to_image/R@1`: then a checkpoint is written whenever it is the best so far."""
    without_room: Literal["go_on", "stop"] = "go_on"
    """When the disk is too full for a checkpoint: keep training with the older ones and say so, or end the run."""

    @property
    def best_is_highest(self) -> bool:
        """Whether higher values of `best_metric` are better: recall, but not losses."""
        return "R@" in self.best_metric


class GuardsConfig(Config):
    """What protects a run that nobody watches."""

    on_nonfinite: Literal["stop", "skip", "rewind"] = "stop"
    """When a loss or gradient is not finite: end the run; or leave the step out, which costs a look at every gradient;
    or go back to the last checkpoint, and look only on the way to where it happened."""
    on_spike: Literal["ignore", "record", "rewind"] = "record"
    """When a loss is far above those before it: write a line into the journal; or go back to the last checkpoint, and
    continue without the batches that spiked and the one before them."""
    spike_deviations: float = Field(8.0, gt=0)
    """How far above the median of the window a spike is, in deviations estimated from the median absolute one."""
    spike_window: int = Field(200, ge=10)
    """Steps that a loss is compared with; nothing is a spike before half of them are known."""
    max_rewinds: int = Field(3, ge=0)
    """How often a run goes back; the next trouble ends it."""
    hung_after_minutes: float = Field(30.0, gt=0)
    """An exchange between workers that takes longer has failed; the error names the worker that is missing."""
    memory_headroom: float = Field(0.1, ge=0, lt=1)
    """Share of free memory, of the machine or the accelerator, below which the journal warns."""


class ValidationConfig(Config):
    """Validation on held-out samples during the training: losses, and retrieval where the model has a shared space."""

    split: str
    """A split of the stage's dataset, and of its tasks' datasets, that nothing is trained on."""
    every_steps: int = Field(500, ge=1)
    """How often, besides after the last step."""
    max_samples: int = Field(2_048, ge=2)
    """The most samples of the split; the same ones every time, on any number of workers."""
    max_seconds: Annotated[float, OPERATIONAL] = Field(60.0, gt=0)
    """The longest that one validation may take: then it is cut short, the journal says so, and it decides nothing."""
    batch_size: int | None = Field(None, ge=2)
    """Samples at once over all workers, without gradients; null: a step's batch, or the micro-batches of the fewest
    workers. A contrastive loss is lower with fewer samples."""
    patience: int | None = Field(None, ge=1)
    """End the training after this many validations in a row without a better `checkpoints.best_metric`, and package the
    best checkpoint if `checkpoints.keep_best` keeps it, else the last weights. null trains to the last step."""
    least_gain: float = Field(0.0, ge=0)
    """How much better a better value must be."""


class TrainingConfig(Config):
    """How long a model is trained, how, and on what machines."""

    epochs: int = Field(10, ge=1)
    """Passes over the split."""
    global_batch_size: int = Field(256, ge=2)
    """Samples of a step over all workers, whatever their number."""
    micro_batch_size: Annotated[int | None, OPERATIONAL] = Field(None, ge=1)
    """The most samples that a worker runs through the model at once. Its share of a batch is split into equal parts,
    with the gradient of the whole (GradCache, arXiv 2101.06983): less memory, and one more forward pass if an objective
    compares all samples of a batch. Batch norms see one part. null takes all at once."""
    optimizer: OptimizerConfig = OptimizerConfig()
    ema_decay: float | None = Field(None, gt=0, lt=1)
    """Keep a running average of the weights, with this share left by each step, and package it instead of the weights.
    In the first steps the share is smaller: (1 + step) / (10 + step)."""
    zero_stage: Literal[0, 1, 2, 3] = 2
    """What DeepSpeed shards over the workers: 1 optimizer states, 2 and gradients, 3 and parameters."""
    offload_optimizer: Annotated[bool, OPERATIONAL] = False
    """Keep the optimizer's states in the CPU's memory and step there; needs zero_stage 1 to 3."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Of forward and backward passes; the optimizer always keeps fp32 masters. fp16, with a loss scale, is for GPUs
    without bf16; it needs zero_stage 1 to 3."""
    compile: Annotated[bool, OPERATIONAL] = False
    """Compile encoders, fusion and decoder with torch.compile: minutes at the start, faster steps after. Not with
    zero_stage 3."""
    num_workers: Annotated[PositiveInt | tuple[PositiveInt, PositiveInt], OPERATIONAL] = 1
    """Ray Train workers, one accelerator each where there are any. [least, most] adapts to the nodes there are: the
    group shrinks with a lost node and grows with a new one; batches and their order stay the same."""
    cpus_per_worker: Annotated[int, OPERATIONAL] = Field(1, ge=1)
    """CPU cores that each worker reserves; also its torch threads where there is no accelerator."""
    checkpoint_every_steps: Annotated[int, OPERATIONAL] = Field(500, ge=1)
    """A killed worker costs at most this many steps."""
    checkpoint_every_minutes: Annotated[float | None, OPERATIONAL] = Field(None, gt=0)
    """Also write a checkpoint when the last one is this old, at the next line of the journal."""
    checkpoints: Annotated[CheckpointsConfig, OPERATIONAL] = CheckpointsConfig()
    validation: ValidationConfig | None = None
    """Leave it out to see only the training loss."""
    guards: Annotated[GuardsConfig, OPERATIONAL] = GuardsConfig()
    max_restarts: Annotated[int, OPERATIONAL] = Field(3, ge=0)
    """How often the workers restart from the last checkpoint before the stage fails."""
    log_every_steps: Annotated[int, OPERATIONAL] = Field(10, ge=1)
    """A line of the journal is the mean of this many steps."""
    peak_tflops: Annotated[float | None, OPERATIONAL] = Field(None, gt=0)
    """Dense peak of a worker's accelerator in this precision, for `mfu`; null: from its maker's data sheet."""

    @property
    def least_workers(self) -> int:
        """The fewest workers that the training continues with."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[0]

    @property
    def most_workers(self) -> int:
        """The most workers that the training uses."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[1]

    @model_validator(mode="after")
    def _check_workers(self) -> TrainingConfig:
        if self.least_workers > self.most_workers:
            raise ValueError(f"num_workers: {self.num_workers} is not [least, most]; swap the two")
        return self

    @model_validator(mode="after")
    def _check_zero_stage(self) -> TrainingConfig:
        if self.zero_stage == 0 and (self.offload_optimizer or self.precision == "fp16"):
            setting = "offload_optimizer" if self.offload_optimizer else "precision: fp16"
            raise ValueError(f"{setting}: not at zero_stage 0; set zero_stage to 1, 2 or 3, or leave it out")
        if self.zero_stage == 3 and self.compile:
            raise ValueError("compile: zero_stage 3 gathers parameters inside a graph; set it to 2, or leave it out")
        return self


class TaskConfig(Config):
    """One of several tasks that a model learns at once."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")
    """Prefix of its metrics, as in `vqa/answering`."""
    weight: float = Field(1.0, gt=0)
    """Its share of the steps, relative to the other tasks' weights. Each step trains one task."""
    dataset: Annotated[Uri | None, OPERATIONAL] = None
    """URI of a committed dataset; the stage's own if left out."""
    loader: LoaderConfig = LoaderConfig()
    objectives: ObjectivesConfig = ObjectivesConfig()


class _PretrainConfig(Config):
    lora: LoraConfig | None = None
    """Train adapters instead of the weights that are trained already; leave it out to train all weights."""
    loader: LoaderConfig = LoaderConfig()
    objectives: ObjectivesConfig = ObjectivesConfig()
    tasks: list[TaskConfig] = Field(default_factory=list)
    """Several tasks at once, each with its own loader and objectives, instead of those two."""
    training: TrainingConfig = TrainingConfig()

    @model_validator(mode="after")
    def _check_tasks(self) -> _PretrainConfig:
        names = [task.name for task in self.tasks]
        if len(names) == 1:
            raise ValueError(f"tasks: {names[0]} is the only one; name another, or give loader and objectives instead")
        if len(set(names)) < len(names):
            raise ValueError(
                f"tasks: {', '.join(names)} has a name twice; metrics are named after tasks, so rename one"
            )
        for name in ("loader", "objectives"):
            if self.tasks and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name}: each task has its own; move it there")
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
    """Teachers besides that one; their probabilities are averaged. They may have other tokenizers and image sizes."""
    cache: CacheConfig | None = None
    """Leave it out to run the teachers at every step."""
    initialise: InitialiseConfig | None = None
    """Leave it out to start the student from scratch, or from its encoders' checkpoints."""
    loader: LoaderConfig = LoaderConfig()
    objectives: ObjectivesConfig = ObjectivesConfig()
    training: TrainingConfig = TrainingConfig()

    @model_validator(mode="after")
    def _check_layers(self) -> DistillConfig:
        inside = [name for name, loss in self.losses.named.items() if loss.READS_LAYERS]
        if self.training.compile and inside:
            raise ValueError(f"training.compile: losses.{inside[0]} reads the layers of encoders; leave one out")
        return self

    @model_validator(mode="after")
    def _check_cache(self) -> DistillConfig:
        if self.cache is not None and all(loss.NEEDS_TEACHER_MODEL for loss in self.losses.named.values()):
            raise ValueError("cache: no loss reads the embeddings that it stores; leave cache out, or name features")
        return self


@dataclass(frozen=True, kw_only=True)
class Task:
    """What a task's batches are made of and what is learnt from them, as plain data."""

    key: str  # of the recipe's section, for errors
    name: str = ""  # prefix of its metrics; empty for a single task
    weight: float = 1.0  # its share of the steps, relative to the others'
    dataset: str | None = None  # URI; None for the stage's own
    loader: LoaderConfig
    objectives: ObjectivesConfig


def tasks_of(key: str, section: PretrainConfig | DistillConfig) -> tuple[Task, ...]:
    """A section's tasks: the section itself, or the several that it names. `key` is the recipe's, for errors."""
    if isinstance(section, DistillConfig) or not section.tasks:
        return (Task(key=key, loader=section.loader, objectives=section.objectives),)
    return tuple(
        Task(
            key=f"{key}.tasks.{number}",
            name=task.name,
            weight=task.weight,
            dataset=task.dataset,
            loader=task.loader,
            objectives=task.objectives,
        )
        for number, task in enumerate(section.tasks)
    )
