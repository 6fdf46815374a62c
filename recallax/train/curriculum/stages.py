"""Configs of a curriculum: what each stage trains, on which task, and when the next stage starts.

A stage selects the parameters that train. Frozen parameters get no update and no weight decay, and keep their moments.
A stage may also ramp scalar gates, which it sets from one value to another instead of training them, and train on its
own task, such as shorter rows. The valid and test splits of the run remain those of the task of the run.

Adam counts the updates of every parameter separately, as PyTorch does, so the first update of a parameter that starts
to train late is that of a fresh optimizer. The learning rate schedule is that of the whole run. Statistics that are not
trained by gradient, such as the bias of a router, are updated in all stages. Checkpoints contain the position in the
curriculum, so an interrupted run resumes in the middle of a stage.
"""

import abc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from recallax.config import Config, ConfigError, require_at_least, suggest_name
from recallax.tasks.base import Task

type StageMetric = Literal["accuracy", "loss"]
STAGE_METRICS = ("accuracy", "loss")


class StageEnd(Config, abc.ABC):
    """Base class of the rules that end a stage."""

    @abc.abstractmethod
    def min_duration(self) -> int:
        """Return the minimum number of steps of the stage; its ramps reach their end in the last of them."""

    @abc.abstractmethod
    def max_duration(self) -> int | None:
        """Return the maximum number of steps of the stage; None for no maximum."""

    @abc.abstractmethod
    def end_reason(self, evaluations: Sequence[Mapping[str, float]]) -> str | None:
        """Return why the evaluations end the stage.

        Args:
            evaluations: Metrics on the valid split in this stage, oldest first.

        Returns:
            The reason, or None if the stage continues.
        """


@dataclass(frozen=True, kw_only=True)
class AfterSteps(StageEnd):
    """Ends a stage after a fixed number of steps."""

    steps: int

    def __post_init__(self) -> None:
        require_at_least(1, "AfterSteps.", steps=self.steps)

    def min_duration(self) -> int:
        return self.steps

    def max_duration(self) -> int:
        return self.steps

    def end_reason(self, evaluations: Sequence[Mapping[str, float]]) -> str | None:
        return None


@dataclass(frozen=True, kw_only=True)
class EndOfRun(StageEnd):
    """Ends a stage at the end of the run; the rule of the last stage."""

    def min_duration(self) -> int:
        return 1

    def max_duration(self) -> int | None:
        return None

    def end_reason(self, evaluations: Sequence[Mapping[str, float]]) -> str | None:
        return None


@dataclass(frozen=True, kw_only=True)
class MetricReached(StageEnd):
    """Ends a stage when a metric on the valid split of its task reaches a threshold; checked every `evaluate.every`."""

    metric: StageMetric = "accuracy"
    threshold: float
    min_steps: int = 1
    """Minimum number of steps of the stage."""
    max_steps: int
    """Maximum number of steps of the stage."""

    def __post_init__(self) -> None:
        _validate_metric_rule(self)

    def min_duration(self) -> int:
        return self.min_steps

    def max_duration(self) -> int:
        return self.max_steps

    def end_reason(self, evaluations: Sequence[Mapping[str, float]]) -> str | None:
        if not evaluations or not _improvement(self.metric, evaluations[-1][self.metric], self.threshold) >= 0:
            return None
        return f"valid {self.metric} {evaluations[-1][self.metric]:.4f} reached {self.threshold:g}"


@dataclass(frozen=True, kw_only=True)
class MetricPlateau(StageEnd):
    """Ends a stage when the last `patience` evaluations do not improve the best one before them by over `min_delta`."""

    metric: StageMetric = "loss"
    patience: int = 2
    """Number of evaluations without improvement."""
    min_delta: float = 0.0
    """Smallest change of the metric that counts as an improvement."""
    min_steps: int = 1
    """Minimum number of steps of the stage."""
    max_steps: int
    """Maximum number of steps of the stage."""

    def __post_init__(self) -> None:
        _validate_metric_rule(self)
        require_at_least(1, "MetricPlateau.", patience=self.patience)
        require_at_least(0, "MetricPlateau.", min_delta=self.min_delta)

    def min_duration(self) -> int:
        return self.min_steps

    def max_duration(self) -> int:
        return self.max_steps

    def end_reason(self, evaluations: Sequence[Mapping[str, float]]) -> str | None:
        values = [row[self.metric] for row in evaluations]
        old, new = values[: -self.patience], values[-self.patience :]
        best = max if self.metric == "accuracy" else min
        if not old or _improvement(self.metric, best(new), best(old)) > self.min_delta:
            return None
        return f"valid {self.metric} settled at {best(new):.4f} after {best(old):.4f}"


