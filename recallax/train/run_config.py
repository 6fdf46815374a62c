"""The config of a run: everything that determines its results, and nothing else."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import recallax.layers
import recallax.tasks  # noqa: F401  from_json finds config classes among the imported ones
from recallax.config import Config, ConfigError, added_field, require_at_least
from recallax.config_errors import raise_config_errors, run_checks
from recallax.models.lm import LMConfig
from recallax.tasks.base import SPLITS, Task
from recallax.train.curriculum.stages import Curriculum


def _invalid(owner: str, config: Config, names: str, is_valid: Callable[[float], bool], rule: str) -> list[str]:
    """Return messages about the fields in `names` (separated by spaces) that are not valid."""
    values = {name: getattr(config, name) for name in names.split()}
    return [f"{owner}.{name} is {value}; it must be {rule}" for name, value in values.items() if not is_valid(value)]


@dataclass(frozen=True, kw_only=True)
class AdamW(Config):
    """AdamW with linear warm-up and cosine decay (Loshchilov & Hutter 2019)."""

    lr: float = 3e-3
    """Peak learning rate."""
    weight_decay: float = 0.1
    """Decoupled weight decay of parameters of rank 2 and more that do not opt out."""
    b1: float = 0.9
    """Decay of the first moment."""
    b2: float = 0.95
    """Decay of the second moment."""
    eps: float = 1e-8
    """Constant added to the root of the second moment."""
    warmup_ratio: float = 0.05
    """Fraction of the steps over which the learning rate rises linearly from 0."""
    min_lr_ratio: float = 0.1
    """Learning rate at the last step as a fraction of the peak."""
    max_grad_norm: float = 1.0
    """Global norm to which larger gradients are clipped."""

    def __post_init__(self) -> None:
        raise_config_errors(
            _invalid("optim", self, "lr weight_decay", lambda x: 0 <= x < math.inf, "at least 0 and finite")
            + _invalid("optim", self, "eps max_grad_norm", lambda x: 0 < x < math.inf, "above 0 and finite")
            + _invalid("optim", self, "b1 b2", lambda x: 0 <= x < 1, "at least 0 and below 1")
            + _invalid("optim", self, "warmup_ratio min_lr_ratio", lambda x: 0 <= x <= 1, "a fraction from 0 to 1")
        )


@dataclass(frozen=True, kw_only=True)
class Train(Config):
    """Length of the training, batches, seeds, logging, checkpoints and devices."""

    steps: int = 2000
    """Optimizer steps."""
    batch_size: int = 64
    """Rows per optimizer step, over all devices and microbatches."""
    seed: int = 0
    """Seed of initialization and dropout."""
    data_seed: int = 0
    """Seed of the batches."""
    gradient_accumulation_steps: int = 1
    """Microbatches per optimizer step; the result does not depend on it."""
    loss_weights: dict[str, float] = field(default_factory=dict)
    """Coefficient of each loss term by name (the task's terms and the modules' auxiliary ones); 1 where absent."""
    z_loss: float = added_field(0.0)
    """Coefficient of logsumexp(logits)^2 per labelled position (PaLM, arXiv 2204.02311, section 5, uses 1e-4)."""
    log_every: int = 50
    """Steps between rows of the log."""
    save_every: int = 500
    """Steps between checkpoints."""
    max_to_keep: int = 2
    """Number of checkpoints to keep; older ones are deleted."""
    data_parallel: int = 0
    """Devices on the data axis of the mesh; 0: all devices divided by `fsdp`."""
    fsdp: int = 1
    """Devices over which parameters and optimizer state are sharded."""

    def __post_init__(self) -> None:
        positive = "steps batch_size gradient_accumulation_steps log_every save_every max_to_keep fsdp"
        raise_config_errors(
            _invalid("train", self, positive, lambda x: x >= 1, "at least 1")
            + _invalid("train", self, "data_parallel z_loss", lambda x: 0 <= x < math.inf, "at least 0 and finite")
            + _invalid("train", self, "seed data_seed", lambda x: 0 <= x < 2**32, "at least 0 and below 2**32")
        )
        if self.batch_size % self.gradient_accumulation_steps:
            raise ConfigError(
                f"train.batch_size {self.batch_size} is not a multiple of train.gradient_accumulation_steps "
                f"{self.gradient_accumulation_steps}"
            )


@dataclass(frozen=True, kw_only=True)
class Evaluate(Config):
    """Frequency and size of evaluations."""

    every: int = 500
    """Steps between evaluations on the valid split; the test split is evaluated once, at the end."""
    batches: int = 16
    """Batches per evaluation."""
    batch_size: int = 64
    """Rows per batch."""

    def __post_init__(self) -> None:
        require_at_least(1, "evaluate.", every=self.every, batches=self.batches, batch_size=self.batch_size)


@dataclass(frozen=True, kw_only=True)
class RunConfig(Config):
    """A run. Its name is that of the file in `recallax/configs` that returns it."""

    task: Task
    model: LMConfig
    optim: AdamW = AdamW()
    train: Train = Train()
    evaluate: Evaluate = Evaluate()
    curriculum: Curriculum | None = added_field(None)
    """Stages of the training; None: train all parameters on the task in all steps."""

    def __post_init__(self) -> None:
        run_checks(self._check_curriculum, self._check_documents)

    def _check_curriculum(self) -> None:
        if self.curriculum is not None:
            self.curriculum.validate(self.task, self.train.steps, self.evaluate.every)

    def _check_documents(self) -> None:
        """Raise DocumentLayoutError if a task states that its documents do not fit the model."""
        limits = self.model.document_limits
        if not limits.layers:
            return
        stages = () if self.curriculum is None else self.curriculum.stages
        for task in (self.task, *(stage.task for stage in stages if stage.task is not None)):
            prefix_lengths = (
                prefix_length
                for split in SPLITS
                for length in task.lengths(split)
                for prefix_length in task.prefix_lengths(split, length)
            )
            limits.check_task(type(task).__name__, task.document_grid, max(prefix_lengths, default=0))


def tiny_run(config: RunConfig, *, task: Task | None = None, model: LMConfig | None = None) -> RunConfig:
    """Return a run that takes seconds: four steps of eight rows, without a curriculum.

    Args:
        config: The run to shorten.
        task: A smaller task; None for that of `config`.
        model: A smaller model; None for that of `config`.

    Returns:
        The shortened run.
    """
    return RunConfig(
        task=task or config.task,
        model=model or config.model,
        optim=config.optim,
        train=replace(config.train, steps=4, batch_size=8, log_every=2, save_every=2),
        evaluate=Evaluate(every=2, batches=2, batch_size=4),
    )
