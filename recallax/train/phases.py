"""Phases of a run: the interface between the training loop and code that changes what a run trains.

Most runs have one phase, in which every parameter trains on the task of the run. A run with a curriculum has one phase
per stage; `recallax.train.curriculum` implements it and is imported only for such runs.
"""

import abc
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import optax
from flax import nnx
from jaxtyping import Array, Int

from recallax.train.optimizer import make_optimizer
from recallax.train.run_config import RunConfig


class PhasePosition(NamedTuple):
    """The phase that a run is in."""

    index: int = 0
    """Number of the phase, from 0."""
    start_step: int = 0
    """Number of steps of the run before the phase started."""


class PhaseStart(NamedTuple):
    """The record of the start of a phase."""

    row: dict[str, Any]
    """Values of the "event" row of the log."""
    note: str
    """Text for the display."""


class Phase(abc.ABC):
    """The task, the loss weights and the trained parameters of one phase.

    Trees of parameters are plain dicts with the structure of `TrainState.params`.
    """

    config: RunConfig
    """The config of the run, with the task and the loss weights of the phase."""

    @abc.abstractmethod
    def make_optimizer(self, params: nnx.State) -> optax.GradientTransformation:
        """Return the optimizer of the phase.

        Args:
            params: The parameters, or their abstract values; only their metadata is read.

        Returns:
            A gradient transformation. Its state has the same structure in all phases of a run.
        """

    @abc.abstractmethod
    def set_parameters(self, params: dict, phase_step: Int[Array, ""]) -> dict:
        """Return the parameters that a step starts from.

        Args:
            params: Parameters after the previous step.
            phase_step: Number of steps of this phase before this one.

        Returns:
            The parameters, some of them set by the phase.
        """

    @abc.abstractmethod
    def stop_gradients(self, params: dict) -> dict:
        """Return the parameters with `jax.lax.stop_gradient` applied to those that do not train."""

    @abc.abstractmethod
    def restore_frozen(self, updated: dict, previous: dict) -> dict:
        """Return `updated` where parameters train, and `previous`, bit for bit, where they do not.

        Args:
            updated: Parameters after a step.
            previous: Parameters before it.

        Returns:
            The parameters.
        """


class FullTraining(Phase):
    """Every parameter trains on the task of the run."""

    def __init__(self, config: RunConfig):
        self.config = config

    def make_optimizer(self, params: nnx.State) -> optax.GradientTransformation:
        return make_optimizer(self.config, params)

    def set_parameters(self, params: dict, phase_step: Int[Array, ""]) -> dict:
        return params

    def stop_gradients(self, params: dict) -> dict:
        return params

    def restore_frozen(self, updated: dict, previous: dict) -> dict:
        return updated


class PhaseSchedule(abc.ABC):
    """The transitions between the phases of a run, and the phase that the run is in."""

    @property
    @abc.abstractmethod
    def position(self) -> PhasePosition:
        """The current phase."""

    @abc.abstractmethod
    def restore(self, metadata: Mapping[str, Any], step: int) -> None:
        """Continue from a checkpoint.

        Args:
            metadata: Metadata of the checkpoint, with what `checkpoint_metadata` returned.
            step: Step of the checkpoint.

        Raises:
            CheckpointError: The metadata lacks the position in the schedule.
        """

    @abc.abstractmethod
    def checkpoint_metadata(self) -> dict[str, Any]:
        """Return JSON values from which `restore` continues."""

    @abc.abstractmethod
    def log_values(self, step: int) -> dict[str, Any]:
        """Return additional values of the "train" row that is written after `step` steps."""

    @abc.abstractmethod
    def phase_start(self, step: int, reason: str) -> PhaseStart | None:
        """Describe the start of the current phase.

        Args:
            step: Number of steps before it.
            reason: Reason for which the previous phase ended.

        Returns:
            The record to log, or None for a run of one phase.
        """

    @abc.abstractmethod
    def add_evaluation(self, metrics: Mapping[str, float], evaluate_phase: Callable[[], dict[str, float]]) -> None:
        """Record an evaluation on the valid split.

        Args:
            metrics: Metrics on the task of the run.
            evaluate_phase: Computes the metrics on the task of the current phase.
        """

    @abc.abstractmethod
    def phase_end_reason(self, step: int, evaluated: bool) -> str | None:
        """Return why the current phase ends, or None if it continues.

        Args:
            step: Number of steps of the run so far.
            evaluated: True if `add_evaluation` was called after this step.
        """

    @abc.abstractmethod
    def start_next_phase(self, step: int) -> None:
        """Enter the next phase after `step` steps of the run."""


class SinglePhase(PhaseSchedule):
    """A schedule of one phase that never ends."""

    @property
    def position(self) -> PhasePosition:
        return PhasePosition()

    def restore(self, metadata: Mapping[str, Any], step: int) -> None:
        pass

    def checkpoint_metadata(self) -> dict[str, Any]:
        return {}

    def log_values(self, step: int) -> dict[str, Any]:
        return {}

    def phase_start(self, step: int, reason: str) -> PhaseStart | None:
        return None

    def add_evaluation(self, metrics: Mapping[str, float], evaluate_phase: Callable[[], dict[str, float]]) -> None:
        pass

    def phase_end_reason(self, step: int, evaluated: bool) -> str | None:
        return None

    def start_next_phase(self, step: int) -> None:
        raise RuntimeError("a run of one phase has no next phase")
