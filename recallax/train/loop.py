"""Training as one linear story: folder, program, resume or start, steps, test."""

import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from recallax.config import ConfigError, fingerprint, from_json, to_json
from recallax.models import accounting
from recallax.tasks.base import Split, Task
from recallax.train.checkpoint import CheckpointError, Checkpoints, Restored
from recallax.train.curriculum import START, Course, Standing, standing_from_json
from recallax.train.log import RunLog, read_log
from recallax.train.profile import Profile, peak_flops, step_flops
from recallax.train.program import Program
from recallax.train.progress import Progress, progress
from recallax.train.run import RunConfig
from recallax.train.run_folder import RunFolder, RunFolderError, read_config
from recallax.train.step import MAX_STREAK, StepReport, TrainState
from recallax.types import Batch


class NonFiniteError(RuntimeError):
    """Too many steps in a row had a non-finite loss or gradient."""


class Interrupted(Exception):
    """The run was asked to stop."""


def train(config: RunConfig, folder: Path, *, name: str, profile: bool = False) -> dict[str, float]:
    """Train in `folder`, going on where a run there stopped; returns the metrics of the test split.

    Raises what the checks of folder, checkpoint and config raise; NonFiniteError; Interrupted after SIGINT or SIGTERM.
    """
    process = jax.process_index()
    program, data = Program(config), _data(config)  # first: a config that cannot run claims no folder
    program.check_stages()
    with (
        _open(folder, config, process) as run,
        Checkpoints(run.checkpoints, config.train.keep) as checkpoints,
        RunLog(run.log_file, fingerprint(config), tensorboard=run.tensorboard, process_index=process) as log,
        progress(config.train.steps) as display,
        _Signals() as signals,
        ExitStack() as stack,
    ):
        display.compiling("the initial state")
        restored = checkpoints.restore(program.abstract)
        state: TrainState = restored.state if restored else program.initial()
        start = int(state.step)
        if restored and restored.meta.get("data", data) != data:
            raise CheckpointError(
                f"step {start} was trained on other data ({restored.meta['data']}, now {data}): the corpus or the "
                "tokenizer's file has changed; bring the old one back, or start in a new folder"
            )
        log.truncate(start if restored else -1)
        log.start(start, describe(config, name))
        logged = _evaluations(run.log_file) if process == 0 else set()
        course = Course(config.curriculum, _standing(config, restored))
        if restored:
            display.note(f"resuming at step {start} of {config.train.steps}")
        elif config.curriculum is not None:
            _tell(course, 0, "the run begins", log, display)

        def save(state: TrainState) -> None:
            if int(state.step) not in checkpoints.steps():
                meta = {"config": to_json(config), "fingerprint": fingerprint(config), "data": data}
                more = {} if config.curriculum is None else {"curriculum": course.standing.to_json()}
                checkpoints.save(int(state.step), state, meta | more)

        trace = Profile(folder / "profile", config.train.steps - start) if profile else None
        meter = _Meter(program, course, log, display, trace)
        stack.callback(meter.close)
        display.compiling("the training step")
        for index, batch in _prefetch(program, course, start, config.train.steps):
            meter.before(index - start)
            state, report = program.step(state, batch, course.standing)
            meter.add(report, batch)
            done = index + 1
            due = done % config.train.log_every == 0 or done == config.train.steps
            if due:
                meter.write(done, state)
            evaluated = done % config.evaluate.every == 0 and done < config.train.steps
            if evaluated:
                metrics = _evaluate(program, state, "valid", log, logged, display)
                if course.asks:
                    own = course.stage.task is not None
                    course.see(program.evaluate(state, "valid", stage=course.standing.stage) if own else metrics)
                meter.restart()
            if (reason := course.ends(done, evaluated)) is not None:
                if not due:
                    meter.write(done, state)  # no row tells of two stages
                course.move(done)
                _tell(course, done, reason, log, display)
            if done % config.train.save_every == 0 or done == config.train.steps:
                save(state)
                meter.restart()
            if signals.stop(done):
                save(state)
                log.write("event", done, {"event": "interrupted"})
                raise Interrupted(f"stopped at step {done}; the same command goes on from there")
        meter.close()
        _evaluate(program, state, "valid", log, logged, display)
        return _evaluate(program, state, "test", log, logged, display)


def _data(config: RunConfig) -> str:
    """The digest of what the run and its stages train on besides the config."""
    stages = () if config.curriculum is None else config.curriculum.stages
    found = [config.task.data(), *(stage.task.data() for stage in stages if stage.task is not None)]
    return "+".join(dict.fromkeys(digest for digest in found if digest))


