"""Profiler trace of a few training steps, and the peak FLOP/s for the model FLOPs utilization (`--profile`)."""

import time
from pathlib import Path

import jax
import jax.numpy as jnp

from recallax.models import accounting
from recallax.train.run_config import RunConfig

PEAK_FLOPS = {
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
}
"""Dense bfloat16 FLOP/s from the data sheets, by prefix of `jax.Device.device_kind`; the longest match is used."""
FIRST_TRACED_STEP, LAST_TRACED_STEP = 10, 20
"""Range of steps that is traced, which starts after compilation; a shorter run traces its last step."""

MEASURED_SIZE = 2048
"""Rows and columns of the matrices whose product is timed on an unknown device."""


def step_flops(config: RunConfig, length: int) -> float:
    """Return the matrix-product FLOPs of one optimizer step: forward pass plus a backward pass of twice the cost.

    Args:
        config: Config of the run.
        length: Tokens per row.

    Returns:
        FLOPs of one step over the whole batch.
    """
    labelled = config.task.max_targets("train", length)
    forward = accounting.forward_flops(config.model, length, config.task.vocab_size, labelled)
    return 3.0 * forward * config.train.batch_size


def peak_flops() -> tuple[float, str]:
    """Return the peak FLOP/s of all devices together, and the source of the number.

    A device that is not in `PEAK_FLOPS` is measured: the best of five float32 products of 2048 x 2048 matrices.

    Returns:
        FLOP/s, and the source as text.
    """
    kind = jax.devices()[0].device_kind
    names = [name for name in PEAK_FLOPS if kind.startswith(name)]
    if names:
        return PEAK_FLOPS[max(names, key=len)] * jax.device_count(), "data sheet, bfloat16"
    a = jnp.ones((MEASURED_SIZE, MEASURED_SIZE), jnp.float32)
    product = jax.jit(jnp.matmul)
    product(a, a).block_until_ready()
    times = []
    for _ in range(5):
        start = time.perf_counter()
        product(a, a).block_until_ready()
        times.append(time.perf_counter() - start)
    return 2 * MEASURED_SIZE**3 / min(times), "measured, float32 matrix product"


class Profiler:
    """Writes a profiler trace of steps `FIRST_TRACED_STEP` to `LAST_TRACED_STEP`.

    Args:
        folder: Folder of the trace.
        steps: Number of steps that this process takes.
    """

    def __init__(self, folder: Path, steps: int):
        self._folder = folder
        self._first_step = min(FIRST_TRACED_STEP, steps - 1)
        self._tracing = False

    def before_step(self, step: int) -> None:
        """Start or stop the trace if it is due; `step` counts the steps of this process from 0."""
        if step == self._first_step:
            jax.profiler.start_trace(str(self._folder))
            self._tracing = True
        elif step == LAST_TRACED_STEP:
            self.close()

    def close(self) -> None:
        """End the trace and write it, if it is running."""
        if self._tracing:
            jax.profiler.stop_trace()
            self._tracing = False
