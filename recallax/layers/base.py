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


class LayerInfo(NamedTuple):
    """Where a mixer stands in the model."""

    layer_idx: int | Int[Array, ""]
    """Absolute layer number from 0; an array inside a stack of repeated blocks."""
    num_layers: int
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


class QueryableMixer(RecurrentMixer):
    """A mixer whose memory can be asked without telling it anything."""

    @abc.abstractmethod
    def read_state(self, state: State) -> State:
        """The part of a state that an answer depends on."""

    @abc.abstractmethod
    def retrieve(self, x: Float[Array, "B N D"], read_state: State) -> Float[Array, "B N D"]:
        """What each row's memory answers to N questions, which need not be tokens of a sequence."""


class MixerConfig(Config, abc.ABC):
    """A config that is the constructor of its mixer. Subclasses are frozen keyword-only dataclasses."""

    @property
    def grid(self) -> int:
        """Packed documents must begin at a multiple of it; it counts from the beginning of the row's first one."""
        return 1

    @property
    def landmark_interval(self) -> int | None:
        """Tokens of a document between the landmarks that the language model inserts for it; None is no landmarks."""
        return None

    @abc.abstractmethod
    def build(self, d_model: int, layer: LayerInfo, *, precision: Precision, rngs: nnx.Rngs) -> SequenceMixer:
        """The module for width `d_model`; raises ConfigError where the sizes do not fit."""
