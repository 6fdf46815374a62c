"""Sparse global attention: the op against its definition, the two caches, and what selectors learn from."""

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


def drawn(seed: int, rows: int, length: int, offers: int = 1) -> dict[str, Any]:
    keys = jax.random.split(jax.random.key(seed), 5)
    shapes = {"q": (4, 8), "k": (2, 8), "v": (2, 6), "selection_key": (offers,), "selection_query": (offers,)}
    return {
        n: jax.random.normal(key, (rows, length, *shape)) for key, (n, shape) in zip(keys, shapes.items(), strict=True)
    }


def packed() -> tuple[jax.Array, jax.Array]:
    """Positions and segments of two rows: one goes on at SEEN, within a block, and a second document follows."""
    first = 4 * BLOCK - SEEN % BLOCK
    positions, segments = np.zeros((2, 2, LENGTH), np.int32)
    positions[0] = SEEN + np.arange(LENGTH)
    positions[1, :first], segments[1, :first] = SEEN + np.arange(first), 3
    positions[1, first:-2], segments[1, first:-2] = np.arange(LENGTH - first - 2), 2
    segments[0] = 1
    return jnp.asarray(positions), jnp.asarray(segments)


def retained_tokens(offers: int, asks: bool):
    """What SEEN tokens leave where every token is kept."""
    before, where = drawn(7, 2, SEEN, offers), unpacked_seq_info(2, SEEN)
    ask = before.pop("selection_query") if asks else None
    before.pop("selection_query", None)
    empty = init_full_cache(2, SEEN + LENGTH, 2, 8, 6, offers, asks, jnp.float32)
    at: dict[str, Any] = {"positions": jnp.asarray(where.positions), "segment_ids": jnp.asarray(where.segment_ids)}
    return sparse_global_attention(**before, selection_query=ask, **SIZES, **at, state=empty)[1]


@pytest.mark.parametrize("asks", [pytest.param(False, marks=pytest.mark.full), True])
def test_blocks_equal_the_definition_in_values_and_gradients(asks):
    positions, segments = packed()
    inputs, state = drawn(1, 2, LENGTH, 3 if asks else 1), retained_tokens(3 if asks else 1, asks)
    valid = (segments > 0)[..., None, None]
    cotangent = jax.random.normal(jax.random.key(2), (2, LENGTH, 4, 6))
    if not asks:
        inputs.pop("selection_query")

    def results(form):
        def loss(inputs, state):
            at: dict[str, Any] = {"positions": positions, "segment_ids": segments, "implementation": form}
            y, after = sparse_global_attention(**inputs, **SIZES, **at, state=state)
            y = jnp.where(valid, y, 0)
            return jnp.sum(y * cotangent), (y, after)

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(inputs, state)

    one, other = results("xla"), results("reference")
    assert all(float(jnp.abs(slope).max()) > 1e-3 for slope in one[1][0].values())
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


