"""AdamW with warm-up, cosine decay, clipping and a weight-decay mask taken from the parameters' own tags."""

import jax
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
    return optax.chain(
        optax.clip_by_global_norm(optim.clip),
        optax.adamw(
            schedule(config), b1=optim.b1, b2=optim.b2, eps=optim.eps, weight_decay=optim.weight_decay, mask=mask
        ),
    )


def logical_axes(params: nnx.State) -> dict:
    """The logical axis names of every parameter, as a plain dict of tuples without the stacked leading axes."""
    return tags(params, lambda p: Names(p.get_metadata()["axes"]))


class Names(tuple[str | None, ...]):
    """A tuple that jax.tree takes for a leaf."""


def tags(params: nnx.State, read) -> dict:
    """`read(parameter)` for every parameter, as a plain dict with the parameters' structure."""
    return nnx.to_pure_dict(jax.tree.map(read, params, is_leaf=lambda x: isinstance(x, nnx.Variable)))
