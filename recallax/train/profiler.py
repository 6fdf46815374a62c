"""`--profile`: a trace of a few steps, and the model FLOPs utilisation of a run."""

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
"""Dense bfloat16 FLOP/s by the vendors' data sheets, by the start of jax's name of the device; longest match wins."""
FIRST_TRACED_STEP, LAST_TRACED_STEP = 10, 20
"""Steps of a run that are traced, after compilation; the last step of a run that is too short for that."""


def step_flops(config: RunConfig, length: int) -> float:
    """FLOPs of one optimizer step: three forward passes' worth of matrix products over the batch."""
    labelled = config.task.max_targets("train", length)
    forward = accounting.forward_flops(config.model, length, config.task.vocab_size, labelled)
    return 3.0 * forward * config.train.batch_size


def peak_flops() -> tuple[float, str]:
    """FLOP/s that all devices together can reach, and where the number comes from.

    A device that is not in the table is measured: the best of five float32 products of 2048 x 2048 matrices.
    """
    kind = jax.devices()[0].device_kind
    names = [name for name in PEAK_FLOPS if kind.startswith(name)]
    if names:
        return PEAK_FLOPS[max(names, key=len)] * jax.device_count(), "data sheet, bfloat16"
    a = jnp.ones((2048, 2048), jnp.float32)
    product = jax.jit(jnp.matmul)
    product(a, a).block_until_ready()
    times = []
    for _ in range(5):
        begin = time.perf_counter()
        product(a, a).block_until_ready()
        times.append(time.perf_counter() - begin)
    return 2 * 2048**3 / min(times), "measured, float32 matrix product"


class Profiler:
    """Traces steps FIRST to LAST of `steps` into a folder; call `before_step` before every step and `close` at the end."""

    def __init__(self, folder: Path, steps: int):
        self._folder = folder
        self._first_step = min(FIRST_TRACED_STEP, steps - 1)
        self._tracing = False

    def before_step(self, step: int) -> None:
        """Start or stop the trace when it is time; counts steps of this process from 0."""
        if step == self._first_step:
            jax.profiler.start_trace(str(self._folder))
            self._tracing = True
        elif step == LAST_TRACED_STEP:
            self.close()

    def close(self) -> None:
        """Write the trace if one is running."""
        if self._tracing:
            jax.profiler.stop_trace()
            self._tracing = False
