"""How a model is trained, and the two stages that train one: `pretrain` and `distill`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from mmflow.config import Config
from mmflow.distillation.config import LessonsConfig
from mmflow.loading.config import LoaderConfig
from mmflow.models.config import ModelConfig
from mmflow.objectives.config import ObjectivesConfig


class OptimizerConfig(Config):
    """AdamW with a linear warm-up and a cosine decay. Norms, biases and scales are not decayed."""

    learning_rate: float = Field(1e-3, gt=0)
    """Peak learning rate."""
    final_learning_rate: float = Field(0.0, ge=0)
    """Where the cosine ends."""
    warmup_steps: int = Field(100, ge=0)
    """Steps of linear warm-up."""
    weight_decay: float = Field(0.05, ge=0)
    """Decoupled weight decay of matrices."""
    beta2: float = Field(0.98, gt=0, lt=1)
    """Decay of the second moment; 0.98 forgives the rare large gradient sooner than 0.999."""
    gradient_clipping: float = Field(1.0, gt=0)
    """Largest norm of the gradient over all parameters."""


class TrainingConfig(Config):
    """Where and how long."""

    epochs: int = Field(10, ge=1)
    """Passes over the split."""
    global_batch_size: int = Field(256, ge=2)
    """Samples of a step over all workers; the same whatever their number."""
    optimizer: OptimizerConfig = OptimizerConfig()
    zero_stage: Literal[0, 1, 2, 3] = 2
    """What DeepSpeed shards over the workers: 1 optimizer states, 2 and gradients, 3 and parameters."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of forward and backward; the optimizer always keeps fp32 masters."""
    num_workers: int = Field(1, ge=1)
    """Ray Train workers, one accelerator each where there are any."""
    cpus_per_worker: int = Field(1, ge=1)
    """CPU cores each worker reserves; also its torch threads where there is no accelerator."""
    checkpoint_every_steps: int = Field(500, ge=1)
    """A killed worker costs at most this many steps."""
    max_restarts: int = Field(3, ge=0)
    """Times that the workers are restarted from the last checkpoint before the stage fails."""
    log_every_steps: int = Field(10, ge=1)
    """A line of the journal is the mean of this many steps."""


class PretrainConfig(Config):
    """Stage `pretrain`: a model from scratch or from encoders that others trained, the teacher."""

    model: ModelConfig
    loader: LoaderConfig = LoaderConfig()
    objectives: ObjectivesConfig = ObjectivesConfig()
    training: TrainingConfig = TrainingConfig()


class DistillConfig(Config):
    """Stage `distill`: a smaller model that learns from the teacher's package and from the pairs. It uses the
    teacher's tokenizer."""

    model: ModelConfig
    lessons: LessonsConfig = LessonsConfig()
    loader: LoaderConfig = LoaderConfig()
    objectives: ObjectivesConfig = ObjectivesConfig()
    training: TrainingConfig = TrainingConfig()
