"""Hydra's block: parallel paths and the diagonal state-space model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from recallax.config import ConfigError
from recallax.layers import DiagonalSSM, Identity, Landmark, LayerInfo, NoChannelMixer, Parallel, SlidingWindow, SwiGLU
from recallax.layers.diagonal_ssm import DiagonalSSMMixer
from recallax.layers.parallel import ParallelMixer
from recallax.types import Precision, unpacked_seq_info

pytestmark = pytest.mark.usefixtures("strict")

WIDTH = 16
X, SEQ = jax.random.normal(jax.random.key(0), (2, 9, WIDTH)), unpacked_seq_info(2, 9)


def build(config, d_model: int = WIDTH):
    return config.build(d_model, LayerInfo(0, 2), precision=Precision(), rngs=nnx.Rngs(0))


def test_output_is_the_gated_sum_of_paths():
    mixer = build(Parallel(ssm=SlidingWindow(window=3), attention=SwiGLU(intermediate_size=5), experts=Identity()))
    assert isinstance(mixer, ParallelMixer)
    y, aux, outputs = jax.jit(lambda: (*mixer(X, SEQ), {name: path(X, SEQ)[0] for name, path in mixer.paths.items()}))()
    np.testing.assert_allclose(y, 0.8 * outputs["ssm"] + 0.2 * outputs["attention"] + 0.5 * X, atol=1e-6)
    assert float(aux["diagnostic/experts_size"].total / aux["diagnostic/experts_size"].weight) == pytest.approx(0.5)
    graph, params, rest = nnx.split(mixer, nnx.Param, ...)
    grads = jax.jit(jax.grad(lambda p: nnx.merge(graph, p, rest)(X, SEQ)[0].var()))(params)
    assert all(leaf.any() for leaf in jax.tree.leaves(grads["gates"]))


def test_absent_path_has_no_parameters_and_adds_zero():
    mixer = build(Parallel(experts=Identity(), gate_init=(9.0, 9.0, 1.0)))
    assert [leaf.shape for leaf in jax.tree.leaves(nnx.state(mixer, nnx.Param))] == [()]
    np.testing.assert_array_equal(mixer(X, SEQ)[0], X)


def test_invalid_paths_are_rejected():
    with pytest.raises(ConfigError, match="every path is NoChannelMixer"):
        Parallel()
    with pytest.raises(ConfigError, match="landmarks every"):
        Parallel(ssm=Landmark(block_size=3), attention=Landmark(block_size=4))
    landmarks = Parallel(ssm=NoChannelMixer(), attention=Landmark(block_size=4), experts=Identity())
    assert landmarks.landmark_interval == 4 and landmarks.grid == 1


def test_diagonal_ssm_matches_its_equation():
    mixer = build(DiagonalSSM(max_timescale=64.0))
    assert isinstance(mixer, DiagonalSSMMixer)
    y, _ = mixer(X, SEQ)
    u, _ = mixer.conv(X, jnp.ones((2, 9), jnp.int32), None)
    r, b, c, value = np.split(np.asarray(mixer.input(u), np.float64), 4, axis=-1)
    rate = np.log1p(np.exp(np.asarray(mixer.rate[...], np.float64)))
    s = np.zeros((2, WIDTH))
    for t in range(9):
        alpha = np.exp(-np.log1p(np.exp(r[:, t])) * rate)
        assert ((alpha > 0) & (alpha < 1)).all()
        s = alpha * s + b[:, t] * value[:, t]
        read = mixer.norm(jnp.asarray(c[:, t] * s, jnp.float32))
        np.testing.assert_allclose(y[:, t], read + mixer.skip(u[:, t]), atol=2e-5)


def test_initial_half_lives_are_log_uniform_and_state_sizes_similar():
    mixer = build(DiagonalSSM(max_timescale=256.0), 256)
    half_lives = 1 / np.log1p(np.exp(np.asarray(mixer.rate[...])))
    assert half_lives.min() < 1.1 and half_lives.max() > 230
    assert abs(np.log(half_lives).mean() - np.log(256) / 2) < 0.4
    x = jax.random.normal(jax.random.key(1), (4, 700, 256))
    state = jax.jit(lambda x: mixer.prefill(x, unpacked_seq_info(4, 700), mixer.init_state(4, 700))[1].ssm_state)(x)
    sizes = np.sqrt((np.asarray(state)[..., 0] ** 2).mean(axis=0))
    long, short = sizes[half_lives > 50].mean(), sizes[half_lives < 5].mean()
    assert 0.6 < long / short < 2.5  # without the smaller columns, 15


def test_half_life_below_one_token_is_rejected():
    with pytest.raises(ConfigError, match="at least 1 token"):
        DiagonalSSM(max_timescale=0.5)
