"""The GPU kernels of linear and Taylor attention equal the definitions in Pallas' interpreter and lower for an H100."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recallax.pallas_kernels import dispatch
from recallax.pallas_kernels.arg_specs import ArgSpec, random_inputs
from recallax.pallas_kernels.linear_attention import linear_attention
from recallax.pallas_kernels.mosaic_gpu import sequence_splits
from recallax.pallas_kernels.taylor_attention import TaylorState, taylor_attention, taylor_attention_step
from recallax.pallas_kernels.taylor_attention import arg_specs as taylor_cases
from tests import gpu_kernel_testing as gpu_testing


@pytest.mark.skipif(gpu_testing.enough_threads(), reason="this process has enough threads to run them")
def test_interpreted_kernels_in_a_process_with_enough_threads(request):
    markers = request.config.getoption("markexpr")
    environment = os.environ | dict.fromkeys(gpu_testing.THREAD_COUNT_VARIABLES, str(gpu_testing.MIN_THREADS))
    interpreted_only = "not lowers and not rejected"
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:xdist", "-m", markers, "-k", interpreted_only]
    command += map(str, sorted(Path(__file__).parent.glob("test_mosaic_gpu*.py")))
    folder = Path(__file__).parents[1]
    result = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


CASES = {
    "one token": ArgSpec(1, 64, 64, num_heads=1, decay="token"),
    "below a chunk": ArgSpec(13, 128, 64, num_heads=1),
    "exactly two chunks": ArgSpec(128, 64, 64, num_heads=1, decay="constant"),
    "odd": ArgSpec(67, 128, 128, num_heads=1, decay="token"),
    "wide keys": ArgSpec(67, 128, 64, num_heads=1, decay="token"),
    "extreme decay": ArgSpec(131, 64, 64, num_heads=1, decay="extreme"),
    "packed": ArgSpec(67, 64, 128, num_heads=1, document_lengths=(1, 15, 1, 1, 20, 29)),
    "packed, decay, padding": ArgSpec(
        131, 64, 64, num_heads=1, decay="token", document_lengths=(16, 1, 50, 33), num_padding=31
    ),
}


def check(case: ArgSpec, heads: int | None = None, *, state: bool = True) -> None:
    """Compare values, final state and every gradient; `heads` is the number of value heads if it exceeds q's."""
    inputs = random_inputs(case)
    if heads:
        rng = np.random.default_rng(3)
        inputs["v"] = rng.normal(size=(2, case.length, heads, case.head_v_dim))
        inputs["log_decay"] = -np.abs(rng.normal(size=(2, case.length, heads)))
    shape = (2, heads or case.num_heads, case.head_k_dim, case.head_v_dim)
    initial_state = np.random.default_rng(5).normal(size=shape) if state else None
    gpu_testing.compare_interpreted(linear_attention, case, inputs, initial_state)


@gpu_testing.interpreted
@pytest.mark.parametrize("name", gpu_testing.mark_slow_cases(CASES, "extreme decay", "packed, decay, padding"))
def test_linear_attention(name):
    check(CASES[name])


@gpu_testing.interpreted
def test_shared_query_heads_and_default_state():
    check(ArgSpec(67, 64, 64, num_heads=1), heads=2, state=False)


@gpu_testing.interpreted
@pytest.mark.parametrize("documents", [pytest.param((), marks=pytest.mark.full), (60, 1, 70, 5)], ids=["one", "four"])
def test_row_splits(documents, monkeypatch):
    """Rows of four chunks as four blocks, each with its own initial state."""
    monkeypatch.setattr(sequence_splits, "MIN_CHUNKS_PER_SPLIT", 1)
    check(gpu_testing.pad_to_length(ArgSpec(200, 64, 64, num_heads=1, decay="token", document_lengths=documents)))


@gpu_testing.interpreted
@pytest.mark.full
@gpu_testing.each_width
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_linear_attention_at_every_width(case, width, values):
    check(dataclasses.replace(case, head_k_dim=width, head_v_dim=values, num_heads=2))


TAYLOR_CASES = {
    "one token": ArgSpec(1, 16, 64, num_heads=1),
    "odd": ArgSpec(67, 16, 64, num_heads=1),
    "exactly two chunks": ArgSpec(128, 16, 64, num_heads=1),
    "packed, padding": ArgSpec(67, 16, 64, num_heads=1, document_lengths=(16, 1, 33), num_padding=17),
}


@gpu_testing.interpreted
@pytest.mark.parametrize("name", gpu_testing.mark_slow_cases(TAYLOR_CASES, "packed, padding"))
def test_taylor_attention(name):
    check_taylor(TAYLOR_CASES[name])


@gpu_testing.interpreted
@pytest.mark.parametrize("documents", [pytest.param((), marks=pytest.mark.full), (60, 1, 40)], ids=["one", "three"])
def test_taylor_attention_row_splits(documents, monkeypatch):
    monkeypatch.setattr(sequence_splits, "MIN_CHUNKS_PER_SPLIT", 1)
    check_taylor(gpu_testing.pad_to_length(ArgSpec(120, 16, 64, num_heads=1, document_lengths=documents)))


