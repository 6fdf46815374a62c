"""Gradients of queries, keys and decays per channel, from the states and their gradients: one block per chunk.

Each block computes 32 channels of one chunk. With S the state before the chunk, dS the gradient of the state after it,
and dP = scale dO V^T below and on the diagonal,

    dQ = scale 2^L (dO S^T) + (part of dP)        dK = 2^(L_C - L) (V dS^T) + (part of dP^T)

The parts of dP are products at the borders of `channel_decay_forward.py`. A decay scales what passes from before its
token to the token and those after it, so its gradient is, channel by channel,

    sum_{i >= t} q~_i (dO_i S^T) + sum_{j < t} k~_j (V_j dS^T) + sum_{i >= t} (q_i dq_i - k_i dk_i within the chunk)

and the state's own part 2^L_C S.dS. In the last sum almost everything cancels, so both of its sides use the same
rounded operands.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from recallax.pallas_kernels.mosaic_gpu.channel_decay_forward import (
    NUM_LEVELS,
    chunk_boundary_decay,
    copy_document_gates,
    level_decay_factors,
    level_mask,
    mask_across_documents,
    masked_row_sums,
    store_hi_lo_decay,
)
from recallax.pallas_kernels.mosaic_gpu.cumulative_decay import LOG2E, CumulativeDecay
from recallax.pallas_kernels.mosaic_gpu.kernel_launch import launch_kernel
from recallax.pallas_kernels.mosaic_gpu.warpgroup_primitives import (
    CHUNK,
    CHUNK_SHAPE,
    WGMMA,
    Ref,
    copy_smem_to_gmem,
    hi_lo_split,
    load_smem_f32,
    load_vector,
    row_and_column_iota,
    shared_group,
    smem_matrix,
    wgmma_accumulate,
    zero_accumulator,
)

CHANNEL_TILE = 32
"""Channels of a block: fewer than in the forward pass, since dq, dk and the decays' sums are all in registers."""
TILE_SHAPE = (CHUNK, CHANNEL_TILE)


class ChannelGradInputs(NamedTuple):
    """Inputs of the gradients of one pair of queries and keys."""

    q: Float[Array, "B T Q K"]
    """Queries; or erase keys, which do not see their own keys. Q is H or a divisor of it."""
    k: Float[Array, "B T G K"]
    decay: Float[Array, "B T H K"]
    """Log2-decay."""
    values: tuple[Float[Array, "B T H V"], Float[Array, "B T H V"]]
    """Gradient of the output dO, and values V."""
    states: tuple[Float[Array, "B H N K V"], ...]
    """S before each chunk, and dS after it. Without dS, q are erase keys and the part of dS is left out."""
    document_gates: CumulativeDecay | tuple[()]


class _BlockRefs(NamedTuple):
    """Shared memory of a block."""

    tokens: Ref
    """[2, C, D]: q and k; then their gradients."""
    values: Ref
    """[2, C, V]: dO and V."""
    states: Ref
    """[1 or 2, 64, V]: S and dS, for two tiles of channels."""
    decay: Ref
    """[4, C, D]: log2-decays of `store_hi_lo_decay`; then the high and low parts of two sums."""
    level: Ref
    """[2, C, D]: queries and keys at the borders of a level."""
    pairs: Ref
    """[C, C]: the pairs of a level."""
    vectors: Ref
    """[2, C]: document gates."""
    loaded: Ref
    """Barrier of the copies."""


class _BlockPosition(NamedTuple):
    """Indices and slices of a block."""

    row: Array
    head: Array
    part: Array
    """Index of the tile of channels."""
    chunk: Array
    time: Any
    channels: Any
    two_tiles: Any
    """Channels of the states in shared memory: a register matrix has at least 64 rows."""
    own_tile: Any
    """Channels of the block among them."""

    @classmethod
    def current(cls) -> "_BlockPosition":
        """Return the position of this block."""
        row, head, part, chunk = (lax.axis_index(name) for name in ("row", "head", "part", "chunk"))
        return cls(
            row,
            head,
            part,
            chunk,
            pl.ds(chunk * CHUNK, CHUNK),
            pl.ds(part * CHANNEL_TILE, CHANNEL_TILE),
            pl.ds(lax.div(part, 2) * 2 * CHANNEL_TILE, 2 * CHANNEL_TILE),
            pl.ds(lax.rem(part, 2) * CHANNEL_TILE, CHANNEL_TILE),
        )


