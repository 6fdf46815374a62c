"""Losses that keep a router from starving some of its memories; each is k where the load of E memories is even.

With f_e the share of tokens that choose memory e (these sum to k) and P_e its mean probability:

    switch:        E sum_e f_e P_e                 per layer, over the batch. Fedus et al. 2021 (arXiv 2101.03961),
                                                   equation 4, for top-k; what the MoM paper (arXiv 2502.13685) names
    per_sequence:  E^2 mean_e f_e P_e              per layer and sequence, P of a softmax over the chosen logits alone;
                                                   the definition of MoM's first released code
    pooled:        as switch, with f and P taken over all layers at once, as in flash-linear-attention: opposite
                   imbalances of two layers cancel, so no mixer uses it

Only P has a gradient.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def switch_loss(
    logits: Float[Array, "B T E"], indices: Int[Array, "B T S"], valid: Bool[Array, "B T"]
) -> Float[Array, ""]:
    """See the head of the file."""
    return _load_balance(
        jax.nn.softmax(logits, axis=-1), _selection_counts(indices, logits.shape[-1]), valid, axis=(0, 1)
    )


def per_sequence_loss(
    logits: Float[Array, "B T E"], indices: Int[Array, "B T S"], valid: Bool[Array, "B T"]
) -> Float[Array, ""]:
    """See the head of the file; the mean over sequences that hold a token."""
    hits = _selection_counts(indices, logits.shape[-1])
    probabilities = jax.nn.softmax(jnp.where(hits > 0, logits, -jnp.inf), axis=-1)
    each = _load_balance(probabilities, hits, valid, axis=(1,))
    rows = valid.any(axis=1)
    return jnp.sum(jnp.where(rows, each, 0)) / jnp.maximum(jnp.sum(rows, dtype=jnp.float32), 1)


def pooled_loss(
    logits: Float[Array, "L B T E"], indices: Int[Array, "L B T S"], valid: Bool[Array, "B T"]
) -> Float[Array, ""]:
    """See the head of the file; over L layers."""
    layers, batch, length, experts = logits.shape
    flat = (layers * batch, length)
    every = jnp.broadcast_to(valid, (layers, batch, length)).reshape(flat)
    return switch_loss(logits.reshape(*flat, experts), indices.reshape(*flat, -1), every)


def _selection_counts(indices: Int[Array, "B T S"], num_experts: int) -> Float[Array, "B T E"]:
    return jnp.sum(jax.nn.one_hot(indices, num_experts), axis=2)


def _load_balance(
    probabilities: Float[Array, "B T E"],
    counts: Float[Array, "B T E"],
    valid: Bool[Array, "B T"],
    axis: tuple[int, ...],
) -> Float[Array, "..."]:
    mask = valid[..., None].astype(jnp.float32)
    count = jnp.maximum(jnp.sum(mask, axis=axis), 1)
    f = jnp.sum(jax.lax.stop_gradient(counts) * mask, axis=axis) / count
    p = jnp.sum(probabilities * mask, axis=axis) / count
    return probabilities.shape[-1] * jnp.sum(f * p, axis=-1)
