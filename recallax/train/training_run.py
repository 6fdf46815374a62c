"""A run that is open for training: its folder, log, checkpoints, position in the schedule, and state."""

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import jax

from recallax.config import fingerprint, to_json
from recallax.files import write_atomic
from recallax.models import LMConfig, accounting
from recallax.tasks.base import Split
from recallax.train.checkpoint import CheckpointError, Checkpoints, RestoredCheckpoint
from recallax.train.log import LogRow, RunLog, read_log
from recallax.train.metrics_logger import MetricsLogger, NonFiniteError
from recallax.train.phase_factory import make_schedule
from recallax.train.process_agreement import all_processes_agree
from recallax.train.profiler import Profiler
from recallax.train.program import Program
from recallax.train.progress import Progress
from recallax.train.run_config import RunConfig, Train
from recallax.train.run_folder import RunFolder, RunFolderError
from recallax.train.step import TrainState


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
        restored = files.checkpoints.restore(program.abstract_state, config)
        if restored is None:
            _check_nothing_is_lost(files, config.train)
        self.state: TrainState = restored.state if restored else program.init_state()
        self.start_step = int(self.state.step)
        self.schedule = make_schedule(config)
        self.error: NonFiniteError | None = None
        """The error that ended the run while others that train with it continue."""
        if restored:
            _check_same_data(restored, files.data_digest)
            self.schedule.restore(restored.metadata, restored.step)
        files.log.truncate(self.start_step or -1)  # a run that begins, also from given parameters, has no rows yet
        files.log.write_run_row(self.start_step, {**_run_info(config, name), "restored": restored is not None})
        self._logged_evaluations = _logged_evaluations(files.folder.log_file) if jax.process_index() == 0 else set()
        trace = Profiler(files.folder.path / "profile", config.train.steps - self.start_step) if profile else None
        self.metrics = MetricsLogger(program, self.schedule, files.log, display, trace)
        if self.start_step:
            display.note(f"resuming at step {self.start_step} of {config.train.steps}")
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
        """Enter the next phase of the schedule after `step` steps, and log it."""
        self.schedule.start_next_phase(step)
        self._log_phase_start(step, reason)

    def save(self) -> None:
        """Write a checkpoint of the state, unless there is one of this step."""
        step = int(self.state.step)
        if step not in self._files.checkpoints.steps():
            config, digest = self.program.config, self._files.data_digest
            metadata = _config_metadata(config) | {"data": digest} | self.schedule.checkpoint_metadata()
            self._files.checkpoints.save(step, self.state, metadata)

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
    config, process_index = program.config, jax.process_index()
    state = program.init_state_from(params, statistics)  # before the folder is created
    with (
        _open_run_folder(folder, config, process_index) as run,
        Checkpoints(run.checkpoints, config.train.max_to_keep) as checkpoints,
    ):
        if steps := checkpoints.steps():
            if exist_ok:
                return
            raise RunFolderError(f"{folder} has checkpoints of the steps {steps}; choose another folder")
        for name, text in (files or {}).items() if process_index == 0 else ():
            write_atomic(run.path / name, text)
        checkpoints.save(0, state, _config_metadata(config))


def _config_metadata(config: RunConfig) -> dict[str, Any]:
    """The entries of a checkpoint's metadata that identify the run."""
    return {"config": to_json(config), "fingerprint": fingerprint(config)}


def _check_nothing_is_lost(files: RunFiles, train: Train) -> None:
    """Refuse to start a run from step 0, which truncates its log, if it had checkpoints."""
    log_file = files.folder.log_file
    rows = read_log(log_file) if log_file.exists() else []
    if any(_follows_checkpoint(row, train) for row in rows):
        raise CheckpointError(
            f"{files.folder.checkpoints} has no checkpoint, but the log of the run has {max(r['step'] for r in rows)} "
            f"steps; restore the checkpoints, or move {log_file} away to train from the start"
        )


def _follows_checkpoint(row: LogRow, train: Train) -> bool:
    """Return True for a row that is only written after a checkpoint has been saved or restored."""
    match row["kind"]:
        case "run":
            return row["step"] > 0 or bool(row.get("restored"))
        case "event" if row.get("event") == "interrupted":
            return True
        case "eval" if row["step"] == train.steps:
            return True
        case _:
            return row["step"] > train.save_every


def _check_same_data(restored: RestoredCheckpoint, data_digest: str) -> None:
    recorded = restored.metadata.get("data", data_digest)
    if recorded != data_digest:
        raise CheckpointError(
            f"step {restored.step} was trained on other data ({recorded}, now {data_digest}): the corpus or the "
            "tokenizer file has changed; restore the old one, or start in a new folder"
        )


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
