"""`recallax calibrate`: make a run that reads longer contexts, without training."""

from dataclasses import dataclass
from pathlib import Path

import tyro

from recallax.cli.options import parse_options
from recallax.cli.outputs import OutputFolder


@dataclass(frozen=True, kw_only=True)
class CalibrateOptions:
    """Make a run that reads longer contexts than a trained run, without training, by LongMamba's token filters.

    The new folder is a run like any other: eval, generate and export accept it.
    """

    run: tyro.conf.Positional[Path]
    """Folder of the trained run. Its model must have Mamba2 or DiagonalSSM layers."""
    context_length: int
    """Length in tokens of the contexts that the new run reads. Up to --train-length, no token is filtered."""
    train_length: int | None = None
    """Length in tokens of the rows that the run was trained on; the longest train length of its task by default."""
    num_rows: int = 32
    """Number of rows of that length, from the valid split, from which the thresholds are computed."""
    min_retention: float = 0.05
    """Fraction of its state that a channel must retain over --train-length tokens to be filtered."""
    clip_quantile: float = 0.95
    """Quantile at which step sizes are clipped before the retention is computed."""
    out: OutputFolder | None = None
    """Folder of the new run; RUN/long-CONTEXT_LENGTH by default."""


def run(arguments: list[str]) -> int:
    """Run the command; returns its exit status."""
    options = parse_options(CalibrateOptions, arguments, "calibrate")
    from recallax.train.calibration import CalibrationOptions, calibrate_run

    calibration = CalibrationOptions(
        context_length=options.context_length,
        train_length=options.train_length,
        num_rows=options.num_rows,
        min_retention=options.min_retention,
        clip_quantile=options.clip_quantile,
    )
    folder, lines = calibrate_run(options.run, calibration, options.out)
    print("\n".join([*lines, f"run: {folder}", f"evaluate: recallax eval {folder}"]))
    return 0
