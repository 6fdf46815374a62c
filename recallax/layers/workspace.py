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

from recallax.config import require_at_least
from recallax.layers.base import LayerInfo, MixerConfig, RecurrentMixer
from recallax.layers.dense import Linear, parameter
from recallax.layers.norm import RMSNorm
from recallax.pallas_kernels.einsum_f32 import einsum_f32
from recallax.pallas_kernels.grid import grid_blocks, merge_grid_blocks, misaligned_rows, split_grid_blocks
from recallax.types import Aux, Precision, SeqInfo, StepInfo

MASK_VALUE = -1e30


@dataclass(frozen=True, kw_only=True)
class Workspace(MixerConfig):
    """See the head of the file."""

    num_slots: int = 64
    slot_dim: int = 128
    """r: width of a slot."""
    chunk_size: int = 64
    """Tokens between two writes."""

    def __post_init__(self) -> None:
        require_at_least(1, num_slots=self.num_slots, slot_dim=self.slot_dim, chunk_size=self.chunk_size)

    @property
    def grid(self) -> int:
        return self.chunk_size

    def build(self, d_model: int, layer: LayerInfo, *, precision: Precision, rngs: nnx.Rngs) -> "WorkspaceMixer":
        return WorkspaceMixer(self, d_model, layer, precision=precision, rngs=rngs)


class WorkspaceState(NamedTuple):
    """The slots, and what the unfinished chunk is about to write."""

    slots: Float[Array, "B S R"]
    max_score: Float[Array, "B S"]
    """Of the chunk's scores; 0 where it has no token."""
    softmax_denominator: Float[Array, "B S"]
    """Sum of exp(score - largest)."""
    softmax_numerator: Float[Array, "B S R"]
    """The same sum over what is to be written."""


