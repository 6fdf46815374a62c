"""Mixture of Memories: dispatch against two references, the router's losses, and states that a step must not change."""

from collections.abc import Callable
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from recallax.config import ConfigError
from recallax.layers import (
    GLA,
    HGRN2,
    KDA,
    DeltaNet,
    GatedDeltaNet,
    GatedDeltaProduct,
    LayerInfo,
    Mamba2,
    MemoryConfig,
    MoM,
    RetNet,
    load_balancing_loss,
)
from recallax.layers.load_balancing_loss import RoutedTokens
from recallax.layers.mom import MoMMixer
from recallax.types import Precision, SeqInfo, StepInfo

pytestmark = pytest.mark.usefixtures("strict")

WIDTH, LENGTH, BATCH = 16, 23, 3
CELL = GatedDeltaNet(num_heads=2, head_k_dim=4, head_v_dim=6)
CONFIG = MoM(memory=CELL, num_memories=4, top_k=2)


def build(config: MoM, seed: int = 0) -> MoMMixer:
    """Build a mixer with large random weights, so that errors are visible."""
    mixer = config.build(WIDTH, LayerInfo(0, 2), precision=Precision(), rngs=nnx.Rngs(seed))
    graph, params, rest = nnx.split(mixer, nnx.Param, ...)
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    leaves = [x + 0.4 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    return nnx.merge(graph, jax.tree.unflatten(tree, leaves), rest)


def noise(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


def unpacked_seq_info(batch: int = BATCH, length: int = LENGTH) -> SeqInfo:
    positions = jnp.broadcast_to(jnp.arange(length), (batch, length))
    return SeqInfo(positions, jnp.ones((batch, length), jnp.int32), jnp.zeros((batch, length), bool))


def memory_writer(mixer: MoMMixer, memory: int):
    graph, params = nnx.split(mixer.writers)
    return nnx.merge(graph, jax.tree.map(lambda p: p[memory], params))


def loop_over_memories(mixer: MoMMixer, x: jax.Array) -> jax.Array:
    """Reference: each memory of each row by itself, on the tokens routed to it, padded to one shape."""
    routing, length = mixer.route(x), x.shape[1]
    graph, params = nnx.split(mixer)

    @jax.jit
    def alone(params, memory, own, positions, segments):
        mixer = nnx.merge(graph, params)
        streams = mixer.query(own) | memory_writer(mixer, memory)(own)
        return mixer.cell.run(streams, positions, segments, None)[0][0]

    rows = []
    for b in range(x.shape[0]):
        total = jnp.zeros((length, mixer.cell.head_dims.num_v_heads, mixer.cell.head_dims.head_v_dim))
        for memory in range(mixer.num_memories):
            times, slots = np.nonzero(np.asarray(routing.indices[b]) == memory)
            own = np.zeros_like(x[:1])
            own[0, : len(times)] = x[b, times]
            positions, segments = np.zeros((2, 1, length), np.int32)
            positions[0, : len(times)], segments[0, : len(times)] = times, 1
            y = alone(params, memory, own, positions, segments)[: len(times)]
            total = total.at[times].add(y * routing.weights[b, times, slots][:, None, None])
        rows.append(total)
    return mixer.readout(jnp.stack(rows), x)


def masked_dense(mixer: MoMMixer, x: jax.Array, seq: SeqInfo) -> jax.Array:
    """Reference: each memory over whole rows, in which tokens of other memories are padding, which keeps the state."""
    routing = mixer.route(x)
    total = jnp.zeros((*x.shape[:2], mixer.cell.head_dims.num_v_heads, mixer.cell.head_dims.head_v_dim))
    for memory in range(mixer.num_memories):
        selected = routing.indices == memory
        segments = jnp.where(selected.any(axis=-1), jnp.asarray(seq.segment_ids), 0)
        y, _ = mixer.cell.run(
            mixer.query(x) | memory_writer(mixer, memory)(x), jnp.asarray(seq.positions), segments, None
        )
        weight = jnp.sum(jnp.where(selected, routing.weights, 0), axis=-1)
        total += jnp.where(segments[..., None, None] > 0, y, 0) * weight[..., None, None]
    return mixer.readout(total, x)


WIDE = {
    "no shared": replace(CONFIG, shared_memory=False),
    "RetNet": MoM(memory=RetNet(num_heads=2), num_memories=3, top_k=2),
    "all of three": MoM(memory=GLA(num_heads=2, gate_low_rank_dim=3), num_memories=3, top_k=3),
}


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(CONFIG, id="default"),
        pytest.param(replace(CONFIG, num_memories=5, top_k=1, norm_topk_prob=False), id="one of five"),
        pytest.param(MoM(memory=Mamba2(state_dim=5, head_dim=8), num_memories=3, top_k=2), id="Mamba2"),
        *(pytest.param(config, id=name, marks=pytest.mark.full) for name, config in WIDE.items()),
    ],
)
def test_dispatch_matches_loop_over_memories(config):
    mixer, x = build(config), noise(1, BATCH, LENGTH, WIDTH)
    np.testing.assert_allclose(mixer(x, unpacked_seq_info())[0], loop_over_memories(mixer, x), atol=2e-5)


