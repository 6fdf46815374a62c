"""Runs of one config with different seeds, trained at once on one device with `jax.vmap`.

Each run has its own folder, log and checkpoints, which do not differ from those of a run trained alone. Initial state
and batches are bit-equal to those of the run trained alone. Steps are equal up to rounding, because a batched matrix
product may sum in another order.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from itertools import groupby
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from recallax.config import ConfigError
from recallax.train.loop import run_steps
from recallax.train.metrics_logger import NonFiniteError
from recallax.train.program import Program
from recallax.train.progress import make_progress
from recallax.train.resource_checks import check_disk_space, explain_out_of_memory
from recallax.train.run_config import RunConfig
from recallax.train.step import StepMetrics
from recallax.train.step_executor import StepExecutor
from recallax.train.stop_signals import StopSignals
from recallax.train.training_run import TrainingRun, open_run_files
from recallax.train.watchdog import Watchdog
from recallax.types import Batch


def without_seeds(config: RunConfig) -> RunConfig:
    """Return the config with both seeds set to 0; equal for configs that differ in their seeds only."""
    return replace(config, train=replace(config.train, seed=0, data_seed=0))


def check_vmappable(configs: Sequence[RunConfig]) -> None:
    """Check that runs can be trained at once; `train_vmapped` also checks the device.

    Args:
        configs: Configs of the runs.

    Raises:
        ConfigError: They differ in more than their seeds, have a curriculum, or draw rows of different lengths.
    """
    first = configs[0]
    if any(without_seeds(config) != without_seeds(first) for config in configs):
        raise ConfigError(
            "the configs differ in more than their seeds; only configs that differ in train.seed and train.data_seed "
            "alone can be trained at once"
        )
    if first.curriculum is not None:
        raise ConfigError(
            "a run with a curriculum cannot be trained at once with others, because its stages may end at different "
            "steps; train each seed alone, without --vmap-seeds"
        )
    lengths = first.task.lengths("train")
    if len(lengths) > 1 and len({config.train.data_seed for config in configs}) > 1:
        raise ConfigError(
            f"rows of {', '.join(map(str, lengths))} tokens cannot be trained at once, because each seed draws its own "
            "lengths; train each seed alone, without --vmap-seeds, or set one train.data_seed for all"
        )


def train_vmapped(
    configs: Sequence[RunConfig],
    folders: Sequence[Path],
    names: Sequence[str],
    *,
    hang_seconds: float | None = None,
) -> list[NonFiniteError | None]:
    """Train runs that differ in their seeds, each in its folder, or resume them.

    Runs that were interrupted at different steps train in groups of equal steps.

    Args:
        configs: Configs of the runs.
        folders: Folders of the runs.
        names: Names of the runs in their logs.
        hang_seconds: End the process if no step finishes for this time, as in `recallax.train.train`.

    Returns:
        For each run the error that ended it, or None.

    Raises:
        ConfigError: The configs cannot be trained at once, or take more than one device.
        RunFolderError: A folder cannot be used, or contains another run.
        CheckpointError: A checkpoint cannot be restored or written, or the data has changed.
        OutOfMemoryError: The memory of the host or of the device does not suffice.
        Interrupted: SIGINT or SIGTERM arrived; checkpoints were written first.
    """
    check_vmappable(configs)
    program = Program(configs[0])
    if program.mesh.size > 1:
        raise ConfigError(
            f"seeds that are trained at once share one device, and this run takes {program.mesh.size}; set "
            "train.data_parallel to 1, or train each seed alone, without --vmap-seeds"
        )
    programs = [program.with_seeds_of(config) for config in configs]
    with ExitStack() as stack, explain_out_of_memory(configs[0]):
        files = [open_run_files(*pair, stack) for pair in zip(programs, folders, strict=True)]
        display = stack.enter_context(make_progress(configs[0].train.steps))
        signals = stack.enter_context(StopSignals())
        watchdog = stack.enter_context(Watchdog(hang_seconds))
        display.show_compiling(f"the initial states of {len(configs)} seeds")
        runs = [TrainingRun(*opened, display) for opened in zip(programs, files, names, strict=True)]
        if any(run.start_step < configs[0].train.steps for run in runs):
            check_disk_space(program, [opened.checkpoints for opened in files])
        by_step = sorted(runs, key=lambda run: run.start_step)
        for _, group in groupby(by_step, key=lambda run: run.start_step):
            executor = VmappedExecutor(list(group))
            display.show_compiling(f"the training step of {len(executor.runs)} seeds")
            run_steps(executor, signals, watchdog)
            executor.update_states()
        with watchdog.pause():
            for run in runs:
                if run.error is None:
                    run.evaluate("valid")
                    run.evaluate("test")
    return [run.error for run in runs]


class VmappedExecutor(StepExecutor):
    """Steps of several runs as one step under `jax.vmap`.

    Args:
        runs: Runs at the same step.
    """

    def __init__(self, runs: Sequence[TrainingRun]):
        super().__init__(runs)
        self._step_fn = runs[0].program.vmapped_step()
        self._states = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(run.state for run in runs))
        self._pending: list[tuple[StepMetrics, Batch]] = []

    def _start_step(self, batches: Sequence[Batch]) -> jax.Array:
        batch = jax.tree.map(lambda *leaves: np.stack(leaves), *batches)
        self._states, metrics = self._step_fn(self._states, batch)
        self._pending.append((metrics, _without_memory(batches[0])))
        return metrics.finite

    def _stop(self, run: TrainingRun, step: int) -> None:
        self.update_states()
        run.error = run.log_frozen(step)  # the other runs continue

    def write_metrics(self, step: int) -> None:
        self.update_states()
        for run in self.active_runs:
            run.metrics.write(step, run.state)

    def update_states(self) -> None:
        stacked = jax.device_get([metrics for metrics, _ in self._pending])
        batches = [batch for _, batch in self._pending]
        self._pending = []
        for index, run in enumerate(self.runs):
            run.state = _select_run(self._states, index)
            for metrics, batch in zip(stacked, batches, strict=True) if run.error is None else ():
                run.metrics.add(_select_run(metrics, index), batch)


def _without_memory(batch: Batch) -> Batch:
    """Arrays of the same shapes that take no memory; the log needs the shapes only."""
    return jax.tree.map(lambda leaf: np.broadcast_to(np.zeros((), leaf.dtype), leaf.shape), batch)


def _select_run[T](stacked: T, index: int) -> T:
    return jax.tree.map(lambda leaf: leaf[index], stacked)
