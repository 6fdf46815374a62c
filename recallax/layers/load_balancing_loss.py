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

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def switch_loss(
    logits: Float[Array, "B T E"], indices: Int[Array, "B T S"], valid: Bool[Array, "B T"]
) -> Float[Array, ""]:
    """Compute the switch loss E sum_e f_e P_e over the batch.

    Args:
        logits: Router logits.
        indices: Selected experts of each token.
        valid: False at padding, which does not count.

    Returns:
        The loss, k where the load is even.
    """
    return _load_balance(
        jax.nn.softmax(logits, axis=-1), _selection_counts(indices, logits.shape[-1]), valid, axis=(0, 1)
    )


def per_sequence_loss(
    logits: Float[Array, "B T E"], indices: Int[Array, "B T S"], valid: Bool[Array, "B T"]
) -> Float[Array, ""]:
    """Compute the loss E^2 mean_e f_e P_e of each sequence, with P over the selected logits, and its mean.

    Args:
        logits: Router logits.
        indices: Selected experts of each token.
        valid: False at padding, which does not count.

    Returns:
        The mean over sequences that have a token, k where the load is even.
    """
    counts = _selection_counts(indices, logits.shape[-1])
    probabilities = jax.nn.softmax(jnp.where(counts > 0, logits, -jnp.inf), axis=-1)
    losses = _load_balance(probabilities, counts, valid, axis=(1,))
    rows = valid.any(axis=1)
    return jnp.sum(jnp.where(rows, losses, 0)) / jnp.maximum(jnp.sum(rows, dtype=jnp.float32), 1)


def pooled_loss(
    logits: Float[Array, "L B T E"], indices: Int[Array, "L B T S"], valid: Bool[Array, "B T"]
) -> Float[Array, ""]:
    """Compute the switch loss over L layers at once, as flash-linear-attention does.

    Args:
        logits: Router logits of all layers.
        indices: Selected experts of each token and layer.
        valid: False at padding, which does not count.

    Returns:
        The loss, k where the load is even or imbalances of the layers cancel.
    """
    layers, batch, length, experts = logits.shape
    flat = (layers * batch, length)
    flat_valid = jnp.broadcast_to(valid, (layers, batch, length)).reshape(flat)
    return switch_loss(logits.reshape(*flat, experts), indices.reshape(*flat, -1), flat_valid)


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
