"""Workspace memory: the definition chunk by chunk, causality between chunks, and the size of the state."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from recallax.config import ConfigError
from recallax.layers import LayerInfo, Workspace
from recallax.layers.workspace import WorkspaceMixer
from recallax.types import Precision, unpacked_seq_info

pytestmark = pytest.mark.usefixtures("strict")

WIDTH, LENGTH, CHUNK = 8, 11, 4
CONFIG = Workspace(num_slots=3, slot_dim=6, chunk_size=CHUNK)
X = jax.random.normal(jax.random.key(0), (1, LENGTH, WIDTH))


def build(size: float) -> WorkspaceMixer:
    mixer = CONFIG.build(WIDTH, LayerInfo(0, 1), precision=Precision(), rngs=nnx.Rngs(0))
    graph, params = nnx.split(mixer)
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    leaves = [x + size * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    return nnx.merge(graph, jax.tree.unflatten(tree, leaves))


def reference_output(mixer: WorkspaceMixer) -> jax.Array:
    slots, out = mixer.start[...], []
    for begin in range(0, LENGTH, CHUNK):
        x, normed = X[0, begin : begin + CHUNK], mixer.slot_norm(slots)
        weights = jax.nn.softmax(mixer.query(x) @ mixer.key(normed).T / 6**0.5, axis=-1)
        out.append(mixer.out(weights @ mixer.value(normed)))
        weights = jax.nn.softmax(mixer.write_query(normed) @ mixer.write_key(x).T / 6**0.5, axis=-1)
        new = weights @ mixer.write_value(x)
        beta = jax.nn.sigmoid(mixer.gate(jnp.concatenate([normed, mixer.write_norm(new)], axis=-1)))
        slots = slots + beta * (new - slots)
    return jnp.concatenate(out)[None]


def test_matches_reference_in_values_and_gradients():
    mixer = build(0.4)
    graph, params = nnx.split(mixer)
    weights = jax.random.normal(jax.random.key(2), (1, LENGTH, WIDTH))

    def results(form):
        def loss(params):
            y = form(nnx.merge(graph, params))
            return jnp.sum(y * weights), y

        return jax.jit(jax.value_and_grad(loss, has_aux=True))(params)

    with jax.default_matmul_precision("highest"):
        one, other = results(lambda m: m(X, unpacked_seq_info(1, LENGTH))[0]), results(reference_output)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)
    assert all(leaf.any() for leaf in jax.tree.leaves(one[1]))


def test_workspace_chunk_influences_only_later_chunks():
    mixer = build(0.4)
    call = jax.jit(lambda x: mixer(x, unpacked_seq_info(1, LENGTH))[0])
    changed = np.asarray(call(X.at[0, 1].add(1.0)) != call(X)).any(axis=-1)[0]
    np.testing.assert_array_equal(changed, [False, True, False, False, *[True] * 7])


def test_initial_output_is_zero_and_state_size_is_constant():
    mixer = build(0.0)
    assert not mixer(X, unpacked_seq_info(1, LENGTH))[0].any()
    sizes = {sum(leaf.nbytes for leaf in jax.tree.leaves(mixer.init_state(1, n))) for n in (10, 10_000)}
    assert sizes == {4 * (2 * 3 * 6 + 2 * 3)}


def test_invalid_configs_are_rejected():
    with pytest.raises(ConfigError, match="slot_dim is 0"):
        replace(CONFIG, slot_dim=0)
