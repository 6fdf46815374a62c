"""Updates of a chunk as a linear map: coefficients of gradients and carried state in the weights of each token.

    S_t = momentum_t S_{t-1} - lr_t g_t        W_t = keep_t W_{t-1} + S_t

is linear in the gradients g, so within a chunk W_t = beta_t W' + f_t S' - sum_s G_ts g_s with W' and S' at its start.
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
    """Inputs of a neural memory per head, for L trainable matrices in the order of `InnerOptimizer.gate_names`."""

    q: Float[Array, "*batch H D"]
    k: Float[Array, "*batch H D"]
    v: Float[Array, "*batch H D"]
    lr: Float[Array, "*batch H L"]
    """Learning rate, at least 0."""
    log_momentum: Float[Array, "*batch H L"]
    """Natural log of the momentum factor, at most 0."""
    log_decay: Float[Array, "*batch H L"]
    """Natural log of keep, the factor of the weights, at most 0."""


class FastWeights(NamedTuple):
    """State of the trainable matrices; float32 [B, H, I, O] by name."""

    delta: Weights
    """Difference of the weights from the initial ones."""
    momentum: Weights
    """Momentum S; empty without momentum."""


class OuterParams(NamedTuple):
    """Parameters of a memory per head, which the outer optimizer trains."""

    initial_weights: Weights
    """Initial weights [H, I, O] of all matrices by name."""
    norm_scale: Float[Array, "H D"]
    norm_bias: Float[Array, "H D"]
    initial_fast_weights: FastWeights | None = None
    """Fast weights [H, I, O] at the start of a document, float32; None: zeros."""


def initial_memory(outer_params: OuterParams, fast_weights: FastWeights) -> FastWeights:
    """Return the memory before the first token of a document.

    Args:
        outer_params: Parameters of all heads or of one head.
        fast_weights: Fast weights whose shapes and dtypes the result has.
    """
    if outer_params.initial_fast_weights is None:
        return jax.tree.map(jnp.zeros_like, fast_weights)
    return jax.tree.map(
        lambda a, b: jnp.broadcast_to(a.astype(b.dtype), b.shape), outer_params.initial_fast_weights, fast_weights
    )


class UpdateCoefficients(NamedTuple):
    """Float32 coefficients in W_t, for every token t of a chunk."""

    initial_weights: Float[Array, "B H L C"]
    """beta: coefficient of the weights at the start of the chunk or of the document."""
    initial_momentum: Float[Array, "B H L C"]
    """f: coefficient of the carried momentum."""
    gradients: Float[Array, "B H L C C"]
    """G: coefficient of minus the gradient of each token up to t."""
    final_momentum: Float[Array, "B H L"]
    """Coefficient of the carried momentum in the momentum at the end of the chunk."""
    final_gradients: Float[Array, "B H L C"]
    """Coefficient of minus each gradient in the momentum at the end of the chunk."""


def update_coefficients(
    inner_optimizer: InnerOptimizer, tokens: MemoryInputs, visible: Bool[Array, "B C C"]
) -> UpdateCoefficients:
    """Compute the coefficients of a chunk; padding has no effect.

    Args:
        inner_optimizer: Defines the momentum and the reduction of gradients.
        tokens: Tokens of the chunk.
        visible: True where token t reads token s: s <= t, same document, and s is not padding.
    """
    b, c, h, layers = tokens.lr.shape
    valid = jnp.diagonal(visible, axis1=1, axis2=2)[..., None, None]

    def flat(x: Array) -> Array:
        return jnp.where(valid, x.astype(jnp.float32), 0).reshape(b, c, h * layers)

    def split_layers(x: Array) -> Array:
        return x.reshape(b, h, layers, *x.shape[2:])

    lr, log_momentum, log_decay = (flat(x) for x in (tokens.lr, tokens.log_momentum, tokens.log_decay))
    mask = visible.astype(jnp.float32)
    beta, momentum_from_start = (jnp.exp(einsum_f32("bts,bsl->blt", mask, x)) for x in (log_decay, log_momentum))
    ones = jnp.ones((b, c, h * layers, 1), jnp.float32)
    kept = decayed_scores(ones, ones, log_decay[..., None], visible)
    lr = jnp.moveaxis(lr, 1, 2)
    if inner_optimizer.momentum:
        spread = decayed_scores(ones, ones, log_momentum[..., None], visible)
        gradients = einsum_f32("bltr,blrs->blts", kept, spread) * lr[:, :, None]
    else:
        spread, gradients = jnp.zeros_like(kept), kept * lr[:, :, None]
    if inner_optimizer.gradient_reduction == "mean":
        gradients /= jnp.maximum(jnp.sum(mask, axis=-1), 1)[:, None, :, None]
    return UpdateCoefficients(
        initial_weights=split_layers(beta),
        initial_momentum=split_layers(einsum_f32("bltr,blr->blt", kept, momentum_from_start)),
        gradients=split_layers(gradients),
        final_momentum=split_layers(momentum_from_start[..., -1]),
        final_gradients=split_layers(spread[..., -1, :] * lr),
    )


def pad_to_chunks(tokens: MemoryInputs, document_ids: DocumentIds, chunk_size: int) -> tuple[MemoryInputs, DocumentIds]:
    """Pad the end to whole chunks; the padding belongs to the last document.

    Args:
        tokens: Tokens of the row.
        document_ids: Documents of the row.
        chunk_size: Tokens of a chunk.
    """
    padding = -document_ids.index.shape[1] % chunk_size
    padded = jax.tree.map(lambda x: jnp.pad(x, [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2)), tokens)
    index = jnp.pad(document_ids.index, ((0, 0), (0, padding)), mode="edge")
    return padded, DocumentIds(index, jnp.pad(document_ids.valid, ((0, 0), (0, padding))))
