"""TPU kernels of landmark attention: interpreted against the XLA implementation, and unsupported arguments."""

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
"""Tokens of a row: three tiles of queries; the test that is not marked as full has two."""


def random_qkv(dtype, groups: int, length: int = LENGTH) -> tuple[jax.Array, ...]:
    rng = np.random.default_rng(0)
    sizes = ((2, 16), (groups, 16), (groups, 24))
    return tuple(jnp.asarray(rng.normal(size=(2, length, *size)), dtype) for size in sizes)


def packed(*documents: int, length: int = LENGTH) -> dict[str, Any]:
    """Segment ids and positions of documents and padding in the first row and one document in the second."""
    segments, positions = np.ones((2, length), np.int32), np.tile(np.arange(length, dtype=np.int32), (2, 1))
    if documents:
        segments[0], positions[0] = 0, 0
        segments[0, : sum(documents)] = np.repeat(np.arange(len(documents)) + 1, documents)
        positions[0, : sum(documents)] = np.concatenate([np.arange(size) for size in documents])
    return {"segment_ids": jnp.asarray(segments), "positions": jnp.asarray(positions)}


@pytest.mark.parametrize(
    ("block_size", "documents", "groups", "dtype", "tolerance"),
    [
        (7, (30, 1, 100), 1, "float32", 2e-6),
        pytest.param(7, (40, 1, 100, 140), 2, "float32", 2e-6, marks=pytest.mark.full),
        pytest.param(15, (), 2, "float32", 2e-6, marks=pytest.mark.full),
        pytest.param(63, (130, 170), 1, "bfloat16", 0.02, marks=pytest.mark.full),
        pytest.param(128, (290,), 1, "float32", 2e-6, marks=pytest.mark.full),
        pytest.param(1, (1, 2, 260), 2, "float32", 2e-6, marks=pytest.mark.full),
    ],
)
def test_kernels_agree_with_xla_in_values_and_gradients(block_size, documents, groups, dtype, tolerance, monkeypatch):
    """Small groups of past blocks, so that a tile reads several and skips some."""
    monkeypatch.setattr(mosaic_tpu, "KEYS_PER_GROUP", 64)
    length = 140 if sum(documents) < 140 and documents else LENGTH
    rows = packed(*documents, length=length)
    valid = (rows["segment_ids"] > 0)[..., None, None]
    out_grad = jnp.where(valid, jnp.asarray(np.random.default_rng(1).normal(size=(2, length, 2, 24)), jnp.float32), 0)

    def results(implementation, dtype):
        def loss(q, k, v):
            out = landmark_attention(q, k, v, block_size=block_size, **rows, implementation=implementation).astype(
                jnp.float32
            )
            return jnp.sum(out_grad * out), jnp.where(valid, out, 0)

        run = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))
        (_, out), grads = run(*random_qkv(dtype, groups, length))
        return [np.asarray(x, np.float32) for x in (out, *grads)]

    expected = results("xla", "float32")
    with interpret_kernels():
        actual = results("mosaic_tpu", dtype)
    for got, want in zip(actual, expected, strict=True):
        assert np.abs(got - want).max() <= tolerance * max(1, np.abs(want).max())


def test_kernels_export_for_a_tpu():
    q, k, v = random_qkv(jnp.bfloat16, 2)

    def loss(q, k, v):
        return jnp.sum(landmark_attention(q, k, v, block_size=63, **packed(300), implementation="mosaic_tpu"))

    with traced_for("tpu", "TPU v6 lite"):
        text = export.export(jax.jit(jax.grad(loss, argnums=(0, 1, 2))), platforms=["tpu"])(q, k, v).mlir_module()
    assert text.count("tpu_custom_call") >= 4  # forward, dq, and dk and dv of past and of own blocks


def test_unsupported_arguments_are_rejected_with_reason():
    q, k, v = random_qkv(jnp.float32, 2)
    cache = init_landmark_cache(2, 40, 7, 2, 16, jnp.float32)
    with pytest.raises(Unsupported, match="for a TPU and this is a CPU"):
        landmark_attention(q, k, v, block_size=7, **packed(), implementation="mosaic_tpu")
    with interpret_kernels():
        with pytest.raises(Unsupported, match="a cache is given"):
            landmark_attention(q, k, v, block_size=7, cache=cache, **packed(), implementation="mosaic_tpu")
        with pytest.raises(Unsupported, match="block_size is 200; the kernel supports at most 128"):
            landmark_attention(q, k, v, block_size=200, **packed(), implementation="mosaic_tpu")
        with pytest.raises(Unsupported, match="must all be float32 or all bfloat16"):
            landmark_attention(q, k.astype(jnp.bfloat16), v, block_size=7, **packed(), implementation="mosaic_tpu")
