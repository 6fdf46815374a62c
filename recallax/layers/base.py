# pyright: strict
"""Base classes of mixers: a module over time, the recurrent kind with an explicit state, and its config."""

import abc
import dataclasses
import math
from typing import Any, NamedTuple

import jax
from flax import nnx
from jaxtyping import Array, Float, Int

from recallax.config import Config
from recallax.types import Aux, Precision, SeqInfo, StepInfo

type State = Any
"""A NamedTuple of arrays with a leading batch axis; `()` for modules without a state."""


class LayerInfo(NamedTuple):
    """Position of a layer in the model."""

    layer_idx: int | Int[Array, ""]
    """Absolute layer number from 0; an array inside a stack of repeated blocks."""
    num_layers: int
    """Number of layers in the model."""


class Statistic(nnx.Variable[jax.Array]):
    """A variable that is not trained by gradient, such as a router's bias; it is saved beside the parameters."""


class SequenceMixer(nnx.Module, abc.ABC):
    """A module that maps a sequence to a sequence of the same shape."""

    @abc.abstractmethod
    def __call__(self, x: Float[Array, "B T D"], seq: SeqInfo) -> tuple[Float[Array, "B T D"], Aux]:
        """Process whole sequences, starting from an empty state.

        Args:
            x: Inputs in the compute dtype.
            seq: Positions and documents of the tokens; packed documents do not interact.

        Returns:
            Outputs in the compute dtype, and auxiliary losses and diagnostics.
        """


class RecurrentMixer(SequenceMixer):
    """A mixer that can continue a sequence from an explicit state, which the caller stores."""

    @abc.abstractmethod
    def init_state(self, batch: int, max_len: int) -> State:
        """Create the empty state.

        Args:
            batch: Number of rows.
            max_len: Largest number of tokens that a row will have; caches are allocated for it.

        Returns:
            The state before any token.
        """

    @abc.abstractmethod
    def prefill(self, x: Float[Array, "B T D"], seq: SeqInfo, state: State) -> tuple[Float[Array, "B T D"], State, Aux]:
        """Process T >= 1 further tokens of each row.

        Args:
            x: Inputs in the compute dtype.
            seq: Positions and documents of the tokens. Padding may be on the right only.
            state: State of the row's first document. It is reset where `seq.positions` starts at 0 and is not passed
                on to later documents of the row.

        Returns:
            Outputs in the compute dtype, the state after each row's last document, and auxiliary losses.
        """

    @abc.abstractmethod
    def step(self, x: Float[Array, "B D"], info: StepInfo, state: State) -> tuple[Float[Array, "B D"], State]:
        """Process one further token of each active row.

        Args:
            x: Inputs in the compute dtype.
            info: Position of each row's token; position 0 resets the state. Inactive rows keep their state.
            state: State before the token.

        Returns:
            Outputs in the compute dtype, 0 in inactive rows, and the state after the token.
        """


class QueryableMixer(RecurrentMixer):
    """A mixer whose memory can be read without writing to it."""

    @abc.abstractmethod
    def read_state(self, state: State) -> State:
        """Extract the part of the state that `retrieve` reads.

        Args:
            state: A state of this mixer.

        Returns:
            The memory as arrays with a leading batch axis.
        """

    @abc.abstractmethod
    def retrieve(self, x: Float[Array, "B N D"], read_state: State) -> Float[Array, "B N D"]:
        """Read each row's memory with N queries.

        Args:
            x: Inputs of the queries; they need not be tokens of a sequence.
            read_state: Result of the method `read_state`.

        Returns:
            One output per query, in the compute dtype.
        """


class MixerConfig(Config, abc.ABC):
    """A config that builds its mixer. Subclasses are frozen, keyword-only dataclasses."""

    @property
    def inner_mixers(self) -> "tuple[MixerConfig, ...]":
        """The fields that are configs of mixers; this mixer has at least their limits on documents."""
        fields = (getattr(self, field.name) for field in dataclasses.fields(self))
        return tuple(field for field in fields if isinstance(field, MixerConfig))

    @property
    def grid(self) -> int:
        """Packed documents must start at multiples of this, counted from the start of the row's first document."""
        return math.lcm(*(mixer.grid for mixer in self.inner_mixers))

    @property
    def prefix_limit(self) -> int | None:
        """Largest number of prefix tokens in a row; None: no limit."""
        limits = (mixer.prefix_limit for mixer in self.inner_mixers)
        return min((limit for limit in limits if limit is not None), default=None)

    @property
    def landmark_interval(self) -> int | None:
        """Tokens of a document between two landmarks that the language model inserts; None: it inserts none."""
        return None

    @abc.abstractmethod
    def build(self, d_model: int, layer: LayerInfo, *, precision: Precision, rngs: nnx.Rngs) -> SequenceMixer:
        """Build the module.

        Args:
            d_model: Width of inputs and outputs.
            layer: Position of the layer in the model.
            precision: Dtypes of parameters and activations.
            rngs: Source of the initial parameters.

        Returns:
            The mixer.

        Raises:
            ConfigError: The sizes in the config do not fit `d_model`.
        """
