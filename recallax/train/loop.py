"""Training as one linear story: folder, program, resume or start, steps, test."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from recallax.config import ConfigError, fingerprint, from_json, to_json
from recallax.models import accounting
from recallax.tasks.base import Split, Task
from recallax.train.checkpoint import CheckpointError, Checkpoints, RestoredCheckpoint
from recallax.train.curriculum.stages import (
    INITIAL_CURRICULUM_STATE,
    CurriculumRunner,
    CurriculumState,
    curriculum_state_from_json,
)
from recallax.train.log import RunLog, read_log
from recallax.train.metrics_logger import MetricsLogger
from recallax.train.profiler import Profiler
from recallax.train.program import Program
from recallax.train.progress import Progress, make_progress
from recallax.train.run_config import RunConfig
from recallax.train.run_folder import RunFolder, RunFolderError, read_config
from recallax.train.step import TrainState
from recallax.train.stop_signals import Interrupted, StopSignals
from recallax.types import Batch


def train(config: RunConfig, folder: Path, *, name: str, profile: bool = False) -> dict[str, float]:
    """Train in `folder`, going on where a run there stopped; returns the metrics of the test split.

    Raises what the checks of folder, checkpoint and config raise; NonFiniteError; Interrupted after SIGINT or SIGTERM.
    """
    process = jax.process_index()
    program, data = Program(config), data_digest(config)  # first: a config that cannot run claims no folder
    program.check_stages()
    with (
        _open_run_folder(folder, config, process) as run,
        Checkpoints(run.checkpoints, config.train.max_to_keep) as checkpoints,
        RunLog(run.log_file, fingerprint(config), tensorboard=run.tensorboard, process_index=process) as log,
        make_progress(config.train.steps) as display,
        StopSignals() as signals,
        ExitStack() as stack,
    ):
        display.show_compiling("the initial state")
        restored = checkpoints.restore(program.abstract_state)
        state: TrainState = restored.state if restored else program.init_state()
        start = int(state.step)
        if restored:
            check_same_data(restored, data)
        log.truncate(start if restored else -1)
        log.write_run_row(start, run_info(config, name))
        logged = logged_evaluations(run.log_file) if process == 0 else set()
        course = CurriculumRunner(config.curriculum, _restore_curriculum_state(config, restored))
        if restored:
            display.note(f"resuming at step {start} of {config.train.steps}")
        elif config.curriculum is not None:
            _log_stage_start(course, 0, "the run begins", log, display)

        def save(state: TrainState) -> None:
            if int(state.step) not in checkpoints.steps():
                more = {} if config.curriculum is None else {"curriculum": course.state.to_json()}
                checkpoints.save(int(state.step), state, checkpoint_metadata(config, data) | more)

        trace = Profiler(folder / "profile", config.train.steps - start) if profile else None
        meter = MetricsLogger(program, course, log, display, trace)
        stack.callback(meter.close)
        display.show_compiling("the training step")
        for index, batch in prefetch(program, course, start, config.train.steps):
            meter.before_step(index - start)
            state, report = program.step(state, batch, course.state)
            meter.add(report, batch)
            done = index + 1
            due = done % config.train.log_every == 0 or done == config.train.steps
            if due:
                meter.write(done, state)
            evaluated = done % config.evaluate.every == 0 and done < config.train.steps
            if evaluated:
                metrics = evaluate_and_log(program, state, "valid", log, logged, display)
                if course.needs_evaluation:
                    own = course.stage.task is not None
                    course.add_evaluation(
                        program.evaluate(state, "valid", stage=course.state.stage_index) if own else metrics
                    )
                meter.restart_clock()
            if (reason := course.stage_end_reason(done, evaluated)) is not None:
                if not due:
                    meter.write(done, state)  # no row tells of two stages
                course.start_next_stage(done)
                _log_stage_start(course, done, reason, log, display)
            if done % config.train.save_every == 0 or done == config.train.steps:
                save(state)
                meter.restart_clock()
            if signals.stop_requested(done):
                save(state)
                log.write("event", done, {"event": "interrupted"})
                raise Interrupted(f"stopped at step {done}; the same command goes on from there")
        meter.close()
        evaluate_and_log(program, state, "valid", log, logged, display)
        return evaluate_and_log(program, state, "test", log, logged, display)


def data_digest(config: RunConfig) -> str:
    """The digest of what the run and its stages train on besides the config."""
    stages = () if config.curriculum is None else config.curriculum.stages
    found = [config.task.data_digest(), *(stage.task.data_digest() for stage in stages if stage.task is not None)]
    return "+".join(dict.fromkeys(digest for digest in found if digest))


def _restore_curriculum_state(config: RunConfig, restored: RestoredCheckpoint | None) -> CurriculumState:
    """Where in its curriculum a checkpoint left a run."""
    if config.curriculum is None or restored is None:
        return INITIAL_CURRICULUM_STATE
    if "curriculum" in restored.metadata:
        return curriculum_state_from_json(restored.metadata["curriculum"])
    if restored.step == 0:
        return INITIAL_CURRICULUM_STATE  # an imported model
    raise CheckpointError(
        f"the checkpoint of step {restored.step} does not say in which stage of the curriculum it was written; "
        "train the config in a new folder"
    )


def _log_stage_start(curriculum: CurriculumRunner, step: int, reason: str, log: RunLog, display: Progress) -> None:
    """Say that a stage begins."""
    row = {"event": "stage", "stage": curriculum.state.stage_index, "name": curriculum.stage.name, "reason": reason}
    log.write("event", step, row)
    display.note(f"step {step}: the stage {curriculum.stage.name!r} begins ({reason})")


def checkpoint_metadata(config: RunConfig, data: str) -> dict[str, Any]:
    """What a checkpoint says of where it comes from; `data`: what the task read (`Task.data`)."""
    return {"config": to_json(config), "fingerprint": fingerprint(config), "data": data}


def check_same_data(restored: RestoredCheckpoint, data: str) -> None:
    """Raises CheckpointError if it was trained on other data than there is now."""
    before = restored.metadata.get("data", data)
    if before != data:
        raise CheckpointError(
            f"step {restored.step} was trained on other data ({before}, now {data}): the corpus or the tokenizer's "
            "file has changed; bring the old one back, or start in a new folder"
        )


def run_info(config: RunConfig, name: str) -> dict[str, Any]:
    """What a run's first row says of its config: name, parameters, bytes of state at the task's longest length."""
    vocab, task = config.task.vocab_size, config.task
    longest = max(task.lengths("test"))
    return {
        "name": name,
        "parameters": accounting.count_parameters(config.model, vocab),
        "state_bytes": accounting.state_bytes(config.model, longest, vocab),
        "context": longest,
        "chance": task.chance(),
        "oracle": 1.0,
    }


def evaluate_run(
    folder: Path, split: Split, batches: int | None = None, transform_task: Callable[[Task], Task] = lambda task: task
) -> dict[str, float]:
    """Metrics of a run's newest checkpoint, which may still be training; nothing in its folder is touched.

    change: what is evaluated instead of the run's task; it may not need more token ids.

    Raises RunFolderError, CheckpointError or ConfigError if there is nothing to evaluate.
    """
    if batches is not None and batches < 1:
        raise ConfigError(f"batches is {batches}; it must be at least 1")
    program, restored = restore_run(folder, transform_task)
    return {"step": float(restored.step), **program.evaluate(restored.state, split, batches)}


def restore_run(
    folder: Path, transform_task: Callable[[Task], Task] = lambda task: task
) -> tuple[Program, RestoredCheckpoint]:
    """A run's newest checkpoint and what executes it; nothing in its folder is touched.

    Raises RunFolderError, CheckpointError or ConfigError if there is none.
    """
    config = from_json(read_config(folder), RunConfig)
    program = Program(replace(config, task=transform_task(config.task)))
    with Checkpoints(folder / "checkpoints", max_to_keep=None) as checkpoints:
        restored = checkpoints.restore(program.abstract_state)
    if restored is None:
        raise RunFolderError(f"{folder} has no checkpoint yet; train it first")
    return program, restored


def _open_run_folder(folder: Path, config: RunConfig, process_index: int) -> RunFolder:
    """Process 0 opens the folder; where it refuses, the others stop with it instead of waiting for it."""
    run, error = None, RunFolderError(f"process 0 refused the folder {folder}; its message says why")
    try:
        run = RunFolder(folder, config, process_index=process_index)
    except RunFolderError as refusal:
        error = refusal
    refused = run is None
    if jax.process_count() > 1:
        refused = bool(multihost_utils.process_allgather(np.asarray(refused)).any())
    if run is None or refused:
        raise error
    return run


def logged_evaluations(log_file: Path) -> set[tuple[int, str]]:
    """Step and split of the evaluations that are in the log: those at a run's end come after its last checkpoint."""
    return {(row["step"], row["split"]) for row in read_log(log_file) if row["kind"] == "eval"}


