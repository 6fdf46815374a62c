"""The GPU kernels of the linear neural memory equal the definition in Pallas' interpreter and lower for an H100."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from recallax.pallas_kernels import dispatch
from recallax.pallas_kernels.arg_specs import ArgSpec
from recallax.pallas_kernels.neural_memory import (
    InnerOptimizer,
    MemoryInputs,
    OuterParams,
    arg_specs,
    init_neural_state,
    neural_memory,
)
from recallax.pallas_kernels.neural_memory.inner_optimizer import LinearNet
from tests import gpu_kernel_testing as gpu_testing

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


def update_memory(
    inner_optimizer: InnerOptimizer, *, weight: Any, state: Any = None, segment_ids: Any = None, **arguments: Any
) -> Any:
    """Apply `neural_memory`.

    Args:
        inner_optimizer: Rule that updates the memory.
        weight: Initial weights [H, D, D].
        state: Fast weights after five tokens, or None: the initial ones.
        segment_ids: Document ids [B, T], or None.
        arguments: The fields of `MemoryInputs`, and `implementation`.

    Returns:
        The output and the final fast weights.
    """
    tokens = MemoryInputs._make(arguments.pop(name) for name in MemoryInputs._fields)
    b, _, h, width = tokens.q.shape
    outer = OuterParams({"w1": weight}, jnp.ones((h, width)), jnp.zeros((h, width)))
    initial = init_neural_state(inner_optimizer, b, h, width)
    if state is not None:
        initial = initial._replace(fast_weights=state, num_tokens=initial.num_tokens + 5)
    out, final = neural_memory(inner_optimizer, tokens, outer, state=initial, segment_ids=segment_ids, **arguments)
    return out, final.fast_weights


def check(case: ArgSpec, inner_optimizer: InnerOptimizer, rate: float = 1.0) -> None:
    """Compare values, final memory and every gradient; `rate` scales the gates."""
    inputs = {name: rate * x if name.startswith("log_") else x for name, x in arg_specs.inputs(case).items()}
    fast_weights = arg_specs.random_fast_weights(case, inner_optimizer)
    gpu_testing.compare_interpreted(functools.partial(update_memory, inner_optimizer), case, inputs, fast_weights)


@gpu_testing.interpreted
@pytest.mark.parametrize("name", gpu_testing.mark_slow_cases(CASES, "extreme gates"))
def test_neural_memory(name):
    check(CASES[name], PER_TOKEN)


@gpu_testing.interpreted
@pytest.mark.parametrize("name", gpu_testing.mark_slow_cases(CASES, "packed over chunks"))
def test_neural_memory_at_the_decayed_weights(name):
    check(CASES[name], dataclasses.replace(PER_TOKEN, gradient="token_decayed", decay_to="zero"))


@gpu_testing.interpreted
def test_slow_decay_across_chunks():
    check(
        ArgSpec(195, 64, 64, num_heads=1, decay="token", max_beta=0.1, document_lengths=(194,), num_padding=1),
        PER_TOKEN,
        rate=0.01,
    )


@gpu_testing.interpreted
@pytest.mark.full
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_neural_memory_without_momentum(case):
    check(case, NO_MOMENTUM)


@gpu_testing.interpreted
@pytest.mark.full
@pytest.mark.parametrize("name", ["exactly two chunks", "extreme gates", "packed over chunks"])
def test_neural_memory_of_wide_heads(name):
    check(dataclasses.replace(CASES[name], head_k_dim=128, head_v_dim=128), PER_TOKEN)


@gpu_testing.interpreted
@pytest.mark.full
def test_no_data_races(monkeypatch):
    """The row has more chunks than the pipeline holds at once."""
    case = ArgSpec(300, 64, 64, num_heads=1, decay="token")
    inputs = {name: jnp.asarray(x, jnp.float32) for name, x in arg_specs.inputs(case).items()}
    inputs = {name: x.astype(jnp.bfloat16)[:1] if name in "qkv" else x[:1] for name, x in inputs.items()}
    gpu_testing.assert_no_data_races(functools.partial(update_memory, PER_TOKEN), inputs, monkeypatch)


@pytest.mark.parametrize(
    ("width", "inner_optimizer"),
    [(128, PER_TOKEN), *(pytest.param(64, x, marks=pytest.mark.full) for x in (PER_TOKEN, NO_MOMENTUM))],
)
def test_lowers_for_an_h100(width, inner_optimizer):
    narrow = dict.fromkeys("qkv", jax.ShapeDtypeStruct((2, 200, 2, width), jnp.bfloat16))
    wide = dict.fromkeys(("lr", "log_momentum", "log_decay"), jax.ShapeDtypeStruct((2, 200, 2, 1), jnp.float32))
    inputs = narrow | wide | {"weight": jax.ShapeDtypeStruct((2, width, width), jnp.float32)}
    ids = jax.ShapeDtypeStruct((2, 200), jnp.int32)

    def op(inputs, ids):
        return update_memory(inner_optimizer, **inputs, segment_ids=ids, implementation="mosaic_gpu")

    assert gpu_testing.count_kernels_with_gradients(op, 1, inputs, ids) == (2, 4)


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
        update_memory(dataclasses.replace(PER_TOKEN, **change), **inputs, implementation="mosaic_gpu")
