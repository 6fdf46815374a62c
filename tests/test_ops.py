"""Every op: the XLA implementation equals the definition in float64, in values and in all gradients."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recallax.pallas_kernels import feature_maps
from recallax.pallas_kernels.arg_specs import ARG_SPECS, ArgSpec, random_inputs, segment_ids
from recallax.pallas_kernels.delta_rule import delta_rule, delta_rule_step
from recallax.pallas_kernels.delta_rule import xla as delta_xla
from recallax.pallas_kernels.delta_rule.arg_specs import inputs as delta_inputs
from recallax.pallas_kernels.landmark_attention import arg_specs as landmark_cases
from recallax.pallas_kernels.landmark_attention import landmark_attention
from recallax.pallas_kernels.landmark_attention import xla as landmark_xla
from recallax.pallas_kernels.linear_attention import arg_specs as linear_cases
from recallax.pallas_kernels.linear_attention import linear_attention, linear_attention_step
from recallax.pallas_kernels.linear_attention import xla as linear_xla
from recallax.pallas_kernels.selective_scan import selective_scan, selective_scan_step
from recallax.pallas_kernels.selective_scan import xla as selective_xla
from recallax.pallas_kernels.selective_scan.arg_specs import inputs as scan_inputs
from recallax.pallas_kernels.short_conv import arg_specs as conv_cases
from recallax.pallas_kernels.short_conv import short_conv
from recallax.pallas_kernels.taylor_attention import arg_specs as taylor_cases
from recallax.pallas_kernels.taylor_attention import num_features, taylor_attention
from recallax.pallas_kernels.taylor_attention import xla as taylor_xla
from recallax.pallas_kernels.triangular import unit_lower_inverse
from recallax.pallas_kernels.window_attention import KVCache, window_attention, window_attention_step
from recallax.pallas_kernels.window_attention import arg_specs as window_cases
from recallax.pallas_kernels.window_attention import xla as window_xla

pytestmark = pytest.mark.usefixtures("strict")

TOLERANCE = {"float32": 3e-5, "bfloat16": 0.03}
"""Largest error relative to the largest output of a head in a block of 64 tokens."""


IMPLEMENTATIONS = ("reference", "xla")
FLOAT32 = ("log_decay", "erase", "write", "rate", "a", "lr", "log_momentum", "weight")
"""Inputs that are float32 for any dtype of the activations."""


each_case = pytest.mark.parametrize("case", ARG_SPECS.values(), ids=ARG_SPECS)
each_dtype = pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.full)])
FEW = ("odd", "packed, decay, padding", "packed, channel decay, padding")
few_cases = pytest.mark.parametrize("case", [ARG_SPECS[name] for name in FEW], ids=FEW)


@pytest.fixture(autouse=True)
def short_chunks(monkeypatch):
    monkeypatch.setattr(linear_xla, "CHUNK", 16)
    monkeypatch.setattr(taylor_xla, "CHUNK", 16)
    monkeypatch.setattr(delta_xla, "CHUNK", 32)  # two blocks of the triangular inverse
    monkeypatch.setattr(selective_xla, "CHUNK", 16)
    monkeypatch.setattr(window_xla, "BLOCK", 16)
    monkeypatch.setattr(landmark_xla, "CHUNK", 16)
    monkeypatch.setattr(landmark_xla, "KEY_CHUNK", 16)


def to_float32(inputs: dict[str, Any]) -> dict[str, Any]:
    """Cast the inputs to float32."""
    return {name: jnp.asarray(x, jnp.float32) for name, x in inputs.items()}


def max_block_error(x: np.ndarray, y: np.ndarray) -> float:
    """Return the largest error of a row, head and block of 64 tokens, relative to the largest value of the block."""
    worst = 0.0
    for start in range(0, x.shape[1], 64):
        a, b = x[:, start : start + 64], y[:, start : start + 64]
        size = np.maximum(np.abs(b).max(axis=(1, 3)), 1e-3 * max(np.abs(y).max(), 1e-30))
        worst = max(worst, float((np.abs(a - b).max(axis=(1, 3)) / size).max()))
    return worst


def compare(op: Callable, case: ArgSpec, inputs: dict[str, Any], state, dtype: str, implementation: str) -> None:
    """Compare values, final state and all gradients of `op(inputs, state, implementation)` with float64."""
    valid = np.asarray(segment_ids(case) > 0)[:, :, None, None]
    rng = np.random.default_rng(9)

    def run(name: str, inputs, state):
        out, final = op(inputs, state, name)
        return jnp.where(valid, out, jnp.zeros((), out.dtype)), final

    @functools.partial(jax.jit, static_argnums=0)
    def results(name: str, inputs, state, cotangents):
        (out, final), pull = jax.vjp(lambda inputs, state: run(name, inputs, state), inputs, state)
        return (out, final), pull(jax.tree.map(lambda c, x: c.astype(x.dtype), cotangents, (out, final)))

    shapes = jax.eval_shape(lambda i, s: run("reference", i, s), inputs, state)
    cotangents = jax.tree.map(lambda x: rng.normal(size=x.shape), shapes)

    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), (inputs, state))
        expected, grads = jax.tree.map(np.asarray, results("reference", *wide, cotangents))
    narrow = jax.tree.map(lambda x: jnp.asarray(x, dtype), inputs)
    narrow = {name: x.astype(jnp.float32) if name in FLOAT32 else x for name, x in narrow.items()}
    low_state = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), state)
    cotangents = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), cotangents)
    (out, final), gradients = results(implementation, narrow, low_state, cotangents)
    assert out.dtype == dtype

    tolerance = TOLERANCE[dtype]
    assert max_block_error(np.asarray(out, np.float64), expected[0]) <= tolerance
    pairs = zip(jax.tree.leaves((final, gradients)), jax.tree.leaves((expected[1], grads)), strict=True)
    for actual, desired in pairs:
        actual = np.asarray(actual, np.float64)
        assert np.isfinite(actual).all()
        assert np.abs(actual - desired).max(initial=0) <= 4 * tolerance * max(1e-3, np.abs(desired).max(initial=0))
    (again, _), _ = results(implementation, narrow, low_state, cotangents)
    np.testing.assert_array_equal(np.asarray(again), np.asarray(out))  # repeatable bit for bit


@each_case
@each_dtype
def test_linear_attention(case, dtype):
    inputs, state = linear_cases.inputs(case), linear_cases.state(case)

    def op(inputs, state, implementation):
        return linear_attention(**inputs, state=state, segment_ids=segment_ids(case), implementation=implementation)

    compare(op, case, inputs, state, dtype, "xla")


@each_case
@each_dtype
@pytest.mark.parametrize("erase", ["token", pytest.param("channel", marks=pytest.mark.full)])
def test_delta_rule(case, dtype, erase):
    inputs, state = delta_inputs(case, erase), linear_cases.state(case)

    def op(inputs, state, implementation):
        return delta_rule(**inputs, state=state, segment_ids=segment_ids(case), implementation=implementation)

    compare(op, case, inputs, state, dtype, "xla")


@each_case
@each_dtype
@pytest.mark.parametrize("states", [3, pytest.param(None, marks=pytest.mark.full)])
def test_selective_scan(case, dtype, states):
    def op(inputs, state, implementation):
        out, state = selective_scan(**inputs, state=state, segment_ids=segment_ids(case), implementation=implementation)
        return out[:, :, None], state  # with an axis of one head

    state = np.random.default_rng(5).normal(size=(2, 5, states or 1))
    compare(op, case, scan_inputs(case, states), state, dtype, "xla")


@each_case
@each_dtype
@pytest.mark.parametrize("features", ["symmetric", pytest.param("full", marks=pytest.mark.full)])
def test_taylor_attention(case, dtype, features):
    inputs, state = taylor_cases.inputs(case), taylor_cases.state(case, features)
    assert state.z.shape[-1] == num_features(case.head_k_dim, features)

    def op(inputs, state, implementation):
        ids = segment_ids(case)
        return taylor_attention(
            **inputs, state=state, segment_ids=ids, features=features, implementation=implementation
        )

    compare(op, case, inputs, state, dtype, "xla")


@each_case
@each_dtype
@pytest.mark.parametrize("window", [None, 5, *(pytest.param(w, marks=pytest.mark.full) for w in (1, 40))])
def test_window_attention(case, dtype, window):
    inputs = window_cases.inputs(case)
    # The cache has as many tokens as the window, and the row continues at position 50.
    slots = 50 + case.length if window is None else window
    rng = np.random.default_rng(8)
    sizes = ((2, slots, 1, case.head_k_dim), (2, slots, 1, case.head_v_dim))
    cache = KVCache(*(jnp.asarray(rng.normal(size=size)) for size in sizes))
    positions = window_cases.positions(case, 50)

    def op(inputs, state, implementation):
        state = KVCache(*(x.astype(inputs["k"].dtype) for x in state))
        where: dict[str, Any] = {
            "positions": jnp.asarray(positions, int),
            "segment_ids": segment_ids(case),
        }  # int is 64 bits in the oracle
        return window_attention(**inputs, window=window, state=state, **where, implementation=implementation)

    compare(op, case, inputs, cache, dtype, "xla")


@pytest.mark.parametrize(
    "case",
    [pytest.param(ARG_SPECS[n], marks=() if n in ("one token", FEW[1]) else pytest.mark.full) for n in ARG_SPECS],
    ids=ARG_SPECS,
)
@each_dtype
@pytest.mark.parametrize("block_size", [7, *(pytest.param(n, marks=pytest.mark.full) for n in (1, 20))])
def test_landmark_attention(case, dtype, block_size):
    """The cache has 50 tokens, so that the row continues inside a block."""
    inputs, positions = landmark_cases.inputs(case), landmark_cases.positions(case, 50)

    def op(inputs, cache, implementation):
        cache = jax.tree.map(lambda x: x.astype(inputs["k"].dtype), cache)
        where: dict[str, Any] = {"positions": jnp.asarray(positions, int), "segment_ids": segment_ids(case)}
        return landmark_attention(
            **inputs, block_size=block_size, cache=cache, **where, implementation=implementation
        ), ()

    compare(op, case, inputs, landmark_cases.random_cache(case, 50, block_size), dtype, "xla")


@few_cases
def test_bfloat16(case):
    """A few cases in bfloat16; the others are marked as full."""
    test_linear_attention(case, "bfloat16")
    test_delta_rule(case, "bfloat16", "channel")
    test_selective_scan(case, "bfloat16", None)
    test_taylor_attention(case, "bfloat16", "symmetric")
    test_window_attention(case, "bfloat16", 5)


@each_case
@pytest.mark.parametrize("width", [3, *(pytest.param(w, marks=pytest.mark.full) for w in (1, 4))])
def test_short_conv(case, width):
    inputs = conv_cases.inputs(case, width)
    state = inputs.pop("state")

    def op(inputs, state, implementation):
        out, state = short_conv(**inputs, state=state, segment_ids=segment_ids(case), implementation=implementation)
        return out[:, :, None], state  # with an axis of one head

    compare(op, case, inputs, state, "float32", "xla")


def test_long_rows_with_default_chunk_sizes(monkeypatch):
    """The length is a multiple of no chunk size."""
    monkeypatch.undo()
    case = ArgSpec(601, head_k_dim=6, document_lengths=(300, 301), num_heads=1)
    inputs, ids = random_inputs(case), segment_ids(case)
    low = to_float32(inputs)
    for op in (linear_attention, taylor_attention):
        a, b = (op(**low, segment_ids=ids, implementation=implementation)[0] for implementation in IMPLEMENTATIONS)
        assert max_block_error(np.asarray(a), np.asarray(b)) <= 2e-4, op.__name__
    unit = low | {"k": low["k"] / jnp.linalg.norm(low["k"], axis=-1, keepdims=True)}
    strength = jnp.full(low["k"].shape[:3], 0.9)
    a, b = (
        delta_rule(**unit, erase=strength, write=strength, segment_ids=ids, implementation=f)[0]
        for f in IMPLEMENTATIONS
    )
    assert max_block_error(np.asarray(a), np.asarray(b)) <= 2e-5
    channel: dict[str, Any] = low | {"log_decay": -jnp.abs(low["q"])}
    a, b = (
        linear_attention(**channel, segment_ids=ids, implementation=implementation)[0]
        for implementation in IMPLEMENTATIONS
    )
    assert max_block_error(np.asarray(a), np.asarray(b)) <= 2e-5
    scan = to_float32(scan_inputs(case, 3))
    a, b = (
        selective_scan(**scan, segment_ids=ids, implementation=implementation)[0] for implementation in IMPLEMENTATIONS
    )
    assert max_block_error(np.asarray(a)[:, :, None], np.asarray(b)[:, :, None]) <= 2e-5
    for window in (None, 70):
        a, b = (window_attention(**low, window=window, segment_ids=ids, implementation=f)[0] for f in IMPLEMENTATIONS)
        assert max_block_error(np.asarray(a), np.asarray(b)) <= 2e-5
    where: dict[str, Any] = {"positions": jnp.asarray(landmark_cases.positions(case, 0)), "segment_ids": ids}
    a, b = (landmark_attention(**low, block_size=15, **where, implementation=f) for f in IMPLEMENTATIONS)
    assert max_block_error(np.asarray(a), np.asarray(b)) <= 2e-5


def test_single_landmark_block_is_causal_attention_and_landmark_values_are_not_read():
    inputs = to_float32(random_inputs(ArgSpec(24)))
    positions = jnp.tile(jnp.arange(24)[None], (2, 1))
    whole = jax.jit(functools.partial(landmark_attention, block_size=24, positions=positions))(**inputs)
    np.testing.assert_allclose(whole, jax.jit(window_attention)(**inputs)[0], atol=1e-6)
    for implementation in IMPLEMENTATIONS:
        out = jax.jit(
            functools.partial(landmark_attention, block_size=7, positions=positions, implementation=implementation)
        )
        grads = jax.jit(jax.grad(lambda v, out=out: (out(inputs["q"], inputs["k"], v) ** 2).sum()))(inputs["v"])
        assert not np.asarray(grads)[:, 7::8].any() and np.asarray(grads)[:, :7].all()
        ones = out(inputs["q"], inputs["k"], jnp.ones_like(inputs["v"]))
        np.testing.assert_allclose(ones, 1, atol=1e-6)  # the weights sum to 1, at landmarks too


def test_taylor_feature_maps_agree_with_the_polynomial():
    q, k = (jnp.asarray(np.random.default_rng(i).normal(size=(5, 16)), jnp.float32) for i in (0, 1))
    assert feature_maps.taylor(q).shape[-1] == 153 and feature_maps.taylor_full(q).shape[-1] == 273
    desired = feature_maps.taylor_score(jnp.sum(q * k, axis=-1))
    for phi in (feature_maps.taylor, feature_maps.taylor_full):
        np.testing.assert_allclose(np.sum(phi(q) * phi(k), axis=-1), desired, rtol=2e-5)
    assert float(feature_maps.taylor_score(jnp.linspace(-9, 9, 1001)).min()) >= 0.5


def test_linear_attention_without_decay_is_masked_attention_without_softmax():
    inputs = to_float32(random_inputs(ArgSpec(40)))
    q, k, v = inputs["q"], inputs["k"], inputs["v"]
    scores = jnp.tril(jnp.einsum("bihk,bjhk->bhij", q, k) * 8**-0.5)
    np.testing.assert_allclose(linear_attention(q, k, v)[0], jnp.einsum("bhij,bjhv->bihv", scores, v), atol=2e-5)


def test_step_respects_window_shorter_than_cache():
    inputs = to_float32(random_inputs(ArgSpec(7, num_heads=1)))
    positions = jnp.tile(jnp.arange(7)[None], (2, 1))
    empty = KVCache(*(jnp.zeros((2, 9, 1, 8)) for _ in range(2)))
    desired, _ = window_attention(**inputs, window=3)
    _, cache = window_attention(
        **{name: x[:, :6] for name, x in inputs.items()}, window=3, state=empty, positions=positions[:, :6]
    )
    assert cache is not None
    token: dict[str, Any] = {name: x[:, 6] for name, x in inputs.items()}
    where: dict[str, Any] = {"position": jnp.full(2, 6), "active": jnp.ones(2, bool)}
    actual, _ = window_attention_step(**token, state=cache, **where, window=3)
    np.testing.assert_allclose(actual, desired[:, 6], atol=1e-6)


def test_unwritten_cache_may_hold_nan():
    case = ArgSpec(5, num_heads=1)
    inputs = to_float32(random_inputs(case))
    nan = KVCache(*(jnp.full((2, 9, 1, 8), jnp.nan) for _ in range(2)))
    positions = jnp.tile(jnp.arange(5)[None], (2, 1))
    desired, _ = window_attention(**inputs, window=9)
    actual, cache = window_attention(**inputs, window=9, state=nan, positions=positions)
    assert cache is not None
    np.testing.assert_allclose(actual, desired, atol=1e-6)
    token: dict[str, Any] = {name: x[:, 0] for name, x in inputs.items()}
    where: dict[str, Any] = {"position": jnp.full(2, 5), "active": jnp.ones(2, bool)}
    assert np.isfinite(window_attention_step(**token, state=cache, **where, window=9)[0]).all()
    fresh: dict[str, Any] = {"position": jnp.zeros(2, jnp.int32), "active": jnp.ones(2, bool)}
    assert np.isfinite(window_attention_step(**token, state=nan, **fresh, window=9)[0]).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": jnp.zeros((2, 4, 2, 3))}, "k has shape"),
        ({"log_decay": jnp.zeros(3)}, "log_decay has shape"),
        ({"state": jnp.zeros((2, 2, 8, 3))}, "state has shape"),
        ({"implementation": "xlaa"}, "did you mean 'xla'"),
    ],
)
def test_invalid_arguments_are_rejected(change, message):
    inputs = to_float32(random_inputs(ArgSpec(4)))
    with pytest.raises(ValueError, match=message):
        unchecked(linear_attention)(**(inputs | change))


def unchecked(function: Callable) -> Callable:
    """Return the function without the type checker of the tests."""
    while hasattr(function, "__wrapped__"):
        function = function.__wrapped__
    return function


def test_linear_attention_step_agrees_with_linear_attention():
    case = ArgSpec(6, decay="token")
    inputs = to_float32(random_inputs(case))
    desired, final = linear_attention(**inputs)
    state = jnp.zeros_like(final)
    for t in range(6):
        token = {name: x[:, t] for name, x in inputs.items()}
        out, state = linear_attention_step(**token, state=state, active=jnp.ones(2, bool))
        np.testing.assert_allclose(out, desired[:, t], atol=1e-5)
    np.testing.assert_allclose(state, final, atol=1e-5)


def test_delta_rule_step_agrees_with_delta_rule():
    inputs = to_float32(delta_inputs(ArgSpec(6, decay="channel", max_beta=2.0), "channel"))
    desired, final = delta_rule(**inputs)
    state = jnp.zeros_like(final)
    for t in range(6):
        token = {name: x[:, t] for name, x in inputs.items()}
        out, state = delta_rule_step(**token, state=state, active=jnp.ones(2, bool))
        np.testing.assert_allclose(out, desired[:, t], atol=1e-5)
    np.testing.assert_allclose(state, final, atol=1e-5)


@pytest.mark.parametrize("states", [None, 3])
def test_selective_scan_step_agrees_with_selective_scan(states):
    inputs = to_float32(scan_inputs(ArgSpec(6), states))
    desired, final = selective_scan(**inputs)
    state = jnp.zeros_like(final)
    for t in range(6):
        token = {name: x if name == "a" else x[:, t] for name, x in inputs.items()}
        out, state = selective_scan_step(**token, state=state, active=jnp.ones(2, bool))
        np.testing.assert_allclose(out, desired[:, t], atol=1e-5)
    np.testing.assert_allclose(state, final, atol=1e-5)


def test_identities_between_recurrences_with_trivial_gates():
    inputs = to_float32(delta_inputs(ArgSpec(67, num_heads=1)))
    beta, plain = inputs["erase"], {name: inputs[name] for name in ("q", "k", "v")}
    token = -jnp.abs(jax.random.normal(jax.random.key(0), beta.shape))
    channel = jnp.broadcast_to(token[..., None], inputs["k"].shape)
    delta = functools.partial(jax.jit(delta_rule), **plain, write=beta)
    linear = jax.jit(linear_attention)
    none = jnp.zeros_like(beta)
    written = plain | {"v": plain["v"] * beta[..., None]}
    wide = jnp.broadcast_to(beta[..., None], inputs["k"].shape)
    pairs = {
        "KDA with one gate for all channels is Gated DeltaNet": (
            delta(erase=beta, log_decay=channel),
            delta(erase=beta, log_decay=token),
        ),
        "Gated DeltaNet without a gate is DeltaNet": (delta(erase=beta, log_decay=none), delta(erase=beta)),
        "nothing erased is simple GLA": (
            delta(erase=none, log_decay=token),
            linear(**written, log_decay=token),
        ),
        "nothing erased per channel is GLA": (
            delta(erase=none, log_decay=channel * wide),
            linear(**written, log_decay=channel * wide),
        ),
        "an erase strength per channel that is constant is KDA": (
            delta(erase=wide, log_decay=channel * wide),
            delta(erase=beta, log_decay=channel * wide),
        ),
        "GLA with one gate for all channels is simple GLA": (
            linear(**plain, log_decay=channel),
            linear(**plain, log_decay=token),
        ),
        "simple GLA with a constant gate is RetNet": (
            linear(**plain, log_decay=jnp.full_like(token, -0.3)),
            linear(**plain, log_decay=jnp.full(1, -0.3)),
        ),
    }
    for name, (one, other) in pairs.items():
        for a, b in zip(one, other, strict=True):
            np.testing.assert_allclose(a, b, atol=2e-5, err_msg=name)


@pytest.mark.parametrize(("correlation", "beta"), [(0.0, 1.0), (0.5, 1.0), (0.9, 1.0), (0.9, 2.0), (0.99, 2.0)])
@pytest.mark.parametrize("size", [1, 13, 64, 128])
def test_triangular_inverse_is_accurate_for_correlated_keys(size, correlation, beta):
    rng = np.random.default_rng(0)
    k = np.sqrt(1 - correlation) * rng.normal(size=(3, size, 128)) + np.sqrt(correlation) * rng.normal(size=128)
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    strength = rng.uniform(beta - 1, beta, size=(3, size, 1))
    a = np.asarray(np.tril(strength * np.einsum("bik,bjk->bij", k, k), -1), np.float32)
    desired = np.linalg.inv(np.eye(size) + a.astype(np.float64))
    actual, pull = jax.vjp(unit_lower_inverse, jnp.asarray(a))
    assert np.linalg.norm(np.asarray(actual) - desired) <= 3e-6 * np.linalg.norm(desired)
    cotangent = rng.normal(size=a.shape)
    grads = np.tril(-np.einsum("bji,bjk,blk->bil", desired, cotangent, desired), -1)
    (back,) = pull(jnp.asarray(cotangent, jnp.float32))
    np.testing.assert_allclose(back, grads, atol=3e-5 * max(1e-3, np.abs(grads).max(initial=0)))
