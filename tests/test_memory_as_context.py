"""Memory as context: a token-by-token reference, and the leak in the published equations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from recallax.config import ConfigError
from recallax.layers import GatedDeltaNet, LayerInfo, MemoryAsContext, NeuralMemory, memory_as_context
from recallax.layers.memory_as_context import MemoryAsContextMixer
from recallax.layers.rotary import rotary
from recallax.pallas_kernels.neural_memory import InnerOptimizer
from recallax.pallas_kernels.neural_memory.inner_optimizer import LinearNet
from recallax.types import Precision, SeqInfo, StepInfo, unpacked_seq_info

pytestmark = pytest.mark.usefixtures("strict")

WIDTH, LENGTH, BLOCK, HEADS = 8, 11, 4, 2
MEMORY = NeuralMemory(num_heads=2, inner_optimizer=InnerOptimizer(network=LinearNet(), chunk_size=2))
QUERIES = ("own", "previous", "learned")
X = jax.random.normal(jax.random.key(0), (1, LENGTH, WIDTH))


def config(query, **changes) -> MemoryAsContext:
    sizes = {"block_size": BLOCK, "num_retrieved_tokens": 2, "num_persistent_tokens": 3, "num_heads": HEADS}
    return MemoryAsContext(memory=MEMORY, query_source=query, **(sizes | changes))


def build(query) -> MemoryAsContextMixer:
    """Build a mixer with large random weights, so that all parts affect the output."""
    mixer = config(query).build(WIDTH, LayerInfo(0, 1), precision=Precision(), rngs=nnx.Rngs(0))
    graph, params = nnx.split(mixer)
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    leaves = [x + 0.3 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    return nnx.merge(graph, jax.tree.unflatten(tree, leaves))


def reference_output(mixer: MemoryAsContextMixer) -> jax.Array:
    """One row, token by token, with access to all earlier tokens."""
    attention, memory = mixer.attention, mixer.memory
    project = [part.kernel[...] for part in (attention.q, attention.k, attention.v)]
    assert attention.persistent is not None
    state, out = memory.init_state(1, LENGTH), []
    step = jax.jit(lambda y, at, state: memory.step(y, StepInfo(at[None], jnp.ones(1, bool)), state))
    for begin in range(0, LENGTH, BLOCK):
        read_state, tokens = memory.read_state(state), X[0, begin : begin + BLOCK]
        for i in range(len(tokens)):
            if mixer.query_source == "own":
                queries = tokens[: i + 1]
            elif mixer.query_source == "learned":
                assert mixer.questions is not None
                queries = mixer.questions[...]
            else:
                queries = X[0, begin - BLOCK : begin].reshape(2, -1, WIDTH).mean(axis=1) if begin else X[0, :0]
            retrieved = memory.retrieve(queries[None], read_state)[0] if len(queries) else X[0, :0]
            unrotated = jnp.concatenate([attention.persistent[...], retrieved])

            def rotated(x, weight, first):
                heads = (x @ weight).reshape(1, len(x), HEADS, -1)
                return rotary(heads, jnp.arange(len(x))[None] + first)[0]

            q = rotated(tokens[i : i + 1], project[0], i)[0]
            k = jnp.concatenate(
                [(unrotated @ project[1]).reshape(len(unrotated), HEADS, -1), rotated(tokens[: i + 1], project[1], 0)]
            )
            v = jnp.concatenate([unrotated, tokens[: i + 1]]) @ project[2]
            weights = jax.nn.softmax(jnp.einsum("hk,shk->hs", q, k) / np.sqrt(WIDTH // HEADS), axis=-1)
            read = jnp.einsum("hs,shk->hk", weights, v.reshape(len(v), HEADS, -1)).reshape(1, -1)
            y = mixer.attention_norm(attention.out(read))
            output, state = step(y, jnp.array(begin + i), state)
            out.append(y * jax.nn.silu(mixer.memory_norm(output)))
    return jnp.concatenate(out)


@pytest.mark.parametrize("query", QUERIES)
def test_matches_reference(query):
    mixer = build(query)
    y, _ = jax.jit(lambda x: mixer(x, unpacked_seq_info(1, LENGTH)))(X)
    with jax.disable_jit(False), jax.numpy_dtype_promotion("standard"):
        expected = reference_output(mixer)
    np.testing.assert_allclose(y[0], expected, atol=2e-5, rtol=0)


def output_sensitivity(mixer: MemoryAsContextMixer) -> np.ndarray:
    """[t, s]: largest change of y_t when x_s changes."""
    seq = unpacked_seq_info(1, LENGTH)
    other = X + jnp.eye(LENGTH)[:, :, None]
    call = jax.jit(lambda x: mixer(x, seq)[0])
    rows = jax.lax.map(lambda x: call(x[None])[0], other)
    return np.asarray(jnp.abs(rows - call(X)).max(axis=-1)).T


@pytest.mark.parametrize("query", QUERIES)
def test_tokens_affect_later_blocks_through_the_memory_and_no_earlier_token(query):
    changes = output_sensitivity(build(query))
    assert not changes[np.triu_indices(LENGTH, 1)].any()
    assert (changes[np.tril_indices(LENGTH)] > 0).all()  # tokens of earlier blocks through the memory only


def test_published_equation_is_not_causal(monkeypatch):
    """Retrieved vectors of all tokens are visible to the whole block; the causality test must detect it."""

    def all_visible(query_source, slots, count, has_previous):
        return jnp.ones((*slots.shape, count), bool)

    monkeypatch.setattr(memory_as_context, "visible_retrieved", all_visible)
    changes = output_sensitivity(build("own"))
    assert changes[0, BLOCK - 1] > 1e-6 and changes[BLOCK, BLOCK + 2] > 1e-6
    assert not changes[0, BLOCK:].any()  # the leak is limited to the block


def test_misaligned_documents_return_nan():
    positions = jnp.array([[0, 1, 2, 0, 1, 2, 3, 4, 5, 6, 7]])
    seq = SeqInfo(positions, jnp.array([[1] * 3 + [2] * 8]), jnp.zeros((1, LENGTH), bool))
    assert jnp.isnan(build("own")(X, seq)[0]).all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: config("own", block_size=3),
            "block_size is 3 tokens; it must be a multiple of the memory's chunk of 2",
        ),
        (
            lambda: config("previous", num_retrieved_tokens=3),
            "num_retrieved_tokens is 3; it must divide the block of 4",
        ),
        (lambda: config("learned", num_retrieved_tokens=0), "num_retrieved_tokens is 0; it must be at least 1"),
        (
            lambda: MemoryAsContext(memory=GatedDeltaNet()).build(
                WIDTH, LayerInfo(0, 1), precision=Precision(), rngs=nnx.Rngs(0)
            ),
            "MemoryMixer does not support queries",
        ),
    ],
)
def test_invalid_configs_are_rejected(make, message):
    with pytest.raises(ConfigError, match=message):
        make()
