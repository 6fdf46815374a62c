"""The schedule of a run with a curriculum: the current stage, and the rule that ends it."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from recallax.train.checkpoint import CheckpointError
from recallax.train.curriculum.stages import STAGE_METRICS, AfterSteps, Curriculum, EndOfRun, Stage
from recallax.train.phases import PhasePosition, PhaseSchedule, PhaseStart


class CurriculumState(NamedTuple):
    """The position of a run in its curriculum."""

    stage_index: int = 0
    start_step: int = 0
    """Number of steps of the run before the stage started."""
    evaluations: tuple[Mapping[str, float], ...] = ()
    """Accuracy and loss of the evaluations in this stage that its rule depends on, oldest first."""

    def to_json(self) -> dict[str, Any]:
        """Return JSON values; floats as text, which is exact and also represents NaN."""
        evaluations = [{name: repr(float(value)) for name, value in row.items()} for row in self.evaluations]
        return {"stage": self.stage_index, "begin": self.start_step, "seen": evaluations}


def curriculum_state_from_json(data: Mapping[str, Any]) -> CurriculumState:
    """Decode the result of `CurriculumState.to_json`."""
    evaluations = tuple({name: float(value) for name, value in row.items()} for row in data["seen"])
    return CurriculumState(int(data["stage"]), int(data["begin"]), evaluations)


class CurriculumSchedule(PhaseSchedule):
    """Moves a run through the stages of its curriculum.

    Args:
        curriculum: The stages.
        state: Position to start from.
    """

    def __init__(self, curriculum: Curriculum, state: CurriculumState | None = None):
        self._stages = curriculum.stages
        self.state = CurriculumState() if state is None else state

    @property
    def position(self) -> PhasePosition:
        return PhasePosition(self.state.stage_index, self.state.start_step)

    @property
    def stage(self) -> Stage:
        """The current stage."""
        return self._stages[self.state.stage_index]

    def restore(self, metadata: Mapping[str, Any], step: int) -> None:
        if "curriculum" in metadata:
            self.state = curriculum_state_from_json(metadata["curriculum"])
        elif step == 0:  # an imported model
            self.state = CurriculumState()
        else:
            raise CheckpointError(
                f"the checkpoint of step {step} does not record the stage of the curriculum; "
                "train the config in a new folder"
            )

    def checkpoint_metadata(self) -> dict[str, Any]:
        return {"curriculum": self.state.to_json()}

    def log_values(self, step: int) -> dict[str, Any]:
        ramps = {f"ramp/{gate}": value for gate, value in self.ramp_values(step).items()}
        return {"stage": self.state.stage_index, **ramps}

    def phase_start(self, step: int, reason: str) -> PhaseStart:
        name = self.stage.name
        row = {"event": "stage", "stage": self.state.stage_index, "name": name, "reason": reason}
        return PhaseStart(row, f"step {step}: stage {name!r} starts ({reason})")

    def add_evaluation(self, metrics: Mapping[str, float], evaluate_phase: Callable[[], dict[str, float]]) -> None:
        if isinstance(self.stage.until, AfterSteps | EndOfRun):
            return
        if self.stage.task is not None:
            metrics = evaluate_phase()
        row = {name: metrics[name] for name in STAGE_METRICS}
        self.state = self.state._replace(evaluations=(*self.state.evaluations, row))

    def phase_end_reason(self, step: int, evaluated: bool) -> str | None:
        rule, stage_steps = self.stage.until, step - self.state.start_step
        reason = None
        if evaluated and stage_steps >= rule.min_duration():
            reason = rule.end_reason(self.state.evaluations)
        return f"after {stage_steps} steps" if reason is None and rule.max_duration() == stage_steps else reason

    def start_next_phase(self, step: int) -> None:
        self.state = CurriculumState(self.state.stage_index + 1, step)

    def ramp_values(self, step: int) -> dict[str, float]:
        """Return the values of the ramped gates in the step that ended at `step`, by pattern."""
        stage_step, ramp_steps = step - 1 - self.state.start_step, self.stage.until.min_duration()
        return {ramp.gate: ramp.value_at(stage_step, ramp_steps) for ramp in self.stage.ramps}
