"""Workspace memory: a few slots per sequence, written after every chunk and read by the tokens of the next ones.

    y_t = W_o softmax_s(W_q x_t . W_k S^_s / sqrt(r)) W_v S^_s             S^ = rms(S), the slots as chunk c found them
    u_s = softmax_t(W_a S^_s . W_b x_t / sqrt(r)) W_c x_t                  over the tokens of chunk c
    S  <- S + beta * (u - S),   beta = sigmoid([S^, rms(u)] W_g + b)       per slot and channel, at the end of chunk c

Slots are r wide and start at learned vectors, which tell them apart; what is written is in the state, never in a
parameter. W_o starts at zero. A chunk counts positions within its document. State: S, and of an unfinished chunk the
softmax so far (maximum, weight, weighted sum): 2 S r + 2 S float32, whatever the chunk.

Source: Hydra (arXiv 2508.15099) names a latent workspace that is read and written. Its prototype (64 slots, 32 active,
rank 128, a mean of .9 and .1 without gradient) summarises the whole sequence, which tells the future, and overwrites
buffers that all sequences share; slots, gate and chunks are chosen here.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from recallax.config import ConfigError
from recallax.layers.base import MixerConfig, RecurrentMixer, Site
from recallax.layers.dense import Linear, parameter
from recallax.layers.norm import RMSNorm
from recallax.pallas_kernels.grid import cut, joined, off_grid, pieces
from recallax.pallas_kernels.product import product
from recallax.types import Aux, Precision, SeqInfo, StepInfo

NEVER = -1e30


@dataclass(frozen=True, kw_only=True)
class Workspace(MixerConfig):
    """See the head of the file."""

    slots: int = 64
    rank: int = 128
    """r: width of a slot."""
    chunk: int = 64
    """Tokens between two writes."""

    def __post_init__(self) -> None:
        for name in ("slots", "rank", "chunk"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 1")

    @property
    def grid(self) -> int:
        return self.chunk

    def build(self, d_model: int, site: Site, *, precision: Precision, rngs: nnx.Rngs) -> "WorkspaceMixer":
        return WorkspaceMixer(self, d_model, site, precision=precision, rngs=rngs)


class WorkspaceState(NamedTuple):
    """The slots, and what the unfinished chunk is about to write."""

    slots: Float[Array, "B S R"]
    largest: Float[Array, "B S"]
    """Of the chunk's scores; 0 where it has no token."""
    weight: Float[Array, "B S"]
    """Sum of exp(score - largest)."""
    total: Float[Array, "B S R"]
    """The same sum over what is to be written."""


