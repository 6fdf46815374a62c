"""`recallax train`: train a config, or resume its run."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from recallax.cli.config_files import load_config
from recallax.cli.options import parse_overrides
from recallax.train.distributed import Distributed
from recallax.train.loop import train
from recallax.train.run_config import RunConfig
from recallax.train.run_folder import run_folder_path


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """Train a config. If the run's folder holds an unfinished run, training resumes from its newest checkpoint."""

    config: Annotated[RunConfig, tyro.conf.arg(name="")]
    run: Path | None = None
    """Folder of the run; runs/CONFIG-FINGERPRINT by default."""
    profile: bool = False
    """Write a profiler trace of a few steps to the run's folder, and report the model FLOPs utilization."""
    distributed: Distributed = field(default_factory=Distributed)


def run(arguments: list[str]) -> int:
    """Run the command; returns its exit status."""
    name, *overrides = arguments
    options = parse_overrides(TrainOptions(config=load_config(name)), overrides, f"train {name}")
    options.distributed.initialize()
    folder = options.run or run_folder_path(Path("runs"), name, options.config)
    train(options.config, folder, name=name, profile=options.profile)
    print(f"run: {folder}\nreport: recallax report {folder}")
    return 0
