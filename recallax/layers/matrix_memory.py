"""Cells whose memory is a matrix per head, written and read by linear attention or by the delta rule.

    streams  ->  convolution  ->  q, k, v and gates  ->  S_t by the op, o_t = S_t^T q_t

State: K V float32 per value head and the tail of the convolution.
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
    """What tokens do to a matrix memory: arguments of `linear_attention`, or of `delta_rule` where `erase` is given."""

    q: Float[Array, "B T G K"]
    k: Float[Array, "B T G K"]
    v: Float[Array, "B T H V"]
    log_decay: Float[Array, "..."] | None = None
    """[H], [B, T, H] or [B, T, H, K]."""
    erase: Float[Array, "B T H"] | None = None
    write: Float[Array, "B T H"] | None = None


class MatrixState(NamedTuple):
    """The memory and the last inputs of the convolution (None without one)."""

    recurrent_state: Float[Array, "B H K V"]
    conv_state: Float[Array, "B W-1 C"] | None


class MatrixCell(RecurrentCell):
    """One matrix memory: convolution, gates, recurrence. Subclasses say how gates become a recurrence."""

    conv_inputs: tuple[str, ...] = ("q", "k", "v")
    """Streams that pass the convolution, where there is one."""
    num_householder: int = 1
    """Steps of the recurrence per token."""

    def __init__(self, head_dims: HeadDims, conv: ShortConvolution | None = None):
        self.head_dims = head_dims
        self.conv = conv

    @abc.abstractmethod
    def recurrence_inputs(
        self, projections: Mapping[str, Float[Array, "B T W"]], positions: Int[Array, "B T"]
    ) -> RecurrenceInputs:
        """The recurrence of T tokens from their streams, those after the convolution among them; T * micro steps."""

    def cell_output(
        self, y: Float[Array, "B T H V"], projections: Mapping[str, Float[Array, "B T W"]]
    ) -> Float[Array, "B T H V"]:
        """What leaves the cell, from what the recurrence put out."""
        return y

    def init_state(self, batch: int) -> MatrixState:
        _, heads, keys, values = self.head_dims
        memory = jnp.zeros((batch, heads, keys, values), jnp.float32)
        return MatrixState(memory, None if self.conv is None else self.conv.init_state(batch))

    def run(
        self,
        projections: Mapping[str, Float[Array, "B T W"]],
        positions: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"],
        state: MatrixState | None,
        conv_segments: Int[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T H V"], MatrixState]:
        past = None if state is None else state.conv_state
        if self.conv is not None:
            joined, past = self.conv(
                self._concat(projections), segment_ids if conv_segments is None else conv_segments, past
            )
            projections = self._split(projections, joined)
        q, k, v, log_decay, erase, write = self.recurrence_inputs(projections, positions)
        where = {
            "state": None if state is None else state.recurrent_state,
            "segments": jnp.repeat(segment_ids, self.num_householder, axis=1),
        }
        if erase is None or write is None:
            y, memory = linear_attention(q, k, v, log_decay=log_decay, scale=1.0, **where)
        else:
            y, memory = delta_rule(q, k, v, erase=erase, write=write, log_decay=log_decay, scale=1.0, **where)
        return self.cell_output(y[:, self.num_householder - 1 :: self.num_householder], projections), MatrixState(
            memory, past
        )

    def step(
        self, projections: Mapping[str, Float[Array, "B W"]], info: StepInfo, state: MatrixState
    ) -> tuple[Float[Array, "B H V"], MatrixState]:
        memory, past = state
        if self.conv is not None and past is not None:
            joined, past = self.conv.step(self._concat(projections), info, past)
            projections = self._split(projections, joined)
        whole = {name: x[:, None] for name, x in projections.items()}
        parts = self.recurrence_inputs(whole, jnp.asarray(info.position)[:, None])
        active, y = jnp.asarray(info.active), jnp.zeros(())
        for step in range(self.num_householder):
            # A decay [H] is the same at every step.
            now = jax.tree.map(lambda x, step=step: x if x.ndim == 1 else x[:, step], parts)
            y, memory = _recurrence_step(now, memory, active)
        return self.cell_output(y[:, None], whole)[:, 0], MatrixState(memory, past)

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
    strengths = {"erase": erase, "write": write}
    return delta_rule_step(q, k, v, recurrent_state, active, log_decay=log_decay, scale=1.0, **strengths)
