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

from recallax.layers.memory import Cell, Sizes
from recallax.layers.short_convolution import ShortConvolution
from recallax.pallas_kernels.delta_rule import delta_rule, delta_rule_step
from recallax.pallas_kernels.linear_attention import linear_attention, linear_attention_step
from recallax.types import StepInfo


class Recurrence(NamedTuple):
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

    memory: Float[Array, "B H K V"]
    past: Float[Array, "B W-1 C"] | None


class MatrixCell(Cell):
    """One matrix memory: convolution, gates, recurrence. Subclasses say how gates become a recurrence."""

    convolved: tuple[str, ...] = ("q", "k", "v")
    """Streams that pass the convolution, where there is one."""
    micro: int = 1
    """Steps of the recurrence per token."""

    def __init__(self, sizes: Sizes, conv: ShortConvolution | None = None):
        self.sizes = sizes
        self.conv = conv

    @abc.abstractmethod
    def recurrence(self, streams: Mapping[str, Float[Array, "B T W"]], positions: Int[Array, "B T"]) -> Recurrence:
        """The recurrence of T tokens from their streams, those after the convolution among them; T * micro steps."""

    def read(self, y: Float[Array, "B T H V"], streams: Mapping[str, Float[Array, "B T W"]]) -> Float[Array, "B T H V"]:
        """What leaves the cell, from what the recurrence put out."""
        return y

    def init_state(self, batch: int) -> MatrixState:
        _, heads, keys, values = self.sizes
        memory = jnp.zeros((batch, heads, keys, values), jnp.float32)
        return MatrixState(memory, None if self.conv is None else self.conv.init_state(batch))

    def run(
        self,
        streams: Mapping[str, Float[Array, "B T W"]],
        positions: Int[Array, "B T"],
        segments: Int[Array, "B T"],
        state: MatrixState | None,
        stretches: Int[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T H V"], MatrixState]:
        past = None if state is None else state.past
        if self.conv is not None:
            joined, past = self.conv(self._joined(streams), segments if stretches is None else stretches, past)
            streams = self._apart(streams, joined)
        q, k, v, log_decay, erase, write = self.recurrence(streams, positions)
        where = {"state": None if state is None else state.memory, "segments": jnp.repeat(segments, self.micro, axis=1)}
        if erase is None or write is None:
            y, memory = linear_attention(q, k, v, log_decay=log_decay, scale=1.0, **where)
        else:
            y, memory = delta_rule(q, k, v, erase=erase, write=write, log_decay=log_decay, scale=1.0, **where)
        return self.read(y[:, self.micro - 1 :: self.micro], streams), MatrixState(memory, past)

    def step(
        self, streams: Mapping[str, Float[Array, "B W"]], info: StepInfo, state: MatrixState
    ) -> tuple[Float[Array, "B H V"], MatrixState]:
        memory, past = state
        if self.conv is not None and past is not None:
            joined, past = self.conv.step(self._joined(streams), info, past)
            streams = self._apart(streams, joined)
        whole = {name: x[:, None] for name, x in streams.items()}
        parts = self.recurrence(whole, jnp.asarray(info.position)[:, None])
        active, y = jnp.asarray(info.active), jnp.zeros(())
        for step in range(self.micro):
            # A decay [H] is the same at every step.
            now = jax.tree.map(lambda x, step=step: x if x.ndim == 1 else x[:, step], parts)
            y, memory = _step(now, memory, active)
        return self.read(y[:, None], whole)[:, 0], MatrixState(memory, past)

    def _joined(self, streams: Mapping[str, Float[Array, "... W"]]) -> Float[Array, "... C"]:
        return jnp.concatenate([streams[name] for name in self.convolved], axis=-1)

    def _apart(self, streams: Mapping[str, Float[Array, "... W"]], joined: Float[Array, "... C"]) -> dict[str, Array]:
        widths = [streams[name].shape[-1] for name in self.convolved]
        ends = [sum(widths[: i + 1]) for i in range(len(widths) - 1)]
        return {**streams, **dict(zip(self.convolved, jnp.split(joined, ends, axis=-1), strict=True))}


def _step(
    now: Recurrence, memory: Float[Array, "B H K V"], active: Bool[Array, " B"]
) -> tuple[Float[Array, "B H V"], Float[Array, "B H K V"]]:
    q, k, v, log_decay, erase, write = now
    if erase is None or write is None:
        return linear_attention_step(q, k, v, memory, active, log_decay=log_decay, scale=1.0)
    strengths = {"erase": erase, "write": write}
    return delta_rule_step(q, k, v, memory, active, log_decay=log_decay, scale=1.0, **strengths)
