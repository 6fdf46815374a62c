"""Trials of a sweep."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from recallax.train.run_config import RunConfig

type ResultRow = dict[str, Any]
"""Result of a finished run: its labels, the fingerprint of its config, and its metrics."""
type SweepStage = Callable[[list[ResultRow]], list["Trial"]]
"""Function from the rows so far to trials."""


@dataclass(frozen=True)
class Trial:
    """One run of a sweep."""

    labels: Mapping[str, str | int | float]
    """Values that identify the trial in results and reports, such as its learning rate. They join its row, so they need
    other names than its columns."""
    config: RunConfig
    """The config to train."""
    extra_metrics: Callable[..., ResultRow] | None = None
    """Function of the `Program` and the trained `TrainState`; the entries that it returns join the row."""
