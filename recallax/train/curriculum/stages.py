"""A curriculum as data: stages that say what trains, which gates are set, on what, and when the next one begins.

    trains       parameters by name; the others get no update at all, no weight decay, and keep their moments
    ramps        scalar gates that the run sets instead of learning them, from one value to another
    task         what the stage trains on, such as shorter rows; valid and test of the run stay those of the run's task
    until        after a number of steps, or once a metric on valid has been reached or has settled

Adam counts the updates of every parameter by itself, as PyTorch does, so one that wakes late starts like a fresh one;
the learning rate is that of the whole run. Where a run stands (`CurriculumState`) is in its checkpoints, so a run that was
killed goes on in the middle of a stage. Statistics that no gradient trains (a router's bias) move as ever.
"""

import abc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from recallax.config import Config, ConfigError, require_at_least, suggest_name
from recallax.tasks.base import Task

type StageMetric = Literal["accuracy", "loss"]
STAGE_METRICS = ("accuracy", "loss")


class StageEnd(Config, abc.ABC):
    """When a stage ends."""

    @abc.abstractmethod
    def min_duration(self) -> int:
        """Steps that a stage has at least; its ramps reach their end in the last of them."""

    @abc.abstractmethod
    def max_duration(self) -> int | None:
        """Steps after which the next stage begins whatever was seen; None for no end."""

    @abc.abstractmethod
    def end_reason(self, evaluations: Sequence[Mapping[str, float]]) -> str | None:
        """Why the evaluations on valid of this stage, oldest first, end it; None if they do not."""


@dataclass(frozen=True, kw_only=True)
class AfterSteps(StageEnd):
    """A fixed number of steps."""

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
    """The end of the run: the rule of the last stage."""

    def min_duration(self) -> int:
        return 1

    def max_duration(self) -> int | None:
        return None

    def end_reason(self, evaluations: Sequence[Mapping[str, float]]) -> str | None:
        return None


@dataclass(frozen=True, kw_only=True)
class MetricReached(StageEnd):
    """Once a metric on the valid split of the stage's task is as good as a threshold; asked at `evaluate.every`."""

    metric: StageMetric = "accuracy"
    threshold: float
    min_steps: int = 1
    """Steps before which it is not asked."""
    max_steps: int
    """Steps after which the stage ends anyway."""

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
    """Once the best of the last `patience` evaluations is not better than the best before by more than `min_delta`."""

    metric: StageMetric = "loss"
    patience: int = 2
    min_delta: float = 0.0
    min_steps: int = 1
    """Steps before which it is not asked."""
    max_steps: int
    """Steps after which the stage ends anyway."""

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
    """A gate that is set: `start` in the stage's first step, `end` from its least step on, linear between them."""

    gate: str
    """Pattern of its name, such as `*.gates.attention`; every parameter that it matches has one value per layer."""
    start: float
    end: float

    def value_at(self, stage_step: int, ramp_steps: int) -> float:
        """The value in step `stage_step` (from 0) of a stage whose least number of steps is `ramp_steps`."""
        done = stage_step >= ramp_steps - 1
        return self.end if done else self.start + (self.end - self.start) * stage_step / (ramp_steps - 1)


@dataclass(frozen=True, kw_only=True)
class Stage(Config):
    """See the head of the file.

    Patterns are those of a shell (`*` crosses dots) over the names of parameters: `embedding`, `norm.scale`,
    `layers.3.mixer.gates.attention` with the layer's number, or `blocks.all.mixer.gates.attention` with its block's.
    """

    name: str
    trainable: tuple[str, ...] = ("*",)
    """Parameters that train, and with `frozen` those of them that do not; a gate that is ramped never does."""
    frozen: tuple[str, ...] = ()
    ramps: tuple[Ramp, ...] = ()
    task: Task | None = None
    """What it trains on, which no option of the command line reaches into; None is the run's task."""
    loss_weights: dict[str, float] = field(default_factory=dict)
    """Coefficients in place of those in `train.masked_prefix_loss_weights`: an unused router needs no balance."""
    until: StageEnd = EndOfRun()

    def __post_init__(self) -> None:
        if not self.trainable:
            raise ConfigError(f"the stage {self.name!r} trains nothing; `trains` needs at least one pattern, such as *")
        for ramp in self.ramps:
            if ramp.start != ramp.end and self.until.min_duration() < 2:
                raise ConfigError(
                    f"the stage {self.name!r} ramps {ramp.gate!r} from {ramp.start} to {ramp.end} over "
                    f"{self.until.min_duration()} step; a ramp needs a rule with at least 2 steps, or start = end to hold"
                )


