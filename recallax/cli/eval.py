"""`recallax eval`: evaluate the newest checkpoint of a run."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from recallax.cli.options import ContextRepetitionArguments, ContextRepetitionOptions, parse_options


@dataclass(frozen=True, kw_only=True)
class EvalOptions:
    """Evaluate the newest checkpoint of a run."""

    run: tyro.conf.Positional[Path]
    """Folder of the run."""
    split: Literal["valid", "test"] = "test"
    """Split of the task."""
    batches: int | None = None
    """Number of batches; that of the config by default."""
    context_repetition: ContextRepetitionArguments = ContextRepetitionOptions()


def run(arguments: list[str]) -> int:
    """Run the command; returns its exit status."""
    options = parse_options(EvalOptions, arguments, "eval")
    from recallax.train.loop import evaluate_run

    repetition = options.context_repetition.build()
    for name, value in evaluate_run(options.run, options.split, options.batches, repetition.apply_to_task).items():
        print(f"{name:24} {value:.4f}")
    return 0
