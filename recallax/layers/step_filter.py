"""Filter of step sizes for LongMamba: a token whose step size is below the threshold neither decays nor writes a state.

The thresholds are not trained; `recallax.models.long_mamba_calibration` computes them from data.
"""

import abc

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from recallax.layers.base import Statistic


class StepFilter(nnx.Module):
    """Sets step sizes below a threshold per channel to 0; a threshold of 0 changes nothing."""

    def __init__(self, channels: int, threshold: float):
        self.threshold = Statistic(jnp.full(channels, threshold, jnp.float32))

    def __call__(self, dt: Float[Array, "*batch C"]) -> Float[Array, "*batch C"]:
        return jnp.where(dt < jnp.broadcast_to(self.threshold[...], dt.shape), 0, dt)


class StepFilteredModule(nnx.Module, abc.ABC):
    """Base class of modules whose states are decayed and written by step sizes, all of which pass `filter_steps`."""

    filter: StepFilter | None = None
    """The filter; None: step sizes are not changed."""

    @abc.abstractmethod
    def decay_rates(self) -> Float[Array, " C"]:
        """Compute the decay rates, that is minus the log-decay of a step of size 1 in each channel; positive."""

    def filter_steps(self, dt: Float[Array, "*batch C"]) -> Float[Array, "*batch C"]:
        """Apply the filter, if there is one.

        Args:
            dt: Step sizes.

        Returns:
            Step sizes, with 0 in place of those below the threshold.
        """
        return dt if self.filter is None else self.filter(dt)