@dataclass(frozen=True, kw_only=True)
class Curriculum(Config):
    """Stages in order; the last one takes what is left of the run."""

    stages: tuple[Stage, ...]

    def __post_init__(self) -> None:
        names = [stage.name for stage in self.stages]
        if not names or len(set(names)) < len(names) or not all(names):
            raise ConfigError(f"the stages of a curriculum are {names}; there must be one, and names of their own")
        for number, stage in enumerate(self.stages, 1):
            if isinstance(stage.until, EndOfRun) != (number == len(names)):
                raise ConfigError(
                    f"stage {number} of {len(names)}, {stage.name!r}, is until {type(stage.until).__name__}; the last "
                    "stage is until Finish, the end of the run, and every other one until After, Reached or Settled"
                )

    def validate(self, task: Task, steps: int, evaluate_every: int) -> None:
        """Whether it fits a run: its task, its steps, and how often it evaluates. Raises ConfigError."""
        most = {stage.name: stage.until.max_duration() or 0 for stage in self.stages[:-1]}
        if sum(most.values()) >= steps:
            raise ConfigError(
                f"train.steps is {steps}, and the stages before the last may take {sum(most.values())} {most}; "
                "there must be a step left: raise train.steps or shorten a stage"
            )
        for stage in self.stages:
            if not isinstance(stage.until, AfterSteps | EndOfRun) and most[stage.name] < evaluate_every:
                raise ConfigError(
                    f"the stage {stage.name!r} ends after at most {most[stage.name]} steps, and evaluate.every is "
                    f"{evaluate_every}, so its rule would never be asked; evaluate more often, or use After"
                )
            if stage.task is not None and stage.task.vocab_size > task.vocab_size:
                raise ConfigError(
                    f"the task of the stage {stage.name!r} has {stage.task.vocab_size} token ids and the run's "
                    f"{task.vocab_size}; a stage may not need more, or the run's task must have as many"
                )


class CurriculumState(NamedTuple):
    """Where a run stands in its curriculum."""

    stage_index: int = 0
    start_step: int = 0
    """Step at which the stage began."""
    evaluations: tuple[Mapping[str, float], ...] = ()
    """Accuracy and loss of the evaluations in this stage that its rule looks at."""

    def to_json(self) -> dict[str, Any]:
        seen = [{name: repr(float(value)) for name, value in row.items()} for row in self.evaluations]
        return {"stage": self.stage_index, "begin": self.start_step, "seen": seen}  # repr: exact, and JSON has no NaN


def curriculum_state_from_json(data: Mapping[str, Any]) -> CurriculumState:
    """What `to_json` wrote."""
    seen = tuple({name: float(value) for name, value in row.items()} for row in data["seen"])
    return CurriculumState(int(data["stage"]), int(data["begin"]), seen)


INITIAL_CURRICULUM_STATE = CurriculumState()


class CurriculumRunner:
    """Takes a run through its curriculum; without one, through a single stage that never ends."""

    def __init__(self, curriculum: Curriculum | None, state: CurriculumState = INITIAL_CURRICULUM_STATE):
        self._stages = (Stage(name="all"),) if curriculum is None else curriculum.stages
        self.state = state

    @property
    def stage(self) -> Stage:
        """The stage that the run is in."""
        return self._stages[self.state.stage_index]

    @property
    def needs_evaluation(self) -> bool:
        """Whether the stage's rule looks at evaluations."""
        return not isinstance(self.stage.until, AfterSteps | EndOfRun)

    def add_evaluation(self, metrics: Mapping[str, float]) -> None:
        """An evaluation of the stage's task on valid."""
        row = {name: metrics[name] for name in STAGE_METRICS}
        self.state = self.state._replace(evaluations=(*self.state.evaluations, row))

    def stage_end_reason(self, step: int, evaluated: bool) -> str | None:
        """Why the stage ends after `step` steps of the run, of which the last was evaluated or not; None if not."""
        rule, within = self.stage.until, step - self.state.start_step
        reason = rule.end_reason(self.state.evaluations) if evaluated and within >= rule.min_duration() else None
        return f"after {within} steps" if reason is None and rule.max_duration() == within else reason

    def start_next_stage(self, step: int) -> None:
        """Begin the next stage after `step` steps of the run."""
        self.state = CurriculumState(self.state.stage_index + 1, step)

    def ramp_values(self, step: int) -> dict[str, float]:
        """The values that gates had in the step before `step`, by pattern."""
        within, steps = step - 1 - self.state.start_step, self.stage.until.min_duration()
        return {ramp.gate: ramp.value_at(within, steps) for ramp in self.stage.ramps}


def _improvement(metric: str, new: float, old: float) -> float:
    return new - old if metric == "accuracy" else old - new


def _validate_metric_rule(rule: MetricReached | MetricPlateau) -> None:
    if rule.metric not in STAGE_METRICS:
        raise ConfigError(
            f"{type(rule).__name__}.metric is {rule.metric!r}{suggest_name(rule.metric, list(STAGE_METRICS))}"
        )
    if not 1 <= rule.min_steps <= rule.max_steps:
        raise ConfigError(
            f"{type(rule).__name__} ends a stage after {rule.min_steps} to {rule.max_steps} steps; min_steps must be at "
            "least 1 and at most max_steps"
        )
