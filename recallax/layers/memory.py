"""Base classes of memories of constant size, the skeleton of the linear-recurrence family.

    q = x W_q,  p = x W_kv (keys, values, gates)   ->   o_t = cell(q, p)_t   ->   y_t = output_proj(o_t, x_t)

A member of the family is a config that defines four parts: the query projection, the projection of keys, values and
gates (`MoM` owns one per memory and `PrefixLinear` a second one), the cell (convolution, gates and recurrence; shared
by all memories of a layer) and the output projection (norm, gate and projection).
"""

import abc
from collections.abc import Mapping
from typing import ClassVar, NamedTuple

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from recallax.layers.base import LayerInfo, MixerConfig, RecurrentMixer, State
from recallax.layers.dense import Linear, LowRank, Projections
from recallax.layers.output_projection import GateActivation, OutputProjection
from recallax.layers.state_reset import reset_for_prefill, reset_for_step
from recallax.types import Aux, Precision, SeqInfo, StepInfo


class HeadDims(NamedTuple):
    """Numbers and widths of heads."""

    num_heads: int
    """Heads of queries and keys."""
    num_v_heads: int
    """Heads of values."""
    head_k_dim: int
    """Width of queries and keys per head."""
    head_v_dim: int
    """Width of values per head."""


class RecurrentCell(nnx.Module, abc.ABC):
    """A recurrence over projected tokens: convolution, gates, and the update and read of one memory."""

    head_dims: HeadDims

    @abc.abstractmethod
    def init_state(self, batch: int) -> State:
        """Create the empty memory of `batch` rows."""

    @abc.abstractmethod
    def run(
        self,
        projections: Mapping[str, Float[Array, "B T W"]],
        positions: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"],
        state: State,
        conv_segments: Int[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T H V"], State]:
        """Run the recurrence over whole rows.

        Args:
            projections: Projected tokens by name ("q", "k", "v" and gates), which differ in width.
            positions: Position of each token within its document.
            segment_ids: Document ids; 0 is padding.
            state: State of the row's first document; None is an empty memory.
            conv_segments: Ids that the convolution does not cross; None: those of the documents.

        Returns:
            One output per token and value head, and the final state.
        """

    @abc.abstractmethod
    def step(
        self, projections: Mapping[str, Float[Array, "B W"]], info: StepInfo, state: State
    ) -> tuple[Float[Array, "B H V"], State]:
        """Run the recurrence over one token of each active row.

        Args:
            projections: The projected token by name.
            info: Position and activity of each row.
            state: State before the token.

        Returns:
            One output per value head, and the new state; inactive rows keep their state.
        """


class MemoryConfig(MixerConfig, abc.ABC):
    """Config of a member of the family. The module calls each method that builds a part once, in a fixed order."""

    @abc.abstractmethod
    def head_dims(self, d_model: int) -> HeadDims:
        """Compute numbers and widths of heads.

        Args:
            d_model: Width of the model.

        Returns:
            The sizes of queries, keys and values.

        Raises:
            ConfigError: The sizes do not fit `d_model`.
        """

    def q_proj(self, d_model: int, *, precision: Precision, rngs: nnx.Rngs) -> Projections:
        """Build the query projection, which all memories of a layer share.

        Args:
            d_model: Width of the model.
            precision: Dtypes of parameters and activations.
            rngs: Source of the initial parameters.

        Returns:
            A projection named "q".
        """
        num_heads, _, head_k_dim, _ = self.head_dims(d_model)
        return Projections({"q": Linear(d_model, num_heads * head_k_dim, precision=precision, rngs=rngs)})

    @abc.abstractmethod
    def kv_proj(self, d_model: int, *, precision: Precision, rngs: nnx.Rngs) -> Projections:
        """Build the projections of keys, values and gates of one memory.

        Args:
            d_model: Width of the model.
            precision: Dtypes of parameters and activations.
            rngs: Source of the initial parameters.

        Returns:
            Projections by the names that the cell reads.
        """

    @abc.abstractmethod
    def cell(self, d_model: int, layer: LayerInfo, *, precision: Precision, rngs: nnx.Rngs) -> RecurrentCell:
        """Build convolution, gates and recurrence.

        Args:
            d_model: Width of the model.
            layer: Position of the layer in the model.
            precision: Dtypes of parameters and activations.
            rngs: Source of the initial parameters.

        Returns:
            The cell.
        """

    @abc.abstractmethod
    def output_proj(self, d_model: int, layer: LayerInfo, *, precision: Precision, rngs: nnx.Rngs) -> OutputProjection:
        """Build output norm, output gate and output projection.

        Args:
            d_model: Width of the model.
            layer: Position of the layer in the model.
            precision: Dtypes of parameters and activations.
            rngs: Source of the initial parameters.

        Returns:
            The module that maps the cell's output to the residual stream.
        """

    def build(self, d_model: int, layer: LayerInfo, *, precision: Precision, rngs: nnx.Rngs) -> "MemoryMixer":
        return MemoryMixer(self, d_model, layer, precision=precision, rngs=rngs)


class GatedMemoryConfig(MemoryConfig):
    """Config of a member whose output is normalized per value head and gated: y = W_o [ rms_head(o) * f(g(x)) ]."""

    norm_eps: float
    """Added to the mean square in the output norm."""
    gate_activation: ClassVar[GateActivation] = "silu"
    """Activation f of the output gate."""

    def output_gate(self, d_model: int, width: int, *, precision: Precision, rngs: nnx.Rngs) -> Linear | LowRank:
        """Build the projection g of the output gate, a linear map unless a subclass overrides it.

        Args:
            d_model: Width of the model.
            width: Width of all value heads together.
            precision: Dtypes of parameters and activations.
            rngs: Source of the initial parameters.

        Returns:
            The projection.
        """
        return Linear(d_model, width, precision=precision, rngs=rngs)

    def output_proj(self, d_model: int, layer: LayerInfo, *, precision: Precision, rngs: nnx.Rngs) -> OutputProjection:
        _, num_heads, _, head_v_dim = self.head_dims(d_model)
        width = num_heads * head_v_dim
        return OutputProjection(
            width,
            d_model,
            layer,
            num_groups=num_heads,
            gate=self.output_gate(d_model, width, precision=precision, rngs=rngs),
            activation=self.gate_activation,
            norm_eps=self.norm_eps,
            precision=precision,
            rngs=rngs,
        )


class MemoryMixer(RecurrentMixer):
    """Mixer with one memory, which all tokens of a row write and read."""

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
        """Project the tokens and run the cell, without the output projection.

        Args:
            x: Inputs in the compute dtype.
            seq: Positions and documents of the tokens.
            state: State of the row's first document; None is an empty memory.

        Returns:
            The cell's output per token and value head, and the final state.
        """
        projections = self.query(x) | self.writer(x)
        return self.cell.run(projections, jnp.asarray(seq.positions), jnp.asarray(seq.segment_ids), state)
