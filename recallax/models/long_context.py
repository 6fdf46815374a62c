"""LongMamba around a trained model's mixers, and thresholds for its filters from rows of the training length.

    global   a channel over which a row of L tokens decays by no less than `keeps`:  exp(-rate sum_t dt_t) > keeps
    g        for context S: the sorted steps of the L tokens, stretched to S; the step at the rank at which their sum
             reaches that of the L tokens, so that the channel decays over S about as it did over L

Other channels get 0: every step passes. Whether a channel is global is decided with steps cut at their `outliers`
quantile. The published code sorts the cut steps too; beyond a few training lengths the threshold then lies among equal
steps and lets all of them pass, up to twice the decay, so the sorted ones are whole here.
Source: LongMamba (arXiv 2504.16053), section 4, and its settings for Mamba-2 (keeps .05, the largest 5 % cut).
"""

import functools
from dataclasses import fields, replace
from typing import Any, get_type_hints

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from recallax.config import Config, ConfigError
from recallax.layers import DiagonalSSM, LongMamba, Mamba2, MixerConfig
from recallax.layers.base import Statistic
from recallax.layers.step_filter import Filtered, StepFilter
from recallax.models.lm import LM, LMConfig
from recallax.models.pattern import parse
from recallax.models.placement import layer_places
from recallax.types import SeqInfo, whole_rows


def lengthened(config: LMConfig, trained: int, context: int) -> LMConfig:
    """The model with LongMamba around each state-space model that has step sizes, also inside other mixers.

    Parameters keep their names. Raises ConfigError where the pattern has none.
    """
    blocks = {
        name: replace(block, **{part: _around(getattr(block, part), trained, context) for part in ("mixer", "channel")})
        for name, block in config.blocks.items()
    }
    if not any(_long(blocks[name]) for name in config.layers):
        raise ConfigError(
            f"none of the layers {sorted(set(config.layers))} has step sizes that LongMamba could filter; the model "
            "needs Mamba2 or DiagonalSSM, alone or as a path of Parallel"
        )
    return replace(config, blocks=blocks)


def _around(mixer: MixerConfig, trained: int, context: int) -> MixerConfig:
    if isinstance(mixer, LongMamba):
        return replace(mixer, trained=trained, context=context)
    if isinstance(mixer, Mamba2 | DiagonalSSM):
        return LongMamba(mixer=mixer, trained=trained, context=context)
    hints = get_type_hints(type(mixer))
    parts = [name for name in vars(mixer) if hints.get(name) is MixerConfig]
    return replace(mixer, **{name: _around(getattr(mixer, name), trained, context) for name in parts})


class Recorder(StepFilter):
    """Lets every step pass and holds the last ones that did."""

    def __call__(self, dt: Float[Array, "*batch C"]) -> Float[Array, "*batch C"]:
        self.seen = Statistic(dt)
        return dt


def calibrated(
    config: LMConfig, model: LM, tokens: Int[Array, "B L"], *, keeps: float = 0.05, outliers: float = 0.95
) -> LM:
    """The model with thresholds for each LongMamba's context; rows are one document each, of its training length.

    Layers run one after another, without filters. Raises ConfigError where nothing is to be filtered, or rows have
    another length, or the model inserts landmarks.
    """
    wanted = {mixer.context: mixer for name in config.layers for mixer in _long(config.blocks[name])}
    wanted = {context: mixer for context, mixer in wanted.items() if context > mixer.trained}
    trained = {mixer.trained for mixer in wanted.values()}
    if len(wanted) != 1:
        raise ConfigError(f"contexts to calibrate for are {sorted(wanted)}; there must be one, above `trained`")
    if trained != {tokens.shape[1]}:
        raise ConfigError(f"rows have {tokens.shape[1]} tokens; LongMamba was trained on {sorted(trained)}")
    if config.landmarks is not None:
        raise ConfigError("a model that inserts landmarks cannot be calibrated: its layers see other rows")
    model, (context,) = nnx.clone(model), wanted
    model._couple()
    seq = jax.tree.map(jnp.asarray, whole_rows(*tokens.shape))
    r, found = model.embedding[tokens].astype(jnp.float32), {}
    for place in layer_places(parse(config.pattern, list(config.blocks))):
        graph, weights = nnx.split(_at(model, place.path))
        r, steps = _recorded(graph, jax.tree.map(lambda w, place=place: w[place.index], weights), r, seq)
        found |= {(place, path): seen for path, seen in steps.items()}
    flat = dict(nnx.to_flat_state(nnx.state(model, Statistic)))
    values = {path: np.array(leaf[...]) for path, leaf in flat.items()}
    for (place, path), (dt, rates) in found.items():
        chosen = thresholds(np.asarray(dt), np.asarray(rates), context, keeps, outliers)
        values[(*place.path, *path, "filter", "threshold")][place.index] = chosen
    new = [(path, leaf.replace(jnp.asarray(values[path]))) for path, leaf in flat.items()]
    nnx.update(model, nnx.from_flat_state(new))
    return model


@functools.partial(jax.jit, static_argnums=0)
def _recorded(graph: nnx.GraphDef, weights: nnx.State, r: Float[Array, "B L D"], seq: SeqInfo):
    """The stream after a block, and by path the steps and rates of its filtered modules."""
    block = nnx.merge(graph, weights)
    parts = {path: n for path, n in nnx.iter_graph(block) if isinstance(n, Filtered) and n.filter is not None}
    recorders = {path: Recorder(part.rates().shape[0], 0.0) for path, part in parts.items()}
    for path, part in parts.items():
        part.filter = recorders[path]
    r, _ = block(r, seq)
    return r, {path: (recorders[path].seen[...], part.rates()) for path, part in parts.items()}


def thresholds(
    dt: Float[np.ndarray, "B L C"], rates: Float[np.ndarray, " C"], context: int, keeps: float, outliers: float
) -> Float[np.ndarray, " C"]:
    """See the head of the file; rows are averaged, and so are their sorted steps."""
    cut = np.minimum(dt, np.quantile(dt, outliers, axis=(0, 1), keepdims=True))
    lasting = np.exp(-rates * cut.sum(axis=1)).mean(axis=0) > keeps
    curve = -np.sort(-dt, axis=1).mean(axis=0)
    length = len(curve)
    at = np.linspace(0, length - 1, context)
    stretched = np.stack([np.interp(at, np.arange(length), channel) for channel in curve.T], axis=1)
    rank = (np.cumsum(stretched, axis=0) < curve.sum(axis=0)).sum(axis=0)
    found = np.take_along_axis(stretched, np.minimum(rank, context - 1)[None], axis=0)[0]
    return np.where(lasting & (context > length), found, 0).astype(np.float32)


def _long(config: Any) -> list[LongMamba]:
    inside = [getattr(config, field.name) for field in fields(config)] if isinstance(config, Config) else []
    found = [part for value in inside for part in _long(value)]
    return [config, *found] if isinstance(config, LongMamba) else found


def _at(model: nnx.Module, path: tuple) -> nnx.Module:
    module: Any = model
    for name in path:
        module = module[name] if isinstance(name, int) else getattr(module, name)
    return module
