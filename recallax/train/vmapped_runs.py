"""Seeds of one config trained at once on one device: their steps are one step under `jax.vmap`.

Each has a run folder, a log and checkpoints of its own, in which nothing tells that it was not alone. Initial state and
batches are those of the run trained alone, to the bit; what follows is equal to rounding, since a product of stacked
arrays may sum in another order.
"""

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from itertools import groupby
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from recallax.config import ConfigError, fingerprint
from recallax.tasks.base import Split
from recallax.train.checkpoint import Checkpoints
from recallax.train.curriculum.stages import CurriculumRunner
from recallax.train.log import RunLog
from recallax.train.loop import (
    check_same_data,
    checkpoint_metadata,
    data_digest,
    evaluate_and_log,
    logged_evaluations,
    prefetch,
    run_info,
)
from recallax.train.metrics_logger import MetricsLogger, NonFiniteError
from recallax.train.program import Program
from recallax.train.progress import Progress, make_progress
from recallax.train.run_config import RunConfig
from recallax.train.run_folder import RunFolder
from recallax.train.step import StepMetrics, TrainState
from recallax.train.stop_signals import Interrupted, StopSignals
from recallax.types import Batch


def without_seeds(config: RunConfig) -> RunConfig:
    """What configs share that differ in their seeds alone."""
    return replace(config, train=replace(config.train, seed=0, data_seed=0))


def check_vmappable(configs: Sequence[RunConfig]) -> None:
    """Raises ConfigError for what cannot be stacked; what a device refuses is seen when it is there."""
    first = configs[0]
    if any(without_seeds(config) != without_seeds(first) for config in configs):
        raise ConfigError("only configs that differ in train.seed and train.data_seed alone can be trained at once")
    if first.curriculum is not None:
        raise ConfigError(
            "a run with a curriculum cannot be trained at once with others: its stages may end by its own accuracy; "
            "train each seed alone, without --vmap-seeds"
        )
    lengths = first.task.lengths("train")
    if len(lengths) > 1 and len({config.train.data_seed for config in configs}) > 1:
        raise ConfigError(
            f"rows of {', '.join(map(str, lengths))} tokens cannot be trained at once: seeds draw their lengths "
            f"independently; train each seed alone, without --vmap-seeds, or give them one train.data_seed"
        )


def train_vmapped(
    configs: Sequence[RunConfig], folders: Sequence[Path], names: Sequence[str]
) -> list[NonFiniteError | None]:
    """Train each config in its folder, or go on there; the error of each that had too many non-finite steps.

    Where a kill has left them at different steps, those at one step go on together. Raises what `train` raises.
    """
    check_vmappable(configs)
    program = Program(configs[0])
    if program.mesh.size > 1:
        raise ConfigError(
            f"seeds that are trained at once share one device, and this run takes {program.mesh.size}; set train.data_parallel "
            f"to 1, or train each seed alone, without --vmap-seeds"
        )
    with ExitStack() as stack, StopSignals() as signals:
        display = stack.enter_context(make_progress(configs[0].train.steps))
        display.show_compiling(f"the initial states of {len(configs)} seeds")
        lanes = [
            VmappedRun(program.with_seeds_of(config), folder, name, display, stack)
            for config, folder, name in zip(configs, folders, names, strict=True)
        ]
        for _, group in groupby(sorted(lanes, key=lambda lane: lane.start), key=lambda lane: lane.start):
            _train_vmapped_steps(list(group), signals, display)
        for lane in lanes:
            lane.evaluate("valid", "test")
    return [lane.error for lane in lanes]


