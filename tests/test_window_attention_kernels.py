"""Window attention by splash attention and cuDNN: agreement with the definition, and unsupported arguments."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from recallax.pallas_kernels.dispatch import Unsupported, interpret_kernels
from recallax.pallas_kernels.window_attention import KVCache, cudnn, window_attention
from tests.test_dispatch import traced_for

LENGTH, WIDTH = 150, 16


def draw(dtype, groups: int = 2) -> tuple[jax.Array, jax.Array, jax.Array]:
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(2, LENGTH, h, WIDTH)), dtype) for h in (4, groups, groups))
    return q, k, v


def packed() -> jax.Array:
    return jnp.asarray(np.stack([np.repeat([1, 5, 2, 0], [40, 1, 89, 20]), np.ones(LENGTH)]), jnp.int32)


def assert_agreement(
    implementation: str, q, k, v, *, window: int | None, segments: jax.Array | None, tolerance: float
) -> None:
    """Compare values and gradients of an implementation with those of the definition in float32."""
    valid = jnp.ones((2, LENGTH, 1, 1), bool) if segments is None else (segments > 0)[..., None, None]
    out_grad = jnp.asarray(np.random.default_rng(1).normal(size=q.shape), jnp.float32)

    def run(implementation, q, k, v):
        out, _ = window_attention(q, k, v, window=window, segment_ids=segments, implementation=implementation)
        out = jnp.where(valid, out, jnp.zeros((), out.dtype))
        return jnp.sum(out_grad * out.astype(jnp.float32)), out

    def results(implementation, *inputs):
        (_, out), grads = jax.jit(jax.value_and_grad(lambda *x: run(implementation, *x), (0, 1, 2), has_aux=True))(
            *inputs
        )
        return [np.asarray(x, np.float32) for x in (out, *grads)]

    expected = results("reference", *(x.astype(jnp.float32) for x in (q, k, v)))
    for got, want in zip(results(implementation, q, k, v), expected, strict=True):
        assert np.abs(got - want).max() <= tolerance * max(1, np.abs(want).max())


@pytest.mark.parametrize("window", [None, 1, 40])
@pytest.mark.parametrize("segments", [None, packed()], ids=["whole rows", "packed"])
def test_splash_attention_agrees_with_the_definition(window, segments):
    with interpret_kernels():
        assert_agreement("splash", *draw(jnp.float32), window=window, segments=segments, tolerance=2e-5)


def test_splash_attention_exports_for_a_tpu():
    q, k, v = draw(jnp.bfloat16)

    def loss(q, k, v):
        return jnp.sum(window_attention(q, k, v, window=40, segment_ids=packed(), implementation="splash")[0])

    with traced_for("tpu", "TPU v6 lite"):
        text = export.export(jax.jit(jax.grad(loss, argnums=(0, 1, 2))), platforms=["tpu"])(q, k, v).mlir_module()
    assert text.count("tpu_custom_call") >= 3  # forward, dq, dk and dv


@pytest.mark.parametrize("window", [None, 1, 40])
def test_cudnn_arguments_agree_with_the_definition(window, monkeypatch):
    monkeypatch.setattr(cudnn, "LIBRARY", "xla")
    assert_agreement("cudnn", *draw(jnp.bfloat16), window=window, segments=None, tolerance=0.03)


def test_unsupported_arguments_are_rejected_with_reason(monkeypatch):
    q, k, v = draw(jnp.bfloat16)
    cache = KVCache(jnp.zeros((2, 40, 2, WIDTH), q.dtype), jnp.zeros((2, 40, 2, WIDTH), q.dtype))
    stateful = {"window": 40, "state": cache, "positions": jnp.tile(jnp.arange(LENGTH)[None], (2, 1))}
    with pytest.raises(Unsupported, match="cuDNN needs a GPU and this is a CPU"):
        window_attention(q, k, v, implementation="cudnn")
    with interpret_kernels(), pytest.raises(Unsupported, match="splash: a state is given"):
        window_attention(q, k, v, **stateful, implementation="splash")
    monkeypatch.setattr(cudnn, "LIBRARY", "xla")
    with pytest.raises(Unsupported, match="cudnn: a state is given"):
        window_attention(q, k, v, **stateful, implementation="cudnn")
    with pytest.raises(Unsupported, match="cudnn: segment_ids are given"):
        window_attention(q, k, v, segment_ids=packed(), implementation="cudnn")
    with pytest.raises(Unsupported, match="q is float32"):
        window_attention(*draw(jnp.float32), implementation="cudnn")
    with pytest.raises(Unsupported, match=r"are \(16, 8\)"):
        window_attention(q, k, v[..., :8], implementation="cudnn")