@dataclass(frozen=True, kw_only=True)
class Ramp(Config):
    """A scalar gate that a stage sets, linearly from `start` to `end` over the minimum duration of the stage."""

    gate: str
    """Shell pattern of parameter names, such as `*.gates.attention`; matches must have one value per layer."""
    start: float
    """Value in the first step of the stage."""
    end: float
    """Value in the last step of the minimum duration, and in all later steps of the stage."""

    def value_at(self, stage_step: int, ramp_steps: int) -> float:
        """Return the value in a step.

        Args:
            stage_step: Number of the step in the stage, from 0.
            ramp_steps: Minimum number of steps of the stage.

        Returns:
            The value of the gate.
        """
        done = stage_step >= ramp_steps - 1
        return self.end if done else self.start + (self.end - self.start) * stage_step / (ramp_steps - 1)


@dataclass(frozen=True, kw_only=True)
class Stage(Config):
    """One stage: the parameters that train, the task, and the rule that ends it.

    Patterns are shell patterns (`*` also matches dots) over the names of parameters: `embedding`, `norm.scale`,
    `layers.3.mixer.gates.attention` by the number of the layer, or `blocks.all.mixer.gates.attention` by its block.
    """

    name: str
    """Name of the stage in the log."""
    trainable: tuple[str, ...] = ("*",)
    """Patterns of the parameters that train."""
    frozen: tuple[str, ...] = ()
    """Patterns of the parameters that do not train although `trainable` matches them; ramped gates never train."""
    ramps: tuple[Ramp, ...] = ()
    """Gates that the stage sets."""
    task: Task | None = None
    """Task of the stage, which has no options on the command line; None: use the task of the run."""
    loss_weights: dict[str, float] = field(default_factory=dict)
    """Coefficients of loss terms that replace those in `train.loss_weights`, such as 0 for an unused router."""
    until: StageEnd = EndOfRun()
    """Rule that ends the stage."""

    def __post_init__(self) -> None:
        if not self.trainable:
            raise ConfigError(f"stage {self.name!r} trains nothing; `trainable` needs at least one pattern, such as *")
        for ramp in self.ramps:
            if ramp.start != ramp.end and self.until.min_duration() < 2:
                raise ConfigError(
                    f"stage {self.name!r} ramps {ramp.gate!r} from {ramp.start} to {ramp.end} over "
                    f"{self.until.min_duration()} step; use a rule with at least 2 steps, or set start = end"
                )


@dataclass(frozen=True, kw_only=True)
class Curriculum(Config):
    """Stages in order; the last one lasts until the end of the run."""

    stages: tuple[Stage, ...]

    def __post_init__(self) -> None:
        names = [stage.name for stage in self.stages]
        if not names or len(set(names)) < len(names) or not all(names):
            raise ConfigError(
                f"the stages of the curriculum are {names}; there must be at least one, and names must be unique"
            )
        for number, stage in enumerate(self.stages, 1):
            if isinstance(stage.until, EndOfRun) != (number == len(names)):
                raise ConfigError(
                    f"stage {number} of {len(names)}, {stage.name!r}, has until = {type(stage.until).__name__}; the "
                    "last stage must have EndOfRun, and every other one AfterSteps, MetricReached or MetricPlateau"
                )

    def validate(self, task: Task, steps: int, evaluate_every: int) -> None:
        """Check that the curriculum fits a run.

        Args:
            task: Task of the run.
            steps: Number of steps of the run.
            evaluate_every: Number of steps between evaluations.

        Raises:
            ConfigError: The stages before the last may take all steps, a rule would never be checked, or the task of a
                stage needs more token ids than the task of the run.
        """
        max_steps = {stage.name: stage.until.max_duration() or 0 for stage in self.stages[:-1]}
        if sum(max_steps.values()) >= steps:
            raise ConfigError(
                f"train.steps is {steps}, and the stages before the last may take {sum(max_steps.values())} "
                f"{max_steps}; at least one step must remain: raise train.steps or shorten a stage"
            )
        for stage in self.stages:
            if not isinstance(stage.until, AfterSteps | EndOfRun) and max_steps[stage.name] < evaluate_every:
                raise ConfigError(
                    f"stage {stage.name!r} ends after at most {max_steps[stage.name]} steps, and evaluate.every is "
                    f"{evaluate_every}, so its rule would never be checked; evaluate more often, or use AfterSteps"
                )
            if stage.task is not None and stage.task.vocab_size > task.vocab_size:
                raise ConfigError(
                    f"the task of stage {stage.name!r} has {stage.task.vocab_size} token ids and the task of the run "
                    f"{task.vocab_size}; a stage must not need more"
                )


def _improvement(metric: str, new: float, old: float) -> float:
    return new - old if metric == "accuracy" else old - new


def _validate_metric_rule(rule: MetricReached | MetricPlateau) -> None:
    if rule.metric not in STAGE_METRICS:
        raise ConfigError(
            f"{type(rule).__name__}.metric is {rule.metric!r}{suggest_name(rule.metric, list(STAGE_METRICS))}"
        )
    if not 1 <= rule.min_steps <= rule.max_steps:
        raise ConfigError(
            f"{type(rule).__name__}.min_steps is {rule.min_steps} and max_steps is {rule.max_steps}; min_steps must be "
            "at least 1 and at most max_steps"
        )
