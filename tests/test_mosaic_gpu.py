"""The GPU kernels: against the definition in Pallas' interpreter, and lowered for an H100 that is not there."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from recallax.pallas_kernels import dispatch, mosaic_gpu
from recallax.pallas_kernels.linear_attention import linear_attention
from tests.test_ops import Case, compare, draw, segments

THREADS = 4
"""The interpreter runs each warpgroup of a block in a thread of its own, and they wait for each other; XLA needs as
many, or they wait for ever."""
VARIABLES = ("PJRT_NPROC", "NPROC")
"""Where XLA reads how many threads it may have, in newer and in older versions of jax."""


def enough_threads() -> bool:
    set_to = [int(os.environ[name]) for name in VARIABLES if name in os.environ]
    return min([*set_to, os.cpu_count() or 1] if not set_to else set_to) >= THREADS


interpreted = pytest.mark.skipif(not enough_threads(), reason="runs in the process that the first test starts")


@pytest.mark.skipif(enough_threads(), reason="this process can run them itself")
def test_the_interpreted_kernels_in_a_process_with_enough_threads(request):
    chosen = request.config.getoption("markexpr")
    environment = os.environ | dict.fromkeys(VARIABLES, str(THREADS))
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:xdist", "-m", chosen, __file__]
    folder = Path(__file__).parents[1]
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


CASES = {
    "one token": Case(1, 64, 64, heads=1, decay="token"),
    "below a chunk": Case(13, 128, 64, heads=1),
    "exactly two chunks": Case(128, 64, 64, heads=1, decay="constant"),
    "odd": Case(67, 128, 128, heads=1, decay="token"),
    "extreme decay": Case(131, 64, 64, heads=1, decay="extreme"),
    "packed": Case(67, 64, 128, heads=1, documents=(1, 15, 1, 1, 20, 29)),
    "packed, decay, padding": Case(131, 64, 64, heads=1, decay="token", documents=(16, 1, 50, 33), padded=31),
}


def linear_inputs(case: Case, heads: int | None = None):
    return draw(case, groups=heads)


def check(case: Case, heads: int | None = None, state: bool = True) -> None:
    """Values, final state and gradients of the kernel, keys and queries of `case.heads` for `heads` value heads."""
    first = None
    if state:
        first = np.random.default_rng(5).normal(size=(2, heads or case.heads, case.width, case.values))
    inputs = draw(case)
    if heads:
        wide = draw(case, groups=heads)
        inputs |= {"v": wide["v"]}
        if case.decay:
            rng = np.random.default_rng(3)
            inputs["log_decay"] = -np.abs(rng.normal(size=(2, case.length, heads)))
    ids = segments(case) if case.documents else None

    def op(inputs, state, form):
        with dispatch.interpreted():
            return linear_attention(**inputs, state=state, segments=ids, implementation=form)

    compare(op, case, inputs, first, "bfloat16", "mosaic_gpu")


@interpreted
@pytest.mark.usefixtures("strict")
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_linear_attention(case):
    check(case)
