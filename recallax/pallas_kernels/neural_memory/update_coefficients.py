"""The inner optimiser of a chunk as a matrix: what each token's gradient, and the carried state, weigh in each token's
weights.

    S_t = momentum_t S_{t-1} - lr_t g_t        W_t = keep_t W_{t-1} + S_t

is linear in the gradients g, so within a chunk W_t = beta_t W' + f_t S' - sum_s G_ts g_s, with W' and S' at its start.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from recallax.pallas_kernels.chunking import DocumentIds
from recallax.pallas_kernels.decay import decayed_scores
from recallax.pallas_kernels.einsum_f32 import einsum_f32
from recallax.pallas_kernels.neural_memory.inner_optimizer import InnerOptimizer, Weights


class MemoryInputs(NamedTuple):
    """What a memory is fed with, per head; L matrices learn."""

    q: Float[Array, "*batch H D"]
    k: Float[Array, "*batch H D"]
    v: Float[Array, "*batch H D"]
    lr: Float[Array, "*batch H L"]
    log_momentum: Float[Array, "*batch H L"]
    log_decay: Float[Array, "*batch H L"]


class FastWeights(NamedTuple):
    """What a memory has learned, of the matrices that learn; float32 [B, H, I, O]."""

    delta: Weights
    """Of the weights, from the initial ones."""
    momentum: Weights
    """Empty for a learner without."""


class OuterParams(NamedTuple):
    """What a memory starts from, learned outside; per head."""

    initial_weights: Weights
    """[H, I, O]"""
    norm_scale: Float[Array, "H D"]
    norm_bias: Float[Array, "H D"]
    initial_fast_weights: FastWeights | None = None
    """[H, I, O], float32: what the memory has learned when a document begins; None is nothing, the initial weights."""


def initial_memory(outer_params: OuterParams, fast_weights: FastWeights) -> FastWeights:
    """The memory of every row before its document's first token; also for one head of one row."""
    if outer_params.initial_fast_weights is None:
        return jax.tree.map(jnp.zeros_like, fast_weights)
    return jax.tree.map(
        lambda a, b: jnp.broadcast_to(a.astype(b.dtype), b.shape), outer_params.initial_fast_weights, fast_weights
    )


class UpdateCoefficients(NamedTuple):
    """Weights in W_t, of every token t of a chunk; float32."""

    initial_weights: Float[Array, "B H L C"]
    """beta: of the weights that the document's tokens found when the chunk began, or the document."""
    initial_momentum: Float[Array, "B H L C"]
    """f: of the carried momentum."""
    gradients: Float[Array, "B H L C C"]
    """G: of minus the gradient of each token up to t."""
    final_momentum: Float[Array, "B H L"]
    """Of the carried momentum in that of the chunk's end."""
    final_gradients: Float[Array, "B H L C"]
    """Of minus each gradient in the momentum of the chunk's end."""


def update_coefficients(
    inner_optimizer: InnerOptimizer, tokens: MemoryInputs, visible: Bool[Array, "B C C"]
) -> UpdateCoefficients:
    """visible: token t may see token s: s <= t, of one document, and s is not padding; padding does nothing."""
    b, c, h, layers = tokens.lr.shape
    here = jnp.diagonal(visible, axis1=1, axis2=2)[..., None, None]

    def flat(x: Array) -> Array:
        return jnp.where(here, x.astype(jnp.float32), 0).reshape(b, c, h * layers)

    def apart(x: Array) -> Array:
        return x.reshape(b, h, layers, *x.shape[2:])

    lr, log_momentum, log_keep = (flat(x) for x in (tokens.lr, tokens.log_momentum, tokens.log_decay))
    seen = visible.astype(jnp.float32)
    beta, since = (jnp.exp(einsum_f32("bts,bsl->blt", seen, x)) for x in (log_keep, log_momentum))
    ones = jnp.ones((b, c, h * layers, 1), jnp.float32)
    kept = decayed_scores(ones, ones, log_keep[..., None], visible)
    lr = jnp.moveaxis(lr, 1, 2)
    if inner_optimizer.momentum:
        spread = decayed_scores(ones, ones, log_momentum[..., None], visible)
        gradients = einsum_f32("bltr,blrs->blts", kept, spread) * lr[:, :, None]
    else:
        spread, gradients = jnp.zeros_like(kept), kept * lr[:, :, None]
    if inner_optimizer.gradient_reduction == "mean":
        gradients /= jnp.maximum(jnp.sum(seen, axis=-1), 1)[:, None, :, None]
    return UpdateCoefficients(
        initial_weights=apart(beta),
        initial_momentum=apart(einsum_f32("bltr,blr->blt", kept, since)),
        gradients=apart(gradients),
        final_momentum=apart(since[..., -1]),
        final_gradients=apart(spread[..., -1, :] * lr),
    )


def pad_to_chunks(tokens: MemoryInputs, document_ids: DocumentIds, chunk_size: int) -> tuple[MemoryInputs, DocumentIds]:
    """Padding at the end, up to a multiple of a chunk; it belongs to the last document."""
    more = -document_ids.index.shape[1] % chunk_size
    padded = jax.tree.map(lambda x: jnp.pad(x, [(0, 0), (0, more)] + [(0, 0)] * (x.ndim - 2)), tokens)
    index = jnp.pad(document_ids.index, ((0, 0), (0, more)), mode="edge")
    return padded, DocumentIds(index, jnp.pad(document_ids.valid, ((0, 0), (0, more))))