def _standing(config: RunConfig, restored: Restored | None) -> Standing:
    """Where in its curriculum a checkpoint left a run."""
    if config.curriculum is None or restored is None:
        return START
    if "curriculum" in restored.meta:
        return standing_from_json(restored.meta["curriculum"])
    if restored.step == 0:
        return START  # an imported model
    raise CheckpointError(
        f"the checkpoint of step {restored.step} does not say in which stage of the curriculum it was written; "
        "train the config in a new folder"
    )


def _tell(course: Course, step: int, reason: str, log: RunLog, display: Progress) -> None:
    """Say that a stage begins."""
    row = {"event": "stage", "stage": course.standing.stage, "name": course.stage.name, "reason": reason}
    log.write("event", step, row)
    display.note(f"step {step}: the stage {course.stage.name!r} begins ({reason})")


def describe(config: RunConfig, name: str) -> dict[str, Any]:
    """What a run's first row says of its config: name, parameters, bytes of state at the task's longest length."""
    vocab, task = config.task.vocab_size, config.task
    longest = max(task.lengths("test"))
    return {
        "name": name,
        "parameters": accounting.parameters(config.model, vocab),
        "state_bytes": accounting.state_bytes(config.model, longest, vocab),
        "context": longest,
        "chance": task.chance(),
        "oracle": 1.0,
    }


def evaluate_run(
    folder: Path, split: Split, batches: int | None = None, change: Callable[[Task], Task] = lambda task: task
) -> dict[str, float]:
    """Metrics of a run's newest checkpoint, which may still be training; nothing in its folder is touched.

    change: what is evaluated instead of the run's task; it may not need more token ids.

    Raises RunFolderError, CheckpointError or ConfigError if there is nothing to evaluate.
    """
    if batches is not None and batches < 1:
        raise ConfigError(f"batches is {batches}; it must be at least 1")
    program, restored = restore_run(folder, change)
    return {"step": float(restored.step), **program.evaluate(restored.state, split, batches)}


def restore_run(folder: Path, change: Callable[[Task], Task] = lambda task: task) -> tuple[Program, Restored]:
    """A run's newest checkpoint and what executes it; nothing in its folder is touched.

    Raises RunFolderError, CheckpointError or ConfigError if there is none.
    """
    config = from_json(read_config(folder), RunConfig)
    program = Program(replace(config, task=change(config.task)))
    with Checkpoints(folder / "checkpoints", keep=None) as checkpoints:
        restored = checkpoints.restore(program.abstract)
    if restored is None:
        raise RunFolderError(f"{folder} has no checkpoint yet; train it first")
    return program, restored


def _open(folder: Path, config: RunConfig, process: int) -> RunFolder:
    """Process 0 opens the folder; where it refuses, the others stop with it instead of waiting for it."""
    run, error = None, RunFolderError(f"process 0 refused the folder {folder}; its message says why")
    try:
        run = RunFolder(folder, config, process_index=process)
    except RunFolderError as refusal:
        error = refusal
    refused = run is None
    if jax.process_count() > 1:
        refused = bool(multihost_utils.process_allgather(np.asarray(refused)).any())
    if run is None or refused:
        raise error
    return run


def _evaluations(log_file: Path) -> set[tuple[int, str]]:
    """Step and split of the evaluations that are in the log: those at a run's end come after its last checkpoint."""
    return {(row["step"], row["split"]) for row in read_log(log_file) if row["kind"] == "eval"}


def _evaluate(
    program: Program, state: TrainState, split: Split, log: RunLog, logged: set[tuple[int, str]], display: Progress
) -> dict[str, float]:
    metrics, step = program.evaluate(state, split), int(state.step)
    if (step, split) not in logged:
        log.write("eval", step, {"split": split, **metrics})
    own = "".join(f"  {k.removeprefix('measure/')} {v:.4g}" for k, v in metrics.items() if k.startswith("measure/"))
    display.note(f"{split}  accuracy {metrics['accuracy']:.4f}  loss {metrics['loss']:.4f}{own}")
    return metrics


def _prefetch(program: Program, course: Course, start: int, stop: int) -> Iterator[tuple[int, Batch]]:
    """Train batches in order; the next one is made while the device works on this one.

    Where a stage begins, what was made ahead for the one before is dropped.
    """
    with ThreadPoolExecutor(1) as pool:
        stage = course.standing.stage
        pending = pool.submit(program.batch, start, stage)
        for index in range(start, stop):
            if course.standing.stage != stage:
                stage = course.standing.stage
                pending = pool.submit(program.batch, index, stage)
            batch = pending.result()
            if index + 1 < stop:
                pending = pool.submit(program.batch, index + 1, stage)
            yield index, batch


