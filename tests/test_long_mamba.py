"""LongMamba: filtered steps, calibrated thresholds, and unchanged outputs at the training length."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from recallax.config import ConfigError
from recallax.layers import Attention, DiagonalSSM, Identity, LayerInfo, LongMamba, Mamba2, NoChannelMixer, Parallel
from recallax.layers.base import Statistic
from recallax.layers.diagonal_ssm import DiagonalSSMMixer
from recallax.models import Block, LMConfig
from recallax.models.long_mamba_calibration import calibrate_step_filters, step_thresholds
from recallax.types import Precision, unpacked_seq_info

pytestmark = pytest.mark.usefixtures("strict")

WIDTH, TRAINED = 16, 24
MAMBA = Mamba2(state_dim=4, head_dim=8, expand=1)


def test_filtered_steps_do_not_change_the_state():
    """Reference: a float64 loop per channel over the tokens above the threshold."""
    config = LongMamba(mixer=DiagonalSSM(max_timescale=64.0), training_length=4, context_length=8, threshold=0.6)
    mixer = config.build(WIDTH, LayerInfo(0, 1), precision=Precision(), rngs=nnx.Rngs(0))
    assert isinstance(mixer, DiagonalSSMMixer)
    x = 3 * jax.random.normal(jax.random.key(0), (1, 30, WIDTH))
    state = mixer.prefill(x, unpacked_seq_info(1, 30), mixer.init_state(1, 30))[1]
    u, _ = mixer.conv(x, jnp.ones((1, 30), jnp.int32), None)
    r, b, _, value = np.split(np.asarray(mixer.input(u), np.float64)[0], 4, axis=-1)
    dt, rate = np.log1p(np.exp(r)), np.log1p(np.exp(np.asarray(mixer.rate[...], np.float64)))
    assert 0.2 < (dt < 0.6).mean() < 0.8
    for c in range(WIDTH):
        s = 0.0
        for t in np.flatnonzero(dt[:, c] >= 0.6):
            s = np.exp(-dt[t, c] * rate[c]) * s + b[t, c] * value[t, c]
        np.testing.assert_allclose(state.ssm_state[0, c, 0], s, atol=1e-5)


def test_filtered_long_context_decays_like_the_training_length():
    rng = np.random.default_rng(0)
    length, context, rates = 256, 2048, np.array([1e-3, 5e-3, 1.0])
    dt, long = (np.exp(rng.normal(size=(20, n, 3)) / 2) for n in (length, context))
    thresholds = step_thresholds(dt, rates, context, min_retention=0.05, clip_quantile=0.95)
    assert (thresholds[:2] > 0).all() and thresholds[2] == 0  # the last channel forgets within the training length
    filtered, expected = (steps.sum(axis=1).mean(axis=0)[:2] for steps in (np.where(long < thresholds, 0, long), dt))
    np.testing.assert_allclose(filtered, expected, rtol=0.1)
    assert (
        0.02 < (long[..., 0] >= thresholds[0]).mean() < 0.125
    )  # fewer tokens than before, since the largest steps pass
    np.testing.assert_array_equal(step_thresholds(dt, rates, length, min_retention=0.05, clip_quantile=0.95), 0)


def model(mixer, context: int, pattern: str = "(m w)*2") -> LMConfig:
    """State-space models in a repeated stack, one of them inside another mixer."""
    long = LongMamba(mixer=mixer, training_length=TRAINED, context_length=context)
    blocks = {
        "m": Block(mixer=long, channel=Identity()),
        "w": Block(mixer=Parallel(ssm=long, attention=Attention()), channel=NoChannelMixer()),
    }
    return LMConfig(d_model=WIDTH, vocab_size=20, pattern=pattern, blocks=blocks)


def logits(built, tokens) -> np.ndarray:
    graph, state = nnx.split(built)
    return np.asarray(jax.jit(lambda s: nnx.merge(graph, s)(tokens, unpacked_seq_info(*tokens.shape))[0])(state))


@pytest.mark.parametrize(
    "mixer",
    [pytest.param(MAMBA, marks=pytest.mark.full), DiagonalSSM(max_timescale=200.0)],
    ids=lambda m: type(m).__name__,
)
def test_calibration_sets_thresholds_per_layer_for_longer_contexts_only(mixer):
    tokens = jax.random.randint(jax.random.key(1), (3, 4 * TRAINED), 0, 20)
    rows = tokens[:, :TRAINED]
    short, long = (model(mixer, context).build(nnx.Rngs(0)) for context in (TRAINED, 4 * TRAINED))
    assert not jax.tree.leaves(nnx.state(short, Statistic))  # no filters, so nothing can change
    plain = logits(short, tokens)
    np.testing.assert_array_equal(logits(long, tokens), plain)  # not calibrated yet
    filtered = calibrate_step_filters(model(mixer, 4 * TRAINED), long, rows, min_retention=1e-6)
    thresholds = [np.asarray(leaf) for leaf in jax.tree.leaves(nnx.state(filtered, Statistic))]
    assert (
        all(len(leaf) == 2 and (leaf > 0).any() and not np.array_equal(*leaf) for leaf in thresholds)
        and len(thresholds) == 2
    )
    assert not any(leaf.any() for leaf in jax.tree.leaves(nnx.state(long, Statistic)))  # the argument is not changed
    changed = np.abs(logits(filtered, tokens) - plain)
    assert changed.max() > 1e-4
    flat = model(mixer, 4 * TRAINED, "m w m w")
    same = calibrate_step_filters(flat, flat.build(nnx.Rngs(0)), rows, min_retention=1e-6)
    np.testing.assert_allclose(logits(same, tokens), logits(filtered, tokens), atol=1e-5)


def test_unsupported_mixers_are_rejected():
    with pytest.raises(ConfigError, match="Attention has no step sizes"):
        LongMamba(mixer=Attention()).build(WIDTH, LayerInfo(0, 1), precision=Precision(), rngs=nnx.Rngs(0))
    config = model(MAMBA, 2 * TRAINED)
    with pytest.raises(ConfigError, match="rows have 7 tokens"):
        calibrate_step_filters(config, config.build(nnx.Rngs(0)), jnp.ones((1, 7), jnp.int32))
    short = replace(
        config, blocks={"m": Block(mixer=LongMamba(mixer=MAMBA, training_length=9, context_length=9))}, pattern="m"
    )
    with pytest.raises(ConfigError, match="must be one"):
        calibrate_step_filters(short, short.build(nnx.Rngs(0)), jnp.ones((1, 9), jnp.int32))
