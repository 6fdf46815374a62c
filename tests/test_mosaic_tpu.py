"""TPU kernels: interpreted on any machine against the definitions in float64, and lowered for a TPU."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from benchmarks import static_tpu
from recallax.pallas_kernels.delta_rule import delta_rule
from recallax.pallas_kernels.delta_rule import mosaic_tpu as delta_tpu
from recallax.pallas_kernels.dispatch import Unsupported, interpret_kernels
from recallax.pallas_kernels.linear_attention import linear_attention
from recallax.pallas_kernels.linear_attention import mosaic_tpu as linear_tpu
from recallax.pallas_kernels.mosaic_tpu import chunk_grid, chunk_scan
from recallax.pallas_kernels.mosaic_tpu.solve_unit_lower import solve_unit_lower
from recallax.pallas_kernels.selective_scan import mosaic_tpu as scan_tpu
from recallax.pallas_kernels.selective_scan import selective_scan
from recallax.pallas_kernels.taylor_attention import mosaic_tpu as taylor_tpu
from recallax.pallas_kernels.taylor_attention import taylor_attention
from recallax.pallas_kernels.taylor_attention.arg_specs import state as taylor_state
from tests.test_ops import (
    ARG_SPECS,
    ArgSpec,
    compare,
    delta_inputs,
    each_dtype,
    random_inputs,
    scan_inputs,
    segment_ids,
)

pytestmark = pytest.mark.usefixtures("strict")

IMPLEMENTATION = "mosaic_tpu"
SHAPE = (2, 300, 4)
"""Rows, tokens and heads of the lowered kernels: three chunks, the last one incomplete."""


@pytest.fixture(autouse=True)
def short_chunks(request, monkeypatch):
    if "lowered" not in request.function.__name__:
        monkeypatch.setattr(linear_tpu, "CHUNK", 16)
        monkeypatch.setattr(linear_tpu, "CHANNEL_CHUNK", 32)  # two blocks of rows
        monkeypatch.setattr(scan_tpu, "CHUNK", 16)
        monkeypatch.setattr(taylor_tpu, "CHUNK", 16)
        monkeypatch.setattr(delta_tpu, "CHUNK", 32)  # two blocks of the triangular system


def cases(*fast: str, **extra: ArgSpec) -> Any:
    """Parametrize a test with all cases; those not in `fast` are marked as full."""
    full = pytest.mark.full
    params = {
        name: pytest.param(case, marks=() if name in fast else full) for name, case in (ARG_SPECS | extra).items()
    }
    return pytest.mark.parametrize("case", params.values(), ids=params)


BASIC = ("odd", "packed, decay, padding", "packed, channel decay, padding")


def ids(case: ArgSpec) -> jnp.ndarray | None:
    """Document ids, or None if every row is one document: kernels have a path for each."""
    return segment_ids(case) if case.document_lengths else None


def random_state(case: ArgSpec) -> np.ndarray:
    return np.random.default_rng(5).normal(size=(2, case.num_heads, case.head_k_dim, case.head_v_dim))


def check_linear(case: ArgSpec, dtype: str, groups: int | None = None) -> None:
    inputs = random_inputs(case)
    inputs |= {name: inputs[name][:, :, :groups] for name in ("q", "k")}

    def op(inputs, state, implementation):
        return linear_attention(**inputs, state=state, segment_ids=ids(case), implementation=implementation)

    with interpret_kernels():
        compare(op, case, inputs, random_state(case), dtype, IMPLEMENTATION)


@cases("one token", "below a chunk", "exactly two chunks", "extreme decay", "extreme channel decay", *BASIC)
@each_dtype
def test_linear_attention(case, dtype):
    check_linear(case, dtype)


@pytest.mark.parametrize(
    ("heads", "groups", "block"), [(4, 2, 4), (4, 2, 1), pytest.param(3, 1, 4, marks=pytest.mark.full)]
)
def test_linear_attention_of_grouped_heads(monkeypatch, heads, groups, block):
    """A grid step computes several groups, one group, or a part of one."""
    monkeypatch.setattr(chunk_grid, "MAX_HEADS_PER_STEP", block)
    case = dataclasses.replace(ARG_SPECS["packed, decay, padding"], num_heads=heads)
    check_linear(case, "bfloat16" if block == 1 else "float32", groups)


@pytest.mark.parametrize("decay", ["token", "channel"])
def test_rounding_of_decay_gradient_does_not_cross_documents(decay):
    """The gradient of the log-decay is a sum over later tokens of the document; other documents change no bit of it."""
    case = ArgSpec(70, decay=decay, document_lengths=(40, 30), num_heads=1)
    inputs = {name: jnp.asarray(x, jnp.bfloat16) for name, x in random_inputs(case).items()}
    inputs["log_decay"] = inputs["log_decay"].astype(jnp.float32)
    later = inputs | {"v": inputs["v"].at[0, 40:].multiply(3)}

    def total(inputs):
        return jnp.sum(
            linear_attention(**inputs, segment_ids=segment_ids(case), implementation=IMPLEMENTATION)[0].astype(
                jnp.float32
            )
        )

    with interpret_kernels():
        gradient = jax.jit(jax.grad(total))
        one, other = (gradient(x)["log_decay"][0, :40] for x in (inputs, later))
    np.testing.assert_array_equal(np.asarray(one), np.asarray(other))


def test_linear_attention_of_documents_without_a_decay_in_bfloat16():
    check_linear(ARG_SPECS["packed"], "bfloat16")


def test_chunks_run_in_order_without_data_races(monkeypatch):
    """The interpreter runs the parallel axes of the grid in random order: rows and heads allow this, chunks do not."""
    interpreter = pltpu.InterpretParams(detect_races=True, random_seed=3)
    monkeypatch.setattr(chunk_scan, "INTERPRET_PARAMS", interpreter)
    check_linear(dataclasses.replace(ARG_SPECS["token decay"], num_heads=6), "float32")


def test_initial_state_is_optional():
    case = ARG_SPECS["token decay"]
    inputs: dict[str, Any] = {name: jnp.asarray(x, jnp.float32) for name, x in random_inputs(case).items()}
    with interpret_kernels():
        actual = linear_attention(**inputs, implementation=IMPLEMENTATION)
    desired = linear_attention(**inputs, implementation="reference")
    for a, b in zip(actual, desired, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


def test_unsupported_arguments_are_rejected_with_reason():
    x = jnp.zeros((1, 4, 2, 8))
    with pytest.raises(Unsupported, match="it is for a TPU"):
        linear_attention(x, x, x, implementation=IMPLEMENTATION)
    with interpret_kernels(), pytest.raises(Unsupported, match="v is bfloat16; they must all be"):
        linear_attention(x, x, x.astype(jnp.bfloat16), implementation=IMPLEMENTATION)


@cases("one token", "extreme decay", "correlated .9, negative eigenvalues, channel decay", *BASIC)
@each_dtype
@pytest.mark.parametrize("erase", ["token", pytest.param("channel", marks=pytest.mark.full)])
def test_delta_rule(case, dtype, erase):
    def op(inputs, state, implementation):
        return delta_rule(**inputs, state=state, segment_ids=ids(case), implementation=implementation)

    with interpret_kernels():
        compare(op, case, delta_inputs(case, erase), random_state(case), dtype, IMPLEMENTATION)


@cases("one token", "odd", "packed, decay, padding")
@each_dtype
def test_taylor_attention(case, dtype):
    inputs = {name: x for name, x in random_inputs(case).items() if name != "log_decay"}

    def op(inputs, state, implementation):
        return taylor_attention(**inputs, state=state, segment_ids=ids(case), implementation=implementation)

    with interpret_kernels():
        compare(op, case, inputs, taylor_state(case, "symmetric"), dtype, IMPLEMENTATION)


def test_taylor_attention_rejects_full_features():
    x = jnp.zeros((1, 4, 2, 8))
    with interpret_kernels(), pytest.raises(Unsupported, match="not symmetric"):
        taylor_attention(x, x, x, features="full", implementation=IMPLEMENTATION)


LAST = "a document of one token at the end of an incomplete chunk"


@cases("one token", "extreme decay", "packed, decay, padding", LAST, **{LAST: ArgSpec(35, document_lengths=(34, 1))})
@each_dtype
@pytest.mark.parametrize("states", [3, pytest.param(None, marks=pytest.mark.full)])
def test_selective_scan(case, dtype, states):
    def op(inputs, state, implementation):
        out, state = selective_scan(**inputs, state=state, segment_ids=ids(case), implementation=implementation)
        return out[:, :, None], state  # with an axis of one head

    state = np.random.default_rng(5).normal(size=(2, 5, states or 1))
    with interpret_kernels():
        compare(op, case, scan_inputs(case, states), state, dtype, IMPLEMENTATION)


def shaped(*shape: int, dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def lowered(op: Callable, inputs: dict[str, Any]) -> str:
    """Return the text of a module that computes outputs and all gradients on a TPU, which need not be present."""

    def both(inputs):
        out, pull = jax.vjp(lambda inputs: op(**inputs, implementation=IMPLEMENTATION), inputs)
        return out, pull(out)

    device = jax.sharding.AbstractDevice(device_kind="TPU v5e", num_cores=1, platform="tpu")
    axis = (jax.sharding.AxisType.Explicit,)
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((1,), ("x",), axis, abstract_device=device)):
        return jax.jit(both).trace(inputs).lower(lowering_platforms=("tpu",)).as_text()


@pytest.mark.parametrize("width", [128, pytest.param(64, marks=pytest.mark.full)])
@pytest.mark.parametrize("decay", [None, "token", "channel"])
def test_linear_attention_is_lowered_for_a_tpu(decay, width):
    inputs = {"q": shaped(*SHAPE[:2], 2, width), "k": shaped(*SHAPE[:2], 2, width), "v": shaped(*SHAPE, width)}
    gates = {None: {}, "token": {"log_decay": SHAPE}, "channel": {"log_decay": (*SHAPE, width)}}[decay]
    gate = {name: shaped(*shape, dtype=jnp.float32) for name, shape in gates.items()}
    op = functools.partial(linear_attention, segment_ids=jnp.ones(SHAPE[:2], jnp.int32)) if decay else linear_attention
    text = lowered(op, inputs | gate)
    assert text.count("tpu_custom_call") >= 3  # forward, and two of the backward pass


@pytest.mark.parametrize("decay", [None, "token", "channel"])
def test_the_delta_rule_is_lowered_for_a_tpu(decay):
    inputs = {"q": shaped(*SHAPE[:2], 2, 128), "k": shaped(*SHAPE[:2], 2, 128), "v": shaped(*SHAPE, 128)}
    gates = {None: {}, "token": {"log_decay": SHAPE}, "channel": {"log_decay": (*SHAPE, 128)}}[decay]
    gates |= {"erase": (*SHAPE, 128) if decay == "channel" else SHAPE, "write": SHAPE}
    gate = {name: shaped(*shape, dtype=jnp.float32) for name, shape in gates.items()}
    text = lowered(delta_rule, inputs | gate)
    assert text.count("tpu_custom_call") >= 2  # forward, backward


def test_taylor_attention_is_lowered_for_a_tpu():
    inputs = {"q": shaped(*SHAPE, 16), "k": shaped(*SHAPE, 16), "v": shaped(*SHAPE, 64)}
    op = functools.partial(taylor_attention, segment_ids=jnp.ones(SHAPE[:2], jnp.int32))
    assert lowered(op, inputs).count("tpu_custom_call") >= 2  # forward, backward


def test_the_selective_scan_is_lowered_for_a_tpu():
    rows, length = SHAPE[:2]
    inputs = {name: shaped(rows, length, 700) for name in ("x", "rate")}
    inputs |= {name: shaped(rows, length, 16) for name in ("b", "c")} | {"a": shaped(700, 16, dtype=jnp.float32)}
    op = functools.partial(selective_scan, segment_ids=jnp.ones(SHAPE[:2], jnp.int32))
    assert lowered(op, inputs).count("tpu_custom_call") >= 2  # forward, backward


@pytest.mark.parametrize(("correlation", "beta"), [(0.0, 1.0), (0.9, 1.0), (0.99, 2.0)])
@pytest.mark.parametrize("size", [16, 128])
def test_triangular_systems_are_accurate_for_correlated_keys(size, correlation, beta):
    rng = np.random.default_rng(0)
    k = np.sqrt(1 - correlation) * rng.normal(size=(3, size, 128)) + np.sqrt(correlation) * rng.normal(size=128)
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    strength = rng.uniform(beta - 1, beta, size=(3, size, 1))
    a = np.tril(strength * np.einsum("bik,bjk->bij", k, k), -1).astype(np.float32)
    b = rng.normal(size=(3, size, 8)).astype(np.float32)
    desired = np.linalg.solve(np.eye(size) + a.astype(np.float64), b)
    actual = jax.vmap(solve_unit_lower)(jnp.asarray(a), jnp.asarray(b))
    assert np.linalg.norm(np.asarray(actual) - desired) <= 3e-6 * np.linalg.norm(desired)


@pytest.mark.parametrize("target", static_tpu.TARGETS)
def test_tpu_compiler_accepts_every_kernel_without_regression(target):
    """A kernel that exceeds VMEM does not compile."""
    if static_tpu.find_libtpu() is None:
        pytest.skip(
            "not compiled for a TPU: libtpu is not installed (scripts/tpu-compiler), so only the lowering is tested"
        )
    before = static_tpu.latest_rows(static_tpu.read_rows())
    for row in static_tpu.compile_kernels(static_tpu.TPU_KERNEL_CASES, target, IMPLEMENTATION):
        recorded = before[static_tpu.row_key(row)]
        assert row["kernels"].keys() == recorded["kernels"].keys() and row["kernels"]
        assert not static_tpu.regressions(row, recorded)


def test_a_kernel_that_grows_by_more_than_a_tenth_is_a_regression():
    def row(bundles):
        return {"case": "a", "target": "v5e", "form": IMPLEMENTATION, "kernels": {"k": {"bundles_per_128": bundles}}}

    assert not static_tpu.regressions(row(109.0), row(100.0)) and not static_tpu.regressions(row(1.0), None)
    assert static_tpu.regressions(row(111.0), row(100.0)) == [
        "a, v5e, k: 100.0 -> 111.0 bundles per 128 tokens of a head"
    ]