class WorkspaceMixer(RecurrentMixer):
    """See the head of the file."""

    def __init__(self, config: Workspace, d_model: int, layer: LayerInfo, *, precision: Precision, rngs: nnx.Rngs):
        rank, self.slot_dim, self.chunk_size = config.slot_dim, config.slot_dim, config.chunk_size
        self.dtype = precision.compute
        inner = precision._replace(compute=jnp.float32)  # slots are sums over time

        def tokens() -> Linear:
            return Linear(d_model, rank, precision=precision, rngs=rngs, axes=("embed", None))

        def slots(inputs: int, bias: bool = False) -> Linear:
            std = inputs**-0.5
            return Linear(inputs, rank, precision=inner, rngs=rngs, std=std, bias=bias, axes=(None, None))

        self.start = parameter(
            jax.random.normal(rngs.params(), (config.num_slots, rank), precision.param),
            (None, None),
            weight_decay=False,
        )
        self.query, self.write_key, self.write_value = tokens(), tokens(), tokens()
        self.key, self.value, self.write_query = slots(rank), slots(rank), slots(rank)
        self.gate = slots(2 * rank, bias=True)
        self.slot_norm, self.write_norm = (RMSNorm(rank, precision=inner) for _ in range(2))
        self.out = Linear(rank, d_model, precision=precision, rngs=rngs, std=0.0, axes=(None, "embed"))

    def __call__(self, x: Float[Array, "B T D"], seq: SeqInfo) -> tuple[Float[Array, "B T D"], Aux]:
        y, _ = self._scan_chunks(x, seq, None)
        return y, {}

    def init_state(self, batch: int, max_len: int) -> WorkspaceState:
        start = jnp.broadcast_to(self.start[...].astype(jnp.float32), (batch, *self.start.shape))
        none = jnp.zeros(start.shape[:2], jnp.float32)
        return WorkspaceState(start, none, none, jnp.zeros_like(start))

    def prefill(
        self, x: Float[Array, "B T D"], seq: SeqInfo, state: WorkspaceState
    ) -> tuple[Float[Array, "B T D"], WorkspaceState, Aux]:
        return *self._scan_chunks(x, seq, state), {}

    def step(
        self, x: Float[Array, "B D"], info: StepInfo, state: WorkspaceState
    ) -> tuple[Float[Array, "B D"], WorkspaceState]:
        active, position = jnp.asarray(info.active), jnp.asarray(info.position)[:, None]
        seq = SeqInfo(position, active.astype(jnp.int32)[:, None], jnp.zeros(position.shape, bool))
        y, state, _ = self.prefill(x[:, None], seq, state)
        return jnp.where(active[:, None], y[:, 0], 0), state

    def _scan_chunks(
        self, x: Float[Array, "B T D"], seq: SeqInfo, state: WorkspaceState | None
    ) -> tuple[Float[Array, "B T D"], WorkspaceState]:
        """Chunk after chunk: each one's questions to the slots need what the one before wrote."""
        positions, segments = jnp.asarray(seq.positions), jnp.asarray(seq.segment_ids)
        rows, length = positions.shape
        begun = None if state is None else positions[:, 0] % self.chunk_size
        parts = grid_blocks(length, self.chunk_size, begun, rows)
        streams = (split_grid_blocks(part(x), parts) for part in (self.query, self.write_key, self.write_value))
        at, valid = split_grid_blocks(positions, parts), (split_grid_blocks(segments, parts) > 0) & parts.mask
        start = self.init_state(rows, length) if state is None else state
        state, read = jax.lax.scan(jax.checkpoint(self._chunk_step), start, (*streams, at, valid))
        y = self.out(merge_grid_blocks(read, length, self.chunk_size, begun))
        wrong = misaligned_rows(positions, segments, parts, self.chunk_size)
        return jnp.where(wrong[:, None, None], jnp.full_like(y, jnp.nan), y), state

    def _chunk_step(
        self, state: WorkspaceState, part: tuple[Array, ...]
    ) -> tuple[WorkspaceState, Float[Array, "B C R"]]:
        """Tokens of one chunk: what they read, and the slots after them."""
        query, key, value, at, valid = part
        fresh = self.init_state(at.shape[0], 1)
        state = _where_rows(valid[:, 0] & (at[:, 0] == 0), fresh, state)
        slots = self.slot_norm(state.slots)
        scale = self.slot_dim**-0.5
        scores = einsum_f32("bcr,bsr->bcs", query.astype(jnp.float32) * scale, self.key(slots))
        read = einsum_f32("bcs,bsr->bcr", jax.nn.softmax(scores, axis=-1), self.value(slots)).astype(self.dtype)

        wanted = einsum_f32("bsr,bcr->bsc", self.write_query(slots) * scale, key.astype(jnp.float32))
        begun = state.softmax_denominator > 0
        wanted = jnp.where(valid[:, None], wanted, MASK_VALUE)
        before = jnp.where(begun, state.max_score, MASK_VALUE)
        largest = jax.lax.stop_gradient(jnp.maximum(before, wanted.max(axis=-1)))
        kept = jnp.where(begun, jnp.exp(before - largest), 0)
        weights = jnp.where(valid[:, None], jnp.exp(wanted - largest[..., None]), 0)
        weight = kept * state.softmax_denominator + weights.sum(axis=-1)
        total = kept[..., None] * state.softmax_numerator + einsum_f32(
            "bsc,bcr->bsr", weights, value.astype(jnp.float32)
        )
        unfinished = WorkspaceState(state.slots, largest, weight, total)

        new = total / jnp.maximum(weight, 1e-30)[..., None]
        beta = jax.nn.sigmoid(self.gate(jnp.concatenate([slots, self.write_norm(new)], axis=-1)))
        written = state.slots + beta * (new - state.slots)
        none = jnp.zeros_like(weight)
        full = (valid & (at % self.chunk_size == self.chunk_size - 1)).any(axis=1)
        after = _where_rows(full, WorkspaceState(written, none, none, jnp.zeros_like(total)), unfinished)
        return _where_rows(valid.any(axis=1), after, state), read


def _where_rows(rows: Bool[Array, " B"], a: WorkspaceState, b: WorkspaceState) -> WorkspaceState:
    return jax.tree.map(lambda x, y: jnp.where(rows.reshape(-1, *[1] * (x.ndim - 1)), x, y), a, b)
