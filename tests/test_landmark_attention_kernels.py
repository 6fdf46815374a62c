"""Landmark attention on TPUs: the interpreted kernels against the XLA form, and what they do not take."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from recallax.pallas_kernels.dispatch import Unsupported, interpret_kernels
from recallax.pallas_kernels.landmark_attention import init_landmark_cache, landmark_attention, mosaic_tpu
from tests.test_dispatch import traced_for

LENGTH = 300
"""Three tiles of queries; two in the gate."""


def drawn(dtype, groups: int, length: int = LENGTH) -> tuple[jax.Array, ...]:
    rng = np.random.default_rng(0)
    sizes = ((2, 16), (groups, 16), (groups, 24))
    return tuple(jnp.asarray(rng.normal(size=(2, length, *size)), dtype) for size in sizes)


def packed(*documents: int, length: int = LENGTH) -> dict[str, Any]:
    """Documents in the first row, with padding behind them, and one in the second."""
    segments, positions = np.ones((2, length), np.int32), np.tile(np.arange(length, dtype=np.int32), (2, 1))
    if documents:
        segments[0], positions[0] = 0, 0
        segments[0, : sum(documents)] = np.repeat(np.arange(len(documents)) + 1, documents)
        positions[0, : sum(documents)] = np.concatenate([np.arange(size) for size in documents])
    return {"segment_ids": jnp.asarray(segments), "positions": jnp.asarray(positions)}


@pytest.mark.parametrize(
    ("real", "documents", "groups", "dtype", "tolerance"),
    [
        (7, (30, 1, 100), 1, "float32", 2e-6),
        pytest.param(7, (40, 1, 100, 140), 2, "float32", 2e-6, marks=pytest.mark.full),
        pytest.param(15, (), 2, "float32", 2e-6, marks=pytest.mark.full),
        pytest.param(63, (130, 170), 1, "bfloat16", 0.02, marks=pytest.mark.full),
        pytest.param(128, (290,), 1, "float32", 2e-6, marks=pytest.mark.full),
        pytest.param(1, (1, 2, 260), 2, "float32", 2e-6, marks=pytest.mark.full),
    ],
)
def test_the_kernels_agree_with_the_xla_form_in_values_and_gradients(
    real, documents, groups, dtype, tolerance, monkeypatch
):
    """Groups of past blocks are cut small, so that a tile meets several and passes over some."""
    monkeypatch.setattr(mosaic_tpu, "KEYS_PER_GROUP", 64)
    length = 140 if sum(documents) < 140 and documents else LENGTH
    where = packed(*documents, length=length)
    valid = (where["segment_ids"] > 0)[..., None, None]
    slope = jnp.where(valid, jnp.asarray(np.random.default_rng(1).normal(size=(2, length, 2, 24)), jnp.float32), 0)

    def results(form, dtype):
        def loss(q, k, v):
            out = landmark_attention(q, k, v, block_size=real, **where, implementation=form).astype(jnp.float32)
            return jnp.sum(slope * out), jnp.where(valid, out, 0)

        run = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))
        (_, out), slopes = run(*drawn(dtype, groups, length))
        return [np.asarray(x, np.float32) for x in (out, *slopes)]

    wanted = results("xla", "float32")
    with interpret_kernels():
        found = results("mosaic_tpu", dtype)
    for got, want in zip(found, wanted, strict=True):
        assert np.abs(got - want).max() <= tolerance * max(1, np.abs(want).max())


def test_the_kernels_export_for_a_tpu():
    q, k, v = drawn(jnp.bfloat16, 2)

    def loss(q, k, v):
        return jnp.sum(landmark_attention(q, k, v, block_size=63, **packed(300), implementation="mosaic_tpu"))

    with traced_for("tpu", "TPU v6 lite"):
        text = export.export(jax.jit(jax.grad(loss, argnums=(0, 1, 2))), platforms=["tpu"])(q, k, v).mlir_module()
    assert text.count("tpu_custom_call") >= 4  # forward, dQ, dK and dV of past blocks and of own ones


def test_unsupported_arguments_are_rejected_with_reason():
    q, k, v = drawn(jnp.float32, 2)
    past = init_landmark_cache(2, 40, 7, 2, 16, jnp.float32)
    with pytest.raises(Unsupported, match="for a TPU and this is a CPU"):
        landmark_attention(q, k, v, block_size=7, **packed(), implementation="mosaic_tpu")
    with interpret_kernels():
        with pytest.raises(Unsupported, match="a cache is given"):
            landmark_attention(q, k, v, block_size=7, cache=past, **packed(), implementation="mosaic_tpu")
        with pytest.raises(Unsupported, match="block_size is 200; the kernel supports at most 128"):
            landmark_attention(q, k, v, block_size=200, **packed(), implementation="mosaic_tpu")
        with pytest.raises(Unsupported, match="must all be float32 or all bfloat16"):
            landmark_attention(q, k.astype(jnp.bfloat16), v, block_size=7, **packed(), implementation="mosaic_tpu")
