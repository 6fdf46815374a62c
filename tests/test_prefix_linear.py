"""Prefix linear attention: the paper's equation, laws outside the prefix, and rows with several prefixes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from recallax.config import ConfigError
from recallax.layers import BaseConv, Based, GatedDeltaNet, LayerInfo, MemoryConfig, PrefixLinear
from recallax.layers.matrix_memory import MatrixState
from recallax.layers.prefix_linear import PrefixLinearMixer, two_pass_layout
from recallax.layers.recurrence_gates import split_heads
from recallax.models import Block, LMConfig
from recallax.pallas_kernels.taylor_attention import taylor_attention
from recallax.types import Precision, SeqInfo, StepInfo, unpacked_seq_info
from tests.test_laws import close, random_inputs, rows, slice_seq_info

pytestmark = pytest.mark.usefixtures("strict", "chunks_of_four")
WIDTH, LENGTH = 16, 11
MEMORIES: dict[str, MemoryConfig] = {
    "based": Based(feature_dim=4, num_heads=2),
    "gated_delta_net": GatedDeltaNet(num_heads=2, head_k_dim=4),
}
each_memory = pytest.mark.parametrize("name", MEMORIES)


def build(config: PrefixLinear) -> PrefixLinearMixer:
    module = config.build(WIDTH, LayerInfo(1, 4), precision=Precision(), rngs=nnx.Rngs(7))
    graph, params, rest = nnx.split(module, nnx.Param, ...)
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(3), len(leaves))
    leaves = [x + 0.4 * jax.random.normal(k, x.shape, x.dtype) for x, k in zip(leaves, keys, strict=True)]
    return nnx.merge(graph, jax.tree.unflatten(tree, leaves), rest)


def with_prefix(seq: SeqInfo, *lengths: tuple[int, ...]) -> SeqInfo:
    """Mark the first tokens of each document as its prefix, by row and document."""
    table = np.zeros((len(lengths), 1 + max(map(len, lengths))), np.int32)
    for row, sizes in enumerate(lengths):
        table[row, 1 : 1 + len(sizes)] = sizes
    prefix_len = np.take_along_axis(table, np.asarray(seq.segment_ids), axis=1)
    return seq._replace(prefix=jnp.asarray(np.asarray(seq.positions) < prefix_len))


def taylor_weights(q: np.ndarray, k: np.ndarray) -> np.ndarray:
    """f(q.k / sqrt(d')) [H, T, T], in float64."""
    score = np.einsum("thk,shk->hts", q, k) / np.sqrt(q.shape[-1])
    return 1 + score + score**2 / 2


def test_prefix_linear_attention_matches_the_papers_equation():
    """Arora et al. 2024 (JRT), section 4: both sums in numerator and denominator, in float64."""
    mixer, x = build(PrefixLinear(memory=MEMORIES["based"])), random_inputs(0, 1, LENGTH, WIDTH)
    q, k, v, ke, ve = (
        np.asarray(split_heads(part, 2)[0], np.float64)
        for part in (mixer.query(x)["q"], *mixer.writer(x).values(), *mixer.encoder(x).values())
    )
    causal = np.tril(np.ones((LENGTH, LENGTH))) * taylor_weights(q, k)
    run = jax.jit(lambda x, seq: mixer.run(x, seq, None))
    for size in (0, 1, 5, LENGTH):
        encoded = taylor_weights(q, ke) * (np.arange(LENGTH) < size)
        total = (causal + encoded).sum(axis=-1, keepdims=True)
        expected = np.einsum("hts,shv->thv", causal / total, v) + np.einsum("hts,shv->thv", encoded / total, ve)
        y, state = run(x, with_prefix(rows([LENGTH]), (size,)))
        close(y[0], expected)
    # Equal to the causal op with the encoder's sums as its state; the final state has the size of BASED's.
    q, k, v, ke, ve = (jnp.asarray(part, jnp.float32)[None] for part in (q, k, v, ke, ve))
    again, final = taylor_attention(q, k, v, state=taylor_attention(ke, ke, ve)[1])
    close(y, again)
    close(state, final)


@each_memory
def test_document_continues_the_state_of_its_prefix(name):
    """Reference: two calls of the cell, with an empty convolution state in the second one."""
    mixer, x, size = build(PrefixLinear(memory=MEMORIES[name])), random_inputs(1, 2, LENGTH, WIDTH), 5
    seq = rows([LENGTH], [8])
    positions, segments = jnp.asarray(seq.positions), jnp.asarray(seq.segment_ids)
    prefix = {key: value[:, :size] for key, value in (mixer.query(x) | mixer.encoder(x)).items()}
    run = jax.jit(mixer.cell.run)
    _, state = run(prefix, positions[:, :size], segments[:, :size], mixer.cell.init_state(2))
    if isinstance(state, MatrixState):
        state = state._replace(conv_state=mixer.cell.init_state(2).conv_state)
    expected, final = run(mixer.query(x) | mixer.writer(x), positions, segments, state)
    y, after = jax.jit(mixer.run)(x, with_prefix(seq, (size,), (size,)), mixer.cell.init_state(2))
    close(y, expected, where=segments > 0)
    close(after, final)
    plain, _ = run(mixer.query(x) | mixer.writer(x), positions, segments, mixer.cell.init_state(2))
    assert jnp.abs(plain - expected)[segments > 0].max() > 0.01  # the prefix has an effect
    close(jax.jit(mixer.run)(x, seq, mixer.cell.init_state(2))[0], plain, where=segments > 0)


@each_memory
def test_prefill_after_prefix_can_be_split_and_stepped(name):
    mixer, x = build(PrefixLinear(memory=MEMORIES[name])), random_inputs(2, 3, LENGTH, WIDTH)
    seq = with_prefix(rows([LENGTH], [4, 7], [6]), (4,), (3, 2), (1,))
    valid = seq.segment_ids > 0
    whole, _ = jax.jit(mixer)(x, seq)
    prefill, step = jax.jit(mixer.prefill), jax.jit(mixer.step)
    cut = 6  # after the last prefix
    a, middle, _ = prefill(x[:, :cut], slice_seq_info(seq, slice(0, cut)), mixer.init_state(3, LENGTH))
    b, after, _ = prefill(x[:, cut:], slice_seq_info(seq, slice(cut, None)), middle)
    close(jnp.concatenate([a, b], axis=1), whole, where=valid)
    state = middle
    for t in range(cut, LENGTH):
        y, state = step(x[:, t], StepInfo(jnp.asarray(seq.positions)[:, t], valid[:, t]), state)
        close(y, whole[:, t], where=valid[:, t])
    close(state, after)


@each_memory
def test_only_the_prefix_is_read_ahead(name):
    mixer = build(PrefixLinear(memory=MEMORIES[name]))
    sizes = ((5,), (2, 3))
    seq = with_prefix(rows([LENGTH], [4, 7]), *sizes)
    # The last token that each token may depend on: the end of its prefix, or itself.
    horizon = np.array([[*[4] * 5, *range(5, LENGTH)], [1, 1, 2, 3, 6, 6, 6, *range(7, LENGTH)]])
    call = jax.jit(lambda x: mixer(x, seq)[0])
    x, other = random_inputs(3, 2, LENGTH, WIDTH), 30 * random_inputs(4, 2, LENGTH, WIDTH)
    y = np.asarray(call(x))
    for t in range(LENGTH):
        changed = np.asarray(call(jnp.where((jnp.arange(LENGTH) > t)[None, :, None], other, x)))
        unaffected = horizon <= t
        np.testing.assert_array_equal(changed[unaffected], y[unaffected])
    grad = np.asarray(jax.jit(jax.grad(lambda x: mixer(x, seq)[0][:, 0].sum()))(x))
    assert grad[0, 1:5].any(axis=-1).all() and not grad[0, 5:].any()  # the test can detect a dependence
    assert grad[1, 1].any() and not grad[1, 2:].any()


@each_memory
def test_packed_documents_and_rows_do_not_share_prefixes(name):
    mixer, x = build(PrefixLinear(memory=MEMORIES[name], max_prefix_len=6)), random_inputs(5, 1, LENGTH, WIDTH)
    call = jax.jit(mixer)
    packed = with_prefix(rows([4, 1, 5], [4], [1], [5]), (3, 1, 2), (3,), (1,), (2,))
    y, _ = call(jnp.concatenate([x, x, jnp.roll(x, -4, axis=1), jnp.roll(x, -5, axis=1)]), packed)
    for row, (start, size) in enumerate([(0, 4), (4, 1), (5, 5)], 1):
        close(y[0, start : start + size], y[row, :size])
    # Padding before and between documents has no effect.
    padded = SeqInfo(*(jnp.insert(jnp.asarray(value), jnp.array([0, 4, 4]), 0, axis=1) for value in packed[:3]))
    z, _ = call(jnp.insert(jnp.tile(x, (4, 1, 1)), jnp.array([0, 4, 4]), 1e3, axis=1), padded)
    close(z[0, 1:5], y[0, :4])
    close(z[0, 7:13], y[0, 4:10])


def test_row_with_too_long_a_prefix_is_nan():
    x, seq = random_inputs(6, 2, LENGTH, WIDTH), with_prefix(rows([LENGTH], [LENGTH]), (5,), (6,))
    wide, narrow = (build(PrefixLinear(memory=MEMORIES["based"], max_prefix_len=length)) for length in (None, 5))
    y, state, _ = jax.jit(narrow.prefill)(x, seq, narrow.init_state(2, LENGTH))
    close(y[0], jax.jit(wide)(x, seq)[0][0])
    assert all(np.isnan(np.asarray(leaf[1])).all() for leaf in (y, *state))
    with pytest.raises(ConfigError, match="at least 1"):
        PrefixLinear(memory=MEMORIES["based"], max_prefix_len=0)


def test_positions_of_both_passes():
    seq = with_prefix(rows([3, 2], [4]), (2, 1), (0,))
    plan = two_pass_layout(jnp.asarray(seq.segment_ids), jnp.asarray(seq.prefix), 4)
    none = LENGTH
    assert plan.tokens_to_prefix.source.tolist() == [[0, 1, 3, none], [none] * 4]
    assert plan.prefix_to_row.target[0, :3].tolist() == [0, 1, 5]
    assert plan.tokens_to_row.target.tolist()[0][:5] == [2, 3, 4, 6, 7]
    assert plan.prefix_fits.all()


def test_prompts_may_be_padded_on_the_left():
    """The published code fails this test: it masks keys, and a key of 0 still has the feature 1."""
    blocks = {"conv": Block(mixer=BaseConv(conv_size=3)), "prefix": Block(mixer=PrefixLinear(memory=MEMORIES["based"]))}
    model = LMConfig(d_model=WIDTH, vocab_size=12, pattern="conv prefix", blocks=blocks).build(nnx.Rngs(0))
    tokens = jax.random.randint(jax.random.key(1), (2, LENGTH), 0, 12)
    seq = with_prefix(rows([LENGTH], [LENGTH]), (7,), (4,))
    graph, weights = nnx.split(model)
    prefill = jax.jit(lambda tokens, seq: nnx.merge(graph, weights).prefill(tokens, seq, model.init_state(2, LENGTH)))
    logits, final, _ = prefill(tokens, seq)
    left = jax.tree.map(lambda value: jnp.pad(jnp.asarray(value), ((0, 0), (3, 0))), (tokens, seq))
    padded, after, _ = prefill(*left)
    close(padded[:, 3:], logits)
    close(after, final)
    causal, _, _ = prefill(tokens, jax.tree.map(jnp.asarray, unpacked_seq_info(2, LENGTH)))
    assert jnp.abs(causal - logits).max() > 1e-4