def test_the_choice_is_that_of_a_loop():
    """Weights of attention read off one-hot values, against sorted scores in Python."""
    inputs = drawn(3, 1, LENGTH)
    inputs.pop("selection_query")
    values = jnp.broadcast_to(jnp.eye(LENGTH)[None, :, None], (1, LENGTH, 2, LENGTH))
    seq = unpacked_seq_info(1, LENGTH)
    at: dict[str, Any] = {"positions": jnp.asarray(seq.positions), "segment_ids": jnp.asarray(seq.segment_ids)}
    weights = jax.jit(lambda inputs: sparse_global_attention(**inputs, **SIZES, **at)[0])(inputs | {"v": values})
    offer = np.asarray(inputs["selection_key"])[0, :, 0]
    for t in range(LENGTH):
        candidates = range(max(t // BLOCK * BLOCK + BLOCK - WINDOW, 0))
        best = sorted(candidates, key=lambda j: -offer[j])[:TOP_K]
        seen = {j for j in best if t - j >= WINDOW} | {j for j in range(t + 1) if t - j < WINDOW}
        assert set(np.flatnonzero(np.asarray(weights)[0, t, 0])) == seen


BASE = SparseGlobalAttention(window=6, top_k=5, block_size=4, num_heads=2)


def build(config, seed: int = 0):
    mixer = config.build(16, LayerInfo(0, 2), precision=Precision(), rngs=nnx.Rngs(0))
    graph, params, rest = nnx.split(mixer, nnx.Param, ...)
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    leaves = [x + 0.4 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    return nnx.merge(graph, jax.tree.unflatten(tree, leaves), rest)


def test_top_k_cache_equals_full_cache():
    heap, every = build(BASE), build(replace(BASE, cache="full"))
    x, cut = jax.random.normal(jax.random.key(0), (8, 60, 16)), 37
    seq = jax.tree.map(jnp.asarray, unpacked_seq_info(8, 60))
    first, later = (jax.tree.map(lambda a, p=p: a[:, p], seq) for p in (slice(0, cut), slice(cut, None)))
    outputs, sizes = [], []
    for mixer in (heap, every):
        prefill = jax.jit(lambda x, seq, state, mixer=mixer: mixer.prefill(x, seq, state)[:2])
        _, state = prefill(x[:, :cut], first, mixer.init_state(8, 60))
        outputs.append(prefill(x[:, cut:], later, state)[0])
        sizes.append([sum(leaf.nbytes for leaf in jax.tree.leaves(mixer.init_state(1, n))) for n in (60, 600)])
    np.testing.assert_array_equal(*outputs)
    whole = jax.jit(lambda x, seq: heap(x, seq)[0])(x, seq)
    np.testing.assert_allclose(outputs[0], whole[:, cut:], atol=1e-5)
    (short, long), (few, many) = sizes
    assert short == long == (6 + 5) * (2 * 16 + 1) * 4 + 5 * 4  # keys, values, offers and numbers
    assert 10 * few == many
    assert isinstance(heap.init_state(1, 9).cache, TopKCache)


def test_with_nothing_to_choose_it_is_a_sliding_window():
    sparse = build(replace(BASE, window=8))
    window = SlidingWindow(window=8, num_heads=2).build(16, LayerInfo(0, 2), precision=Precision(), rngs=nnx.Rngs(0))
    window.q, window.k, window.v, window.out = sparse.q, sparse.k, sparse.v, sparse.out
    x, seq = jax.random.normal(jax.random.key(1), (2, 8, 16)), unpacked_seq_info(2, 8)
    np.testing.assert_allclose(sparse(x, seq)[0], window(x, seq)[0], atol=1e-6)


@pytest.mark.parametrize(
    "selector", [QueryDependentSelector(score_dim=3), KeyScore(hidden_size=5, num_sampled_keys=16)]
)
def test_selectors_learn_from_attention_or_from_their_ranking_loss_alone(selector):
    mixer = build(replace(BASE, selector=selector, cache="full"))
    graph, params, rest = nnx.split(mixer, nnx.Param, ...)
    x, seq = jax.random.normal(jax.random.key(2), (2, 40, 16)), unpacked_seq_info(2, 40)

    def slopes(pick):
        return jax.jit(jax.grad(lambda p: pick(*nnx.merge(graph, p, rest)(x, seq))))(params)

    through = slopes(lambda y, aux: (y**2).sum())
    sizes = [float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(through["selector"])]
    assert min(sizes) > 1e-4 if isinstance(selector, QueryDependentSelector) else not any(sizes)
    if isinstance(selector, KeyScore):
        ranked = slopes(lambda y, aux: aux["key_ranking"].total / aux["key_ranking"].weight)
        reached = {jax.tree_util.keystr(p) for p, leaf in jax.tree_util.tree_leaves_with_path(ranked) if leaf.any()}
        assert reached and all("selector" in path for path in reached)


def test_the_ranking_loss_is_small_for_the_right_order_and_large_for_the_wrong_one():
    q, k = (jax.random.normal(jax.random.key(i), (1, 32, 2, 4)) for i in (0, 1))
    seq = unpacked_seq_info(1, 32)
    later = np.tril(np.ones((32, 32)))
    wanted = np.asarray(jax.nn.sigmoid(jnp.einsum("bthk,bshk->btsh", q, k) / 2)).mean(axis=-1)[0]
    worth = jnp.asarray((wanted * later).sum(axis=0) / later.sum(axis=0))[None]
    good, bad = (float(m.total / m.weight) for m in (ranking_loss(s * 1e3 * worth, q, k, seq, 32) for s in (1, -1)))
    assert good < 0.1 < 1 < bad
    assert float(ranking_loss(worth, q, k, seq, 32).weight) == 32 * 31 / 2


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
