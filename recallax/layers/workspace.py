"""Workspace memory: S slots per sequence, which each chunk reads at its start and updates at its end.

    y_t = W_o softmax_s(W_q x_t . W_k S^_s / sqrt(r)) W_v S^_s             S^ = rms(S), slots at the start of chunk c
    u_s = softmax_t(W_a S^_s . W_b x_t / sqrt(r)) W_c x_t                  over the tokens of chunk c
    S  <- S + beta * (u - S),   beta = sigmoid([S^, rms(u)] W_g + b)       per slot and channel, at the end of chunk c

Slots have width r. Each starts at a learned vector, by which slots differ from each other. W_o is initialised to zero.
Chunks count positions within the document. State: S, and for the unfinished chunk the running softmax (maximum,
denominator and numerator): 2 S r + 2 S float32 for any chunk size.

Source: Hydra (arXiv 2508.15099) describes a latent workspace that is read and written. Its prototype (64 slots of rank
128, 32 of them active, an average with weights 0.9 and 0.1 without gradient) summarises the whole sequence, which leaks
future tokens, and overwrites buffers that all sequences share. Slots, gate and chunks here are our own.
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
from recallax.layers.state_reset import where_rows
from recallax.pallas_kernels.einsum_f32 import einsum_f32
from recallax.pallas_kernels.grid import grid_blocks, merge_grid_blocks, misaligned_rows, split_grid_blocks
from recallax.types import Aux, Precision, SeqInfo, StepInfo

MASK_VALUE = -1e30
"""Score of masked tokens: finite, so that differences of masked scores are not NaN."""
TINY = 1e-30
"""Lower bound of the softmax denominator, for chunks without a token."""


@dataclass(frozen=True, kw_only=True)
class Workspace(MixerConfig):
    """Slots that each chunk reads and updates (workspace memory of Hydra)."""

    num_slots: int = 64
    """S: number of slots."""
    slot_dim: int = 128
    """r: width of a slot."""
    chunk_size: int = 64
    """Tokens between two updates of the slots."""

    def __post_init__(self) -> None:
        require_at_least(1, num_slots=self.num_slots, slot_dim=self.slot_dim, chunk_size=self.chunk_size)

    @property
    def grid(self) -> int:
        return self.chunk_size

    def build(self, d_model: int, layer: LayerInfo, *, precision: Precision, rngs: nnx.Rngs) -> "WorkspaceMixer":
        return WorkspaceMixer(self, d_model, layer, precision=precision, rngs=rngs)


class WorkspaceState(NamedTuple):
    """State of `Workspace`: the slots, and the running softmax over the unfinished chunk, float32."""

    slots: Float[Array, "B S R"]
    max_score: Float[Array, "B S"]
    """Largest score of the chunk's tokens; 0 without a token."""
    softmax_denominator: Float[Array, "B S"]
    """Sum of exp(score - max_score)."""
    softmax_numerator: Float[Array, "B S R"]
    """Sum of exp(score - max_score) * value."""


