"""The training loop, and restoring and evaluating what it trained."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from recallax.config import from_json, require_at_least
from recallax.tasks.base import Split, Task
from recallax.train.checkpoint import Checkpoints, RestoredCheckpoint
from recallax.train.mesh import make_reader_mesh
from recallax.train.program import Program
from recallax.train.progress import make_progress
from recallax.train.resource_checks import (
    check_disk_space,
    check_state_memory,
    check_step_memory,
    explain_out_of_memory,
)
from recallax.train.run_config import RunConfig
from recallax.train.run_folder import RunFolderError, read_config
from recallax.train.step_executor import SingleRunExecutor, StepExecutor
from recallax.train.stop_signals import Interrupted, StopSignals
from recallax.train.training_run import TrainingRun, open_run_files
from recallax.train.watchdog import Watchdog
from recallax.types import Batch

MAX_STEPS_IN_FLIGHT = 2
"""Number of steps that may be computing while the host starts the next one."""


def train(
    config: RunConfig,
    folder: Path,
    *,
    name: str | None = None,
    profile: bool = False,
    hang_seconds: float | None = None,
) -> dict[str, float]:
    """Train a run in a folder, or resume it from its newest checkpoint there, and evaluate it.

    Args:
        config: Config of the run.
        folder: Folder of the run, which is created if it does not exist.
        name: Name of the run in its log; None for the name of the folder.
        profile: Write a profiler trace of a few steps, and log the model FLOPs utilization.
        hang_seconds: Time, at least ten times the median time of a step, without a finished step after which the
            process ends with `recallax.train.watchdog.EXIT_HUNG`. None: never.

    Returns:
        Metrics on the test split, as `recallax.train.evaluate.evaluate` returns them.

    Raises:
        ConfigError: The config does not fit the devices, the data or the model.
        RunFolderError: The folder cannot be used, or contains another run.
        CheckpointError: No checkpoint can be restored or written, the checkpoints were removed or are those of another
            config, or the data has changed.
        NonFiniteError: Too many steps in a row were not finite.
        OutOfMemoryError: The memory of the host or of a device does not suffice.
        Interrupted: SIGINT or SIGTERM arrived; a checkpoint was written first.
    """
    program = Program(config)  # before the folder is created: a config that cannot run must not leave one
    program.check_phases()
    check_state_memory(program)
    with ExitStack() as stack, explain_out_of_memory(config):
        files = open_run_files(program, folder, stack)
        display = stack.enter_context(make_progress(config.train.steps))
        signals = stack.enter_context(StopSignals())
        watchdog = stack.enter_context(Watchdog(hang_seconds))
        display.show_compiling("the initial state")
        run = TrainingRun(program, files, name or folder.name, display, profile=profile)
        stack.callback(run.metrics.close)
        if run.start_step < config.train.steps:
            check_disk_space(program, [files.checkpoints])
            display.show_compiling("the training step")
            phase = run.schedule.position.index
            check_step_memory(program, program.batch(run.start_step, phase), phase)
        run_steps(SingleRunExecutor(run), signals, watchdog)
        run.metrics.close()
        with watchdog.pause():
            run.evaluate("valid")
            return run.evaluate("test")


def run_steps(executor: StepExecutor, signals: StopSignals, watchdog: Watchdog) -> None:
    """Train runs from the step that all of them are at to the last step, with logging, evaluation and checkpoints.

    Args:
        executor: The runs and their steps.
        signals: Requests to stop.
        watchdog: Detects a hang.

    Raises:
        NonFiniteError: The only run has too many non-finite steps in a row.
        Interrupted: A signal arrived; all runs were saved first.
    """
    runs = executor.runs
    config, start = runs[0].program.config, runs[0].start_step
    last, log_every, save_every = config.train.steps, config.train.log_every, config.train.save_every
    for index, batches in enumerate(zip(*(prefetch(run, last) for run in runs), strict=True), start):
        for run in runs:
            run.metrics.before_step(index - start)
        watchdog.step_starts((runs[0].schedule.position.index, batches[0].tokens.shape))
        executor.step(batches)
        step = index + 1
        log_due = step % log_every == 0 or step == last
        evaluation_due = step % config.evaluate.every == 0 and step < last
        save_due = step % save_every == 0 or step == last
        stop = signals.stop_requested(step)
        executor.wait(step, 0 if log_due or evaluation_due or save_due or stop else MAX_STEPS_IN_FLIGHT)
        watchdog.step_finished()
        if not executor.active_runs:
            return
        if log_due:
            executor.write_metrics(step)
        if evaluation_due:
            executor.update_states()
            with watchdog.pause():
                for run in executor.active_runs:
                    run.evaluate_for_schedule()
            _restart_clocks(executor)
        ends = [(run, run.schedule.phase_end_reason(step, evaluation_due)) for run in runs]
        if any(reason is not None for _, reason in ends) and not log_due:
            executor.write_metrics(step)  # a row never covers steps of two phases
        for run, reason in ends:
            if reason is not None:
                run.start_next_phase(step, reason)
        if save_due or stop:
            with watchdog.pause():
                _save(executor, required=stop or step == last)
            _restart_clocks(executor)
        if stop:
            for run in executor.active_runs:
                run.log_interruption()
            raise Interrupted(f"stopped at step {step}; run the same command again to resume")


def prefetch(run: TrainingRun, stop: int) -> Iterator[Batch]:
    """Yield the training batches of a run in order; a thread makes the next one while the device computes.

    Args:
        run: The run. When it enters another phase, the batch that was made ahead for the previous phase is dropped.
        stop: Number of batches from the start of the data, at which the iterator ends.

    Yields:
        Batches of numpy arrays, from number `run.start_step`.
    """
    phase = run.schedule.position.index
    pending = _start_thread(run.program.batch, run.start_step, phase)
    for index in range(run.start_step, stop):
        if run.schedule.position.index != phase:
            phase = run.schedule.position.index
            pending = _start_thread(run.program.batch, index, phase)
        batch = pending.result()
        if index + 1 < stop:
            pending = _start_thread(run.program.batch, index + 1, phase)
        yield batch


def _start_thread[**P, T](function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Future[T]:
    """Call a function in a daemon thread. The process can end while it hangs, unlike with `ThreadPoolExecutor`."""
    future = Future[T]()

    def call() -> None:
        try:
            future.set_result(function(*args, **kwargs))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=call, name="prefetch", daemon=True).start()
    return future


def evaluate_run(
    folder: Path, split: Split, batches: int | None = None, transform_task: Callable[[Task], Task] = lambda task: task
) -> dict[str, float]:
    """Evaluate the newest checkpoint of a run, which may still be training; the folder is not changed.

    Args:
        folder: Folder of the run.
        split: The split.
        batches: Number of batches; None for `evaluate.batches` of the run's config.
        transform_task: Maps the task of the run to the task to evaluate, which must not need more token ids.

    Returns:
        Metrics by name, and the step of the checkpoint as "step".

    Raises:
        RunFolderError: The folder is not that of a run, or has no checkpoint.
        CheckpointError: No checkpoint can be restored.
        ConfigError: `batches` is below 1, or the config does not fit this version.
    """
    require_at_least(1, batches=batches)
    program, restored = restore_run(folder, transform_task)
    return {"step": float(restored.step), **program.evaluate(restored.state, split, batches)}


def restore_run(
    folder: Path, transform_task: Callable[[Task], Task] = lambda task: task
) -> tuple[Program, RestoredCheckpoint]:
    """Restore the newest checkpoint of a run on the devices that are available; the folder is not changed.

    Args:
        folder: Folder of the run.
        transform_task: Maps the task of the run to the task of the program, which must not need more token ids.

    Returns:
        The program of the run, and its newest checkpoint.

    Raises:
        RunFolderError: The folder is not that of a run, or has no checkpoint.
        CheckpointError: No checkpoint can be restored, or the newest one was written with another config.
        ConfigError: The config does not fit this version.
    """
    config = from_json(read_config(folder), RunConfig)
    program = Program(replace(config, task=transform_task(config.task)), make_reader_mesh(config))
    with Checkpoints(folder / "checkpoints", max_to_keep=None) as checkpoints:
        restored = checkpoints.restore(program.abstract_state, config)
    if restored is None:
        raise RunFolderError(f"{folder} has no checkpoint yet; train it first")
    return program, restored


def _save(executor: StepExecutor, *, required: bool) -> None:
    executor.update_states()
    for run in executor.active_runs:
        run.save(required=required)


def _restart_clocks(executor: StepExecutor) -> None:
    """Exclude the time of an evaluation or a checkpoint from the training speed."""
    for run in executor.runs:
        run.metrics.restart_clock()
