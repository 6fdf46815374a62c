"""Load-balancing losses of routers over E experts or memories; each equals k where the load is even.

With f_e the share of tokens that select expert e (the shares sum to k) and P_e its mean probability:

    switch:        E sum_e f_e P_e                 per layer, over the batch: Fedus et al. 2021 (arXiv 2101.03961),
                                                   equation 4, for top-k; the loss that the MoM paper names
    per_sequence:  E^2 mean_e f_e P_e              per layer and sequence, with P from a softmax over the selected
                                                   logits only; the loss of MoM's first released code
    pooled:        the switch loss with f and P over all layers at once, as in flash-linear-attention; opposite
                   imbalances of two layers cancel, so no mixer uses it

Gradients flow through P only.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


class RoutedTokens(NamedTuple):
    """Decisions of a router for the tokens of a batch, or of L layers."""

    logits: Float[Array, "*L B T E"]
    """Router logits."""
    indices: Int[Array, "*L B T S"]
    """Selected experts of each token."""
    valid: Bool[Array, "B T"]
    """False at padding, which does not count."""


def switch_loss(tokens: RoutedTokens) -> Float[Array, ""]:
    """Compute the switch loss E sum_e f_e P_e over the batch.

    Args:
        tokens: Decisions of one router.

    Returns:
        The loss, k where the load is even.
    """
    return _load_balance(jax.nn.softmax(tokens.logits, axis=-1), _selection_counts(tokens), tokens.valid, axis=(0, 1))


def per_sequence_loss(tokens: RoutedTokens) -> Float[Array, ""]:
    """Compute the loss E^2 mean_e f_e P_e of each sequence, with P over the selected logits, and its mean.

    Args:
        tokens: Decisions of one router.

    Returns:
        The mean over sequences that have a token, k where the load is even.
    """
    counts = _selection_counts(tokens)
    probabilities = jax.nn.softmax(jnp.where(counts > 0, tokens.logits, -jnp.inf), axis=-1)
    losses = _load_balance(probabilities, counts, tokens.valid, axis=(1,))
    rows = tokens.valid.any(axis=1)
    return jnp.sum(jnp.where(rows, losses, 0)) / jnp.maximum(jnp.sum(rows, dtype=jnp.float32), 1)


def pooled_loss(tokens: RoutedTokens) -> Float[Array, ""]:
    """Compute the switch loss over L layers at once, as flash-linear-attention does.

    Args:
        tokens: Decisions of the routers of all layers, with a leading axis L.

    Returns:
        The loss, k where the load is even or imbalances of the layers cancel.
    """
    layers, batch, length, _ = tokens.logits.shape
    valid = jnp.broadcast_to(tokens.valid, (layers, batch, length))
    parts = (tokens.logits, tokens.indices, valid)
    return switch_loss(RoutedTokens(*(part.reshape(layers * batch, *part.shape[2:]) for part in parts)))


def _selection_counts(tokens: RoutedTokens) -> Float[Array, "B T E"]:
    return jnp.sum(jax.nn.one_hot(tokens.indices, tokens.logits.shape[-1]), axis=2)


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
