"""The delta rule's GPU kernels: against the definition in Pallas' interpreter, and lowered for an H100."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from recallax.pallas_kernels import dispatch, mosaic_gpu
from recallax.pallas_kernels.cases import Case, segments
from recallax.pallas_kernels.delta_rule import delta_rule
from recallax.pallas_kernels.delta_rule import segments as delta_segments
from recallax.pallas_kernels.delta_rule.cases import inputs as delta_inputs
from recallax.pallas_kernels.linear_attention import cases as linear_cases
from recallax.pallas_kernels.linear_attention import segments as segments_of
from recallax.pallas_kernels.mosaic_gpu_solve import inverses
from tests.hopper import in_the_gate, interpreted, kernels_in
from tests.test_ops import compare

CASES = {
    "one token": Case(1, 64, 64, heads=1, decay="token"),
    "below a chunk": Case(13, 128, 64, heads=1),
    "exactly two chunks": Case(128, 64, 64, heads=1, decay="constant"),
    "odd": Case(67, 128, 128, heads=1, decay="token"),
    "shared keys": Case(67, 64, 64),
    "correlated .99": Case(67, 64, 64, heads=1, correlation=0.99),
    "negative eigenvalues": Case(131, 64, 128, heads=1, correlation=0.9, beta=2.0),
    "extreme decay": Case(131, 64, 64, heads=1, decay="extreme"),
    "packed": Case(67, 64, 128, heads=1, documents=(1, 15, 1, 1, 20, 29)),
    "packed, decay, padding": Case(67, 64, 64, heads=1, decay="token", documents=(16, 1, 33), padded=17),
}


def check(case: Case, rate: float = 1.0) -> None:
    """Values, final state and every gradient of the kernels; decays are as much slower as `rate` says."""
    inputs = delta_inputs(case)
    if case.decay:
        inputs["log_decay"] = rate * inputs["log_decay"]
    ids = segments(case) if case.documents else None

    def op(inputs, state, form):
        with dispatch.interpreted():
            return delta_rule(**inputs, state=state, segments=ids, implementation=form)

    compare(op, case, inputs, linear_cases.state(case), "bfloat16", "mosaic_gpu")


@interpreted
@pytest.mark.usefixtures("strict")
@pytest.mark.parametrize("name", in_the_gate(CASES))
def test_delta_rule(name):
    check(CASES[name])


@interpreted
@pytest.mark.usefixtures("strict")
def test_states_that_outlast_a_chunk():
    check(CASES["packed, decay, padding"], rate=0.02)


@interpreted
@pytest.mark.usefixtures("strict")
@pytest.mark.parametrize("documents", [pytest.param((), marks=pytest.mark.full), (60, 1, 70, 5)], ids=["one", "four"])
def test_few_heads_walk_segments_at_once(documents, monkeypatch):
    """Rows of four chunks as four blocks; decays leave something of a state behind a segment."""
    monkeypatch.setattr(segments_of, "LEAST_CHUNKS", 1)
    padded = 200 - sum(documents) if documents else 0
    case = Case(200, 64, 128, heads=1, decay="token", correlation=0.9, documents=documents, padded=padded)
    check(case, rate=0.02)


def test_as_few_segments_as_there_are_walks_gain_nothing():
    assert delta_segments.number_of_segments(16, 512) == 8
    assert delta_segments.number_of_segments(40, 512) == 1 < segments_of.number_of_segments(40, 512)


@interpreted
@pytest.mark.full
@pytest.mark.usefixtures("strict")
@pytest.mark.parametrize("values", [64, 128])
@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_delta_rule_at_every_width(case, width, values):
    check(dataclasses.replace(case, width=width, values=values))


@interpreted
@pytest.mark.parametrize(("beta", "tolerance"), [(1.0, 1e-5), (2.0, 1e-3)])
def test_keys_that_are_all_alike_leave_an_inverse_its_digits(beta, tolerance):
    key = np.random.default_rng(0).normal(size=64)
    k = jnp.asarray(np.broadcast_to(key / np.linalg.norm(key), (1, 64, 1, 64)), jnp.bfloat16)
    got = np.asarray(inverses(k, None, jnp.full((1, 1, 64), beta), interpret=True), np.float64)[0, 0]
    k = np.asarray(k, np.float64)[0, :, 0]
    want = np.linalg.inv(np.eye(64) + beta * np.tril(k @ k.T, -1))
    np.testing.assert_allclose(got[:, :64] + got[:, 64:], want, atol=tolerance * np.abs(want).max())


@interpreted
@pytest.mark.full
def test_warpgroups_do_not_race(monkeypatch):
    """Over more chunks than the pipeline has room for."""
    monkeypatch.setattr(mosaic_gpu, "INTERPRETER", plgpu.InterpretGPUParams(detect_races=True))
    case = Case(300, 64, 128, heads=1, decay="token")
    inputs: dict[str, Any] = {name: jnp.asarray(x[:1], jnp.bfloat16) for name, x in delta_inputs(case).items()}

    def total(inputs):
        with dispatch.interpreted():
            out, state = delta_rule(**inputs, implementation="mosaic_gpu")
        return jnp.sum(out.astype(jnp.float32)) + jnp.sum(state)

    slopes = jax.jit(jax.grad(total))(inputs)
    assert all(np.isfinite(np.asarray(x, np.float32)).all() for x in jax.tree.leaves(slopes))


@pytest.mark.parametrize(
    ("width", "decay", "docs"),
    [
        (128, True, True),
        *(pytest.param(64, decay, False, marks=pytest.mark.full) for decay in (False, True)),
        pytest.param(128, True, False, marks=pytest.mark.full),
    ],
)
def test_it_lowers_for_an_h100(width, decay, docs):
    tokens = jax.ShapeDtypeStruct((2, 200, 2, width), jnp.bfloat16)
    strength = jax.ShapeDtypeStruct((2, 200, 2), jnp.float32)
    gate = strength if decay else None
    ids = jax.ShapeDtypeStruct((2, 200), jnp.int32) if docs else None

    def op(q, k, v, strength, gate, ids):
        return delta_rule(
            q, k, v, erase=strength, write=strength, log_decay=gate, segments=ids, implementation="mosaic_gpu"
        )

    def slopes(q, k, v, strength, gate, ids):
        out, pull = jax.vjp(lambda q, k, v, strength, gate: op(q, k, v, strength, gate, ids), q, k, v, strength, gate)
        return pull(out)

    arguments = (tokens, tokens, tokens, strength, gate, ids)
    assert kernels_in(op, *arguments) == 2 and kernels_in(slopes, *arguments) == 4


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"v": jnp.zeros((1, 4, 1, 32), jnp.bfloat16)}, "V is 32"),
        ({"k": jnp.zeros((1, 4, 1, 64))}, "k is float32"),
    ],
)
def test_what_it_cannot_take_is_refused_with_the_reason(change, reason):
    tokens = {name: jnp.zeros((1, 4, 1, 64), jnp.bfloat16) for name in "qkv"}
    inputs = tokens | dict.fromkeys(("erase", "write"), jnp.zeros((1, 4, 1))) | change
    with dispatch.interpreted(), pytest.raises(dispatch.Unsupported, match=reason):
        delta_rule(**inputs, implementation="mosaic_gpu")