class WorkspaceMixer(RecurrentMixer):
    """See the head of the file."""

    def __init__(self, config: Workspace, d_model: int, site: Site, *, precision: Precision, rngs: nnx.Rngs):
        rank, self.rank, self.chunk = config.rank, config.rank, config.chunk
        self.dtype = precision.compute
        inner = precision._replace(compute=jnp.float32)  # slots are sums over time

        def tokens() -> Linear:
            return Linear(d_model, rank, precision=precision, rngs=rngs, axes=("embed", None))

        def slots(inputs: int, bias: bool = False) -> Linear:
            std = inputs**-0.5
            return Linear(inputs, rank, precision=inner, rngs=rngs, std=std, bias=bias, axes=(None, None))

        self.start = parameter(
            jax.random.normal(rngs.params(), (config.slots, rank), precision.param), (None, None), decay=False
        )
        self.query, self.write_key, self.write_value = tokens(), tokens(), tokens()
        self.key, self.value, self.write_query = slots(rank), slots(rank), slots(rank)
        self.gate = slots(2 * rank, bias=True)
        self.slot_norm, self.write_norm = (RMSNorm(rank, precision=inner) for _ in range(2))
        self.out = Linear(rank, d_model, precision=precision, rngs=rngs, std=0.0, axes=(None, "embed"))

    def __call__(self, x: Float[Array, "B T D"], seq: SeqInfo) -> tuple[Float[Array, "B T D"], Aux]:
        y, _ = self._pieces(x, seq, None)
        return y, {}

    def init_state(self, batch: int, max_len: int) -> WorkspaceState:
        start = jnp.broadcast_to(self.start[...].astype(jnp.float32), (batch, *self.start.shape))
        none = jnp.zeros(start.shape[:2], jnp.float32)
        return WorkspaceState(start, none, none, jnp.zeros_like(start))

    def prefill(
        self, x: Float[Array, "B T D"], seq: SeqInfo, state: WorkspaceState
    ) -> tuple[Float[Array, "B T D"], WorkspaceState, Aux]:
        return *self._pieces(x, seq, state), {}

    def step(
        self, x: Float[Array, "B D"], info: StepInfo, state: WorkspaceState
    ) -> tuple[Float[Array, "B D"], WorkspaceState]:
        active, position = jnp.asarray(info.active), jnp.asarray(info.position)[:, None]
        seq = SeqInfo(position, active.astype(jnp.int32)[:, None], jnp.zeros(position.shape, bool))
        y, state, _ = self.prefill(x[:, None], seq, state)
        return jnp.where(active[:, None], y[:, 0], 0), state

    def _pieces(
        self, x: Float[Array, "B T D"], seq: SeqInfo, state: WorkspaceState | None
    ) -> tuple[Float[Array, "B T D"], WorkspaceState]:
        """Chunk after chunk: each one's questions to the slots need what the one before wrote."""
        positions, segments = jnp.asarray(seq.positions), jnp.asarray(seq.segments)
        rows, length = positions.shape
        begun = None if state is None else positions[:, 0] % self.chunk
        parts = pieces(length, self.chunk, begun, rows)
        streams = (cut(part(x), parts) for part in (self.query, self.write_key, self.write_value))
        at, valid = cut(positions, parts), (cut(segments, parts) > 0) & parts.inside
        start = self.init_state(rows, length) if state is None else state
        state, read = jax.lax.scan(jax.checkpoint(self._piece), start, (*streams, at, valid))
        y = self.out(joined(read, length, self.chunk, begun))
        wrong = off_grid(positions, segments, parts, self.chunk)
        return jnp.where(wrong[:, None, None], jnp.full_like(y, jnp.nan), y), state

    def _piece(self, state: WorkspaceState, part: tuple[Array, ...]) -> tuple[WorkspaceState, Float[Array, "B C R"]]:
        """Tokens of one chunk: what they read, and the slots after them."""
        query, key, value, at, valid = part
        fresh = self.init_state(at.shape[0], 1)
        state = _where(valid[:, 0] & (at[:, 0] == 0), fresh, state)
        slots = self.slot_norm(state.slots)
        scale = self.rank**-0.5
        scores = product("bcr,bsr->bcs", query.astype(jnp.float32) * scale, self.key(slots))
        read = product("bcs,bsr->bcr", jax.nn.softmax(scores, axis=-1), self.value(slots)).astype(self.dtype)

        wanted = product("bsr,bcr->bsc", self.write_query(slots) * scale, key.astype(jnp.float32))
        begun = state.weight > 0
        wanted = jnp.where(valid[:, None], wanted, NEVER)
        before = jnp.where(begun, state.largest, NEVER)
        largest = jax.lax.stop_gradient(jnp.maximum(before, wanted.max(axis=-1)))
        kept = jnp.where(begun, jnp.exp(before - largest), 0)
        weights = jnp.where(valid[:, None], jnp.exp(wanted - largest[..., None]), 0)
        weight = kept * state.weight + weights.sum(axis=-1)
        total = kept[..., None] * state.total + product("bsc,bcr->bsr", weights, value.astype(jnp.float32))
        unfinished = WorkspaceState(state.slots, largest, weight, total)

        new = total / jnp.maximum(weight, 1e-30)[..., None]
        beta = jax.nn.sigmoid(self.gate(jnp.concatenate([slots, self.write_norm(new)], axis=-1)))
        written = state.slots + beta * (new - state.slots)
        none = jnp.zeros_like(weight)
        full = (valid & (at % self.chunk == self.chunk - 1)).any(axis=1)
        after = _where(full, WorkspaceState(written, none, none, jnp.zeros_like(total)), unfinished)
        return _where(valid.any(axis=1), after, state), read


def _where(rows: Bool[Array, " B"], a: WorkspaceState, b: WorkspaceState) -> WorkspaceState:
    return jax.tree.map(lambda x, y: jnp.where(rows.reshape(-1, *[1] * (x.ndim - 1)), x, y), a, b)
