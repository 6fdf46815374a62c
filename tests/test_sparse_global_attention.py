"""Sparse global attention: the op against its definition, both caches, and gradients of selectors."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from recallax.config import ConfigError
from recallax.layers import KeyScore, LayerInfo, QueryDependentSelector, SlidingWindow, SparseGlobalAttention
from recallax.layers.selection import ranking_loss
from recallax.pallas_kernels.sparse_global_attention import TopKCache, init_full_cache, sparse_global_attention
from recallax.types import Precision, unpacked_seq_info

pytestmark = pytest.mark.usefixtures("strict")

BLOCK, WINDOW, TOP_K, LENGTH, SEEN = 4, 6, 5, 41, 11
SIZES: dict[str, Any] = {"window": WINDOW, "top_k": TOP_K, "block_size": BLOCK}


def random_op_inputs(seed: int, rows: int, length: int, score_dim: int = 1) -> dict[str, Any]:
    keys = jax.random.split(jax.random.key(seed), 5)
    shapes = {"q": (4, 8), "k": (2, 8), "v": (2, 6), "selection_key": (score_dim,), "selection_query": (score_dim,)}
    return {
        n: jax.random.normal(key, (rows, length, *shape)) for key, (n, shape) in zip(keys, shapes.items(), strict=True)
    }


def packed() -> tuple[jax.Array, jax.Array]:
    """Positions and segment ids of two rows that continue at SEEN, within a block; the second has a second document."""
    first = 4 * BLOCK - SEEN % BLOCK
    positions, segments = np.zeros((2, 2, LENGTH), np.int32)
    positions[0] = SEEN + np.arange(LENGTH)
    positions[1, :first], segments[1, :first] = SEEN + np.arange(first), 3
    positions[1, first:-2], segments[1, first:-2] = np.arange(LENGTH - first - 2), 2
    segments[0] = 1
    return jnp.asarray(positions), jnp.asarray(segments)


def full_cache(score_dim: int, query_dependent: bool):
    """Cache of all tokens after the first SEEN ones."""
    before, seq = random_op_inputs(7, 2, SEEN, score_dim), unpacked_seq_info(2, SEEN)
    selection_query = before.pop("selection_query") if query_dependent else None
    before.pop("selection_query", None)
    empty = init_full_cache(2, SEEN + LENGTH, 2, 8, 6, score_dim, query_dependent, jnp.float32)
    layout: dict[str, Any] = {"positions": jnp.asarray(seq.positions), "segment_ids": jnp.asarray(seq.segment_ids)}
    return sparse_global_attention(**before, selection_query=selection_query, **SIZES, **layout, state=empty)[1]


@pytest.mark.parametrize("query_dependent", [pytest.param(False, marks=pytest.mark.full), True])
def test_blocks_match_reference_in_values_and_gradients(query_dependent):
    positions, segments = packed()
    score_dim = 3 if query_dependent else 1
    inputs, state = random_op_inputs(1, 2, LENGTH, score_dim), full_cache(score_dim, query_dependent)
    valid = (segments > 0)[..., None, None]
    cotangent = jax.random.normal(jax.random.key(2), (2, LENGTH, 4, 6))
    if not query_dependent:
        inputs.pop("selection_query")

    def results(implementation):
        def loss(inputs, state):
            options: dict[str, Any] = {
                "positions": positions,
                "segment_ids": segments,
                "implementation": implementation,
            }
            y, after = sparse_global_attention(**inputs, **SIZES, **options, state=state)
            y = jnp.where(valid, y, 0)
            return jnp.sum(y * cotangent), (y, after)

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(inputs, state)

    one, other = results("xla"), results("reference")
    assert all(float(jnp.abs(grad).max()) > 1e-3 for grad in one[1][0].values())
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


def test_selected_tokens_match_a_loop():
    """Attention weights, which one-hot values make visible, against sorted scores in Python."""
    inputs = random_op_inputs(3, 1, LENGTH)
    inputs.pop("selection_query")
    values = jnp.broadcast_to(jnp.eye(LENGTH)[None, :, None], (1, LENGTH, 2, LENGTH))
    seq = unpacked_seq_info(1, LENGTH)
    layout: dict[str, Any] = {"positions": jnp.asarray(seq.positions), "segment_ids": jnp.asarray(seq.segment_ids)}
    weights = jax.jit(lambda inputs: sparse_global_attention(**inputs, **SIZES, **layout)[0])(inputs | {"v": values})
    score = np.asarray(inputs["selection_key"])[0, :, 0]
    for t in range(LENGTH):
        candidates = range(max(t // BLOCK * BLOCK + BLOCK - WINDOW, 0))
        best = sorted(candidates, key=lambda j: -score[j])[:TOP_K]
        visible = {j for j in best if t - j >= WINDOW} | {j for j in range(t + 1) if t - j < WINDOW}
        assert set(np.flatnonzero(np.asarray(weights)[0, t, 0])) == visible


BASE = SparseGlobalAttention(window=6, top_k=5, block_size=4, num_heads=2)


def build(config, seed: int = 0):
    mixer = config.build(16, LayerInfo(0, 2), precision=Precision(), rngs=nnx.Rngs(0))
    graph, params, rest = nnx.split(mixer, nnx.Param, ...)
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    leaves = [x + 0.4 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    return nnx.merge(graph, jax.tree.unflatten(tree, leaves), rest)


def test_top_k_cache_equals_full_cache():
    top_k, full = build(BASE), build(replace(BASE, cache="full"))
    x, cut = jax.random.normal(jax.random.key(0), (8, 60, 16)), 37
    seq = jax.tree.map(jnp.asarray, unpacked_seq_info(8, 60))
    first, later = (jax.tree.map(lambda a, p=p: a[:, p], seq) for p in (slice(0, cut), slice(cut, None)))
    outputs, sizes = [], []
    for mixer in (top_k, full):
        prefill = jax.jit(lambda x, seq, state, mixer=mixer: mixer.prefill(x, seq, state)[:2])
        _, state = prefill(x[:, :cut], first, mixer.init_state(8, 60))
        outputs.append(prefill(x[:, cut:], later, state)[0])
        sizes.append([sum(leaf.nbytes for leaf in jax.tree.leaves(mixer.init_state(1, n))) for n in (60, 600)])
    np.testing.assert_array_equal(*outputs)
    whole = jax.jit(lambda x, seq: top_k(x, seq)[0])(x, seq)
    np.testing.assert_allclose(outputs[0], whole[:, cut:], atol=1e-5)
    (short, long), (few, many) = sizes
    assert short == long == (6 + 5) * (2 * 16 + 1) * 4 + 5 * 4  # keys, values, selection keys and positions
    assert 10 * few == many
    assert isinstance(top_k.init_state(1, 9).cache, TopKCache)


def test_without_earlier_tokens_it_equals_a_sliding_window():
    sparse = build(replace(BASE, window=8))
    window = SlidingWindow(window=8, num_heads=2).build(16, LayerInfo(0, 2), precision=Precision(), rngs=nnx.Rngs(0))
    window.q, window.k, window.v, window.out = sparse.q, sparse.k, sparse.v, sparse.out
    x, seq = jax.random.normal(jax.random.key(1), (2, 8, 16)), unpacked_seq_info(2, 8)
    np.testing.assert_allclose(sparse(x, seq)[0], window(x, seq)[0], atol=1e-6)


@pytest.mark.parametrize(
    "selector", [QueryDependentSelector(score_dim=3), KeyScore(hidden_size=5, num_sampled_keys=16)]
)
def test_selector_gradients_come_from_attention_or_the_ranking_loss(selector):
    mixer = build(replace(BASE, selector=selector, cache="full"))
    graph, params, rest = nnx.split(mixer, nnx.Param, ...)
    x, seq = jax.random.normal(jax.random.key(2), (2, 40, 16)), unpacked_seq_info(2, 40)

    def grads(pick):
        return jax.jit(jax.grad(lambda p: pick(*nnx.merge(graph, p, rest)(x, seq))))(params)

    attention_grads = grads(lambda y, aux: (y**2).sum())
    sizes = [float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(attention_grads["selector"])]
    assert min(sizes) > 1e-4 if isinstance(selector, QueryDependentSelector) else not any(sizes)
    if isinstance(selector, KeyScore):
        ranking_grads = grads(lambda y, aux: aux["key_ranking"].total / aux["key_ranking"].weight)
        names = {
            jax.tree_util.keystr(p) for p, leaf in jax.tree_util.tree_leaves_with_path(ranking_grads) if leaf.any()
        }
        assert names and all("selector" in name for name in names)


def test_ranking_loss_is_small_for_the_target_order_and_large_for_its_reverse():
    q, k = (jax.random.normal(jax.random.key(i), (1, 32, 2, 4)) for i in (0, 1))
    seq = unpacked_seq_info(1, 32)
    later = np.tril(np.ones((32, 32)))
    affinity = np.asarray(jax.nn.sigmoid(jnp.einsum("bthk,bshk->btsh", q, k) / 2)).mean(axis=-1)[0]
    target = jnp.asarray((affinity * later).sum(axis=0) / later.sum(axis=0))[None]
    good, bad = (float(m.total / m.weight) for m in (ranking_loss(s * 1e3 * target, q, k, seq, 32) for s in (1, -1)))
    assert good < 0.1 < 1 < bad
    assert float(ranking_loss(target, q, k, seq, 32).weight) == 32 * 31 / 2


def test_misaligned_documents_return_nan():
    mixer, x = build(BASE), jax.random.normal(jax.random.key(3), (2, 9, 16))
    segments = jnp.asarray([[1] * 9, [1] * 3 + [2] * 6], jnp.int32)
    positions = jnp.asarray([[*range(9)], [*range(3), *range(6)]], jnp.int32)
    y = mixer(x, unpacked_seq_info(2, 9)._replace(segment_ids=segments, positions=positions))[0]
    assert np.isfinite(y[0]).all() and np.isnan(y[1]).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block_size": 7}, "at most the window of 6"),
        ({"top_k": 0}, "top_k is 0"),
        ({"selector": QueryDependentSelector()}, "QueryDependentSelector may select a token"),
    ],
)
def test_invalid_configs_are_rejected(changes, message):
    with pytest.raises(ConfigError, match=message):
        replace(BASE, **changes).build(16, LayerInfo(0, 1), precision=Precision(), rngs=nnx.Rngs(0))
