"""Step sizes below a threshold become 0: such a token neither decays a channel's state nor writes to it.

The thresholds are no parameters; `models/long_context.py` finds them from data. See `layers/long_mamba.py`.
"""

import abc

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from recallax.layers.base import Statistic


class StepFilter(nnx.Module):
    """A threshold per channel; 0 lets every step pass."""

    def __init__(self, channels: int, threshold: float):
        self.threshold = Statistic(jnp.full(channels, threshold, jnp.float32))

    def __call__(self, dt: Float[Array, "*batch C"]) -> Float[Array, "*batch C"]:
        return jnp.where(dt < jnp.broadcast_to(self.threshold[...], dt.shape), 0, dt)


class StepFilteredModule(nnx.Module, abc.ABC):
    """A module whose states decay and are written by step sizes, all of which pass `filter_steps`."""

    filter: StepFilter | None = None

    @abc.abstractmethod
    def decay_rates(self) -> Float[Array, " C"]:
        """How much log-decay a step of size 1 is in each channel; positive."""

    def filter_steps(self, dt: Float[Array, "*batch C"]) -> Float[Array, "*batch C"]:
        """The step sizes that pass, 0 in place of the others."""
        return dt if self.filter is None else self.filter(dt)
