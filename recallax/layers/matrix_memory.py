"""Cells with a matrix memory per head, updated by linear attention or by the delta rule.

    projections  ->  convolution  ->  q, k, v and gates  ->  S_t by the op, o_t = S_t^T q_t

State: K V float32 per value head, and the last inputs of the convolution.
"""

import abc
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from recallax.layers.memory import HeadDims, RecurrentCell
from recallax.layers.short_convolution import ShortConvolution
from recallax.pallas_kernels.delta_rule import delta_rule, delta_rule_step
from recallax.pallas_kernels.linear_attention import linear_attention, linear_attention_step
from recallax.types import StepInfo


class RecurrenceInputs(NamedTuple):
    """Arguments of `linear_attention`, or of `delta_rule` if `erase` and `write` are given."""

    q: Float[Array, "B T G K"]
    k: Float[Array, "B T G K"]
    v: Float[Array, "B T H V"]
    log_decay: Float[Array, "..."] | None = None
    """Logarithm of the decay, [H], [B, T, H] or [B, T, H, K]; None: no decay."""
    erase: Float[Array, "B T H"] | None = None
    """Gate of the delta rule's erasure; None selects linear attention."""
    write: Float[Array, "B T H"] | None = None
    """Gate of the delta rule's write; None selects linear attention."""


class MatrixState(NamedTuple):
    """State of a matrix memory."""

    recurrent_state: Float[Array, "B H K V"]
    """The memory, float32."""
    conv_state: Float[Array, "B W-1 C"] | None
    """Last inputs of the convolution in the compute dtype; None: there is no convolution."""


class MatrixCell(RecurrentCell):
    """One matrix memory per head. Subclasses define the recurrence by `recurrence_inputs`."""

    conv_inputs: tuple[str, ...] = ("q", "k", "v")
    """Names of the projections that pass through the convolution, if there is one."""
    num_householder: int = 1
    """Steps of the recurrence per token."""

    def __init__(self, head_dims: HeadDims, conv: ShortConvolution | None = None):
        self.head_dims = head_dims
        self.conv = conv

    @abc.abstractmethod
    def recurrence_inputs(
        self, projections: Mapping[str, Float[Array, "B T W"]], positions: Int[Array, "B T"]
    ) -> RecurrenceInputs:
        """Compute the arguments of the recurrence.

        Args:
            projections: Projected tokens by name, after the convolution.
            positions: Position of each token within its document.

        Returns:
            Arguments of T * num_householder steps.
        """

    def cell_output(
        self, y: Float[Array, "B T H V"], projections: Mapping[str, Float[Array, "B T W"]]
    ) -> Float[Array, "B T H V"]:
        """Compute the cell's output from the recurrence's; by default they are equal.

        Args:
            y: Output of the recurrence, one per token.
            projections: Projected tokens by name, after the convolution.

        Returns:
            The output of the cell.
        """
        return y

    def init_state(self, batch: int) -> MatrixState:
        _, num_heads, head_k_dim, head_v_dim = self.head_dims
        memory = jnp.zeros((batch, num_heads, head_k_dim, head_v_dim), jnp.float32)
        return MatrixState(memory, None if self.conv is None else self.conv.init_state(batch))

    def run(
        self,
        projections: Mapping[str, Float[Array, "B T W"]],
        positions: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"],
        state: MatrixState | None,
        conv_segments: Int[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T H V"], MatrixState]:
        conv_state = None if state is None else state.conv_state
        if self.conv is not None:
            conv_segments = segment_ids if conv_segments is None else conv_segments
            convolved, conv_state = self.conv(self._concat(projections), conv_segments, conv_state)
            projections = self._split(projections, convolved)
        q, k, v, log_decay, erase, write = self.recurrence_inputs(projections, positions)
        options = {
            "log_decay": log_decay,
            "state": None if state is None else state.recurrent_state,
            "segment_ids": jnp.repeat(segment_ids, self.num_householder, axis=1),
            "scale": 1.0,
        }
        if erase is None or write is None:
            y, memory = linear_attention(q, k, v, **options)
        else:
            y, memory = delta_rule(q, k, v, erase=erase, write=write, **options)
        y = y[:, self.num_householder - 1 :: self.num_householder]  # a token reads after its last step
        return self.cell_output(y, projections), MatrixState(memory, conv_state)

    def step(
        self, projections: Mapping[str, Float[Array, "B W"]], info: StepInfo, state: MatrixState
    ) -> tuple[Float[Array, "B H V"], MatrixState]:
        memory, conv_state = state
        if self.conv is not None and conv_state is not None:
            convolved, conv_state = self.conv.step(self._concat(projections), info, conv_state)
            projections = self._split(projections, convolved)
        sequence = {name: x[:, None] for name, x in projections.items()}
        inputs = self.recurrence_inputs(sequence, jnp.asarray(info.position)[:, None])
        active, y = jnp.asarray(info.active), jnp.zeros(())
        for step in range(self.num_householder):
            # A decay of shape [H] is the same at every step.
            step_inputs = jax.tree.map(lambda x, step=step: x if x.ndim == 1 else x[:, step], inputs)
            y, memory = _recurrence_step(step_inputs, memory, active)
        return self.cell_output(y[:, None], sequence)[:, 0], MatrixState(memory, conv_state)

    def _concat(self, projections: Mapping[str, Float[Array, "... W"]]) -> Float[Array, "... C"]:
        return jnp.concatenate([projections[name] for name in self.conv_inputs], axis=-1)

    def _split(
        self, projections: Mapping[str, Float[Array, "... W"]], concatenated: Float[Array, "... C"]
    ) -> dict[str, Array]:
        widths = [projections[name].shape[-1] for name in self.conv_inputs]
        ends = [sum(widths[: i + 1]) for i in range(len(widths) - 1)]
        return {**projections, **dict(zip(self.conv_inputs, jnp.split(concatenated, ends, axis=-1), strict=True))}


def _recurrence_step(
    inputs: RecurrenceInputs, recurrent_state: Float[Array, "B H K V"], active: Bool[Array, " B"]
) -> tuple[Float[Array, "B H V"], Float[Array, "B H K V"]]:
    q, k, v, log_decay, erase, write = inputs
    if erase is None or write is None:
        return linear_attention_step(q, k, v, recurrent_state, active, log_decay=log_decay, scale=1.0)
    return delta_rule_step(q, k, v, recurrent_state, active, erase=erase, write=write, log_decay=log_decay, scale=1.0)
