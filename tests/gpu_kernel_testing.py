"""How the tests of the GPU kernels run without a GPU: in Pallas' interpreter, and lowered for an H100."""

import os
from collections.abc import Callable
from typing import Any

import jax
import pytest

from recallax.pallas_kernels.arg_specs import ArgSpec

MIN_THREADS = 4
"""The interpreter runs each warpgroup of a block in a thread of its own, and they wait for each other; XLA needs as
many, or they wait for ever."""
THREAD_COUNT_VARIABLES = ("PJRT_NPROC", "NPROC")
"""Where XLA reads how many threads it may have, in newer and in older versions of jax."""


def enough_threads() -> bool:
    """Whether this process can interpret a kernel."""
    told = [int(os.environ[name]) for name in THREAD_COUNT_VARIABLES if name in os.environ]
    return min(told or [os.cpu_count() or 1]) >= MIN_THREADS


interpreted = pytest.mark.skipif(not enough_threads(), reason="runs in the process that test_mosaic_gpu.py starts")


def mark_slow_cases(cases: dict[str, ArgSpec], *names: str) -> list[Any]:
    """The interpreter takes a second per chunk, so the gate has a few cases and `make test-full` all of them."""
    return [name if name in names else pytest.param(name, marks=pytest.mark.full) for name in cases]


def abstract_h100() -> Any:
    """Trace for an H100, without one and without its plugin."""
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")
    mesh = jax.sharding.AbstractMesh((1,), ("x",), (jax.sharding.AxisType.Explicit,), abstract_device=device)
    return jax.sharding.use_abstract_mesh(mesh)


def count_kernels(function: Callable, *arguments: Any) -> int:
    """How many kernels of ours a function has for an H100."""
    with abstract_h100():
        lowered = jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",))
    return lowered.as_text().count("custom_call @mosaic_gpu")
