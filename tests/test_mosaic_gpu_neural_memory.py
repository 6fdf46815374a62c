"""GPU kernels of the linear memory: against the definition in Pallas' interpreter, and lowered for an H100."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from recallax.pallas_kernels import dispatch
from recallax.pallas_kernels.arg_specs import ArgSpec, segment_ids
from recallax.pallas_kernels.mosaic_gpu import kernel_launch
from recallax.pallas_kernels.neural_memory import (
    InnerOptimizer,
    MemoryInputs,
    OuterParams,
    arg_specs,
    init_neural_state,
    neural_memory,
)
from recallax.pallas_kernels.neural_memory.inner_optimizer import LinearNet
from tests.gpu_kernel_testing import count_kernels, interpreted, mark_slow_cases
from tests.test_ops import compare

PER_TOKEN = InnerOptimizer(network=LinearNet(), gradient="token")
NO_MOMENTUM = dataclasses.replace(PER_TOKEN, momentum=False)
CASES = {
    "one token": ArgSpec(1, 64, 64, num_heads=1, decay="token"),
    "below a chunk": ArgSpec(13, 64, 64, num_heads=1),
    "exactly two chunks": ArgSpec(128, 64, 64, num_heads=1, decay="constant"),
    "odd": ArgSpec(67, 128, 128, num_heads=1, decay="token"),
    "two heads": ArgSpec(67, 64, 64, decay="token"),
    "correlated .99": ArgSpec(67, 64, 64, num_heads=1, key_correlation=0.99),
    "extreme gates": ArgSpec(131, 64, 64, num_heads=1, decay="extreme"),
    "packed": ArgSpec(67, 64, 64, num_heads=1, document_lengths=(1, 15, 1, 1, 20, 29)),
    "packed, decay, padding": ArgSpec(
        67, 64, 64, num_heads=1, decay="token", document_lengths=(16, 1, 33), num_padding=17
    ),
    "packed over chunks": ArgSpec(131, 64, 64, num_heads=1, document_lengths=(60, 1, 49), num_padding=21),
}


def op(inner_optimizer: InnerOptimizer, inputs: dict[str, Any], memory: Any, ids: Any, implementation: str) -> Any:
    """Return the output and the final memory; `inputs` are the tokens and the initial weights by name."""
    b, _, h, width = inputs["q"].shape
    fixed = OuterParams({"w1": inputs["weight"]}, jnp.ones((h, width)), jnp.zeros((h, width)))
    state = init_neural_state(inner_optimizer, b, h, width)
    if memory is not None:
        state = state._replace(fast_weights=memory, num_tokens=state.num_tokens + 5)
    tokens = MemoryInputs._make(inputs[name] for name in MemoryInputs._fields)
    out, state = neural_memory(
        inner_optimizer, tokens, fixed, state=state, segment_ids=ids, implementation=implementation
    )
    return out, state.fast_weights


def check(case: ArgSpec, inner_optimizer: InnerOptimizer, rate: float = 1.0) -> None:
    """Compare values, final memory and every gradient; `rate` scales the gates."""
    ids = segment_ids(case) if case.document_lengths else None
    inputs = {name: rate * x if name.startswith("log_") else x for name, x in arg_specs.inputs(case).items()}

    def run(inputs, memory, implementation):
        with dispatch.interpret_kernels():
            return op(inner_optimizer, inputs, memory, ids, implementation)

    compare(run, case, inputs, arg_specs.random_fast_weights(case, inner_optimizer), "bfloat16", "mosaic_gpu")


@interpreted
@pytest.mark.usefixtures("strict")
@pytest.mark.parametrize("name", mark_slow_cases(CASES, "extreme gates"))
def test_neural_memory(name):
    check(CASES[name], PER_TOKEN)


@interpreted
@pytest.mark.usefixtures("strict")
@pytest.mark.parametrize("name", mark_slow_cases(CASES, "packed over chunks"))
def test_neural_memory_at_the_decayed_weights(name):
    check(CASES[name], dataclasses.replace(PER_TOKEN, gradient="token_decayed", decay_to="zero"))


@interpreted
@pytest.mark.usefixtures("strict")
def test_slow_decay_across_chunks():
    check(
        ArgSpec(195, 64, 64, num_heads=1, decay="token", max_beta=0.1, document_lengths=(194,), num_padding=1),
        PER_TOKEN,
        rate=0.01,
    )


@interpreted
@pytest.mark.full
@pytest.mark.usefixtures("strict")
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_neural_memory_without_momentum(case):
    check(case, NO_MOMENTUM)


@interpreted
@pytest.mark.full
@pytest.mark.usefixtures("strict")
@pytest.mark.parametrize("name", ["exactly two chunks", "extreme gates", "packed over chunks"])
def test_neural_memory_of_wide_heads(name):
    check(dataclasses.replace(CASES[name], head_k_dim=128, head_v_dim=128), PER_TOKEN)


@interpreted
@pytest.mark.full
def test_no_data_races(monkeypatch):
    """The row has more chunks than the pipeline holds at once."""
    monkeypatch.setattr(kernel_launch, "INTERPRET_PARAMS", plgpu.InterpretGPUParams(detect_races=True))
    case = ArgSpec(300, 64, 64, num_heads=1, decay="token")
    inputs = {name: jnp.asarray(x, jnp.float32) for name, x in arg_specs.inputs(case).items()}
    inputs = {name: x.astype(jnp.bfloat16)[:1] if name in "qkv" else x[:1] for name, x in inputs.items()}

    def total(inputs):
        with dispatch.interpret_kernels():
            out, memory = op(PER_TOKEN, inputs, None, None, "mosaic_gpu")
        return jnp.sum(out.astype(jnp.float32)) + sum(jnp.sum(x) for x in jax.tree.leaves(memory))

    grads = jax.jit(jax.grad(total))(inputs)
    assert all(np.isfinite(np.asarray(x, np.float32)).all() for x in jax.tree.leaves(grads))


@pytest.mark.parametrize(
    ("width", "inner_optimizer"),
    [(128, PER_TOKEN), *(pytest.param(64, x, marks=pytest.mark.full) for x in (PER_TOKEN, NO_MOMENTUM))],
)
def test_lowers_for_an_h100(width, inner_optimizer):
    narrow = dict.fromkeys("qkv", jax.ShapeDtypeStruct((2, 200, 2, width), jnp.bfloat16))
    wide = dict.fromkeys(("lr", "log_momentum", "log_decay"), jax.ShapeDtypeStruct((2, 200, 2, 1), jnp.float32))
    inputs = narrow | wide | {"weight": jax.ShapeDtypeStruct((2, width, width), jnp.float32)}
    ids = jax.ShapeDtypeStruct((2, 200), jnp.int32)

    def learn(inputs, ids):
        return op(inner_optimizer, inputs, None, ids, "mosaic_gpu")

    def grads(inputs, ids):
        out, pull = jax.vjp(lambda inputs: learn(inputs, ids), inputs)
        return pull(out)

    assert count_kernels(learn, inputs, ids) == 2 and count_kernels(grads, inputs, ids) == 4


@pytest.mark.parametrize(
    ("width", "dtype", "change", "reason"),
    [
        (32, jnp.bfloat16, {}, "the memory is 32 wide; it must be one of"),
        (64, jnp.float32, {}, "q is float32; it must be bfloat16"),
        (64, jnp.bfloat16, {"gradient": "chunk_start"}, "gradient is 'chunk_start'"),
    ],
)
def test_unsupported_arguments_are_rejected_with_reason(width, dtype, change, reason):
    inputs: dict[str, Any] = dict.fromkeys("qkv", jnp.zeros((1, 4, 1, width), dtype))
    inputs |= dict.fromkeys(("lr", "log_momentum", "log_decay"), jnp.zeros((1, 4, 1, 1)))
    inputs |= {"weight": jnp.zeros((1, width, width))}
    with dispatch.interpret_kernels(), pytest.raises(dispatch.Unsupported, match=reason):
        op(dataclasses.replace(PER_TOKEN, **change), inputs, None, None, "mosaic_gpu")
