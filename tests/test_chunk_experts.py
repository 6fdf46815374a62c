"""ChunkExperts: dispatch against a dense reference, routing of chunks, losses and diagnostics."""

import functools
import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from recallax.config import ConfigError
from recallax.layers import ChunkExperts, Identity, LayerInfo
from recallax.layers.base import Statistic
from recallax.layers.chunk_experts import ChunkExpertsMixer
from recallax.models import Block, LMConfig
from recallax.tasks import MQAR, MixtureSlice
from recallax.train.program import Program
from recallax.train.run_config import RunConfig, tiny_run
from recallax.types import Precision, SeqInfo, unpacked_seq_info

pytestmark = pytest.mark.usefixtures("strict")

WIDTH, ROUTES = 16, ("first_token", "previous_chunk", "token")
CONFIG = ChunkExperts(num_experts=4, top_k=2, intermediate_size=6, chunk_size=4)


def build(config: ChunkExperts, size: float = 0.4) -> ChunkExpertsMixer:
    mixer = config.build(WIDTH, LayerInfo(0, 2), precision=Precision(), rngs=nnx.Rngs(0))
    graph, params, rest = nnx.split(mixer, nnx.Param, ...)
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    leaves = [x + size * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    return nnx.merge(graph, jax.tree.unflatten(tree, leaves), rest)


def packed() -> SeqInfo:
    positions = np.zeros((2, 19), np.int32)
    segments = np.zeros((2, 19), np.int32)
    positions[0], segments[0] = np.arange(19), 1
    for number, (start, end) in enumerate(((0, 6), (6, 16)), 1):
        positions[1, start:end], segments[1, start:end] = np.arange(end - start), number
    return SeqInfo(jnp.asarray(positions), jnp.asarray(segments), jnp.zeros((2, 19), bool))


def dense(mixer: ChunkExpertsMixer, x: jax.Array, seq: SeqInfo) -> jax.Array:
    """All experts on all tokens, with routing by loops over the definition."""
    own, positions = x @ mixer.router[...], np.asarray(seq.positions)
    rows = []
    for b in range(x.shape[0]):
        logits = []
        for t in range(x.shape[1]):
            at = int(positions[b, t])
            begin = t - at % mixer.chunk_size
            if mixer.route == "previous_chunk":
                assert mixer.start is not None
                mean = own[b, max(begin - mixer.chunk_size, 0) : max(begin, 1)].mean(axis=0)
                logits.append(mixer.start[...] if at < mixer.chunk_size else mean)
            else:
                logits.append(own[b, t if mixer.route == "token" else begin])
        rows.append(jnp.stack(logits))
    logits = jnp.stack(rows)
    least = jnp.sort(logits, axis=-1)[..., -mixer.top_k][..., None]
    weights = jax.nn.softmax(jnp.where(logits >= least, logits, -jnp.inf), axis=-1)
    gate, up = jnp.split(jnp.einsum("btd,edf->btef", x, mixer.up[...]), 2, axis=-1)
    return jnp.einsum("btef,efd,bte->btd", jax.nn.silu(gate) * up, mixer.out[...], weights)


@pytest.mark.parametrize("route", ["previous_chunk", *(pytest.param(r, marks=pytest.mark.full) for r in ROUTES[::2])])
def test_dispatch_matches_dense_reference_in_values_and_gradients(route):
    mixer, seq = build(replace(CONFIG, route=route)), packed()
    graph, params, rest = nnx.split(mixer, nnx.Param, ...)
    x, valid = jax.random.normal(jax.random.key(2), (2, 19, WIDTH)), (seq.segment_ids > 0)[..., None]
    cotangent = jnp.where(valid, jax.random.normal(jax.random.key(3), x.shape), 0)

    def results(form):
        def loss(params, x):
            y = jnp.where(valid, form(nnx.merge(graph, params, rest), x), 0)
            return jnp.sum(y * cotangent), y

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(params, x)

    with jax.default_matmul_precision("highest"):
        one, other = results(lambda m, x: m(x, seq)[0]), results(lambda m, x: dense(m, x, seq))
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5 * max(1.0, float(jnp.abs(b).max())))


@functools.partial(jax.jit, static_argnums=0)
def aux_of(graph, params, rest, x: jax.Array, seq: SeqInfo):
    return nnx.merge(graph, params, rest)(x, seq)[1]


def means(mixer: ChunkExpertsMixer, x: jax.Array, seq: SeqInfo | None = None) -> dict[str, float]:
    aux = aux_of(*nnx.split(mixer, nnx.Param, ...), x, unpacked_seq_info(*x.shape[:2]) if seq is None else seq)
    return {name.removeprefix("diagnostic/"): float(mean.total / mean.weight) for name, mean in aux.items()}


