"""Helpers to test GPU kernels without a GPU: in Pallas' interpreter, and lowered for an H100."""

import os
from collections.abc import Callable
from typing import Any

import jax
import pytest

from recallax.pallas_kernels.arg_specs import ArgSpec

MIN_THREADS = 4
"""Threads that XLA needs at least: the interpreter runs each warpgroup of a block in its own thread, and they wait for
each other, so that fewer threads deadlock."""
THREAD_COUNT_VARIABLES = ("PJRT_NPROC", "NPROC")
"""Environment variables with XLA's number of threads, in newer and in older versions of jax."""


def enough_threads() -> bool:
    """Return True if this process has enough threads to interpret a kernel."""
    counts = [int(os.environ[name]) for name in THREAD_COUNT_VARIABLES if name in os.environ]
    return min(counts or [os.cpu_count() or 1]) >= MIN_THREADS


interpreted = pytest.mark.skipif(not enough_threads(), reason="runs in the process that test_mosaic_gpu.py starts")


def mark_slow_cases(cases: dict[str, ArgSpec], *names: str) -> list[Any]:
    """Mark all cases but `names` as full, because the interpreter is slow: `make test-full` runs them."""
    return [name if name in names else pytest.param(name, marks=pytest.mark.full) for name in cases]


def abstract_h100() -> Any:
    """Return a context that traces for an H100, without the device and without its plugin."""
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")
    mesh = jax.sharding.AbstractMesh((1,), ("x",), (jax.sharding.AxisType.Explicit,), abstract_device=device)
    return jax.sharding.use_abstract_mesh(mesh)


def count_kernels(function: Callable, *arguments: Any) -> int:
    """Return the number of Mosaic GPU kernels that a function has when it is lowered for an H100."""
    with abstract_h100():
        lowered = jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",))
    return lowered.as_text().count("custom_call @mosaic_gpu")
