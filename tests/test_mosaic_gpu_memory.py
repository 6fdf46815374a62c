"""The exact linear memory's GPU kernels: against the definition in Pallas' interpreter, and lowered for an H100."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from recallax.pallas_kernels import dispatch, mosaic_gpu
from recallax.pallas_kernels.cases import Case, segments
from recallax.pallas_kernels.neural_memory import Fixed, Learner, Tokens, cases, init_state, neural_memory
from recallax.pallas_kernels.neural_memory.learner import LinearNet
from tests.hopper import in_the_gate, interpreted, kernels_in
from tests.test_ops import compare

TOKEN = Learner(network=LinearNet(), gradient="token")
WITHOUT = dataclasses.replace(TOKEN, momentum=False)
CASES = {
    "one token": Case(1, 64, 64, heads=1, decay="token"),
    "below a chunk": Case(13, 64, 64, heads=1),
    "exactly two chunks": Case(128, 64, 64, heads=1, decay="constant"),
    "odd": Case(67, 128, 128, heads=1, decay="token"),
    "two heads": Case(67, 64, 64, decay="token"),
    "correlated .99": Case(67, 64, 64, heads=1, correlation=0.99),
    "extreme gates": Case(131, 64, 64, heads=1, decay="extreme"),
    "packed": Case(67, 64, 64, heads=1, documents=(1, 15, 1, 1, 20, 29)),
    "packed, decay, padding": Case(67, 64, 64, heads=1, decay="token", documents=(16, 1, 33), padded=17),
    "packed over chunks": Case(131, 64, 64, heads=1, documents=(60, 1, 49), padded=21),
}


def op(learner: Learner, inputs: dict[str, Any], memory: Any, ids: Any, form: str) -> Any:
    """The output and the final memory, of tokens and initial weights by name."""
    b, _, h, width = inputs["q"].shape
    fixed = Fixed({"w1": inputs["weight"]}, jnp.ones((h, width)), jnp.zeros((h, width)))
    state = init_state(learner, b, h, width)
    if memory is not None:
        state = state._replace(memory=memory, count=state.count + 5)
    tokens = Tokens._make(inputs[name] for name in Tokens._fields)
    out, state = neural_memory(learner, tokens, fixed, state=state, segments=ids, implementation=form)
    return out, state.memory


def check(case: Case, learner: Learner, rate: float = 1.0) -> None:
    """Values, final memory and every gradient of the kernels; gates are as much slower as `rate` says."""
    ids = segments(case) if case.documents else None
    inputs = {name: rate * x if name.startswith("log_") else x for name, x in cases.inputs(case).items()}

    def run(inputs, memory, form):
        with dispatch.interpreted():
            return op(learner, inputs, memory, ids, form)

    compare(run, case, inputs, cases.memory(case, learner), "bfloat16", "mosaic_gpu")


@interpreted
@pytest.mark.usefixtures("strict")
@pytest.mark.parametrize("name", in_the_gate(CASES, "extreme gates"))
def test_neural_memory(name):
    check(CASES[name], TOKEN)


@interpreted
@pytest.mark.usefixtures("strict")
@pytest.mark.parametrize("name", in_the_gate(CASES, "packed over chunks"))
def test_neural_memory_at_the_decayed_weights(name):
    check(CASES[name], dataclasses.replace(TOKEN, gradient="token_decayed", decay_to="zero"))


@interpreted
@pytest.mark.usefixtures("strict")
def test_states_that_outlast_a_chunk():
    check(Case(195, 64, 64, heads=1, decay="token", beta=0.1, documents=(194,), padded=1), TOKEN, rate=0.01)


@interpreted
@pytest.mark.full
@pytest.mark.usefixtures("strict")
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_neural_memory_without_momentum(case):
    check(case, WITHOUT)


@interpreted
@pytest.mark.full
@pytest.mark.usefixtures("strict")
@pytest.mark.parametrize("name", ["exactly two chunks", "extreme gates", "packed over chunks"])
def test_neural_memory_of_wide_heads(name):
    check(dataclasses.replace(CASES[name], width=128, values=128), TOKEN)


@interpreted
@pytest.mark.full
def test_warpgroups_do_not_race(monkeypatch):
    """Over more chunks than the pipeline has room for."""
    monkeypatch.setattr(mosaic_gpu, "INTERPRETER", plgpu.InterpretGPUParams(detect_races=True))
    case = Case(300, 64, 64, heads=1, decay="token")
    inputs = {name: jnp.asarray(x, jnp.float32) for name, x in cases.inputs(case).items()}
    inputs = {name: x.astype(jnp.bfloat16)[:1] if name in "qkv" else x[:1] for name, x in inputs.items()}

    def total(inputs):
        with dispatch.interpreted():
            out, memory = op(TOKEN, inputs, None, None, "mosaic_gpu")
        return jnp.sum(out.astype(jnp.float32)) + sum(jnp.sum(x) for x in jax.tree.leaves(memory))

    slopes = jax.jit(jax.grad(total))(inputs)
    assert all(np.isfinite(np.asarray(x, np.float32)).all() for x in jax.tree.leaves(slopes))


@pytest.mark.parametrize(
    ("width", "learner"), [(128, TOKEN), *(pytest.param(64, x, marks=pytest.mark.full) for x in (TOKEN, WITHOUT))]
)
def test_it_lowers_for_an_h100(width, learner):
    narrow = dict.fromkeys("qkv", jax.ShapeDtypeStruct((2, 200, 2, width), jnp.bfloat16))
    wide = dict.fromkeys(("lr", "log_momentum", "log_keep"), jax.ShapeDtypeStruct((2, 200, 2, 1), jnp.float32))
    inputs = narrow | wide | {"weight": jax.ShapeDtypeStruct((2, width, width), jnp.float32)}
    ids = jax.ShapeDtypeStruct((2, 200), jnp.int32)

    def learn(inputs, ids):
        return op(learner, inputs, None, ids, "mosaic_gpu")

    def slopes(inputs, ids):
        out, pull = jax.vjp(lambda inputs: learn(inputs, ids), inputs)
        return pull(out)

    assert kernels_in(learn, inputs, ids) == 2 and kernels_in(slopes, inputs, ids) == 4


@pytest.mark.parametrize(
    ("width", "dtype", "change", "reason"),
    [
        (32, jnp.bfloat16, {}, "the memory is 32 wide; it must be one of"),
        (64, jnp.float32, {}, "q is float32; it must be bfloat16"),
        (64, jnp.bfloat16, {"gradient": "chunk_start"}, "gradients are taken at the chunk's start"),
    ],
)
def test_what_it_cannot_take_is_refused_with_the_reason(width, dtype, change, reason):
    inputs: dict[str, Any] = dict.fromkeys("qkv", jnp.zeros((1, 4, 1, width), dtype))
    inputs |= dict.fromkeys(("lr", "log_momentum", "log_keep"), jnp.zeros((1, 4, 1, 1)))
    inputs |= {"weight": jnp.zeros((1, width, width))}
    with dispatch.interpreted(), pytest.raises(dispatch.Unsupported, match=reason):
        op(dataclasses.replace(TOKEN, **change), inputs, None, None, "mosaic_gpu")