def channel_decay_grads(
    inputs: ChannelGradInputs, chunk_decay: Float[Array, "B H N K"], scale: float
) -> tuple[Float[Array, "B T H K"], Float[Array, "B T H K"], Float[Array, "B T H K"]]:
    """Compute the gradients of q and k per value head, and of the natural log-decay.

    Args:
        inputs: Arrays of the forward pass and their gradients.
        chunk_decay: Decay 2^L_C of the state over each chunk.
        scale: Factor of the scores.
    """
    (b, t, _, k_dim), (h, v_dim) = inputs.q.shape, inputs.values[0].shape[2:]
    num_states = len(inputs.states)

    def channel_grads(inputs, dq, dk, ddecay, state_products):
        position = _BlockPosition.current()

        def scoped(*refs):
            _channel_block(inputs, _BlockRefs(*refs), (dq, dk, ddecay, state_products), position, scale)

        pl.run_scoped(
            scoped,
            smem_matrix(2, *TILE_SHAPE, tile=CHANNEL_TILE),
            smem_matrix(2, CHUNK, v_dim, tile=64),
            smem_matrix(num_states, 2 * CHANNEL_TILE, v_dim, tile=64),
            smem_matrix(4, *TILE_SHAPE, tile=CHANNEL_TILE),
            smem_matrix(2, *TILE_SHAPE, tile=CHANNEL_TILE),
            smem_matrix(*CHUNK_SHAPE, tile=CHANNEL_TILE),
            plgpu.SMEM((2, CHUNK), jnp.float32),
            plgpu.Barrier(num_arrivals=4 + num_states + len(inputs.document_gates)),
        )

    grads = jax.ShapeDtypeStruct((b, t, h, k_dim), inputs.q.dtype)
    state_products = (jax.ShapeDtypeStruct(chunk_decay.shape, jnp.float32),) * (num_states - 1)
    dq, dk, ddecay, state_products = launch_kernel(
        channel_grads,
        name="gradients" if num_states > 1 else "erasing_gradients",
        out_type=(grads, grads, jax.ShapeDtypeStruct(grads.shape, jnp.float32), state_products),
        grid={"row": b, "head": h, "part": k_dim // CHANNEL_TILE, "chunk": t // CHUNK},
        num_consumer_wgs=1,
        num_producer_wgs=0,
    )(inputs)
    for x in state_products:
        ddecay += jnp.repeat(jnp.moveaxis(x * chunk_decay, 2, 1), CHUNK, axis=1)
    return dq, dk, ddecay / LOG2E


def _channel_block(inputs, refs: _BlockRefs, outputs, position: _BlockPosition, scale):
    """Load the inputs of a block (references, as `ChannelGradInputs`), compute its gradients and store them."""
    dq, dk, ddecay, state_products = outputs
    row, head, part, n, time, channels, two_tiles, own_tile = position
    for i, x in enumerate((inputs.q, inputs.k)):
        group = shared_group(head, inputs.decay.shape[2], x.shape[2])
        plgpu.copy_gmem_to_smem(x.at[row, time, group, channels], refs.tokens.at[i], refs.loaded)
    for i, x in enumerate(inputs.values):
        plgpu.copy_gmem_to_smem(x.at[row, time, head], refs.values.at[i], refs.loaded)
    for i, x in enumerate(inputs.states):
        plgpu.copy_gmem_to_smem(x.at[row, head, n, two_tiles], refs.states.at[i], refs.loaded)
    gates = copy_document_gates(inputs.document_gates, row, time, refs.vectors, refs.loaded)
    plgpu.barrier_wait(refs.loaded)

    if state_products:

        @pl.when(lax.rem(part, 2) == 0)
        def _():
            state_products[0][row, head, n, two_tiles] = jnp.sum(
                load_smem_f32(refs.states.at[0]) * load_smem_f32(refs.states.at[1]), axis=1
            )

    (score_grads,) = wgmma_accumulate(
        (zero_accumulator(*CHUNK_SHAPE), (refs.values.at[0], refs.values.at[1].transpose((1, 0))))
    )
    score_grads = mask_across_documents(score_grads, gates) * scale
    state_tiles = [refs.states.at[i, own_tile] for i in range(len(inputs.states))]
    log2_decay = load_vector(inputs.decay.at[row, time, head, channels], WGMMA)
    *token_grads, decay_grad = _channel_tile_grads(refs, log2_decay, state_tiles, score_grads, gates, scale)
    ddecay[row, time, head, channels] = decay_grad
    for i, x in enumerate(token_grads):
        refs.tokens.at[i][...] = x.astype(refs.tokens.dtype)
    plgpu.commit_smem()
    copy_smem_to_gmem(*((refs.tokens.at[i], x.at[row, time, head, channels]) for i, x in enumerate((dq, dk))))
    plgpu.wait_smem_to_gmem(0)


def _channel_tile_grads(refs: _BlockRefs, log2_decay, state_tiles, score_grads, gates, scale):
    """Return the gradients of one tile of channels of q, k and the log2-decay, without the state's own part."""
    q, k = refs.tokens.at[0], refs.tokens.at[1]
    store_hi_lo_decay(log2_decay, refs.decay)
    plgpu.commit_smem()
    from_start, to_end = chunk_boundary_decay(refs.decay, gates, TILE_SHAPE, 0)
    from_start *= scale
    dq, *dk = wgmma_accumulate(
        *((zero_accumulator(*TILE_SHAPE), (refs.values.at[i], x.transpose((1, 0)))) for i, x in enumerate(state_tiles))
    )
    plgpu.commit_smem()  # all warps have read
    score_grads_smem = refs.values.at[0, :, pl.ds(0, CHUNK)]
    i, t = row_and_column_iota(CHUNK_SHAPE)
    score_grads = score_grads if len(state_tiles) > 1 else jnp.where(i > t, score_grads, 0.0)
    score_grads_smem[...] = score_grads.astype(refs.values.dtype)
    suffix_terms = load_smem_f32(q) * from_start * dq
    prefix_terms: Any = load_smem_f32(k) * to_end * dk[0] if dk else None
    dq, dk = dq * from_start, dk[0] * to_end if dk else zero_accumulator(*TILE_SHAPE)
    dq, dk, suffix_terms = _add_level_grads(refs, score_grads_smem, dq, dk, suffix_terms)
    parts = (*hi_lo_split(suffix_terms), *(() if prefix_terms is None else hi_lo_split(prefix_terms)))
    for n, part in enumerate(parts):
        refs.decay.at[n][...] = part
    plgpu.commit_smem()
    decay_grad = masked_row_sums(t >= i, (refs.decay.at[0], refs.decay.at[1]), TILE_SHAPE)
    if prefix_terms is not None:
        decay_grad += masked_row_sums(t < i, (refs.decay.at[2], refs.decay.at[3]), TILE_SHAPE)
    plgpu.commit_smem()  # all warps have read
    return dq, dk, decay_grad


def _add_level_grads(refs: _BlockRefs, score_grads_smem, dq, dk, suffix_terms):
    """Add the parts of the scores' gradients, level by level, to dq, dk and the terms q.dq - k.dk."""
    q, k = refs.tokens.at[0], refs.tokens.at[1]

    def meet(step, carry):
        dq, dk, suffix_terms = carry
        query_factors, key_factors = level_decay_factors(step, refs.decay, TILE_SHAPE)
        refs.level.at[0][...] = (load_smem_f32(q) * query_factors).astype(refs.level.dtype)
        refs.level.at[1][...] = (load_smem_f32(k) * key_factors).astype(refs.level.dtype)
        pairs = jnp.where(level_mask(step), load_smem_f32(score_grads_smem), 0.0).astype(refs.pairs.dtype)
        refs.pairs[...] = pairs
        plgpu.commit_smem()
        query_grads, key_grads = wgmma_accumulate(
            (zero_accumulator(*TILE_SHAPE), (pairs, refs.level.at[1])),
            (zero_accumulator(*TILE_SHAPE), (refs.pairs.transpose((1, 0)), refs.level.at[0])),
        )
        suffix_terms += load_smem_f32(refs.level.at[0]) * query_grads - load_smem_f32(refs.level.at[1]) * key_grads
        plgpu.commit_smem()  # all warps have read
        return dq + query_grads * query_factors, dk + key_grads * key_factors, suffix_terms

    return lax.fori_loop(0, NUM_LEVELS, meet, (dq, dk, suffix_terms))
