"""Training, evaluation and checkpoints.

`train` trains a run in a folder or resumes it there, `initialize_run` makes one that starts from given parameters,
`continue_run` makes one that continues a checkpoint of another run, `evaluate_run` evaluates its newest checkpoint, and
`restore_run` loads it. Names are imported on first use, so that importing this package does not import JAX.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from recallax.train.checkpoint import CheckpointError, Checkpoints, CheckpointWarning, RestoredCheckpoint
    from recallax.train.continuation import continue_run
    from recallax.train.log import LogError, RunLog, read_log
    from recallax.train.loop import evaluate_run, restore_run, train
    from recallax.train.metrics_logger import NonFiniteError
    from recallax.train.program import Program
    from recallax.train.resource_checks import OutOfMemoryError
    from recallax.train.run_config import AdamW, Evaluate, RunConfig, Train, tiny_run
    from recallax.train.run_folder import RunFolder, RunFolderError
    from recallax.train.step import StepMetrics, TrainState
    from recallax.train.stop_signals import Interrupted
    from recallax.train.training_run import initialize_run
    from recallax.train.vmapped_runs import train_vmapped

__all__ = [
    "AdamW",
    "CheckpointError",
    "CheckpointWarning",
    "Checkpoints",
    "Evaluate",
    "Interrupted",
    "LogError",
    "NonFiniteError",
    "OutOfMemoryError",
    "Program",
    "RestoredCheckpoint",
    "RunConfig",
    "RunFolder",
    "RunFolderError",
    "RunLog",
    "StepMetrics",
    "Train",
    "TrainState",
    "continue_run",
    "evaluate_run",
    "initialize_run",
    "read_log",
    "restore_run",
    "tiny_run",
    "train",
    "train_vmapped",
]

_MODULES = {
    "checkpoint": ("CheckpointError", "CheckpointWarning", "Checkpoints", "RestoredCheckpoint"),
    "continuation": ("continue_run",),
    "log": ("LogError", "RunLog", "read_log"),
    "loop": ("evaluate_run", "restore_run", "train"),
    "metrics_logger": ("NonFiniteError",),
    "program": ("Program",),
    "resource_checks": ("OutOfMemoryError",),
    "run_config": ("AdamW", "Evaluate", "RunConfig", "Train", "tiny_run"),
    "run_folder": ("RunFolder", "RunFolderError"),
    "step": ("StepMetrics", "TrainState"),
    "stop_signals": ("Interrupted",),
    "training_run": ("initialize_run",),
    "vmapped_runs": ("train_vmapped",),
}
"""Module in this package to the names that it defines."""


def __getattr__(name: str) -> Any:
    for module, names in _MODULES.items():
        if name in names:
            return getattr(importlib.import_module(f"recallax.train.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
