"""The selective scan on a GPU: against the definition in Pallas' interpreter, and lowered for an H100."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from recallax.pallas_kernels import dispatch, mosaic_gpu
from recallax.pallas_kernels.cases import Case, segments
from recallax.pallas_kernels.selective_scan import mosaic_gpu as mosaic_gpu_scan
from recallax.pallas_kernels.selective_scan import selective_scan
from recallax.pallas_kernels.selective_scan.cases import inputs as scan_inputs
from tests.hopper import in_the_gate, interpreted, kernels_in
from tests.test_ops import compare

CASES = {
    "one token": Case(1),
    "below a chunk": Case(13),
    "exactly two chunks": Case(32),
    "odd": Case(67),
    "extreme decay": Case(37, decay="extreme"),
    "packed": Case(67, documents=(1, 15, 1, 1, 20, 29)),
    "packed, padding": Case(37, documents=(16, 1, 11), padded=9),
}


def check(case: Case, states: int | None, dtype: str, rate: float = 1.0) -> None:
    """Values, final state and every gradient; decays are as much slower as `rate` says."""
    inputs = scan_inputs(case, states)
    inputs["rate"] = rate * inputs["rate"]
    ids = segments(case) if case.documents else None

    def op(inputs, state, form):
        with dispatch.interpreted():
            out, state = selective_scan(**inputs, state=state, segments=ids, implementation=form)
        return out[:, :, None], state  # as if of one head

    state = np.random.default_rng(5).normal(size=(2, 5, states or 1))
    compare(op, case, inputs, state, dtype, "mosaic_gpu")


@interpreted
@pytest.mark.usefixtures("strict")
@pytest.mark.parametrize("name", in_the_gate(CASES, "packed, padding"))
def test_selective_scan(name):
    check(CASES[name], 3, "bfloat16")


@interpreted
@pytest.mark.usefixtures("strict")
@pytest.mark.parametrize("documents", [pytest.param((), marks=pytest.mark.full), (20, 1, 25)], ids=["one", "three"])
def test_few_channels_walk_segments_at_once(documents, monkeypatch):
    """Rows of four chunks as four blocks; decays leave something of a state behind a segment."""
    monkeypatch.setattr(mosaic_gpu_scan, "LEAST_TOKENS", 16)
    check(Case(64, documents=documents, padded=64 - sum(documents) if documents else 0), 3, "bfloat16", rate=0.02)


@interpreted
@pytest.mark.full
@pytest.mark.usefixtures("strict")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("states", [None, 16])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_selective_scan_with_other_states(case, states, dtype):
    check(case, states, dtype)


@interpreted
@pytest.mark.full
def test_copies_do_not_race(monkeypatch):
    """Over more chunks than the pipeline has room for."""
    monkeypatch.setattr(mosaic_gpu, "INTERPRETER", plgpu.InterpretGPUParams(detect_races=True))
    inputs = {name: jnp.asarray(x, jnp.float32) for name, x in scan_inputs(Case(100), 3).items()}

    def total(inputs):
        with dispatch.interpreted():
            out, state = selective_scan(**inputs, implementation="mosaic_gpu")
        return jnp.sum(out) + jnp.sum(state)

    slopes = jax.jit(jax.grad(total))(inputs)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(slopes))


@pytest.mark.parametrize(("states", "docs"), [pytest.param(1, False, marks=pytest.mark.full), (16, True)])
def test_it_lowers_for_an_h100(states, docs):
    tokens = jax.ShapeDtypeStruct((2, 200, 128), jnp.bfloat16)
    a, mix = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((128, states), (2, 200, states)))
    ids = jax.ShapeDtypeStruct((2, 200), jnp.int32) if docs else None

    def op(x, a, b, ids):
        return selective_scan(x, x, a=a, b=b, c=b, segments=ids, implementation="mosaic_gpu")

    def slopes(x, a, b, ids):
        out, pull = jax.vjp(lambda x, a, b: op(x, a, b, ids), x, a, b)
        return pull(out)

    assert kernels_in(op, tokens, a, mix, ids) == 1 and kernels_in(slopes, tokens, a, mix, ids) == 2


def test_too_many_states_are_refused_with_the_reason():
    inputs = {name: jnp.asarray(x, jnp.float32) for name, x in scan_inputs(Case(3), 40).items()}
    with dispatch.interpreted(), pytest.raises(dispatch.Unsupported, match="N is 40"):
        selective_scan(**inputs, implementation="mosaic_gpu")