def evaluate_and_log(
    program: Program, state: TrainState, split: Split, log: RunLog, logged: set[tuple[int, str]], display: Progress
) -> dict[str, float]:
    metrics, step = program.evaluate(state, split), int(state.step)
    if (step, split) not in logged:
        log.write("eval", step, {"split": split, **metrics})
    own = "".join(f"  {k.removeprefix('measure/')} {v:.4g}" for k, v in metrics.items() if k.startswith("measure/"))
    display.note(f"{split}  accuracy {metrics['accuracy']:.4f}  loss {metrics['loss']:.4f}{own}")
    return metrics


def prefetch(program: Program, curriculum: CurriculumRunner, start: int, stop: int) -> Iterator[tuple[int, Batch]]:
    """Train batches in order; the next one is made while the device works on this one.

    Where a stage begins, what was made ahead for the one before is dropped.
    """
    with ThreadPoolExecutor(1) as pool:
        stage = curriculum.state.stage_index
        pending = pool.submit(program.batch, start, stage)
        for index in range(start, stop):
            if curriculum.state.stage_index != stage:
                stage = curriculum.state.stage_index
                pending = pool.submit(program.batch, index, stage)
            batch = pending.result()
            if index + 1 < stop:
                pending = pool.submit(program.batch, index + 1, stage)
            yield index, batch
