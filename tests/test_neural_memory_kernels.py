"""TPU kernel of the neural memory: interpreted against the token loop in float64, and lowered for a TPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recallax.pallas_kernels.dispatch import Unsupported, interpret_kernels
from recallax.pallas_kernels.neural_memory import (
    InnerOptimizer,
    OuterParams,
    init_neural_state,
    mosaic_tpu,
    neural_memory,
)
from recallax.pallas_kernels.neural_memory.inner_optimizer import LinearNet
from recallax.pallas_kernels.neural_memory.update_coefficients import MemoryInputs
from tests.test_mosaic_tpu import lowered
from tests.test_neural_memory import EXACT, INNER_OPTIMIZERS, B, D, H, close, draw, single
from tests.test_ops import max_block_error

pytestmark = pytest.mark.usefixtures("strict")

LENGTH = 67
PACKED = [1] * 16 + [2] + [3] * 33 + [0] * 17
SEQUENTIAL = [name for name in INNER_OPTIMIZERS if name.startswith("exact")]
FEW = ("exact", "exact at the decayed, to zero")


def with_gradients(
    inner_optimizer: InnerOptimizer, implementation: str, tokens: MemoryInputs, outer_params: OuterParams, packed: bool
):
    """Return outputs, final memory, and the gradients of tokens, outer parameters and initial memory."""
    dtype = jnp.float64 if implementation == "reference" else jnp.float32
    rng = np.random.default_rng(1)
    segments = jnp.array([PACKED, [1] * LENGTH], jnp.int32) if packed else None
    weight = rng.normal(size=(B, LENGTH, H, D))
    weight = jnp.asarray(weight if segments is None else weight * (np.asarray(segments) > 0)[..., None, None], dtype)
    empty = init_neural_state(inner_optimizer, B, H, D)
    initial = jax.tree.map(lambda x: jnp.asarray(0.3 * rng.normal(size=x.shape), dtype), empty.fast_weights)

    def run(tokens, outer_params, initial):
        state = empty._replace(fast_weights=initial, num_tokens=empty.num_tokens + 5)
        out, state = neural_memory(
            inner_optimizer, tokens, outer_params, state=state, segment_ids=segments, implementation=implementation
        )
        norm = sum(jnp.sum(x * x) for x in jax.tree.leaves(state.fast_weights))
        return jnp.sum(out.astype(dtype) * weight) + 0.1 * norm, (out, state.fast_weights)

    (_, results), grads = jax.jit(jax.value_and_grad(run, argnums=(0, 1, 2), has_aux=True))(
        tokens, outer_params, initial
    )
    return jax.tree.map(np.asarray, (*results, grads))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", [jnp.float32, pytest.param(jnp.bfloat16, marks=pytest.mark.full)])
@pytest.mark.parametrize("name", [n if n in FEW else pytest.param(n, marks=pytest.mark.full) for n in SEQUENTIAL])
def test_kernel_agrees_with_token_loop_in_values_and_gradients(monkeypatch, name, dtype, packed):
    monkeypatch.setattr(mosaic_tpu, "CHUNK", 32)  # two blocks of the triangular system
    inner_optimizer = INNER_OPTIMIZERS[name]
    tokens, outer_params = draw(inner_optimizer, LENGTH)
    outer_params = outer_params._replace(initial_fast_weights=None)
    if not packed:  # slower decay, so that the states of a chunk affect later chunks
        tokens = tokens._replace(log_momentum=0.1 * tokens.log_momentum, log_decay=0.1 * tokens.log_decay)
    rounded = MemoryInputs._make(single(x, dtype if i < 3 else jnp.float32) for i, x in enumerate(tokens))
    with jax.enable_x64(True):
        tokens_, outer_params_ = (
            jax.tree.map(lambda x: jnp.asarray(np.asarray(x, np.float64)), x) for x in (rounded, outer_params)
        )
        out_, memory_, grads_ = with_gradients(inner_optimizer, "reference", tokens_, outer_params_, packed)
    with interpret_kernels():
        out, memory, grads = with_gradients(inner_optimizer, "mosaic_tpu", rounded, single(outer_params), packed)
    valid = np.ones((B, LENGTH), bool)
    if packed:
        valid[0] = np.array(PACKED) > 0
    out, out_ = (np.where(valid[..., None, None], np.asarray(x, np.float64), 0) for x in (out, out_))
    narrow = dtype == jnp.bfloat16
    assert max_block_error(out, out_) <= (0.03 if narrow else 1e-5)
    close((memory, grads), (memory_, grads_), 0.04 if narrow else 1e-5)


def test_unsupported_arguments_are_rejected_with_reason():
    tokens, outer_params = (single(x) for x in draw(EXACT, 4))
    with pytest.raises(Unsupported, match="it is for a TPU"):
        neural_memory(EXACT, tokens, outer_params._replace(initial_fast_weights=None), implementation="mosaic_tpu")
    with interpret_kernels(), pytest.raises(Unsupported, match="initial_fast_weights are given"):
        neural_memory(EXACT, tokens, outer_params, implementation="mosaic_tpu")
    stale = InnerOptimizer(network=LinearNet(), chunk_size=4)
    with interpret_kernels(), pytest.raises(Unsupported, match="gradient is 'chunk_start'"):
        neural_memory(stale, tokens, outer_params, implementation="mosaic_tpu")


@pytest.mark.parametrize("momentum", [True, False])
def test_kernel_is_lowered_for_a_tpu(momentum):
    inner_optimizer = InnerOptimizer(network=LinearNet(), gradient="token", momentum=momentum)
    b, t, h, width = 2, 300, 4, 128

    def op(weight, *tokens, implementation):
        outer_params = OuterParams({"w1": weight}, jnp.ones((h, width)), jnp.zeros((h, width)))
        segments = jnp.ones((b, t), jnp.int32)
        return neural_memory(
            inner_optimizer, MemoryInputs(*tokens), outer_params, segment_ids=segments, implementation=implementation
        )[0]

    narrow = jax.ShapeDtypeStruct((b, t, h, width), jnp.bfloat16)
    gate = jax.ShapeDtypeStruct((b, t, h, 1), jnp.float32)
    inputs = [jax.ShapeDtypeStruct((h, width, width), jnp.float32), *[narrow] * 3, *[gate] * 3]
    text = lowered(lambda inputs, implementation: op(*inputs, implementation=implementation), {"inputs": inputs})
    assert text.count("tpu_custom_call") >= 2  # forward, backward