class VmappedRun:
    """One seed: its folder, and its state while nothing is stacked."""

    def __init__(self, program: Program, folder: Path, name: str, display: Progress, stack: ExitStack):
        config = program.config
        self._data_digest = data_digest(config)
        run = stack.enter_context(RunFolder(folder, config))
        self.program, self.display = program, display
        self._checkpoints = stack.enter_context(Checkpoints(run.checkpoints, config.train.max_to_keep))
        self._log = stack.enter_context(RunLog(run.log_file, fingerprint(config), tensorboard=run.tensorboard))
        restored = self._checkpoints.restore(program.abstract_state)
        if restored:
            check_same_data(restored, self._data_digest)
        self.state: TrainState = restored.state if restored else program.init_state()
        self.start = int(self.state.step)
        self.error: NonFiniteError | None = None
        self._log.truncate(self.start if restored else -1)
        self._log.write_run_row(self.start, run_info(config, name))
        self._logged_evaluations = logged_evaluations(run.log_file)
        self.curriculum = CurriculumRunner(None)
        self.metrics_logger = MetricsLogger(program, self.curriculum, self._log, display, None)

    def write(self, step: int, reports: Iterable[tuple[StepMetrics, Batch]]) -> None:
        """A row for the steps since the last; a state that is frozen keeps its error, and the others go on."""
        for report, batch in reports:
            self.metrics_logger.add(report, batch)
        try:
            self.metrics_logger.write(step, self.state)
        except NonFiniteError as error:
            self.error = error

    def save(self) -> None:
        step = int(self.state.step)
        if self.error is None and step not in self._checkpoints.steps():
            self._checkpoints.save(step, self.state, checkpoint_metadata(self.program.config, self._data_digest))

    def evaluate(self, *splits: Split) -> None:
        for split in splits if self.error is None else ():
            evaluate_and_log(self.program, self.state, split, self._log, self._logged_evaluations, self.display)

    def save_interrupted(self) -> None:
        """Save, and say that it was asked to stop."""
        self.save()
        self._log.write("event", int(self.state.step), {"event": "interrupted"})


def _train_vmapped_steps(runs: list[VmappedRun], signals: StopSignals, display: Progress) -> None:
    """From the step at which all of them stand to the last; each lane's state is then its own again."""
    program = runs[0].program
    train, evaluate, start = program.config.train, program.config.evaluate, runs[0].start
    step = program.vmapped_step()
    states = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(lane.state for lane in runs))
    pending: list[tuple[StepMetrics, Batch]] = []
    display.show_compiling(f"the training step of {len(runs)} seeds")
    for numbered in zip(*(prefetch(lane.program, lane.curriculum, start, train.steps) for lane in runs), strict=True):
        done = numbered[0][0] + 1
        batch = jax.tree.map(lambda *leaves: np.stack(leaves), *(batch for _, batch in numbered))
        states, report = step(states, batch)
        pending.append((report, _shapes_only(numbered[0][1])))
        logs = done % train.log_every == 0 or done == train.steps
        evaluates = done % evaluate.every == 0 and done < train.steps
        saves = done % train.save_every == 0 or done == train.steps
        stops = signals.stop_requested(done)
        if not (logs or evaluates or saves or stops):
            continue
        for i, lane in enumerate(runs):
            lane.state = _unstack(states, i)
        if logs:
            reports = jax.device_get([report for report, _ in pending])
            shapes = [shape for _, shape in pending]
            for i, lane in enumerate(runs):
                if lane.error is None:
                    lane.write(done, zip((_unstack(report, i) for report in reports), shapes, strict=True))
            pending = []
        for lane in runs:
            if evaluates:
                lane.evaluate("valid")
            if saves:
                lane.save()
        if evaluates or saves:
            for lane in runs:
                lane.metrics_logger.restart_clock()
        if stops:
            for lane in runs:
                lane.save_interrupted()
            raise Interrupted(f"stopped at step {done}; the same command goes on from there")


def _shapes_only(batch: Batch) -> Batch:
    """Its shapes without its memory: a row of the log asks for no more."""
    return jax.tree.map(lambda leaf: np.broadcast_to(np.zeros((), leaf.dtype), leaf.shape), batch)


def _unstack[T](stacked: T, index: int) -> T:
    return jax.tree.map(lambda leaf: leaf[index], stacked)