class _Meter:
    """Collects what steps report, without waiting for the device until a row is due."""

    def __init__(self, program: Program, course: Course, log: RunLog, display: Progress, profile: Profile | None):
        self._program, self._course, self._log, self._display = program, course, log, display
        self._profile = profile
        self._peak = None if profile is None else peak_flops()
        self.restart()
        self._reports: list[StepReport] = []

    def restart(self) -> None:
        """Start the clock anew, so that evaluation and saving do not count as training."""
        self._tokens = self._flops = self._timed = 0
        self._clock = time.monotonic()

    def before(self, step: int) -> None:
        if self._profile is not None:
            self._profile.at(step)

    def add(self, report: StepReport, batch: Batch) -> None:
        self._reports.append(report)
        self._tokens += batch.tokens.size
        if self._peak is not None:
            lesson = self._program.lessons[self._course.standing.stage]
            self._flops += step_flops(lesson.config, batch.tokens.shape[1])

    def write(self, step: int, state: TrainState) -> None:
        """One row for the steps since the last; raises NonFiniteError if the state is frozen."""
        reports: list[StepReport] = jax.device_get(self._reports)
        seconds = max(time.monotonic() - self._clock, 1e-9)
        self._reports = []
        good = [r for r in reports if r.finite.all()]
        values: dict[str, Any] = {"learning_rate": self._rate(step, state)}
        if good:
            values["loss"] = np.mean([r.loss for r in good])
            values["accuracy"] = sum(r.accuracy.total for r in good) / sum(r.accuracy.weight for r in good)
            values["gradient_norm"] = np.mean([r.gradient_norm for r in good])
            for name in good[0].terms:
                total, weight = (sum(r.terms[name][i] for r in good) for i in (0, 1))
                values[f"term/{name}"] = total / weight
        if self._program.config.curriculum is not None:
            values["stage"] = self._course.standing.stage
            values |= {f"ramp/{gate}": value for gate, value in self._course.ramps(step).items()}
        speed = self._tokens / seconds
        values |= {"tokens_per_second": speed, "skipped": int(state.skipped)}
        if self._peak is not None:
            peak, source = self._peak
            values |= {"flops_utilisation": self._flops / seconds / peak, "peak_flops": peak, "peak_source": source}
        self._log.write("train", step, values)
        shown = {name: float(values[name]) for name in ("loss", "accuracy") if name in values}
        if self._peak is not None:
            shown["mfu"] = values["flops_utilisation"]
        self._display.update(step, shown, speed)
        if len(good) < len(reports):
            self._display.note(f"{len(reports) - len(good)} steps were skipped: {self._first_bad(reports)}")
        if int(state.streak) >= MAX_STREAK:
            bad = self._bad_parameter(state) or self._first_bad(reports)
            self._log.write("event", step, {"event": "non-finite", "leaf": bad})
            raise NonFiniteError(
                f"{MAX_STREAK} steps in a row were not finite, up to step {step}: {bad}; the parameters are those "
                f"before them. Lower optim.lr, raise optim.warmup, or look at the batches"
            )
        self.restart()

    def close(self) -> None:
        if self._profile is not None:
            self._profile.close()

    def _first_bad(self, reports: list[StepReport]) -> str:
        bad = next((r.finite for r in reports if not r.finite.all()), None)
        if bad is None:
            return "the streak began before this row"
        leaves = [f"the gradient or update of {name}" for name in self._program.leaf_names]
        first = [*leaves, "the loss", "the norm of the gradient"][int(np.argmin(bad))]
        return first if bad[len(leaves)] else f"the loss, and {first}" if not bad[:-2].all() else "the loss"

    def _bad_parameter(self, state: TrainState) -> str | None:
        """Steps keep parameters finite; one that is not was so from the start, and makes every gradient non-finite."""
        leaves = zip(self._program.leaf_names, jax.tree.leaves(state.params), strict=True)
        return next((f"the parameter {name}" for name, leaf in leaves if not np.isfinite(leaf).all()), None)

    def _rate(self, step: int, state: TrainState) -> float:
        """Learning rate of the last step: the schedule counts the steps that were taken, not those skipped."""
        return float(np.asarray(self._program.learning_rate(max(step - 1 - int(state.skipped), 0))))


class _Signals:
    """Turns SIGINT and SIGTERM into a question that the loop asks after every step; a second signal ends at once."""

    def __init__(self) -> None:
        self._asked = False
        self._old: dict[int, Any] = {}

    def stop(self, step: int) -> bool:
        """Whether to save and stop now; all processes of a run get the same answer for the same step."""
        if jax.process_count() == 1:
            return self._asked
        return bool(multihost_utils.process_allgather(np.asarray(self._asked)).any())

    def __enter__(self) -> "_Signals":
        for number in (signal.SIGINT, signal.SIGTERM):
            self._old[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self._asked = True
        signal.signal(number, self._old[number])