def check_taylor(case: ArgSpec) -> None:
    """Compare values, final state and every gradient."""
    gpu_testing.compare_interpreted(
        taylor_attention, case, taylor_cases.inputs(case), taylor_cases.state(case, "symmetric")
    )


@gpu_testing.interpreted
def test_taylor_attention_step_equals_xla():
    case = ArgSpec(1, 16, 64, num_heads=1)
    token: dict[str, Any] = {name: jnp.asarray(x[:, 0], jnp.bfloat16) for name, x in taylor_cases.inputs(case).items()}
    state = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), taylor_cases.state(case, "symmetric"))
    active = jnp.asarray([True, False])
    with dispatch.interpret_kernels():
        out, after = taylor_attention_step(**token, state=state, active=active, implementation="mosaic_gpu")
    expected_out, expected = taylor_attention_step(**token, state=state, active=active, implementation="xla")
    np.testing.assert_allclose(np.asarray(out, np.float32), np.asarray(expected_out, np.float32), atol=1e-2)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), after, expected)
    assert (after.kv[1] == state.kv[1]).all() and (out[1] == 0).all()


@gpu_testing.interpreted
def test_no_data_races(monkeypatch):
    """Two warpgroups share the state's operand, and the row has more chunks than the pipeline holds at once."""
    case = ArgSpec(300, 128, 128, num_heads=1, decay="token")
    gpu_testing.assert_no_data_races(
        linear_attention, gpu_testing.first_row_in_bfloat16(random_inputs(case)), monkeypatch
    )


@pytest.mark.parametrize("width", [64, pytest.param(128, marks=pytest.mark.full)])
@pytest.mark.parametrize("decay", [True, False], ids=["decay", "no decay"])
@pytest.mark.parametrize("docs", [True, pytest.param(False, marks=pytest.mark.full)], ids=["docs", "no docs"])
def test_lowers_for_an_h100(width, decay, docs):
    tokens = jax.ShapeDtypeStruct((2, 200, 2, width), jnp.bfloat16)
    gate = jax.ShapeDtypeStruct((2, 200, 2), jnp.float32) if decay else None
    ids = jax.ShapeDtypeStruct((2, 200), jnp.int32) if docs else None

    def op(q, k, v, gate, ids):
        return linear_attention(q, k, v, log_decay=gate, segment_ids=ids, implementation="mosaic_gpu")

    assert gpu_testing.count_kernels_with_gradients(op, 4, tokens, tokens, tokens, gate, ids) == (1, 3)


def test_row_split_lowering_fills_an_h100():
    tokens = jax.ShapeDtypeStruct((1, 8192, 4, 128), jnp.bfloat16)

    def op(q, k, v):
        return linear_attention(q, k, v, implementation="mosaic_gpu")

    with gpu_testing.abstract_h100():
        lowered = jax.jit(op).trace(tokens, tokens, tokens).lower(lowering_platforms=("cuda",)).as_text()
    assert sequence_splits.choose_num_splits(4, 128) == 16
    assert lowered.count("custom_call @mosaic_gpu") == 2 and "tensor<16x512x4x128xbf16>" in lowered


@pytest.mark.parametrize("docs", [True, pytest.param(False, marks=pytest.mark.full)], ids=["docs", "no docs"])
def test_taylor_attention_lowers_for_an_h100(docs):
    keys, values = (jax.ShapeDtypeStruct((2, 200, 2, width), jnp.bfloat16) for width in (16, 64))
    ids = jax.ShapeDtypeStruct((2, 200), jnp.int32) if docs else None

    def op(q, k, v, ids):
        return taylor_attention(q, k, v, segment_ids=ids, implementation="mosaic_gpu")

    assert gpu_testing.count_kernels_with_gradients(op, 3, keys, keys, values, ids) == (1, 4)


def test_taylor_attention_step_lowers_for_an_h100():
    keys, values = (jax.ShapeDtypeStruct((2, 2, width), jnp.bfloat16) for width in (16, 64))
    kv, z = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((2, 2, 153, 64), (2, 2, 153)))

    def step(q, k, v, kv, z):
        active = jnp.ones(2, bool)
        return taylor_attention_step(q, k, v, TaylorState(kv, z), active, implementation="mosaic_gpu")

    assert gpu_testing.count_kernels(step, keys, keys, values, kv, z) == 1


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"q": jnp.zeros((1, 4, 1, 32), jnp.bfloat16), "k": jnp.zeros((1, 4, 1, 32), jnp.bfloat16)}, "K is 32"),
        ({"v": jnp.zeros((1, 4, 1, 64))}, "v is float32"),
    ],
)
def test_unsupported_arguments_are_rejected_with_reason(change, reason):
    inputs = {name: jnp.zeros((1, 4, 1, 64), jnp.bfloat16) for name in "qkv"} | change
    with dispatch.interpret_kernels(), pytest.raises(dispatch.Unsupported, match=reason):
        linear_attention(**inputs, implementation="mosaic_gpu")
    with pytest.raises(dispatch.Unsupported, match="it is for a GPU and this is a CPU"):
        linear_attention(**inputs, implementation="mosaic_gpu")