def test_initial_router_balances_random_tokens():
    mixer = build(replace(CONFIG, num_experts=8), size=0.0)
    measured = means(mixer, jax.random.normal(jax.random.key(4), (8, 256, WIDTH)))
    assert measured["expert_usage_deviation"] < 0.25 / 8
    assert measured["expert_entropy"] > 0.99 * math.log(8)
    assert measured["expert_token_entropy"] <= measured["expert_entropy"] + 1e-6
    assert abs(measured["expert_repeats"] - 1 / 8) < 0.1


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_balance_loss_rebalances_a_skewed_router(weight):
    """All tokens have a common direction that one expert's router weights match; the z-loss is off."""
    mixer = build(replace(CONFIG, load_balance_loss_weight=weight, router_z_loss_weight=0.0), size=0.0)
    x = jax.random.normal(jax.random.key(5), (8, 64, WIDTH)).at[..., 0].set(3.0)
    mixer.router[...] = mixer.router[...].at[0, 0].set(1.0)
    graph, params, rest = nnx.split(mixer, nnx.Param, ...)
    optimizer = optax.sgd(0.1)

    def body(carry, _):
        params, moments = carry
        grads = jax.grad(lambda p: nnx.merge(graph, p, rest)(x, unpacked_seq_info(8, 64))[1]["expert_balance"].total)(
            params
        )
        updates, moments = optimizer.update(grads, moments, params)
        return (optax.apply_updates(params, updates), moments), None

    (params, _), _ = jax.jit(lambda p: jax.lax.scan(body, (p, optimizer.init(p)), length=300))(params)
    entropy = means(nnx.merge(graph, params, rest), x)["expert_entropy"]
    assert entropy >= 0.8 * math.log(4) if weight else entropy < 0.5 * math.log(4)


def test_losses_have_gradients_for_the_router_only_and_exclude_padding():
    mixer, seq = build(CONFIG), packed()
    graph, params, rest = nnx.split(mixer, nnx.Param, ...)
    x = jax.random.normal(jax.random.key(6), (2, 19, WIDTH))
    by_loss = jax.jit(jax.jacrev(lambda p: nnx.merge(graph, p, rest)(x, seq)[1]))(params)
    for name in ("expert_balance", "expert_z"):
        grads = by_loss[name].total
        for path, grad in jax.tree_util.tree_leaves_with_path(grads):
            assert bool(jnp.any(grad != 0)) == ("router" in jax.tree_util.keystr(path)), (name, path)
    changed = jnp.where((seq.segment_ids > 0)[..., None], x, 7.0)
    assert means(mixer, x, seq) == means(mixer, changed, seq)


def test_bias_update_favors_underused_experts_in_training_only():
    mixer = build(replace(CONFIG, bias_update_rate=0.25, route="token"), size=0.0)
    mixer.router[...] = mixer.router[...].at[0, 0].set(1.0).at[0, 1].set(0.5)
    x = jax.random.normal(jax.random.key(7), (4, 32, WIDTH)).at[..., 0].set(3.0)
    assert mixer.bias is not None
    before = means(mixer, x)["expert_usage_deviation"]
    np.testing.assert_array_equal(mixer.bias[...], 0)
    graph, params, rest = nnx.split(mixer, nnx.Param, ...)

    @jax.jit
    def train(rest):
        module = nnx.merge(graph, params, rest)
        module(x, unpacked_seq_info(4, 32)._replace(key=jax.random.key(0)))
        return nnx.state(module, Statistic)

    rest = train(rest)
    np.testing.assert_array_equal(rest["bias"][...], [-0.25, -0.25, 0.25, 0.25])
    mixer = nnx.merge(graph, params, train(train(rest)))
    assert means(mixer, x)["expert_usage_deviation"] < before


def test_training_updates_the_bias_and_excludes_diagnostics_from_the_loss():
    slices = (MixtureSlice(length=16, num_kv_pairs=2),)
    experts = replace(CONFIG, bias_update_rate=1e-3)
    blocks = {"e": Block(mixer=experts, channel=Identity())}
    config = tiny_run(
        RunConfig(
            task=MQAR(vocab_size=32, mixture=slices, test_mixture=slices),
            model=LMConfig(d_model=WIDTH, pattern="e*2", blocks=blocks, remat="block"),
        )
    )
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        program = Program(config)
        state, report = program.step(program.init_state(), program.batch(0))
    terms = {name: float(mean.total / mean.weight) for name, mean in report.terms.items()}
    assert terms["diagnostic/expert_entropy"] > 1
    losses = sum(value for name, value in terms.items() if not name.startswith("diagnostic/"))
    assert float(report.loss) == pytest.approx(losses, rel=1e-5)
    (bias,) = jax.tree.leaves(state.statistics)
    assert bias.shape == (2, 4) and np.isclose(np.abs(np.asarray(bias)), 1e-3).any()
    assert nnx.state(build(CONFIG), Statistic) == nnx.State({})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"top_k": 5}, "num_experts = 4"),
        ({"chunk_size": 0}, "chunk_size is 0"),
        ({"router_z_loss_weight": -1.0}, "router_z_loss_weight"),
    ],
)
def test_invalid_configs_are_rejected(changes, message):
    with pytest.raises(ConfigError, match=message):
        replace(CONFIG, **changes)
