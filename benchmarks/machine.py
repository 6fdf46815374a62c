"""The machine that a benchmark runs on, and the opponent's interpreter."""

import math
import os
import subprocess
import sys
from pathlib import Path


def one_thread() -> None:
    """Restrict JAX to one thread. Takes effect before the first computation only."""
    os.environ |= {"PJRT_NPROC": "1", "NPROC": "1", "OMP_NUM_THREADS": "1"}


def torch_python(path: str | None, *modules: str) -> str:
    """Check the opponent's interpreter by importing what it needs.

    Args:
        path: A Python executable.
        modules: Imported besides numpy and torch.

    Returns:
        The path.

    Raises:
        SystemExit: There is no path, it cannot be executed, or it cannot import the modules.
    """
    if not path:
        sys.exit("no PyTorch to compare with: give --torch-python PATH or set TORCH_PYTHON")
    names = ", ".join(("numpy", "torch", *modules))
    try:
        found = subprocess.run([path, "-c", f"import {names}"], capture_output=True, text=True)
    except OSError as error:
        sys.exit(f"--torch-python {path} cannot be executed: {error}")
    if found.returncode:
        reason = found.stderr.strip().splitlines()[-1:]
        sys.exit(f"--torch-python {path} cannot import {names}: {' '.join(reason)}")
    return path


def describe_machine() -> dict[str, str | int | None]:
    """Return the processor's name, where Linux gives it, and the number of CPUs."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return {"device": next(names, "cpu"), "cpus": os.cpu_count()}


def busy_cpu_seconds() -> float:
    """Return the CPU seconds that all processes have used on all cores; NaN where the system is not Linux."""
    try:
        fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    except OSError:
        return math.nan
    user, nice, system, _, _, irq, softirq, steal = map(int, fields[:8])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
