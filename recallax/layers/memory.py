"""Matrix memories: the skeleton that the linear-recurrence family shares.

    q = x W_q,  streams = x W_s (keys, values, gates)    ->  convolution, gates     ->  S_t by the op, o_t = S_t^T q_t
    y_t = W_o readout(o_t, x_t)

A member of the family is a config that says how each of four parts is made: the query projection, the writer (what a
token writes; `MoM` owns one per memory), the cell (convolution, gates, recurrence; shared by the memories) and the
readout (norm, gate, output projection). State: K V float32 per value head and the tail of the convolution.
"""

import abc
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from recallax.layers.base import MixerConfig, RecurrentMixer, Site
from recallax.layers.continuation import continued, started
from recallax.layers.dense import Linear, Streams
from recallax.layers.readout import Readout
from recallax.layers.short_convolution import ShortConvolution
from recallax.pallas_kernels.delta_rule import delta_rule, delta_rule_step
from recallax.pallas_kernels.linear_attention import linear_attention, linear_attention_step
from recallax.types import Aux, Precision, SeqInfo, StepInfo


class Recurrence(NamedTuple):
    """What tokens do to a matrix memory: arguments of `linear_attention`, or of `delta_rule` where `erase` is given."""

    q: Float[Array, "B T G K"]
    k: Float[Array, "B T G K"]
    v: Float[Array, "B T H V"]
    log_decay: Float[Array, "..."] | None = None
    """[H], [B, T, H] or [B, T, H, K]."""
    erase: Float[Array, "B T H"] | None = None
    write: Float[Array, "B T H"] | None = None


class MemoryState(NamedTuple):
    """The memory and the last inputs of the convolution (None without one)."""

    memory: Float[Array, "B H K V"]
    past: Float[Array, "B W-1 C"] | None


class Sizes(NamedTuple):
    """Heads of queries and keys, heads of values, and their widths."""

    groups: int
    heads: int
    keys: int
    values: int


class Cell(nnx.Module, abc.ABC):
    """One matrix memory, from raw projections to what is read from it. Subclasses say how gates become a recurrence."""

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

    def skip(self, y: Float[Array, "B T H V"], streams: Mapping[str, Float[Array, "B T W"]]) -> Float[Array, "B T H V"]:
        """What is read, plus whatever passes the memory by."""
        return y

    def init_state(self, batch: int) -> MemoryState:
        """The empty memory."""
        _, heads, keys, values = self.sizes
        memory = jnp.zeros((batch, heads, keys, values), jnp.float32)
        return MemoryState(memory, None if self.conv is None else self.conv.init_state(batch))

    def run(
        self,
        streams: Mapping[str, Float[Array, "B T W"]],
        positions: Int[Array, "B T"],
        segments: Int[Array, "B T"],
        state: MemoryState | None,
    ) -> tuple[Float[Array, "B T H V"], MemoryState]:
        """What each token reads, and the final state; `state` belongs to the row's first document, None is empty."""
        past = None if state is None else state.past
        if self.conv is not None:
            joined, past = self.conv(self._joined(streams), segments, past)
            streams = self._apart(streams, joined)
        q, k, v, log_decay, erase, write = self.recurrence(streams, positions)
        where = {"state": None if state is None else state.memory, "segments": jnp.repeat(segments, self.micro, axis=1)}
        if erase is None or write is None:
            y, memory = linear_attention(q, k, v, log_decay=log_decay, scale=1.0, **where)
        else:
            y, memory = delta_rule(q, k, v, erase=erase, write=write, log_decay=log_decay, scale=1.0, **where)
        return self.skip(y[:, self.micro - 1 :: self.micro], streams), MemoryState(memory, past)

    def step(
        self, streams: Mapping[str, Float[Array, "B W"]], info: StepInfo, state: MemoryState
    ) -> tuple[Float[Array, "B H V"], MemoryState]:
        """One token of each active row."""
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
        return self.skip(y[:, None], whole)[:, 0], MemoryState(memory, past)

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


class MemoryConfig(MixerConfig, abc.ABC):
    """A member of the family: how its four parts are made. Each is called once per module, with its own keys."""

    @abc.abstractmethod
    def sizes(self, d_model: int) -> Sizes:
        """Heads and widths; raises ConfigError where they do not fit."""

    def query(self, d_model: int, *, precision: Precision, rngs: nnx.Rngs) -> Streams:
        """What every memory is read with."""
        groups, _, keys, _ = self.sizes(d_model)
        return Streams({"q": Linear(d_model, groups * keys, precision=precision, rngs=rngs)})

    @abc.abstractmethod
    def writer(self, d_model: int, *, precision: Precision, rngs: nnx.Rngs) -> Streams:
        """What one memory is written with: keys, values, gates."""

    @abc.abstractmethod
    def cell(self, d_model: int, site: Site, *, precision: Precision, rngs: nnx.Rngs) -> Cell:
        """Convolution, gates and recurrence."""

    @abc.abstractmethod
    def readout(self, d_model: int, site: Site, *, precision: Precision, rngs: nnx.Rngs) -> Readout:
        """Norm, gate and output projection."""

    def build(self, d_model: int, site: Site, *, precision: Precision, rngs: nnx.Rngs) -> "MemoryMixer":
        return MemoryMixer(self, d_model, site, precision=precision, rngs=rngs)


class MemoryMixer(RecurrentMixer):
    """One memory that every token writes to."""

    def __init__(self, config: MemoryConfig, d_model: int, site: Site, *, precision: Precision, rngs: nnx.Rngs):
        self.query = config.query(d_model, precision=precision, rngs=rngs)
        self.writer = config.writer(d_model, precision=precision, rngs=rngs)
        self.cell = config.cell(d_model, site, precision=precision, rngs=rngs)
        self.readout = config.readout(d_model, site, precision=precision, rngs=rngs)

    def __call__(self, x: Float[Array, "B T D"], seq: SeqInfo) -> tuple[Float[Array, "B T D"], Aux]:
        y, _ = self.cell.run(self._streams(x), jnp.asarray(seq.positions), jnp.asarray(seq.segments), None)
        return self.readout(y, x), {}

    def init_state(self, batch: int, max_len: int) -> MemoryState:
        return self.cell.init_state(batch)

    def prefill(
        self, x: Float[Array, "B T D"], seq: SeqInfo, state: MemoryState
    ) -> tuple[Float[Array, "B T D"], MemoryState, Aux]:
        state = continued(state, seq)
        y, state = self.cell.run(self._streams(x), jnp.asarray(seq.positions), jnp.asarray(seq.segments), state)
        return self.readout(y, x), state, {}

    def step(
        self, x: Float[Array, "B D"], info: StepInfo, state: MemoryState
    ) -> tuple[Float[Array, "B D"], MemoryState]:
        y, state = self.cell.step(self._streams(x), info, started(state, info))
        return jnp.where(jnp.asarray(info.active)[:, None], self.readout(y, x), 0), state

    def _streams(self, x: Float[Array, "*batch D"]) -> dict[str, Array]:
        return self.query(x) | self.writer(x)
