"""Sparse global attention in XLA, block by block.

Memory and work are linear in time except for one score per block and token. The selected keys and those of the window
are gathered for all blocks at once, (C + W + block) / block copies of the keys and values, so that their gradient is
one sum instead of one array of the row's length per block. Attention scores exist
for one block at a time and are recomputed in the backward pass.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from recallax.pallas_kernels.einsum_f32 import einsum_f32
from recallax.pallas_kernels.grid import gather_tokens, merge_grid_blocks, split_grid_blocks
from recallax.pallas_kernels.masked_logit import MASKED_LOGIT
from recallax.pallas_kernels.sparse_global_attention.reference import SparseGlobalArgs
from recallax.pallas_kernels.sparse_global_attention.selection_candidates import (
    QueryBlocks,
    SelectionCandidates,
    candidate_mask,
    selection_scores,
)


def select_tokens(
    candidates: SelectionCandidates, blocks: QueryBlocks, top_k: int, block_size: int, window: int
) -> tuple[Int[Array, "N B C"], Bool[Array, "N B C"]]:
    """Select the tokens with the largest scores for each block; ties go to the earliest token.

    Args:
        candidates: The candidates.
        blocks: Blocks of queries.
        top_k: Upper bound C of the tokens per block.
        block_size: Tokens of a block.
        window: Tokens of the window.

    Returns:
        Indices of the selected candidates in temporal order, and the mask of the valid ones.
    """

    def block(one: QueryBlocks) -> tuple[Array, Array]:
        scores = jax.lax.stop_gradient(selection_scores(candidates.selection_key, one.selection_query[:, None]))
        candidate = candidate_mask(candidates, one.document_index, one.start_position, block_size, window)
        values, index = jax.lax.top_k(jnp.where(candidate, scores, MASKED_LOGIT), min(top_k, scores.shape[1]))
        index = jnp.sort(jnp.where(values > MASKED_LOGIT, index, scores.shape[1]), axis=1)
        return jnp.minimum(index, scores.shape[1] - 1), index < scores.shape[1]

    return jax.lax.map(block, blocks)


def sparse_global_attention(args: SparseGlobalArgs) -> Float[Array, "B T H V"]:
    """Compute attention over the selected tokens and those of the window.

    The arguments and the result are those of `sparse_global_attention.reference.sparse_global_attention`.
    """
    q, candidates, positions, document_ids, blocks, index, mask, grid_parts, block_offset = args[:9]
    window, block_size, score_bias = args.window, args.block_size, args.score_bias
    width = grid_parts.token_index.shape[2]
    window_offset = jnp.arange(window - 1 + width, dtype=jnp.int32) - (window - 1)
    near = candidates.first_new + grid_parts.token_index[..., :1] + window_offset[None, None]
    within = (near >= 0) & (near < candidates.k.shape[1])
    near = jnp.clip(near, 0, candidates.k.shape[1] - 1)
    every = jnp.concatenate([index, near], axis=2)
    k, v, position, document = (
        _gather_per_block(x, every)
        for x in (candidates.k, candidates.v, candidates.position, candidates.document_index)
    )
    selection_key, count = _gather_per_block(candidates.selection_key, index), index.shape[2]

    @jax.checkpoint
    def block(part: tuple[Array, ...]) -> Array:
        q, q_position, q_document, k, v, position, document, selection_key, selection_query, mask, within = part
        distance = q_position[:, :, None] - position[:, None]
        same_document = document[:, None] == q_document[:, :, None]
        far = mask[:, None] & (distance[..., :count] >= window)
        close = within[:, None] & (distance[..., count:] >= 0) & (distance[..., count:] < window)
        visible = same_document & jnp.concatenate([far, close], axis=2)
        scores = selection_scores(selection_key, selection_query[:, None]) if score_bias else None
        bias = jnp.zeros(mask.shape, jnp.float32) if scores is None else jax.nn.log_sigmoid(scores)
        bias = jnp.concatenate([bias, jnp.zeros_like(within, bias.dtype)], axis=1)
        return _attend(q, k, v, visible, bias).astype(v.dtype)

    tokens = (split_grid_blocks(x, grid_parts) for x in (q, positions, document_ids.index))
    y = jax.lax.map(block, (*tokens, k, v, position, document, selection_key, blocks.selection_query, mask, within))
    return merge_grid_blocks(y, q.shape[1], block_size, block_offset)


def _gather_per_block(x: Shaped[Array, "B P ..."], index: Int[Array, "N B S"]) -> Shaped[Array, "N B S ..."]:
    """Gather the entries of all blocks at once."""
    count, rows, size = index.shape
    flat = gather_tokens(x, jnp.moveaxis(index, 0, 1).reshape(rows, -1))
    return jnp.moveaxis(flat.reshape(rows, count, size, *x.shape[2:]), 1, 0)


def _attend(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B S G K"],
    v: Float[Array, "B S G V"],
    visible: Bool[Array, "B T S"],
    bias: Float[Array, "B S"],
) -> Float[Array, "B T H V"]:
    """Softmax attention in float32 with products in the inputs' dtype; 0 where a query sees no key."""
    b, t, h, width = q.shape
    grouped = q.reshape(b, t, k.shape[2], -1, width)
    seen = visible[:, None, None]
    logits = einsum_f32("btgrk,bsgk->bgrts", grouped, k)
    logits = jnp.where(seen, logits + bias[:, None, None, None], MASKED_LOGIT)
    weights = jnp.where(seen, jnp.exp(logits - jax.lax.stop_gradient(logits.max(axis=-1, keepdims=True))), 0)
    total = jnp.moveaxis(weights.sum(axis=-1), 3, 1)[..., None]
    out = einsum_f32("bgrts,bsgv->btgrv", weights.astype(v.dtype), v)
    return (out / jnp.where(total > 0, total, 1)).reshape(b, t, h, -1)
