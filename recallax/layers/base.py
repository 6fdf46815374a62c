"""What a mixer is: a module over time, and the recurrent kind with an explicit state."""

import abc
from typing import Any, NamedTuple

import jax
from flax import nnx
from jaxtyping import Array, Float, Int

from recallax.config import Config
from recallax.types import Aux, Precision, SeqInfo, StepInfo

type State = Any
"""A NamedTuple of arrays with a leading batch axis; `()` for modules that remember nothing."""


class Site(NamedTuple):
    """Where a mixer stands in the model."""

    index: int | Int[Array, ""]
    """Absolute layer number from 0; an array inside a stack of repeated blocks."""
    depth: int
    """Number of layers in the model."""


class Statistic(nnx.Variable[jax.Array]):
    """A variable that is not trained by gradient (a running norm, a router's bias): kept beside the parameters."""


class SequenceMixer(nnx.Module, abc.ABC):
    """Maps a sequence to a sequence of the same shape; in the compute dtype."""

    @abc.abstractmethod
    def __call__(self, x: Float[Array, "B T D"], seq: SeqInfo) -> tuple[Float[Array, "B T D"], Aux]:
        """The whole sequence at once, from an empty state."""


class RecurrentMixer(SequenceMixer):
    """A mixer that can also continue: its state is a value that the caller holds."""

    @abc.abstractmethod
    def init_state(self, batch: int, max_len: int) -> State:
        """The empty state of `batch` rows that will see at most `max_len` tokens."""

    @abc.abstractmethod
    def prefill(self, x: Float[Array, "B T D"], seq: SeqInfo, state: State) -> tuple[Float[Array, "B T D"], State, Aux]:
        """T >= 1 further tokens. The incoming state belongs to the row's first document and is dropped where that
        document ends, or where `seq.positions` starts at 0. Padding may stand on the right only."""

    @abc.abstractmethod
    def step(self, x: Float[Array, "B D"], info: StepInfo, state: State) -> tuple[Float[Array, "B D"], State]:
        """One further token of each active row; position 0 starts afresh, inactive rows keep their state."""


class MixerConfig(Config, abc.ABC):
    """A config that is the constructor of its mixer. Subclasses are frozen keyword-only dataclasses."""

    @property
    def grid(self) -> int:
        """Packed documents must begin at a multiple of it; it counts from the beginning of the row's first one."""
        return 1

    @property
    def landmarks(self) -> int | None:
        """Tokens of a document between the landmarks that the language model inserts for it; None is no landmarks."""
        return None

    @abc.abstractmethod
    def build(self, d_model: int, site: Site, *, precision: Precision, rngs: nnx.Rngs) -> SequenceMixer:
        """The module for width `d_model`; raises ConfigError where the sizes do not fit."""
