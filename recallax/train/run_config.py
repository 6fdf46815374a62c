"""One run as a value: everything that decides its numbers, and nothing else."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import recallax.layers
import recallax.tasks  # noqa: F401  reading a config from JSON needs every config class to be known
from recallax.config import Config, ConfigError, added_field
from recallax.models.lm import LMConfig
from recallax.tasks.base import Task
from recallax.train.curriculum.stages import Curriculum


def _validate_fields(owner: str, config: Config, names: str, holds: Callable[[float], bool], rule: str) -> None:
    for name in names.split():
        if not holds(getattr(config, name)):
            raise ConfigError(f"{owner}.{name} is {getattr(config, name)}; it must be {rule}")


@dataclass(frozen=True, kw_only=True)
class AdamW(Config):
    """AdamW with linear warm-up and cosine decay (Loshchilov & Hutter 2019)."""

    lr: float = 3e-3
    """Peak learning rate."""
    weight_decay: float = 0.1
    """Decoupled decay, on parameters of rank 2 and more that do not opt out."""
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    warmup_ratio: float = 0.05
    """Fraction of the steps over which the rate rises linearly from 0."""
    min_lr_ratio: float = 0.1
    """Rate at the last step as a fraction of the peak."""
    max_grad_norm: float = 1.0
    """Largest global norm of the gradient."""

    def __post_init__(self) -> None:
        _validate_fields("optim", self, "lr weight_decay", lambda x: 0 <= x < math.inf, "at least 0 and finite")
        _validate_fields("optim", self, "eps max_grad_norm", lambda x: 0 < x < math.inf, "above 0 and finite")
        _validate_fields("optim", self, "b1 b2", lambda x: 0 <= x < 1, "at least 0 and below 1")
        _validate_fields("optim", self, "warmup_ratio min_lr_ratio", lambda x: 0 <= x <= 1, "a fraction from 0 to 1")


@dataclass(frozen=True, kw_only=True)
class Train(Config):
    """How long, on what, and how to spread it over devices."""

    steps: int = 2000
    batch_size: int = 64
    """Rows per optimizer step, over all devices and microbatches."""
    seed: int = 0
    """Seed of initialisation and dropout."""
    data_seed: int = 0
    """Seed of the task's streams."""
    gradient_accumulation_steps: int = 1
    """Microbatches per optimizer step; the result is that of the whole batch."""
    loss_weights: dict[str, float] = field(default_factory=dict)
    """Coefficient of each loss term by name (the task's terms and the modules' auxiliary ones); 1 where absent."""
    z_loss: float = added_field(0.0)
    """Coefficient of logsumexp(logits)^2 per labelled position (PaLM, arXiv 2204.02311, section 5, uses 1e-4)."""
    log_every: int = 50
    save_every: int = 500
    max_to_keep: int = 2
    """Newest checkpoints to keep."""
    data_parallel: int = 0
    """Devices on the data axis of the mesh; 0 takes all that the fsdp axis leaves."""
    fsdp: int = 1
    """Devices over which parameters and optimizer state are sharded."""

    def __post_init__(self) -> None:
        positive = "steps batch_size gradient_accumulation_steps log_every save_every max_to_keep fsdp"
        _validate_fields("train", self, positive, lambda x: x >= 1, "at least 1")
        _validate_fields("train", self, "data_parallel z_loss", lambda x: 0 <= x < math.inf, "at least 0 and finite")
        _validate_fields("train", self, "seed data_seed", lambda x: 0 <= x < 2**32, "at least 0 and below 2**32")
        if self.batch_size % self.gradient_accumulation_steps:
            raise ConfigError(
                f"train.batch_size {self.batch_size} is not a multiple of train.gradient_accumulation_steps {self.gradient_accumulation_steps}"
            )


@dataclass(frozen=True, kw_only=True)
class Evaluate(Config):
    """When to evaluate, and on how much."""

    every: int = 500
    """Steps between evaluations on the valid split; the test split is read once, at the end."""
    batches: int = 16
    batch_size: int = 64

    def __post_init__(self) -> None:
        _validate_fields("evaluate", self, "every batches batch_size", lambda x: x >= 1, "at least 1")


@dataclass(frozen=True, kw_only=True)
class RunConfig(Config):
    """A run; the file in `recallax/configs` that returns it is its name."""

    task: Task
    model: LMConfig
    optim: AdamW = AdamW()
    train: Train = Train()
    evaluate: Evaluate = Evaluate()
    curriculum: Curriculum | None = added_field(None)
    """Stages; None trains everything on the task from the first step."""

    def __post_init__(self) -> None:
        if self.curriculum is not None:
            self.curriculum.validate(self.task, self.train.steps, self.evaluate.every)


def tiny_run(config: RunConfig, *, task: Task | None = None, model: LMConfig | None = None) -> RunConfig:
    """The same run cut to seconds: four steps of eight rows, on a smaller task or model where one is given."""
    return RunConfig(
        task=task or config.task,
        model=model or config.model,
        optim=config.optim,
        train=replace(config.train, steps=4, batch_size=8, log_every=2, save_every=2),
        evaluate=Evaluate(every=2, batches=2, batch_size=4),
    )
