"""`recallax sweep`: train the configs that a Python file yields, and collect their results."""

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from recallax.cli.options import parse_options
from recallax.cli.outputs import OutputFolder


@dataclass(frozen=True, kw_only=True)
class SweepOptions:
    """Train the configs that a Python file yields, each in its own run folder, and collect their results.

    The same command resumes a sweep: finished runs are skipped, unfinished ones continue from their checkpoints.
    """

    file: tyro.conf.Positional[Path]
    """Python file with `STAGES`, a list of functions from the rows so far to trials (see `recallax.sweep`)."""
    out: OutputFolder | None = None
    """Folder of the runs and of results.jsonl; runs/FOLDER_OF_THE_FILE by default."""
    backend: Literal["local", "ray", "slurm"] = "local"
    """Train in processes of this machine, in tasks of a Ray cluster, or in SLURM jobs. A cluster must share OUT."""
    workers: int | None = None
    """Number of concurrent runs: by default one per accelerator or core; on a cluster, 64 in its queue."""
    retries: int = 1
    """Number of times that a failed run is retried. A preempted run has not failed."""
    vmap_seeds: int = 1
    """Maximum number of seeds of one config that one process trains at once on one device, with jax.vmap."""
    address: str | None = None
    """Ray: address of the cluster; by default RAY_ADDRESS, or a new cluster on this machine."""
    cpus: int | None = None
    """Ray and SLURM: cores per run; 1 by default."""
    gpus: float | None = None
    """Ray and SLURM: accelerators per run. Default: 1 on a Ray cluster that has any, 0 on SLURM."""
    memory: float | None = None
    """SLURM: memory per run in GiB."""
    partition: str | None = None
    """SLURM: partition of the jobs."""
    minutes: int | None = None
    """SLURM: wall time in minutes, after which a run saves and is queued again; 60 by default."""
    extra: tuple[str, ...] = ()
    """SLURM: more options of sbatch, as in `--extra account=NAME constraint=h100`."""


def run(arguments: list[str]) -> int:
    """Run the command; returns its exit status."""
    options = parse_options(SweepOptions, arguments, "sweep")
    from recallax.sweep import ResourceOptions, make_backend, run_sweep

    out = options.out or Path("runs") / options.file.absolute().parent.name
    resources = ResourceOptions(
        address=options.address,
        cpus=options.cpus,
        gpus=options.gpus,
        memory=options.memory,
        partition=options.partition,
        minutes=options.minutes,
        extra=options.extra or None,
    )
    with contextlib.closing(make_backend(options.backend, options.workers, resources, out)) as backend:
        num_failed = run_sweep(options.file, out, backend, retries=options.retries, vmap_seeds=options.vmap_seeds)
    print(f"rows: {out / 'results.jsonl'}")
    return min(num_failed, 1)
