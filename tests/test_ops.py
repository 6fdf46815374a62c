"""The battery of every op: each form against the definition in float64, in values and in every gradient."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recallax.pallas_kernels import feature_maps
from recallax.pallas_kernels.linear_attention import linear_attention, linear_attention_step
from recallax.pallas_kernels.linear_attention import xla as linear_xla
from recallax.pallas_kernels.short_conv import short_conv
from recallax.pallas_kernels.taylor_attention import TaylorState, state_width, taylor_attention
from recallax.pallas_kernels.taylor_attention import xla as taylor_xla
from recallax.pallas_kernels.window_attention import KVCache, window_attention, window_attention_step
from recallax.pallas_kernels.window_attention import xla as window_xla

pytestmark = pytest.mark.usefixtures("strict")

TOLERANCE = {"float32": 3e-5, "bfloat16": 0.03}
"""Largest error relative to the largest output of a head in a block of 64 tokens."""


@dataclasses.dataclass(frozen=True)
class Case:
    """Sizes and how hard the numbers are."""

    length: int
    width: int = 8
    values: int = 8
    heads: int = 2
    correlation: float = 0.0
    """Share of every key that is the same for all tokens."""
    decay: str | None = None
    """"constant" per head, "token", or "extreme": mixtures of no decay and of total forgetting."""
    documents: tuple[int, ...] = ()
    """Lengths of the documents in the first row; the second row is one document."""
    padded: int = 0


CASES = {
    "one token": Case(1),
    "below a chunk": Case(13),
    "exactly two chunks": Case(32),
    "odd": Case(67, width=4, values=6),
    "wide values": Case(40, width=3, values=16, heads=1),
    "correlated .5": Case(67, correlation=0.5),
    "correlated .99": Case(67, correlation=0.99),
    "constant decay": Case(67, decay="constant"),
    "token decay": Case(67, decay="token"),
    "extreme decay": Case(67, decay="extreme"),
    "packed": Case(67, documents=(1, 15, 1, 1, 20, 29)),
    "packed, decay, padding": Case(67, decay="token", documents=(16, 1, 33), padded=17),
}
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
each_dtype = pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.full)])
FEW = ("odd", "packed, decay, padding")
few_cases = pytest.mark.parametrize("case", [CASES[name] for name in FEW], ids=FEW)


@pytest.fixture(autouse=True)
def short_chunks(monkeypatch):
    monkeypatch.setattr(linear_xla, "CHUNK", 16)
    monkeypatch.setattr(taylor_xla, "CHUNK", 16)
    monkeypatch.setattr(window_xla, "BLOCK", 16)


def draw(case: Case, groups: int | None = None) -> dict[str, Any]:
    """Inputs in float64 for two rows."""
    rng = np.random.default_rng(hash(case.length) + case.width)
    shape = (2, case.length, case.heads, case.width)
    kv = (2, case.length, groups or case.heads)
    k = rng.normal(size=(*kv, case.width))
    shared = rng.normal(size=case.width)
    k = np.sqrt(1 - case.correlation) * k + np.sqrt(case.correlation) * shared
    inputs = {"q": rng.normal(size=shape), "k": k, "v": rng.normal(size=(*kv, case.values))}
    gates = {
        "constant": -np.abs(rng.normal(size=(case.heads,))),
        "token": -np.abs(rng.normal(size=shape[:3])),
        "extreme": -rng.choice([0.0, 1e-4, 40.0], size=shape[:3], p=[0.5, 0.3, 0.2]),
    }
    return inputs | ({"log_decay": gates[case.decay]} if case.decay else {})


def single(inputs: dict[str, Any]) -> dict[str, Any]:
    """The inputs in float32."""
    return {name: jnp.asarray(x, jnp.float32) for name, x in inputs.items()}


def segments(case: Case) -> jnp.ndarray:
    ids = np.ones((2, case.length), np.int32)
    if case.documents:
        lengths = [*case.documents, case.padded]
        # ids need not be ordered: every other document has a larger one
        names = [3 * i + 1 if i % 2 else 50 - i for i in range(len(case.documents))] + [0]
        ids[0] = np.repeat(names, lengths)
    return jnp.asarray(ids)


def per_block(x: np.ndarray, y: np.ndarray) -> float:
    """Largest error per row, head and block of 64 tokens, relative to what the block holds."""
    worst = 0.0
    for start in range(0, x.shape[1], 64):
        a, b = x[:, start : start + 64], y[:, start : start + 64]
        size = np.maximum(np.abs(b).max(axis=(1, 3)), 1e-3 * max(np.abs(y).max(), 1e-30))
        worst = max(worst, float((np.abs(a - b).max(axis=(1, 3)) / size).max()))
    return worst


def compare(op: Callable, case: Case, inputs: dict[str, Any], state, dtype: str, form: str) -> None:
    """Values, final state and all gradients of `op(inputs, state, form)` against its definition in float64."""
    valid = np.asarray(segments(case) > 0)[:, :, None, None]
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
        expected, slopes = jax.tree.map(np.asarray, results("reference", *wide, cotangents))
    narrow = jax.tree.map(lambda x: jnp.asarray(x, dtype), inputs)
    narrow = {name: x.astype(jnp.float32) if name == "log_decay" else x for name, x in narrow.items()}
    held = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), state)
    cotangents = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), cotangents)
    (out, final), gradients = results(form, narrow, held, cotangents)
    assert out.dtype == dtype

    tolerance = TOLERANCE[dtype]
    assert per_block(np.asarray(out, np.float64), expected[0]) <= tolerance
    pairs = zip(jax.tree.leaves((final, gradients)), jax.tree.leaves((expected[1], slopes)), strict=True)
    for got, want in pairs:
        got = np.asarray(got, np.float64)
        assert np.isfinite(got).all()
        assert np.abs(got - want).max(initial=0) <= 4 * tolerance * max(1e-3, np.abs(want).max(initial=0))
    (again, _), _ = results(form, narrow, held, cotangents)
    np.testing.assert_array_equal(np.asarray(again), np.asarray(out))  # bit for bit


@each_case
@each_dtype
def test_linear_attention(case, dtype):
    inputs = draw(case)
    state = np.random.default_rng(5).normal(size=(2, case.heads, case.width, case.values))

    def op(inputs, state, form):
        return linear_attention(**inputs, state=state, segments=segments(case), implementation=form)

    compare(op, case, inputs, state, dtype, "xla")


@each_case
@each_dtype
@pytest.mark.parametrize("features", ["symmetric", pytest.param("full", marks=pytest.mark.full)])
def test_taylor_attention(case, dtype, features):
    inputs = {name: x for name, x in draw(case).items() if name != "log_decay"}
    # A state that tokens could have left: random sums would make the denominator vanish somewhere.
    past = np.random.default_rng(6).normal(size=(2, 7, case.heads, case.width)) * case.width**-0.25
    expand = feature_maps.taylor if features == "symmetric" else feature_maps.taylor_full
    with jax.enable_x64(True):
        phi = np.asarray(expand(jnp.asarray(past)))
    v = np.random.default_rng(7).normal(size=(2, 7, case.heads, case.values))
    state: Any = TaylorState(*map(jnp.asarray, (np.einsum("bthf,bthv->bhfv", phi, v), phi.sum(axis=1))))
    assert state.z.shape[-1] == state_width(case.width, features)

    def op(inputs, state, form):
        ids = segments(case)
        return taylor_attention(**inputs, state=state, segments=ids, features=features, implementation=form)

    compare(op, case, inputs, state, dtype, "xla")


@each_case
@each_dtype
@pytest.mark.parametrize("window", [None, 5, *(pytest.param(w, marks=pytest.mark.full) for w in (1, 40))])
def test_window_attention(case, dtype, window):
    inputs = {name: x for name, x in draw(case, groups=1).items() if name != "log_decay"}
    # As many cached tokens as a window holds, behind a row that continues at position 50.
    slots = 50 + case.length if window is None else window
    rng = np.random.default_rng(8)
    sizes = ((2, slots, 1, case.width), (2, slots, 1, case.values))
    cache = KVCache(*(jnp.asarray(rng.normal(size=size)) for size in sizes))
    positions = positions_of(case, 50)

    def op(inputs, state, form):
        state = KVCache(*(x.astype(inputs["k"].dtype) for x in state))
        where: dict[str, Any] = {
            "positions": jnp.asarray(positions, int),
            "segments": segments(case),
        }  # int is 64 bits in the oracle
        return window_attention(**inputs, window=window, state=state, **where, implementation=form)

    compare(op, case, inputs, cache, dtype, "xla")


def positions_of(case: Case, seen: int) -> np.ndarray:
    """Positions within documents; the first document of each row goes on at `seen`."""
    positions = np.tile(np.arange(case.length, dtype=np.int32), (2, 1)) + seen
    if case.documents:
        rows = [np.arange(n) + (seen if i == 0 else 0) for i, n in enumerate(case.documents)]
        positions[0] = np.concatenate([*rows, np.zeros(case.padded)])
    return positions


@few_cases
def test_bfloat16(case):
    """The part of the sweep over dtypes that stays in the gate."""
    test_linear_attention(case, "bfloat16")
    test_taylor_attention(case, "bfloat16", "symmetric")
    test_window_attention(case, "bfloat16", 5)


@each_case
@pytest.mark.parametrize("width", [3, *(pytest.param(w, marks=pytest.mark.full) for w in (1, 4))])
def test_short_conv(case, width):
    rng = np.random.default_rng(2)
    inputs = {
        "x": rng.normal(size=(2, case.length, 6)),
        "weight": rng.normal(size=(width, 6)),
        "bias": rng.normal(size=6),
    }
    state = rng.normal(size=(2, width - 1, 6))

    def op(inputs, state, form):
        out, state = short_conv(**inputs, state=state, segments=segments(case), implementation=form)
        return out[:, :, None], state  # as if of one head

    compare(op, case, inputs, state, "float32", "xla")


def test_long_rows_cross_many_real_chunks(monkeypatch):
    """The defaults, at a length that is no multiple of any of them."""
    monkeypatch.undo()
    case = Case(601, width=6, documents=(300, 301), heads=1)
    inputs, ids = draw(case), segments(case)
    low = single(inputs)
    for op in (linear_attention, taylor_attention):
        a, b = (op(**low, segments=ids, implementation=form)[0] for form in ("reference", "xla"))
        assert per_block(np.asarray(a), np.asarray(b)) <= 2e-4, op.__name__
    for window in (None, 70):
        a, b = (window_attention(**low, window=window, segments=ids, implementation=f)[0] for f in ("reference", "xla"))
        assert per_block(np.asarray(a), np.asarray(b)) <= 2e-5


def test_the_two_taylor_expansions_and_the_polynomial_are_one_kernel():
    q, k = (jnp.asarray(np.random.default_rng(i).normal(size=(5, 16)), jnp.float32) for i in (0, 1))
    assert feature_maps.taylor(q).shape[-1] == 153 and feature_maps.taylor_full(q).shape[-1] == 273
    want = feature_maps.taylor_score(jnp.sum(q * k, axis=-1))
    for phi in (feature_maps.taylor, feature_maps.taylor_full):
        np.testing.assert_allclose(np.sum(phi(q) * phi(k), axis=-1), want, rtol=2e-5)
    assert float(feature_maps.taylor_score(jnp.linspace(-9, 9, 1001)).min()) >= 0.5


def test_linear_attention_without_decay_is_masked_attention_without_softmax():
    inputs = single(draw(Case(40)))
    q, k, v = inputs["q"], inputs["k"], inputs["v"]
    scores = jnp.tril(jnp.einsum("bihk,bjhk->bhij", q, k) * 8**-0.5)
    np.testing.assert_allclose(linear_attention(q, k, v)[0], jnp.einsum("bhij,bjhv->bihv", scores, v), atol=2e-5)


def test_unwritten_cache_may_hold_nan():
    case = Case(5, heads=1)
    inputs = single(draw(case))
    nan = KVCache(*(jnp.full((2, 9, 1, 8), jnp.nan) for _ in range(2)))
    positions = jnp.tile(jnp.arange(5)[None], (2, 1))
    want, _ = window_attention(**inputs, window=9)
    got, cache = window_attention(**inputs, window=9, state=nan, positions=positions)
    assert cache is not None
    np.testing.assert_allclose(got, want, atol=1e-6)
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
def test_bad_input_is_named(change, message):
    inputs = single(draw(Case(4)))
    with pytest.raises(ValueError, match=message):
        unchecked(linear_attention)(**(inputs | change))


def unchecked(function: Callable) -> Callable:
    """The function as users call it: tests alone have the type checker in front."""
    while hasattr(function, "__wrapped__"):
        function = function.__wrapped__
    return function


def test_a_step_of_linear_attention_with_decay_follows_the_recurrence():
    case = Case(6, decay="token")
    inputs = single(draw(case))
    want, final = linear_attention(**inputs)
    state = jnp.zeros_like(final)
    for t in range(6):
        token = {name: x[:, t] for name, x in inputs.items()}
        out, state = linear_attention_step(**token, state=state, active=jnp.ones(2, bool))
        np.testing.assert_allclose(out, want[:, t], atol=1e-5)
    np.testing.assert_allclose(state, final, atol=1e-5)
