"""`recallax train`: train a config, or resume its run."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from recallax.cli.config_files import load_config
from recallax.cli.options import parse_overrides
from recallax.cli.outputs import OutputFolder
from recallax.config import fingerprint, from_json, require_at_least
from recallax.train.continuation import continue_run
from recallax.train.distributed import Distributed, explain_lost_processes
from recallax.train.loop import train
from recallax.train.program import Program
from recallax.train.run_config import RunConfig
from recallax.train.run_folder import read_config, run_folder_path
from recallax.train.watchdog import HANG_SECONDS


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """Train a config. If the run's folder holds an unfinished run, training resumes from its newest checkpoint."""

    config: Annotated[RunConfig, tyro.conf.arg(name="")]
    run: OutputFolder | None = None
    """Folder of the run; runs/CONFIG-FINGERPRINT by default."""
    from_checkpoint: Annotated[str | None, tyro.conf.arg(name="from", metavar="RUN[@STEP]")] = None
    """Continue a checkpoint of another run, RUN@STEP, or its newest one, RUN, in a new folder. The config may differ
    from that of the run in optim, train and evaluate."""
    profile: bool = False
    """Write a profiler trace of a few steps to the run's folder, and report the model FLOPs utilization."""
    hang_seconds: float = HANG_SECONDS
    """Time in seconds, at least ten times the median time of a step, without a finished step after which the process
    ends with status 79 and the stacks of all threads; 0: never."""
    distributed: Distributed = field(default_factory=Distributed)


def run(arguments: list[str]) -> int:
    """Run the command; returns its exit status."""
    name, *overrides = arguments
    options = parse_overrides(TrainOptions(config=load_config(name)), overrides, f"train {name}")
    require_at_least(0, hang_seconds=options.hang_seconds)
    options.distributed.initialize()
    source, step = _parse_checkpoint(options.from_checkpoint)
    folder = options.run or _default_folder(name, options.config, source, step)
    with explain_lost_processes():
        if source is not None:
            continue_run(source, step, Program(options.config), folder)
        train(options.config, folder, name=name, profile=options.profile, hang_seconds=options.hang_seconds or None)
    print(f"run: {folder}\nreport: recallax report {folder}")
    return 0


def _parse_checkpoint(text: str | None) -> tuple[Path | None, int | None]:
    """Split RUN@STEP; the step is None where it is omitted."""
    if text is None:
        return None, None
    run, separator, step = text.rpartition("@")
    return (Path(run), int(step)) if separator and step.isascii() and step.isdecimal() else (Path(text), None)


def _default_folder(name: str, config: RunConfig, source: Path | None, step: int | None) -> Path:
    folder = run_folder_path(Path("runs"), name, config)
    if source is None:
        return folder
    origin = fingerprint(from_json(read_config(source), RunConfig)) + ("" if step is None else f"-{step}")
    return folder.with_name(f"{folder.name}-from-{origin}")
