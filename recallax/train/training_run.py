"""A run that is open for training: its folder, log, checkpoints, position in the schedule, and state."""

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import jax

from recallax.atomic_files import write_atomic
from recallax.config import fingerprint, to_json
from recallax.models import LMConfig, accounting
from recallax.tasks.base import Split
from recallax.train.checkpoint import Checkpoints
from recallax.train.log import RunLog, read_log
from recallax.train.metrics_logger import MetricsLogger, NonFiniteError
from recallax.train.origin import read_origin
from recallax.train.phase_factory import make_schedule
from recallax.train.process_agreement import all_processes_agree
from recallax.train.profiler import Profiler
from recallax.train.program import Program
from recallax.train.progress import Progress
from recallax.train.resume_checks import check_nothing_is_lost, check_same_data, describe_frozen_state
from recallax.train.run_config import RunConfig
from recallax.train.run_folder import RunFolder, RunFolderError
from recallax.train.step import MAX_NONFINITE_STREAK, TrainState


class RunFiles(NamedTuple):
    """The open files of a run."""

    folder: RunFolder
    checkpoints: Checkpoints
    log: RunLog
    data_digest: str
    """Digest of the data that the run trains on."""


def open_run_files(program: Program, folder: Path, stack: ExitStack) -> RunFiles:
    """Open the folder of a run, its checkpoints and its log.

    Args:
        program: The program of the run.
        folder: The folder, which is created if it does not exist.
        stack: Closes the files when it exits.

    Returns:
        The open files.

    Raises:
        RunFolderError: The folder cannot be used, or contains another run.
        CheckpointError: The checkpoints cannot be opened.
        LogError: The log cannot be read or written.
    """
    config, process_index, digest = program.config, jax.process_index(), program.data_digest()
    opened = stack.enter_context(_open_run_folder(folder, config, process_index))
    checkpoints = stack.enter_context(Checkpoints(opened.checkpoints, config.train.max_to_keep))
    log = RunLog(opened.log_file, fingerprint(config), tensorboard=opened.tensorboard, process_index=process_index)
    return RunFiles(opened, checkpoints, stack.enter_context(log), digest)


