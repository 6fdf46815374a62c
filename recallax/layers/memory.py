"""Memories of constant size: the skeleton that the linear-recurrence family shares.

    q = x W_q,  streams = x W_s (keys, values, gates)   ->   o_t, by the cell   ->   y_t = readout(o_t, x_t)

A member of the family is a config that says how each of four parts is made: the query projection, the writer (what a
token writes; `MoM` owns one per memory, `PrefixLinear` a second one), the cell (convolution, gates, recurrence; shared by the
memories) and the readout (norm, gate, output projection).
"""

import abc
from collections.abc import Mapping
from typing import NamedTuple

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from recallax.layers.base import LayerInfo, MixerConfig, RecurrentMixer, State
from recallax.layers.dense import Linear, Projections
from recallax.layers.output_projection import OutputProjection
from recallax.layers.state_reset import reset_for_prefill, reset_for_step
from recallax.types import Aux, Precision, SeqInfo, StepInfo


class HeadDims(NamedTuple):
    """Heads of queries and keys, heads of values, and their widths."""

    num_heads: int
    num_v_heads: int
    head_k_dim: int
    head_v_dim: int


class RecurrentCell(nnx.Module, abc.ABC):
    """One memory, from raw projections to what is read from it."""

    head_dims: HeadDims

    @abc.abstractmethod
    def init_state(self, batch: int) -> State:
        """The empty memory."""

    @abc.abstractmethod
    def run(
        self,
        projections: Mapping[str, Float[Array, "B T W"]],
        positions: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"],
        state: State,
        conv_segments: Int[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T H V"], State]:
        """What each token reads, and the final state; `state` belongs to the row's first document, None is empty.

        stretches: what a convolution must not look across, where that is more than the documents.
        """

    @abc.abstractmethod
    def step(
        self, projections: Mapping[str, Float[Array, "B W"]], info: StepInfo, state: State
    ) -> tuple[Float[Array, "B H V"], State]:
        """One token of each active row."""


class MemoryConfig(MixerConfig, abc.ABC):
    """A member of the family: how its four parts are made. Each is called once per module, with its own keys."""

    @abc.abstractmethod
    def head_dims(self, d_model: int) -> HeadDims:
        """Heads and widths; raises ConfigError where they do not fit."""

    def q_proj(self, d_model: int, *, precision: Precision, rngs: nnx.Rngs) -> Projections:
        """What every memory is read with."""
        groups, _, keys, _ = self.head_dims(d_model)
        return Projections({"q": Linear(d_model, groups * keys, precision=precision, rngs=rngs)})

    @abc.abstractmethod
    def kv_proj(self, d_model: int, *, precision: Precision, rngs: nnx.Rngs) -> Projections:
        """What one memory is written with: keys, values, gates."""

    @abc.abstractmethod
    def cell(self, d_model: int, layer: LayerInfo, *, precision: Precision, rngs: nnx.Rngs) -> RecurrentCell:
        """Convolution, gates and recurrence."""

    @abc.abstractmethod
    def output_proj(self, d_model: int, layer: LayerInfo, *, precision: Precision, rngs: nnx.Rngs) -> OutputProjection:
        """Norm, gate and output projection."""

    def build(self, d_model: int, layer: LayerInfo, *, precision: Precision, rngs: nnx.Rngs) -> "MemoryMixer":
        return MemoryMixer(self, d_model, layer, precision=precision, rngs=rngs)


class MemoryMixer(RecurrentMixer):
    """One memory that every token writes to."""

    def __init__(self, config: MemoryConfig, d_model: int, layer: LayerInfo, *, precision: Precision, rngs: nnx.Rngs):
        self.query = config.q_proj(d_model, precision=precision, rngs=rngs)
        self.writer = config.kv_proj(d_model, precision=precision, rngs=rngs)
        self.cell = config.cell(d_model, layer, precision=precision, rngs=rngs)
        self.readout = config.output_proj(d_model, layer, precision=precision, rngs=rngs)

    def __call__(self, x: Float[Array, "B T D"], seq: SeqInfo) -> tuple[Float[Array, "B T D"], Aux]:
        y, _ = self.run(x, seq, None)
        return self.readout(y, x), {}

    def init_state(self, batch: int, max_len: int) -> State:
        return self.cell.init_state(batch)

    def prefill(self, x: Float[Array, "B T D"], seq: SeqInfo, state: State) -> tuple[Float[Array, "B T D"], State, Aux]:
        y, state = self.run(x, seq, reset_for_prefill(state, seq))
        return self.readout(y, x), state, {}

    def step(self, x: Float[Array, "B D"], info: StepInfo, state: State) -> tuple[Float[Array, "B D"], State]:
        y, state = self.cell.step(self.query(x) | self.writer(x), info, reset_for_step(state, info))
        return jnp.where(jnp.asarray(info.active)[:, None], self.readout(y, x), 0), state

    def run(self, x: Float[Array, "B T D"], seq: SeqInfo, state: State) -> tuple[Float[Array, "B T H V"], State]:
        """What the tokens read from the memory that they write to, and what it holds at the end."""
        streams = self.query(x) | self.writer(x)
        return self.cell.run(streams, jnp.asarray(seq.positions), jnp.asarray(seq.segment_ids), state)