def test_dispatch_matches_dense_reference_in_values_and_gradients():
    mixer, x = build(replace(CONFIG, memory=replace(CELL, conv_size=0))), noise(2, BATCH, LENGTH, WIDTH)
    segments = jnp.asarray([[1] * 9 + [2] + [3] * 13, [4] * 12 + [2] * 8 + [0] * 3, [1] * LENGTH], jnp.int32)
    seq = unpacked_seq_info()._replace(segment_ids=segments)
    graph, params, rest = nnx.split(mixer, nnx.Param, ...)
    cotangent = jnp.where(segments[..., None] > 0, noise(3, BATCH, LENGTH, WIDTH), 0)

    def results(form: Callable) -> tuple:
        def loss(params, x):
            y = form(nnx.merge(graph, params, rest), x)
            return jnp.sum(y * cotangent), jnp.where(segments[..., None] > 0, y, 0)

        (_, y), grads = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(params, x)
        return y, grads

    one, other = results(lambda m, x: m(x, seq)[0]), results(lambda m, x: masked_dense(m, x, seq))
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, atol=3e-5 * max(1.0, float(jnp.abs(b).max())))


MEMORIES: tuple[MemoryConfig, ...] = (
    CELL,
    DeltaNet(num_heads=2),
    GatedDeltaProduct(num_heads=2, head_k_dim=3, head_v_dim=4),
    GLA(num_heads=2, gate_low_rank_dim=3, conv_size=4),
    HGRN2(num_heads=2),
    KDA(num_heads=2, head_k_dim=3),
    Mamba2(state_dim=6, head_dim=8, num_groups=2),
    RetNet(num_heads=2),
)


@pytest.mark.parametrize(
    "memory",
    [pytest.param(m, marks=[pytest.mark.full] * (not isinstance(m, GatedDeltaNet | GLA | Mamba2))) for m in MEMORIES],
    ids=lambda m: type(m).__name__,
)
def test_single_memory_equals_its_cell(memory):
    mixer = build(MoM(memory=memory, num_memories=1, top_k=1, shared_memory=False))
    alone = memory.build(WIDTH, LayerInfo(0, 2), precision=Precision(), rngs=nnx.Rngs(0))
    alone.query, alone.writer, alone.cell, alone.readout = (
        mixer.query,
        memory_writer(mixer, 0),
        mixer.cell,
        mixer.readout,
    )
    x, seq = noise(4, BATCH, LENGTH, WIDTH), unpacked_seq_info()
    np.testing.assert_allclose(mixer(x, seq)[0], alone(x, seq)[0], atol=1e-5)


def test_order_of_memories_does_not_matter():
    mixer, x = build(CONFIG), noise(5, BATCH, LENGTH, WIDTH)
    expected = mixer(x, unpacked_seq_info())[0]
    order = jnp.array([2, 0, 3, 1, 4])  # the shared memory remains last
    graph, params = nnx.split(mixer.writers)
    mixer.writers = nnx.merge(graph, jax.tree.map(lambda p: p[order], params))
    mixer.router[...] = mixer.router[...][:, order[:4]]
    np.testing.assert_allclose(mixer(x, unpacked_seq_info())[0], expected, atol=1e-5)


def test_last_token_affects_no_earlier_token_and_no_other_row():
    """The released code fails this test: in training its convolution crosses from one memory into other documents."""
    mixer, x = build(CONFIG), noise(6, BATCH, LENGTH, WIDTH)
    call = jax.jit(lambda x: mixer(x, unpacked_seq_info())[0])
    expected = call(x)
    for seed in range(20):
        actual = call(x.at[1, -1].set(9 * noise(seed, WIDTH)))
        np.testing.assert_allclose(actual[:, :-1], expected[:, :-1], atol=3e-6)
        np.testing.assert_allclose(actual[jnp.array([0, 2])], expected[jnp.array([0, 2])], atol=3e-6)
        assert float(jnp.abs(actual[1, -1] - expected[1, -1]).max()) > 1e-3


