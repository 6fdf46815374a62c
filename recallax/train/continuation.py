# pyright: strict
"""Runs that continue a checkpoint of another run, with another optimizer or another length."""

from pathlib import Path

from recallax.config import ConfigError, diff, fingerprint, from_json
from recallax.train.checkpoint import Checkpoints, RestoredCheckpoint
from recallax.train.origin import ORIGIN_FILE, Origin, read_origin
from recallax.train.program import Program
from recallax.train.resume_checks import describe_frozen_state
from recallax.train.run_config import RunConfig
from recallax.train.run_folder import RunFolderError, read_config
from recallax.train.training_run import write_first_checkpoint

CHANGEABLE_FIELDS = ("optim.", "train.", "evaluate.")
"""Fields of the config that a continued run may change."""


def continue_run(source: Path, step: int | None, program: Program, folder: Path) -> None:
    """Create the folder of a run that continues another one; `recallax.train.train` then trains it.

    The new run takes parameters, statistics, optimizer moments, the position in the data and the number of steps. Its
    `origin.json` and the first event of its log record the checkpoint and the fields that were changed. If the folder
    is already that of this run, it is not changed.

    Args:
        source: Folder of the other run, which is not changed.
        step: Step of the checkpoint. None: the newest one that can be resumed.
        program: The program of the new run.
        folder: Folder of the new run.

    Raises:
        ConfigError: The configs differ in more than the optimizer, training and evaluation, or the new run would have
            no steps left.
        RunFolderError: A folder cannot be used, or the other run has no such checkpoint.
        CheckpointError: The checkpoint is damaged or does not fit, or the new one cannot be written.
    """
    source_config = from_json(read_config(source), RunConfig)
    changes = diff(source_config, program.config)
    if fixed := [line for line in changes if not line.startswith(CHANGEABLE_FIELDS)]:
        raise ConfigError(
            f"a run that continues {source} may change fields of optim, train and evaluate only, but these differ:\n  "
            + "\n  ".join(fixed)
        )
    if (recorded := read_origin(folder)) is not None:
        _check_same_origin(folder, recorded, source, source_config, step)
        return
    restored = _restore(source, step, program, source_config)
    if restored.step >= program.config.train.steps:
        raise ConfigError(
            f"train.steps is {program.config.train.steps}; it must be above {restored.step}, the step of the checkpoint"
        )
    origin = Origin(str(source), fingerprint(source_config), restored.step, changes)
    metadata = {name: restored.metadata[name] for name in ("data", "curriculum") if name in restored.metadata}
    state = restored.state._replace(streak=restored.state.streak * 0)  # of its sharding
    write_first_checkpoint(folder, program, state, metadata=metadata, files={ORIGIN_FILE: origin.to_text()})


def _check_same_origin(
    folder: Path, recorded: Origin, source: Path, source_config: RunConfig, step: int | None
) -> None:
    if recorded.fingerprint != fingerprint(source_config) or step not in (None, recorded.step):
        raise RunFolderError(
            f"{folder} continues step {recorded.step} of {recorded.run}, not {source}@{'' if step is None else step}; "
            "choose a new folder"
        )


def _restore(source: Path, step: int | None, program: Program, source_config: RunConfig) -> RestoredCheckpoint:
    if not (source / "checkpoints").is_dir():
        raise RunFolderError(f"{source} has no checkpoint; train it first")
    with Checkpoints(source / "checkpoints", max_to_keep=None) as checkpoints:
        restored = checkpoints.restore(
            program.abstract_state, source_config, step=step, find_problem=describe_frozen_state
        )
        if restored is None:
            raise RunFolderError(f"{source} has no checkpoint of step {step}; it has {checkpoints.steps()}")
    return restored
