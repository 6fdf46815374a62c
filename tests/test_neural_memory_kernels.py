"""The neural memory's kernel: interpreted on any machine, against the token loop in float64, and lowered for a TPU."""

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
from tests.test_neural_memory import EXACT, LEARNERS, B, D, H, close, draw, single
from tests.test_ops import per_block

pytestmark = pytest.mark.usefixtures("strict")

LENGTH = 67
PACKED = [1] * 16 + [2] + [3] * 33 + [0] * 17
EVERY = [name for name in LEARNERS if name.startswith("exact")]
FEW = ("exact", "exact at the decayed, to zero")


def with_gradients(learner: InnerOptimizer, form: str, tokens: MemoryInputs, fixed: OuterParams, packed: bool):
    """Outputs, the final memory, and the slopes of tokens, initial weights and the incoming memory."""
    wide = jnp.float64 if form == "reference" else jnp.float32
    rng = np.random.default_rng(1)
    segments = jnp.array([PACKED, [1] * LENGTH], jnp.int32) if packed else None
    weight = rng.normal(size=(B, LENGTH, H, D))
    weight = jnp.asarray(weight if segments is None else weight * (np.asarray(segments) > 0)[..., None, None], wide)
    empty = init_neural_state(learner, B, H, D)
    held = jax.tree.map(lambda x: jnp.asarray(0.3 * rng.normal(size=x.shape), wide), empty.fast_weights)

    def run(tokens, fixed, held):
        state = empty._replace(fast_weights=held, num_tokens=empty.num_tokens + 5)
        out, state = neural_memory(learner, tokens, fixed, state=state, segment_ids=segments, implementation=form)
        kept = sum(jnp.sum(x * x) for x in jax.tree.leaves(state.fast_weights))
        return jnp.sum(out.astype(wide) * weight) + 0.1 * kept, (out, state.fast_weights)

    (_, results), slopes = jax.jit(jax.value_and_grad(run, argnums=(0, 1, 2), has_aux=True))(tokens, fixed, held)
    return jax.tree.map(np.asarray, (*results, slopes))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", [jnp.float32, pytest.param(jnp.bfloat16, marks=pytest.mark.full)])
@pytest.mark.parametrize("name", [n if n in FEW else pytest.param(n, marks=pytest.mark.full) for n in EVERY])
def test_the_kernel_is_the_token_loop_in_values_and_gradients(monkeypatch, name, dtype, packed):
    monkeypatch.setattr(mosaic_tpu, "CHUNK", 32)  # two blocks of the triangular system
    learner = LEARNERS[name]
    tokens, fixed = draw(learner, LENGTH)
    fixed = fixed._replace(initial_fast_weights=None)
    if not packed:  # states that outlast a chunk
        tokens = tokens._replace(log_momentum=0.1 * tokens.log_momentum, log_decay=0.1 * tokens.log_decay)
    rounded = MemoryInputs._make(single(x, dtype if i < 3 else jnp.float32) for i, x in enumerate(tokens))
    with jax.enable_x64(True):
        tokens_, fixed_ = (jax.tree.map(lambda x: jnp.asarray(np.asarray(x, np.float64)), x) for x in (rounded, fixed))
        out_, memory_, slopes_ = with_gradients(learner, "reference", tokens_, fixed_, packed)
    with interpret_kernels():
        out, memory, slopes = with_gradients(learner, "mosaic_tpu", rounded, single(fixed), packed)
    valid = np.ones((B, LENGTH), bool)
    if packed:
        valid[0] = np.array(PACKED) > 0
    out, out_ = (np.where(valid[..., None, None], np.asarray(x, np.float64), 0) for x in (out, out_))
    narrow = dtype == jnp.bfloat16
    assert per_block(out, out_) <= (0.03 if narrow else 1e-5)
    close((memory, slopes), (memory_, slopes_), 0.04 if narrow else 1e-5)


def test_unsupported_arguments_are_named():
    tokens, fixed = (single(x) for x in draw(EXACT, 4))
    with pytest.raises(Unsupported, match="it is for a TPU"):
        neural_memory(EXACT, tokens, fixed._replace(initial_fast_weights=None), implementation="mosaic_tpu")
    with interpret_kernels(), pytest.raises(Unsupported, match="documents begin with something learned"):
        neural_memory(EXACT, tokens, fixed, implementation="mosaic_tpu")
    stale = InnerOptimizer(network=LinearNet(), chunk_size=4)
    with interpret_kernels(), pytest.raises(Unsupported, match="gradients are taken at the chunk's start"):
        neural_memory(stale, tokens, fixed, implementation="mosaic_tpu")


@pytest.mark.parametrize("momentum", [True, False])
def test_it_is_lowered_for_a_tpu(momentum):
    learner = InnerOptimizer(network=LinearNet(), gradient="token", momentum=momentum)
    b, t, h, width = 2, 300, 4, 128

    def op(weight, *tokens, implementation):
        fixed = OuterParams({"w1": weight}, jnp.ones((h, width)), jnp.zeros((h, width)))
        segments = jnp.ones((b, t), jnp.int32)
        return neural_memory(
            learner, MemoryInputs(*tokens), fixed, segment_ids=segments, implementation=implementation
        )[0]

    narrow = jax.ShapeDtypeStruct((b, t, h, width), jnp.bfloat16)
    gate = jax.ShapeDtypeStruct((b, t, h, 1), jnp.float32)
    inputs = [jax.ShapeDtypeStruct((h, width, width), jnp.float32), *[narrow] * 3, *[gate] * 3]
    text = lowered(lambda inputs, implementation: op(*inputs, implementation=implementation), {"inputs": inputs})
    assert text.count("tpu_custom_call") >= 2  # forward, backward
