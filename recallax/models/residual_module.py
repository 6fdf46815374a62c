# pyright: strict
"""Interface of one layer or several layers that update the residual stream, with an explicit state."""

import abc

from flax import nnx
from jaxtyping import Array, Float

from recallax.layers.base import State
from recallax.types import Aux, SeqInfo, StepInfo


class ResidualModule(nnx.Module, abc.ABC):
    """One layer, or a sequence of layers, that maps a residual stream to a residual stream."""

    @abc.abstractmethod
    def init_state(self, batch: int, max_len: int) -> State:
        """Return the states of the mixers before any token.

        Args:
            batch: The number of rows.
            max_len: Largest number of tokens per row.

        Returns:
            The states, as a tuple.

        Raises:
            TypeError: If a mixer has no state.
        """

    @abc.abstractmethod
    def prefill(self, r: Float[Array, "B T D"], seq: SeqInfo, state: State) -> tuple[Float[Array, "B T D"], State, Aux]:
        """Read further tokens of each row.

        Args:
            r: The residual stream, float32.
            seq: The tokens' sequence information.
            state: The states before the tokens.

        Returns:
            The residual stream after the layers, the states after the tokens, and auxiliary means.
        """

    @abc.abstractmethod
    def step(self, r: Float[Array, "B D"], info: StepInfo, state: State) -> tuple[Float[Array, "B D"], State]:
        """Read one token of each active row.

        Args:
            r: The residual stream, float32.
            info: Positions, and the rows that are active.
            state: The states before the token.

        Returns:
            The residual stream after the layers, and the states after the token.
        """
