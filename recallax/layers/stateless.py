"""Base class of mixers that process every token by itself; their state is `()`."""

import abc

import jax.numpy as jnp
from jaxtyping import Array, Float

from recallax.layers.base import RecurrentMixer
from recallax.types import Aux, SeqInfo, StepInfo


class StatelessMixer(RecurrentMixer):
    """A mixer without a state. Subclasses define `apply`."""

    @abc.abstractmethod
    def apply(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        """Map tokens independently of each other.

        Args:
            x: Tokens with any leading axes.

        Returns:
            Outputs of the same shape.
        """

    def __call__(self, x: Float[Array, "B T D"], seq: SeqInfo) -> tuple[Float[Array, "B T D"], Aux]:
        return self.apply(x), {}

    def init_state(self, batch: int, max_len: int) -> tuple[()]:
        return ()

    def prefill(
        self, x: Float[Array, "B T D"], seq: SeqInfo, state: tuple[()]
    ) -> tuple[Float[Array, "B T D"], tuple[()], Aux]:
        return self.apply(x), (), {}

    def step(self, x: Float[Array, "B D"], info: StepInfo, state: tuple[()]) -> tuple[Float[Array, "B D"], tuple[()]]:
        return jnp.where(jnp.asarray(info.active)[:, None], self.apply(x), 0), ()
