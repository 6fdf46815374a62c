"""The exact linear memory's GPU kernels: against the definition in Pallas' interpreter, and lowered for an H100."""

from typing import Any

import jax.numpy as jnp
import pytest

from recallax.pallas_kernels import dispatch
from recallax.pallas_kernels.cases import Case, segments
from recallax.pallas_kernels.neural_memory import Fixed, Learner, Tokens, cases, init_state, neural_memory
from recallax.pallas_kernels.neural_memory.learner import LinearNet
from tests.hopper import in_the_gate, interpreted
from tests.test_ops import compare

TOKEN = Learner(network=LinearNet(), gradient="token")
LEARNERS = {
    "token": TOKEN,
    "decayed, to zero": Learner(network=LinearNet(), gradient="token_decayed", decay_to="zero"),
    "no momentum": Learner(network=LinearNet(), gradient="token", momentum=False),
}
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


def check(case: Case, learner: Learner) -> None:
    """Values, final memory and every gradient of the kernels."""
    ids = segments(case) if case.documents else None

    def run(inputs, memory, form):
        with dispatch.interpreted():
            return op(learner, inputs, memory, ids, form)

    compare(run, case, cases.inputs(case), cases.memory(case, learner), "bfloat16", "mosaic_gpu")


@interpreted
@pytest.mark.usefixtures("strict")
@pytest.mark.parametrize("learner", LEARNERS.values(), ids=LEARNERS)
@pytest.mark.parametrize("name", in_the_gate(CASES))
def test_neural_memory(name, learner):
    check(CASES[name], learner)
