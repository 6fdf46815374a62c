"""Launches of Mosaic GPU kernels, and the static configuration that their differentiation rules receive.

Kernels are written for Hopper with lane semantics: the layout of every register array is explicit. One Pallas thread is
a warpgroup of 128 CUDA threads. A pipelined kernel has consumer warpgroups, which compute, and one producer warpgroup,
which issues the TMA copies.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.experimental.pallas import mosaic_gpu as plgpu

from recallax.pallas_kernels.dispatch import interpret_kernels, interpreting

INTERPRET_PARAMS = plgpu.InterpretGPUParams()
"""Parameters of Pallas' interpreter. Tests replace them to detect races."""

REDUCTION_SCRATCH_BYTES = 2048
"""Shared memory of a sum over the rows of a register array, which crosses the four warps of a warpgroup."""


class LaunchConfig(NamedTuple):
    """Static configuration of an op: the first argument of its `custom_vjp` functions."""

    scale: float
    """Factor of the scores."""
    num_splits: int
    """Splits of each row in time (`sequence_splits.py`)."""
    interpret: bool
    """The value of `dispatch.interpreting()` when the op was called. JAX may trace the backward pass after the caller
    has left `interpret_kernels()`, so it is stored here and not read again."""


def kernel_custom_vjp(
    primal: Callable[..., Any], fwd: Callable[..., Any], bwd: Callable[..., Any]
) -> Callable[..., Any]:
    """Build a `jax.custom_vjp` whose functions are traced in the interpreter mode of their static configuration.

    Args:
        primal: `primal(config, *arrays) -> outputs`; `config` is hashable and has the field `interpret`.
        fwd: `fwd(config, *arrays) -> (outputs, residuals)`.
        bwd: `bwd(config, residuals, output_grads) -> gradients of the arrays`.

    Returns:
        A differentiable function with the signature of `primal`.
    """
    differentiable = jax.custom_vjp(_in_configured_mode(primal), nondiff_argnums=(0,))
    differentiable.defvjp(_in_configured_mode(fwd), _in_configured_mode(bwd))
    return differentiable


def _in_configured_mode(rule: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(rule)
    def traced(config: Any, *arguments: Any) -> Any:
        with interpret_kernels(config.interpret):
            return rule(config, *arguments)

    return traced


def launch_kernel(
    body: Callable[..., None],
    *,
    name: str | None = None,
    out_type: Any,
    grid: dict[str, int],
    num_consumer_wgs: int,
    num_producer_wgs: int = 1,
    column_sums: bool = False,
) -> Callable[..., Any]:
    """Build a kernel, interpreted within `dispatch.interpret_kernels()`.

    Args:
        body: Kernel body: receives references to the inputs, then to the outputs, as pytrees.
        name: Name of the kernel in profiles and in `benchmarks/results/static_gpu.jsonl`; None: the name of `body`.
        out_type: Pytree of `jax.ShapeDtypeStruct`.
        grid: Number of blocks along each named axis.
        num_consumer_wgs: Warpgroups that compute, on the axis "warpgroup".
        num_producer_wgs: Warpgroups that only copy; 0: the computing warpgroup issues its own copies.
        column_sums: The body sums over the rows of a register array, which needs shared memory.

    Returns:
        A function of the inputs.
    """
    body.__name__ = name or body.__name__
    num_warpgroups = num_consumer_wgs + num_producer_wgs
    return plgpu.kernel(
        body,
        out_type=out_type,
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        num_threads=num_warpgroups if num_warpgroups > 1 else None,
        thread_name="warpgroup" if num_warpgroups > 1 else None,
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            lowering_semantics=plgpu.LoweringSemantics.Lane,
            reduction_scratch_bytes=REDUCTION_SCRATCH_BYTES if column_sums else 0,
        ),
        interpret=INTERPRET_PARAMS if interpreting() else None,
    )
