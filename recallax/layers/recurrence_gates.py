"""Decay gates and strengths that several members of the linear-recurrence family share."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from recallax.layers.dense import parameter
from recallax.types import Precision

DT_MIN, DT_MAX, DT_FLOOR = 1e-3, 0.1, 1e-4


class DecayGate(nnx.Module):
    """g = -exp(a_log) * clip(softplus(x + dt_bias)), the gate of Mamba-2; both parameters without weight decay.

    exp(a_log) starts uniform in [1, 16] per head, softplus(dt_bias) log-uniform in [.001, .1] per channel.
    Source: Dao & Gu 2024 (arXiv 2405.21060), section 7; the same in Gated DeltaNet and KDA.
    """

    def __init__(
        self,
        num_heads: int,
        channels: int,
        *,
        precision: Precision,
        rngs: nnx.Rngs,
        dt_limit: tuple[float, float] = (0.0, float("inf")),
    ):
        rate = jax.random.uniform(rngs.params(), (num_heads,), precision.param, 1.0, 16.0)
        self.a_log = parameter(jnp.log(rate), (None,), weight_decay=False)
        self.dt_bias = parameter(init_dt_bias(channels, precision, rngs), (None,), weight_decay=False)
        self.dt_limit = dt_limit

    def dt(self, x: Float[Array, "B T C"]) -> Float[Array, "B T C"]:
        """Step sizes in float32."""
        dt = jax.nn.softplus(x.astype(jnp.float32) + self.dt_bias[...][None, None])
        return jnp.clip(dt, *self.dt_limit) if self.dt_limit != (0.0, float("inf")) else dt

    def __call__(self, dt: Float[Array, "B T H ..."]) -> Float[Array, "B T H ..."]:
        """Log-decay of step sizes that are laid out by head."""
        return -jnp.exp(self.a_log[...]).reshape(1, 1, -1, *[1] * (dt.ndim - 3)) * dt


def init_dt_bias(channels: int, precision: Precision, rngs: nnx.Rngs) -> Float[Array, " C"]:
    """Biases whose softplus is log-uniform in [DT_MIN, DT_MAX]."""
    low, high = jnp.log(DT_MIN), jnp.log(DT_MAX)
    dt = jnp.exp(jax.random.uniform(rngs.params(), (channels,), precision.param, low, high))
    dt = jnp.maximum(dt, DT_FLOOR)
    return dt + jnp.log(-jnp.expm1(-dt))


def beta_gate(x: Float[Array, "B T H"], allow_neg_eigval: bool) -> Float[Array, "B T H"]:
    """beta = largest * sigmoid(x), in float32; above 1 the transition has negative eigenvalues."""
    return (2.0 if allow_neg_eigval else 1.0) * jax.nn.sigmoid(x.astype(jnp.float32))


def split_heads(x: Float[Array, "B T W"], num_heads: int) -> Float[Array, "B T H K"]:
    """The channels of each head."""
    return x.reshape(*x.shape[:2], num_heads, -1)
