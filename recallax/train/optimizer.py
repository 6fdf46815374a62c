"""AdamW with warm-up, cosine decay and clipping; weight decay, rates and sparse rows by the parameters' own tags."""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from recallax.train.run import RunConfig

type Axes = tuple[str | None, ...]


def schedule(config: RunConfig) -> optax.Schedule:
    """Learning rate by step: linear from 0 to the peak, then a cosine down to `final` times the peak."""
    optim, steps = config.optim, config.train.steps
    warmup = max(1, round(optim.warmup * steps))
    return optax.warmup_cosine_decay_schedule(0.0, optim.lr, warmup, max(steps, warmup + 1), optim.lr * optim.final)


def make_optimizer(config: RunConfig, params: nnx.State) -> optax.GradientTransformation:
    """The transformation for parameters held as plain dicts; `params` only gives their tags."""
    optim = config.optim
    mask = tags(params, lambda p: p.get_metadata()["decay"] and len(p.get_metadata()["axes"]) >= 2)
    adam = optax.adamw(
        schedule(config), b1=optim.b1, b2=optim.b2, eps=optim.eps, weight_decay=optim.weight_decay, mask=mask
    )
    sparse, rates = (tags(params, lambda p, name=name: p.get_metadata()[name]) for name in ("sparse", "lr"))
    if any(jax.tree.leaves(sparse)):
        adam = by_rows(adam, sparse)
    parts = [optax.clip_by_global_norm(optim.clip), adam]
    if any(rate != 1.0 for rate in jax.tree.leaves(rates)):
        parts.append(optax.stateless(lambda updates, _: jax.tree.map(lambda u, rate: u * rate, updates, rates)))
    return optax.chain(*parts)


def by_rows(inner: optax.GradientTransformation, sparse: dict) -> optax.GradientTransformation:
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
    return tags(params, lambda p: Names(p.get_metadata()["axes"]))


class Names(tuple[str | None, ...]):
    """A tuple that jax.tree takes for a leaf."""


def tags(params: nnx.State, read) -> dict:
    """`read(parameter)` for every parameter, as a plain dict with the parameters' structure."""
    return nnx.to_pure_dict(jax.tree.map(read, params, is_leaf=lambda x: isinstance(x, nnx.Variable)))