class TrainingRun:
    """A run that is open for training. Creation restores the newest checkpoint, or initializes the state.

    Args:
        program: The program of the run.
        files: The open files of the run.
        name: Name of the run in its log.
        display: Display of its progress.
        profile: Write a profiler trace of a few steps.

    Raises:
        CheckpointError: No checkpoint can be restored, the newest one was written with another config, the log records
            checkpoints that are not there any more, or the data has changed since.
    """

    def __init__(self, program: Program, files: RunFiles, name: str, display: Progress, *, profile: bool = False):
        config = program.config
        self.program = program
        self._files, self._display = files, display
        restored = files.checkpoints.restore(program.abstract_state, config, find_problem=describe_frozen_state)
        if restored is None:
            check_nothing_is_lost(files.checkpoints, files.folder.log_file, config.train)
        self.state: TrainState = restored.state if restored else program.init_state()
        self.start_step = int(self.state.step)
        self.schedule = make_schedule(config)
        self.nonfinite_streak = int(self.state.streak)
        """Number of steps in a row, up to the last one whose result is known, that were not finite."""
        self.error: NonFiniteError | None = None
        """The error that ended the run while others that train with it continue."""
        if restored:
            check_same_data(restored, files.data_digest)
            self.schedule.restore(restored.metadata, restored.step)
        origin = read_origin(files.folder.path)
        begins = self.start_step == (origin.step if origin else 0)  # from its initial state, or from a given one
        files.log.truncate(-1 if begins else self.start_step)
        files.log.write_run_row(self.start_step, {**_run_info(config, name), "restored": restored is not None})
        self._logged_evaluations = _logged_evaluations(files.folder.log_file) if jax.process_index() == 0 else set()
        trace = Profiler(files.folder.path / "profile", config.train.steps - self.start_step) if profile else None
        metadata = restored.metadata if restored else {}
        self.metrics = MetricsLogger(program, self.schedule, files.log, display, trace, self.start_step, metadata)
        if not begins:
            display.note(f"resuming at step {self.start_step} of {config.train.steps}")
        elif origin:
            files.log.write("event", origin.step, origin.event_row())
            display.note(f"continuing {origin.run} from step {origin.step} of {config.train.steps}")
        else:
            self._log_phase_start(0, "the run begins")

    def evaluate(self, split: Split) -> dict[str, float]:
        """Evaluate the state, log the metrics unless the log has them, and return them."""
        metrics, step = self.program.evaluate(self.state, split), int(self.state.step)
        if (step, split) not in self._logged_evaluations:
            self._files.log.write("eval", step, {"split": split, **metrics})
        named = {k.removeprefix("measure/"): v for k, v in metrics.items() if k.startswith("measure/")}
        task_metrics = "".join(f"  {name} {value:.4g}" for name, value in named.items())
        self._display.note(f"{split}  accuracy {metrics['accuracy']:.4f}  loss {metrics['loss']:.4f}{task_metrics}")
        return metrics

    def evaluate_for_schedule(self) -> None:
        """Evaluate on the valid split during training, and pass the metrics to the schedule."""
        phase = self.schedule.position.index
        metrics = self.evaluate("valid")
        self.schedule.add_evaluation(metrics, lambda: self.program.evaluate(self.state, "valid", phase=phase))

    def start_next_phase(self, step: int, reason: str) -> None:
        """Enter the next phase of the schedule, and log it.

        Args:
            step: Number of steps so far.
            reason: Why the phase before has ended, for the log.
        """
        self.schedule.start_next_phase(step)
        self._log_phase_start(step, reason)

    def save(self, *, required: bool = False) -> None:
        """Write a checkpoint of the state, unless there is one of this step.

        The parameters at the start of a streak of non-finite steps may be the reason for it. A checkpoint of them must
        not replace an older one, so it is written only if it is required or there is no older one.

        Args:
            required: The run stops after this step.
        """
        step, steps = int(self.state.step), self._files.checkpoints.steps()
        if step in steps or (self.nonfinite_streak and steps and not required):
            return
        metadata = _config_metadata(self.program.config) | {"data": self._files.data_digest}
        metadata |= self.schedule.checkpoint_metadata() | self.metrics.checkpoint_metadata()
        self._files.checkpoints.save(step, self.state, metadata)

    def log_frozen(self, step: int) -> NonFiniteError:
        """Log that the state is frozen after `step` steps; returns the error that ends the run."""
        leaf = self.metrics.write_frozen(step, self.state)
        folder, lr = self._files.folder.path, self.program.config.optim.lr
        remedy = "Train in a new folder with a lower optim.lr or a higher optim.warmup_ratio, or inspect the batches"
        if steps := self._files.checkpoints.steps():
            remedy = (
                f"Inspect the batches, or continue from a checkpoint with another optimizer in a new folder: recallax "
                f"train CONFIG --from {folder}@{steps[-1]} --optim.lr {lr / 2:g}"
            )
        return NonFiniteError(
            f"{MAX_NONFINITE_STREAK} steps in a row were not finite, up to step {step}: {leaf}; the parameters are "
            f"those before them, and no checkpoint of them was written. {remedy}"
        )

    def log_interruption(self) -> None:
        """Log that training was interrupted at this step."""
        self._files.log.write("event", int(self.state.step), {"event": "interrupted"})

    def _log_phase_start(self, step: int, reason: str) -> None:
        start = self.schedule.phase_start(step, reason)
        if start is not None:
            self._files.log.write("event", step, start.row)
            self._display.note(start.note)


