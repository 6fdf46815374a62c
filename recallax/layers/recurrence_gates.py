"""Decay gates and beta gates that several members of the linear-recurrence family share."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from recallax.layers.dense import parameter
from recallax.types import Precision

DT_MIN, DT_MAX, DT_FLOOR = 1e-3, 0.1, 1e-4
"""Range of initial step sizes and their lower bound, as in the code of Mamba."""
MAX_A_LOG = 88.0
"""Largest log of a decay rate; its exponential is the last one that is finite in float32, to a factor of 2."""


class DecayGate(nnx.Module):
    """Decay gate of Mamba-2: log_decay = -exp(a_log) * clip(softplus(x + dt_bias)).

    exp(a_log) is initialised uniformly in [1, 16] per head and softplus(dt_bias) log-uniformly in [0.001, 0.1] per
    channel. Both parameters are exempt from weight decay.
    Source: Dao & Gu 2024 (arXiv 2405.21060), section 7; Gated DeltaNet and KDA have the same gate.

    Args:
        num_heads: Number of decay rates.
        channels: Number of step sizes.
        precision: Dtypes of parameters and activations.
        rngs: Source of the initial parameters.
        dt_limit: Range to which step sizes are clipped.
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
        """Compute step sizes softplus(x + dt_bias), clipped to `dt_limit`, in float32."""
        dt = jax.nn.softplus(x.astype(jnp.float32) + self.dt_bias[...][None, None])
        return jnp.clip(dt, *self.dt_limit) if self.dt_limit != (0.0, float("inf")) else dt

    def __call__(self, dt: Float[Array, "B T H ..."]) -> Float[Array, "B T H ..."]:
        """Compute the log-decay -exp(a_log) * dt from step sizes whose third axis is that of the heads."""
        return -decay_rate(self.a_log[...]).reshape(1, 1, -1, *[1] * (dt.ndim - 3)) * dt


def decay_rate(a_log: Float[Array, "..."]) -> Float[Array, "..."]:
    """Compute exp(a_log), which is finite for every log: rate * 0 is 0 and not NaN.

    Args:
        a_log: Logs of decay rates, float32; those above `MAX_A_LOG` count as `MAX_A_LOG`.

    Returns:
        Decay rates.
    """
    return jnp.exp(jnp.minimum(a_log, MAX_A_LOG))


def init_dt_bias(channels: int, precision: Precision, rngs: nnx.Rngs) -> Float[Array, " C"]:
    """Draw initial biases of step sizes.

    Args:
        channels: Number of biases.
        precision: Dtypes; the biases have the parameter dtype.
        rngs: Source of random numbers.

    Returns:
        Biases whose softplus is log-uniform in [DT_MIN, DT_MAX].
    """
    low, high = jnp.log(DT_MIN), jnp.log(DT_MAX)
    dt = jnp.exp(jax.random.uniform(rngs.params(), (channels,), precision.param, low, high))
    dt = jnp.maximum(dt, DT_FLOOR)
    return dt + jnp.log(-jnp.expm1(-dt))


def beta_gate(x: Float[Array, "B T H"], allow_neg_eigval: bool) -> Float[Array, "B T H"]:
    """Compute the beta gate of the delta rule, sigmoid(x) or 2 * sigmoid(x), in float32.

    Args:
        x: Projected tokens.
        allow_neg_eigval: Double the gate; where it is above 1, the transition has a negative eigenvalue.

    Returns:
        Gates in (0, 1), or in (0, 2).
    """
    return (2.0 if allow_neg_eigval else 1.0) * jax.nn.sigmoid(x.astype(jnp.float32))


def split_heads(x: Float[Array, "B T W"], num_heads: int) -> Float[Array, "B T H K"]:
    """Split the last axis into heads.

    Args:
        x: Projected tokens.
        num_heads: Number of heads, a divisor of the width.

    Returns:
        Tokens with an axis of heads.
    """
    return x.reshape(*x.shape[:2], num_heads, -1)
