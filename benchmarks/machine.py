"""The machine that a benchmark runs on, and the opponent's interpreter."""

import math
import os
import subprocess
import sys
from pathlib import Path


def torch_python(path: str | None, *needed: str) -> str:
    """The opponent's interpreter, executed once to see that it has torch and numpy, and what else is needed."""
    if not path:
        sys.exit("no PyTorch to compare with: give --torch-python PATH or set TORCH_PYTHON")
    modules = ", ".join(("numpy", "torch", *needed))
    try:
        found = subprocess.run([path, "-c", f"import {modules}"], capture_output=True, text=True)
    except OSError as error:
        sys.exit(f"--torch-python {path} cannot be run: {error}")
    if found.returncode:
        reason = found.stderr.strip().splitlines()[-1:]
        sys.exit(f"--torch-python {path} cannot import {modules}: {' '.join(reason)}")
    return path


def described() -> dict[str, str | int | None]:
    """What a row says of the machine: the processor's name where Linux tells it, and how many there are."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return {"device": next(names, "cpu"), "cpus": os.cpu_count()}


def busy_seconds() -> float:
    """What all processes together have used of all cores; NaN where the system is not Linux."""
    try:
        fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    except OSError:
        return math.nan
    user, nice, system, _, _, irq, softirq, steal = map(int, fields[:8])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