def test_step_preserves_unselected_memories():
    mixer, x = build(CONFIG), noise(7, BATCH, LENGTH, WIDTH)
    _, state, _ = mixer.prefill(x, unpacked_seq_info(), mixer.init_state(BATCH, LENGTH))
    token = noise(8, BATCH, WIDTH)
    selected = np.asarray(mixer.route(token[:, None]).indices[:, 0])
    info = StepInfo(jnp.full(BATCH, LENGTH), jnp.array([True, True, False]))
    _, after = mixer.step(token, info, state)
    for old, new in zip(jax.tree.leaves(state), jax.tree.leaves(after), strict=True):
        for row in range(BATCH):
            for memory in range(mixer.num_memories):
                same = np.array_equal(np.asarray(old)[row, memory], np.asarray(new)[row, memory])
                assert same == (row == 2 or memory not in selected[row])


def test_routing_does_not_recompile():
    mixer = build(CONFIG)
    traces = []

    @jax.jit
    def call(x):
        traces.append(x)
        return mixer(x, unpacked_seq_info())[0]

    for seed in range(3):
        call(9 * noise(seed, BATCH, LENGTH, WIDTH))
    assert len(traces) == 1


def test_gradients_have_no_scatter():
    mixer = build(replace(CONFIG, memory=replace(CELL, conv_size=0)))
    text = str(
        jax.make_jaxpr(jax.grad(lambda x: mixer(x, unpacked_seq_info())[0].sum()))(noise(9, BATCH, LENGTH, WIDTH))
    )
    assert "gather" in text and "scatter-add" not in text and "scatter_add" not in text


def test_balance_losses_equal_k_at_even_load_and_exceed_it_otherwise():
    experts, k = 4, 2
    indices = jnp.asarray([[[0, 1], [1, 2], [2, 3], [3, 0]]])
    even, valid = jnp.zeros((1, 4, experts)), jnp.ones((1, 4), bool)
    skewed = jnp.broadcast_to(jnp.array([3.0, 2.0, -3.0, -3.0]), (1, 4, experts))
    favoured = jnp.broadcast_to(jnp.array([0, 1]), (1, 4, 2))
    for loss in (load_balancing_loss.switch_loss, load_balancing_loss.per_sequence_loss):
        np.testing.assert_allclose(loss(RoutedTokens(even, indices, valid)), k, rtol=1e-6)
        assert float(loss(RoutedTokens(skewed, favoured, valid))) > 1.5 * k
    # Opposite imbalances of two layers cancel in the pooled loss only.
    layers = RoutedTokens(
        jnp.stack([skewed, jnp.flip(skewed, -1)]), jnp.stack([favoured, experts - 1 - favoured]), valid
    )
    np.testing.assert_allclose(load_balancing_loss.pooled_loss(layers), k, rtol=1e-5)
    separate = (RoutedTokens(layers.logits[i], layers.indices[i], valid) for i in range(2))
    assert float(sum(load_balancing_loss.switch_loss(tokens) for tokens in separate)) > 3 * k


def test_balance_loss_excludes_padding():
    mixer, x = build(CONFIG), noise(10, 2, 8, WIDTH)
    seq = unpacked_seq_info(2, 8)
    short = mixer(x, seq)[1]["memory_balance"]
    longer = jnp.pad(x, ((0, 0), (0, 3), (0, 0)), constant_values=5.0)
    padded = unpacked_seq_info(2, 11)._replace(segment_ids=jnp.pad(jnp.asarray(seq.segment_ids), ((0, 0), (0, 3))))
    np.testing.assert_allclose(mixer(longer, padded)[1]["memory_balance"].total, short.total, rtol=1e-6)


@pytest.mark.parametrize("definition", ["switch", "per_sequence"])
def test_balance_loss_has_gradients_for_the_router_only(definition):
    mixer, x = build(replace(CONFIG, load_balance_loss=definition)), noise(11, BATCH, LENGTH, WIDTH)
    graph, params, rest = nnx.split(mixer, nnx.Param, ...)
    grads = jax.grad(lambda p: nnx.merge(graph, p, rest)(x, unpacked_seq_info())[1]["memory_balance"].total)(params)
    for path, grad in jax.tree_util.tree_leaves_with_path(grads):
        assert bool(jnp.any(grad != 0)) == ("router" in jax.tree_util.keystr(path)), path


def test_router_has_a_gradient_at_top_1_only_without_normalization():
    for norm_topk_prob, has_gradient in ((True, False), (False, True)):
        mixer, x = build(replace(CONFIG, top_k=1, norm_topk_prob=norm_topk_prob)), noise(12, BATCH, LENGTH, WIDTH)
        graph, params, rest = nnx.split(mixer, nnx.Param, ...)
        grads = jax.grad(lambda p, g=graph, r=rest, x=x: nnx.merge(g, p, r)(x, unpacked_seq_info())[0].sum())(params)
        assert (float(jnp.abs(grads["router"][...]).max()) > 1e-4) == has_gradient


@pytest.mark.parametrize("top_k", [0, 5])
def test_top_k_must_fit(top_k):
    with pytest.raises(ConfigError, match=r"top_k is .*num_memories = 4"):
        replace(CONFIG, top_k=top_k)