class WorkspaceMixer(RecurrentMixer):
    """Attention from tokens to slots, and a gated update of the slots after each chunk."""

    def __init__(self, config: Workspace, d_model: int, layer: LayerInfo, *, precision: Precision, rngs: nnx.Rngs):
        rank, self.slot_dim, self.chunk_size = config.slot_dim, config.slot_dim, config.chunk_size
        self.dtype = precision.compute
        slot_precision = precision._replace(compute=jnp.float32)  # slots are sums over time

        def token_proj() -> Linear:
            return Linear(d_model, rank, precision=precision, rngs=rngs, axes=("embed", None))

        def slot_proj(inputs: int, bias: bool = False) -> Linear:
            std = inputs**-0.5
            return Linear(inputs, rank, precision=slot_precision, rngs=rngs, std=std, bias=bias, axes=(None, None))

        self.start = parameter(
            jax.random.normal(rngs.params(), (config.num_slots, rank), precision.param),
            (None, None),
            weight_decay=False,
        )
        self.query, self.write_key, self.write_value = token_proj(), token_proj(), token_proj()
        self.key, self.value, self.write_query = slot_proj(rank), slot_proj(rank), slot_proj(rank)
        self.gate = slot_proj(2 * rank, bias=True)
        self.slot_norm, self.write_norm = (RMSNorm(rank, precision=slot_precision) for _ in range(2))
        self.out = Linear(rank, d_model, precision=precision, rngs=rngs, std=0.0, axes=(None, "embed"))

    def __call__(self, x: Float[Array, "B T D"], seq: SeqInfo) -> tuple[Float[Array, "B T D"], Aux]:
        y, _ = self._scan_chunks(x, seq, None)
        return y, {}

    def init_state(self, batch: int, max_len: int) -> WorkspaceState:
        slots = jnp.broadcast_to(self.start[...].astype(jnp.float32), (batch, *self.start.shape))
        return _empty_chunk(slots)

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
        """Process the chunks in order, since each one reads the slots that the previous one has updated."""
        positions, segment_ids = jnp.asarray(seq.positions), jnp.asarray(seq.segment_ids)
        rows, length = positions.shape
        offset = None if state is None else positions[:, 0] % self.chunk_size
        chunks = grid_blocks(length, self.chunk_size, offset, rows)
        q, k, v = (split_grid_blocks(proj(x), chunks) for proj in (self.query, self.write_key, self.write_value))
        chunk_positions = split_grid_blocks(positions, chunks)
        valid = (split_grid_blocks(segment_ids, chunks) > 0) & chunks.mask
        start = self.init_state(rows, length) if state is None else state
        state, read = jax.lax.scan(jax.checkpoint(self._chunk_step), start, (q, k, v, chunk_positions, valid))
        y = self.out(merge_grid_blocks(read, length, self.chunk_size, offset))
        misaligned = misaligned_rows(positions, segment_ids, chunks, self.chunk_size)
        return jnp.where(misaligned[:, None, None], jnp.full_like(y, jnp.nan), y), state

    def _chunk_step(
        self, state: WorkspaceState, chunk: tuple[Array, ...]
    ) -> tuple[WorkspaceState, Float[Array, "B C R"]]:
        """Read the slots with the tokens of one chunk, and update the slots of rows in which the chunk ends."""
        q, k, v, positions, valid = chunk
        initial = self.init_state(positions.shape[0], 1)
        state = where_rows(valid[:, 0] & (positions[:, 0] == 0), initial, state)
        slots = self.slot_norm(state.slots)
        scale = self.slot_dim**-0.5
        scores = einsum_f32("bcr,bsr->bcs", q.astype(jnp.float32) * scale, self.key(slots))
        read = einsum_f32("bcs,bsr->bcr", jax.nn.softmax(scores, axis=-1), self.value(slots)).astype(self.dtype)

        scores = einsum_f32("bsr,bcr->bsc", self.write_query(slots) * scale, k.astype(jnp.float32))
        unfinished = _add_to_softmax(state, scores, v.astype(jnp.float32), valid)
        new = unfinished.softmax_numerator / jnp.maximum(unfinished.softmax_denominator, TINY)[..., None]
        beta = jax.nn.sigmoid(self.gate(jnp.concatenate([slots, self.write_norm(new)], axis=-1)))
        updated = _empty_chunk(state.slots + beta * (new - state.slots))
        chunk_ends = (valid & (positions % self.chunk_size == self.chunk_size - 1)).any(axis=1)
        return where_rows(valid.any(axis=1), where_rows(chunk_ends, updated, unfinished), state), read


def _empty_chunk(slots: Float[Array, "B S R"]) -> WorkspaceState:
    """Create the state at the start of a chunk."""
    zeros = jnp.zeros(slots.shape[:2], jnp.float32)
    return WorkspaceState(slots, zeros, zeros, jnp.zeros_like(slots))


def _add_to_softmax(
    state: WorkspaceState, scores: Float[Array, "B S C"], values: Float[Array, "B C R"], valid: Bool[Array, "B C"]
) -> WorkspaceState:
    """Add tokens to the running softmax of the unfinished chunk."""
    has_tokens = state.softmax_denominator > 0
    scores = jnp.where(valid[:, None], scores, MASK_VALUE)
    old_max = jnp.where(has_tokens, state.max_score, MASK_VALUE)
    max_score = jax.lax.stop_gradient(jnp.maximum(old_max, scores.max(axis=-1)))
    old_scale = jnp.where(has_tokens, jnp.exp(old_max - max_score), 0)
    weights = jnp.where(valid[:, None], jnp.exp(scores - max_score[..., None]), 0)
    denominator = old_scale * state.softmax_denominator + weights.sum(axis=-1)
    numerator = old_scale[..., None] * state.softmax_numerator + einsum_f32("bsc,bcr->bsr", weights, values)
    return WorkspaceState(state.slots, max_score, denominator, numerator)
