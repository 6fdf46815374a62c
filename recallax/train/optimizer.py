"""AdamW with warm-up, cosine decay and clipping; weight decay, rates and sparse rows by the parameters' own tags."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Int

from recallax.train.run_config import RunConfig


def learning_rate_schedule(config: RunConfig) -> optax.Schedule:
    """Learning rate by step: linear from 0 to the peak, then a cosine down to `final` times the peak."""
    optim, steps = config.optim, config.train.steps
    warmup = max(1, round(optim.warmup_ratio * steps))
    return optax.warmup_cosine_decay_schedule(
        0.0, optim.lr, warmup, max(steps, warmup + 1), optim.lr * optim.min_lr_ratio
    )


def make_optimizer(config: RunConfig, params: nnx.State, trainable: dict | None = None) -> optax.GradientTransformation:
    """The transformation for parameters held as plain dicts; `params` only gives their tags.

    trains: in a stage of a curriculum, a bool per parameter. The state has the same form in all stages.
    """
    optim = config.optim
    mask = map_parameters(params, lambda p: p.get_metadata()["decay"] and len(p.get_metadata()["axes"]) >= 2)
    if trainable is None:
        adam = optax.adamw(
            learning_rate_schedule(config),
            b1=optim.b1,
            b2=optim.b2,
            eps=optim.eps,
            weight_decay=optim.weight_decay,
            mask=mask,
        )
    else:
        mask = jax.tree.map(lambda decays, on: decays and on, mask, trainable)
        adam = optax.chain(
            scale_by_adam_per_parameter(trainable, optim.b1, optim.b2, optim.eps),
            optax.add_decayed_weights(optim.weight_decay, mask),
            optax.scale_by_learning_rate(learning_rate_schedule(config)),
        )
    sparse, rates = (map_parameters(params, lambda p, name=name: p.get_metadata()[name]) for name in ("sparse", "lr"))
    if any(jax.tree.leaves(sparse)):
        adam = skip_zero_gradient_rows(adam, sparse)
    parts = [optax.clip_by_global_norm(optim.max_grad_norm), adam]
    if any(rate != 1.0 for rate in jax.tree.leaves(rates)):
        parts.append(optax.stateless(lambda updates, _: jax.tree.map(lambda u, rate: u * rate, updates, rates)))
    return optax.chain(*parts)


class PerParameterAdamState(NamedTuple):
    """Adam's state with a count of its own for every parameter, in `jax.tree` order."""

    counts: Int[Array, " P"]
    mu: dict
    nu: dict


def scale_by_adam_per_parameter(trainable: dict, b1: float, b2: float, eps: float) -> optax.GradientTransformation:
    """Adam without its rate, where parameters that do not train keep their moments and do not count the step.

    So the first update of a parameter that wakes late is corrected as any first update is: with a count for all, it
    would be (1 - b1) / sqrt(1 - b2) times as large, .45 at b2 = .95 and 3.2 at .999. PyTorch counts this way too.
    """
    inner = optax.scale_by_adam(b1, b2, eps)

    def init(params) -> PerParameterAdamState:
        zeros = [jax.tree.map(jnp.zeros_like, params) for _ in ("mu", "nu")]
        return PerParameterAdamState(jnp.zeros(len(jax.tree.leaves(params)), jnp.int32), *zeros)

    def update(updates, state, params=None):
        on, tree = jax.tree.flatten(trainable)
        leaves = (jax.tree.leaves(part) for part in (updates, state.mu, state.nu))
        moved, mu, nu = [], [], []
        for trained, grad, m, v, count in zip(on, *leaves, state.counts, strict=True):
            if trained:
                found: Any = inner.update(grad, optax.ScaleByAdamState(count, m, v))
                grad, (_, m, v) = found
            moved, mu, nu = [*moved, grad], [*mu, m], [*nu, v]
        counts = state.counts + jnp.array(on, jnp.int32)
        return tree.unflatten(moved), PerParameterAdamState(counts, tree.unflatten(mu), tree.unflatten(nu))

    return optax.GradientTransformation(init, update)


def skip_zero_gradient_rows(inner: optax.GradientTransformation, sparse: dict) -> optax.GradientTransformation:
    """The same, but rows of tagged parameters whose gradient is zero stay as they are, and so do their moments.

    What SparseAdam does in PyTorch; here the arrays are dense, so it saves no traffic and no memory.
    """

    def update(updates, state, params=None):
        def touched(grad: jax.Array, tagged: bool) -> jax.Array:
            return (grad != 0).any(axis=-1, keepdims=True) if tagged else jnp.ones((), bool)

        rows, every = jax.tree.map(touched, updates, sparse), jnp.ones((), bool)
        updates, new = inner.update(updates, state, params)
        moved = optax.tree_map_params(inner, lambda _, row: row, new, rows, transform_non_params=lambda _: every)
        state = jax.tree.map(jnp.where, moved, new, state)
        return jax.tree.map(lambda row, u: jnp.where(row, u, 0), rows, updates), state

    return optax.GradientTransformation(inner.init, update)


def logical_axes(params: nnx.State) -> dict:
    """The logical axis names of every parameter, as a plain dict of tuples without the stacked leading axes."""
    return map_parameters(params, lambda p: AxisNames(p.get_metadata()["axes"]))


class AxisNames(tuple[str | None, ...]):
    """A tuple that jax.tree takes for a leaf."""


def map_parameters(params: nnx.State, fn) -> dict:
    """`read(parameter)` for every parameter, as a plain dict with the parameters' structure."""
    return nnx.to_pure_dict(jax.tree.map(fn, params, is_leaf=lambda x: isinstance(x, nnx.Variable)))
