"""Helpers to test GPU kernels without a GPU: in Pallas' interpreter, and lowered for an H100."""

import dataclasses
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from recallax.pallas_kernels import dispatch
from recallax.pallas_kernels.arg_specs import ArgSpec, segment_ids
from recallax.pallas_kernels.mosaic_gpu import kernel_launch
from tests.test_ops import compare

MIN_THREADS = 4
"""Threads that XLA needs at least: the interpreter runs each warpgroup of a block in its own thread, and they wait for
each other, so that fewer threads deadlock."""
THREAD_COUNT_VARIABLES = ("PJRT_NPROC", "NPROC")
"""Environment variables with XLA's number of threads, in newer and in older versions of jax."""


def enough_threads() -> bool:
    """Return True if this process has enough threads to interpret a kernel."""
    counts = [int(os.environ[name]) for name in THREAD_COUNT_VARIABLES if name in os.environ]
    return min(counts or [os.cpu_count() or 1]) >= MIN_THREADS


def interpreted(test: Callable) -> Callable:
    """Run a test only in a process with enough threads, and with the fixture `strict`."""
    skip = pytest.mark.skipif(not enough_threads(), reason="runs in the process that test_mosaic_gpu.py starts")
    return skip(pytest.mark.usefixtures("strict")(test))


def each_width(test: Callable) -> Callable:
    """Run a test for every supported width of keys (`width`) and of values (`values`)."""
    return pytest.mark.parametrize("values", [64, 128])(pytest.mark.parametrize("width", [64, 128])(test))


def mark_slow_cases(cases: dict[str, ArgSpec], *names: str) -> list[Any]:
    """Mark all cases but `names` as full, because the interpreter is slow: `make test-full` runs them."""
    return [name if name in names else pytest.param(name, marks=pytest.mark.full) for name in cases]


def pad_to_length(case: ArgSpec) -> ArgSpec:
    """Return the case with padding after the documents of its first row; without documents there is no padding."""
    num_padding = case.length - sum(case.document_lengths) if case.document_lengths else 0
    return dataclasses.replace(case, num_padding=num_padding)


def compare_interpreted(
    op: Callable, case: ArgSpec, inputs: dict[str, Any], state: Any, dtype: str = "bfloat16"
) -> None:
    """Compare an interpreted GPU kernel with its definition, in values, final state and every gradient.

    Args:
        op: Called with the inputs and with `state`, `segment_ids` and `implementation` as keyword arguments; returns
            the output [B, T, H, D] and the final state.
        case: The test case; its documents determine `segment_ids`.
        inputs: Arrays by argument name.
        state: Initial state, or None.
        dtype: Dtype of the inputs of the kernel.

    Raises:
        AssertionError: The kernel differs from the definition by more than the tolerance of `dtype`.
    """
    ids = segment_ids(case) if case.document_lengths else None

    def run(inputs: dict[str, Any], state: Any, implementation: str) -> Any:
        with dispatch.interpret_kernels():
            return op(**inputs, state=state, segment_ids=ids, implementation=implementation)

    compare(run, case, inputs, state, dtype, "mosaic_gpu")


def first_row_in_bfloat16(inputs: dict[str, Any]) -> dict[str, Any]:
    """Return the first row of each array in bfloat16."""
    return {name: jnp.asarray(x[:1], jnp.bfloat16) for name, x in inputs.items()}


def assert_no_data_races(op: Callable, inputs: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the forward and backward kernels of an op in the interpreter, which raises an error on a data race.

    Args:
        op: Called with the inputs and `implementation` as keyword arguments; returns arrays, the output among them.
        inputs: Arrays by argument name.
        monkeypatch: Enables the detection of races for this test.

    Raises:
        AssertionError: A gradient is not finite.
    """
    monkeypatch.setattr(kernel_launch, "INTERPRET_PARAMS", plgpu.InterpretGPUParams(detect_races=True))

    def total(inputs: dict[str, Any]) -> Any:
        with dispatch.interpret_kernels():
            outputs = op(**inputs, implementation="mosaic_gpu")
        return sum(jnp.sum(x.astype(jnp.float32)) for x in jax.tree.leaves(outputs))

    grads = jax.jit(jax.grad(total))(inputs)
    assert all(np.isfinite(np.asarray(x, np.float32)).all() for x in jax.tree.leaves(grads))


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


def count_kernels_with_gradients(op: Callable, num_differentiable: int, *arguments: Any) -> tuple[int, int]:
    """Count the Mosaic GPU kernels of an op and of its gradients when they are lowered for an H100.

    Args:
        op: The op, with positional arguments.
        num_differentiable: Number of the first arguments for which gradients are computed.
        *arguments: Shapes and dtypes of all arguments.

    Returns:
        The number of kernels of a forward pass, and of a forward and backward pass.
    """

    def gradients(*arguments: Any) -> Any:
        differentiable, others = arguments[:num_differentiable], arguments[num_differentiable:]
        out, pull = jax.vjp(lambda *inputs: op(*inputs, *others), *differentiable)
        return pull(out)

    return count_kernels(op, *arguments), count_kernels(gradients, *arguments)