def initialize_run(
    folder: Path,
    program: Program,
    params: dict,
    statistics: dict,
    *,
    files: Mapping[str, str] | None = None,
    exist_ok: bool = False,
) -> None:
    """Create the folder of a run that starts from given parameters; `recallax.train.train` then trains it.

    It writes a checkpoint of step 0, with fresh optimizer moments. The checkpoint does not record the data of the run,
    because no step has used it.

    Args:
        folder: Folder of the run, which is created if it does not exist.
        program: The program of the run.
        params: Parameters, with the structure of `TrainState.params`.
        statistics: Variables that are not trained by gradient, with the structure of `TrainState.statistics`.
        files: Further text files of the folder by name, written before the checkpoint.
        exist_ok: Change nothing if the run has checkpoints, instead of raising an error.

    Raises:
        ValueError: `params` or `statistics` do not fit the model.
        RunFolderError: The folder cannot be used, or contains another run; or the run has checkpoints.
        CheckpointError: The checkpoint cannot be written.
    """
    state = program.init_state_from(params, statistics)  # before the folder is created
    write_first_checkpoint(folder, program, state, metadata={}, files=files or {}, exist_ok=exist_ok)


def write_first_checkpoint(
    folder: Path,
    program: Program,
    state: TrainState,
    *,
    metadata: Mapping[str, Any],
    files: Mapping[str, str],
    exist_ok: bool = False,
) -> None:
    """Create the folder of a run that starts from a given state.

    Args:
        folder: Folder of the run, which is created if it does not exist.
        program: The program of the run.
        state: The state.
        metadata: Metadata of the checkpoint besides the config.
        files: Further text files of the folder by name, written before the checkpoint.
        exist_ok: Change nothing if the run has checkpoints, instead of raising an error.

    Raises:
        RunFolderError: The folder cannot be used, or contains another run; or the run has checkpoints.
        CheckpointError: The checkpoint cannot be written.
    """
    config, process_index = program.config, jax.process_index()
    with (
        _open_run_folder(folder, config, process_index) as run,
        Checkpoints(run.checkpoints, config.train.max_to_keep) as checkpoints,
    ):
        if steps := checkpoints.steps():
            if exist_ok:
                return
            raise RunFolderError(f"{folder} has checkpoints of the steps {steps}; choose another folder")
        for name, text in files.items() if process_index == 0 else ():
            write_atomic(run.path / name, text)
        checkpoints.save(int(state.step), state, {**_config_metadata(config), **metadata})


def _config_metadata(config: RunConfig) -> dict[str, Any]:
    """The entries of a checkpoint's metadata that identify the run."""
    return {"config": to_json(config), "fingerprint": fingerprint(config)}


def _run_info(config: RunConfig, name: str) -> dict[str, Any]:
    """Values of the "run" row that depend on the config."""
    vocab_size, task = config.task.vocab_size, config.task
    longest = max(task.lengths("test"))
    return {
        "name": name,
        "parameters": accounting.count_parameters(config.model, vocab_size),
        "state_bytes": _state_bytes(config.model, longest, vocab_size),
        "context": longest,
        "chance": task.chance(),
        "oracle": 1.0,
    }


def _state_bytes(model: LMConfig, context_length: int, vocab_size: int) -> int | None:
    """Bytes of state per sequence; None for a model without one, such as a non-causal control."""
    try:
        return accounting.state_bytes(model, context_length, vocab_size)
    except TypeError:
        return None


def _open_run_folder(folder: Path, config: RunConfig, process_index: int) -> RunFolder:
    """Open the folder in process 0; if that fails, raise in every process, so that none waits for process 0."""
    run, error = None, RunFolderError(f"process 0 could not open the folder {folder}; its message has the reason")
    try:
        run = RunFolder(folder, config, process_index=process_index)
    except RunFolderError as own_error:
        error = own_error
    if not all_processes_agree(run is not None) or run is None:
        raise error
    return run


def _logged_evaluations(log_file: Path) -> set[tuple[int, str]]:
    """Step and split of the evaluations in the log; those at the end of a run come after its last checkpoint."""
    return {(row["step"], row["split"]) for row in read_log(log_file) if row["kind"] == "eval"}
