"""AdamW with warm-up, cosine decay and gradient clipping.

Parameters carry metadata that the optimizer reads: `decay` (whether weight decay applies), `lr` (a multiplier of the
learning rate), `sparse` (skip rows whose gradient is zero) and `axes` (logical axis names).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from recallax.train.run_config import RunConfig


def learning_rate_schedule(config: RunConfig) -> optax.Schedule:
    """Return the learning rate by step: linear warm-up from 0 to `optim.lr`, then cosine decay.

    Args:
        config: Config of the run.

    Returns:
        A schedule that ends at `optim.min_lr_ratio * optim.lr` after `train.steps` steps.
    """
    optim, steps = config.optim, config.train.steps
    warmup = max(1, round(optim.warmup_ratio * steps))
    return optax.warmup_cosine_decay_schedule(
        0.0, optim.lr, warmup, max(steps, warmup + 1), optim.lr * optim.min_lr_ratio
    )


def make_optimizer(config: RunConfig, params: nnx.State) -> optax.GradientTransformation:
    """Return the optimizer of a run.

    Args:
        config: Config of the run.
        params: The parameters, or their abstract values; only their metadata is read.

    Returns:
        A gradient transformation for parameters as plain dicts.
    """
    optim = config.optim
    adam = optax.adamw(
        learning_rate_schedule(config),
        b1=optim.b1,
        b2=optim.b2,
        eps=optim.eps,
        weight_decay=optim.weight_decay,
        mask=weight_decay_mask(params),
    )
    return compose_optimizer(config, params, adam)


def compose_optimizer(
    config: RunConfig, params: nnx.State, adam: optax.GradientTransformation
) -> optax.GradientTransformation:
    """Add gradient clipping, sparse rows and learning-rate multipliers to an optimizer.

    Args:
        config: Config of the run.
        params: The parameters, or their abstract values; only their metadata is read.
        adam: The inner optimizer, with learning rate and weight decay.

    Returns:
        The composed gradient transformation.
    """
    sparse, rates = (map_parameters(params, lambda p, name=name: p.get_metadata()[name]) for name in ("sparse", "lr"))
    if any(jax.tree.leaves(sparse)):
        adam = skip_zero_gradient_rows(adam, sparse)
    parts = [optax.clip_by_global_norm(config.optim.max_grad_norm), adam]
    if any(rate != 1.0 for rate in jax.tree.leaves(rates)):
        parts.append(optax.stateless(lambda updates, _: jax.tree.map(lambda u, rate: u * rate, updates, rates)))
    return optax.chain(*parts)


def weight_decay_mask(params: nnx.State) -> dict:
    """Return a bool per parameter: True for those of rank 2 and more that do not opt out of weight decay."""
    return map_parameters(params, lambda p: p.get_metadata()["decay"] and len(p.get_metadata()["axes"]) >= 2)


def skip_zero_gradient_rows(inner: optax.GradientTransformation, sparse: dict) -> optax.GradientTransformation:
    """Leave rows of tagged parameters, and their moments, unchanged in steps where their gradient is zero.

    This is the rule of PyTorch's SparseAdam. The arrays are dense, so it saves no memory.

    Args:
        inner: The optimizer to wrap.
        sparse: A bool per parameter.

    Returns:
        The wrapped gradient transformation, with the state of `inner`.
    """

    def update(updates, state, params=None):
        def has_gradient(grad: jax.Array, tagged: bool) -> jax.Array:
            return (grad != 0).any(axis=-1, keepdims=True) if tagged else jnp.ones((), bool)

        rows, all_rows = jax.tree.map(has_gradient, updates, sparse), jnp.ones((), bool)
        updates, new_state = inner.update(updates, state, params)
        changed = optax.tree_map_params(
            inner, lambda _, row: row, new_state, rows, transform_non_params=lambda _: all_rows
        )
        state = jax.tree.map(jnp.where, changed, new_state, state)
        return jax.tree.map(lambda row, u: jnp.where(row, u, 0), rows, updates), state

    return optax.GradientTransformation(inner.init, update)


class AxisNames(tuple[str | None, ...]):
    """Logical axis names of one parameter; a leaf in `jax.tree`, unlike a plain tuple."""


def logical_axes(params: nnx.State) -> dict:
    """Return the `AxisNames` of every parameter, without the leading axes of stacked layers."""
    return map_parameters(params, lambda p: AxisNames(p.get_metadata()["axes"]))


def map_parameters(params: nnx.State, fn: Callable[[nnx.Variable], Any]) -> dict:
    """Apply a function to every parameter.

    Args:
        params: The parameters, or their abstract values.
        fn: The function.

    Returns:
        Its results, as a plain dict with the structure of the parameters.
    """
    return nnx.to_pure_dict(jax.tree.map(fn, params, is_leaf=lambda x: isinstance(x, nnx.Variable)))
