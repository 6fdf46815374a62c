# pyright: strict
"""Checks before a run resumes: its state, its data, and checkpoints that its log records."""

from pathlib import Path

from recallax.train.checkpoint import CheckpointError, Checkpoints, RestoredCheckpoint
from recallax.train.log import LogRow, read_log
from recallax.train.run_config import Train
from recallax.train.step import MAX_NONFINITE_STREAK, TrainState


def describe_frozen_state(state: TrainState) -> str:
    """Return why a run cannot resume from a state; an empty text if it can. Earlier versions saved frozen states."""
    streak = int(state.streak)
    return f"its state is frozen after {streak} non-finite steps in a row" if streak >= MAX_NONFINITE_STREAK else ""


def check_nothing_is_lost(checkpoints: Checkpoints, log_file: Path, train: Train) -> None:
    """Refuse to start a run from step 0, which truncates its log, if it had checkpoints.

    Args:
        checkpoints: The checkpoints of the run, of which there is none.
        log_file: Its log, which may not exist.
        train: Its config.

    Raises:
        CheckpointError: The log has rows that are written after a checkpoint only.
        LogError: The log cannot be read.
    """
    rows = read_log(log_file) if log_file.exists() else []
    if any(_follows_checkpoint(row, train) for row in rows):
        raise CheckpointError(
            f"{checkpoints.directory} has no checkpoint, but the log of the run has {max(r['step'] for r in rows)} "
            f"steps; restore the checkpoints, or move {log_file} away to train from the start"
        )


def check_same_data(restored: RestoredCheckpoint, data_digest: str) -> None:
    """Compare the data that a checkpoint was trained on with the data of the run.

    Args:
        restored: The checkpoint, which may not record its data.
        data_digest: Digest of the data of the run.

    Raises:
        CheckpointError: They differ.
    """
    recorded = restored.metadata.get("data", data_digest)
    if recorded != data_digest:
        raise CheckpointError(
            f"step {restored.step} was trained on other data ({recorded}, now {data_digest}): the corpus or the "
            "tokenizer file has changed; restore the old one, or start in a new folder"
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
