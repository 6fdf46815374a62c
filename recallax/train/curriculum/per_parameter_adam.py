"""AdamW in which every parameter has its own step count, so that a parameter may start to train late."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Int

from recallax.train.optimizer import compose_optimizer, learning_rate_schedule, weight_decay_mask
from recallax.train.run_config import RunConfig


def make_masked_optimizer(config: RunConfig, params: nnx.State, trainable: dict) -> optax.GradientTransformation:
    """Return the optimizer of a stage in which some parameters do not train.

    Args:
        config: Config of the run.
        params: The parameters, or their abstract values; only their metadata is read.
        trainable: A bool per parameter.

    Returns:
        A gradient transformation whose state has the same structure for every `trainable`.
    """
    optim = config.optim
    decayed = jax.tree.map(lambda decays, trains: decays and trains, weight_decay_mask(params), trainable)
    adam = optax.chain(
        scale_by_adam_per_parameter(trainable, optim.b1, optim.b2, optim.eps),
        optax.add_decayed_weights(optim.weight_decay, decayed),
        optax.scale_by_learning_rate(learning_rate_schedule(config)),
    )
    return compose_optimizer(config, params, adam)


class PerParameterAdamState(NamedTuple):
    """Moments of Adam with a step count per parameter."""

    counts: Int[Array, " P"]
    """Updates of each parameter so far, in `jax.tree` order."""
    mu: dict
    nu: dict


def scale_by_adam_per_parameter(trainable: dict, b1: float, b2: float, eps: float) -> optax.GradientTransformation:
    """Adam without learning rate, in which frozen parameters keep their moments and their step count.

    The bias correction of a parameter that starts to train late is then that of a first step. A count shared by all
    parameters would scale its first update by (1 - b1) / sqrt(1 - b2): 0.45 at b2 = 0.95 and 3.2 at b2 = 0.999.
    PyTorch also counts per parameter.

    Args:
        trainable: A bool per parameter.
        b1: Decay of the first moment.
        b2: Decay of the second moment.
        eps: Constant added to the root of the second moment.

    Returns:
        The gradient transformation. It returns the gradients of frozen parameters unchanged.
    """
    inner = optax.scale_by_adam(b1, b2, eps)

    def init(params) -> PerParameterAdamState:
        zeros = [jax.tree.map(jnp.zeros_like, params) for _ in ("mu", "nu")]
        return PerParameterAdamState(jnp.zeros(len(jax.tree.leaves(params)), jnp.int32), *zeros)

    def update(updates, state, params=None):
        trains, tree = jax.tree.flatten(trainable)
        leaves = (jax.tree.leaves(part) for part in (updates, state.mu, state.nu))
        new_updates, mu, nu = [], [], []
        for trained, grad, m, v, count in zip(trains, *leaves, state.counts, strict=True):
            if trained:
                result: Any = inner.update(grad, optax.ScaleByAdamState(count, m, v))
                grad, (_, m, v) = result
            new_updates, mu, nu = [*new_updates, grad], [*mu, m], [*nu, v]
        counts = state.counts + jnp.array(trains, jnp.int32)
        return tree.unflatten(new_updates), PerParameterAdamState(counts, tree.unflatten(mu), tree.unflatten(nu))

    return optax.GradientTransformation(init, update)
