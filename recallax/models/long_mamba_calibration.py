"""LongMamba around a trained model's mixers, and thresholds for its filters from rows of the training length.

    global   a channel over which a row of L tokens decays by no less than `min_retention`:  exp(-rate sum_t dt_t) > keeps
    g        for context S: the sorted steps of the L tokens, stretched to S; the step at the rank at which their sum
             reaches that of the L tokens, so that the channel decays over S about as it did over L

Other channels get 0: every step passes. Whether a channel is global is decided with steps cut at their `clip_quantile`
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
from recallax.layers.step_filter import StepFilter, StepFilteredModule
from recallax.models.lm import LM, LMConfig
from recallax.models.parameter_paths import layer_paths
from recallax.models.pattern import parse_pattern
from recallax.types import SeqInfo, unpacked_seq_info


def with_long_mamba(config: LMConfig, training_length: int, context_length: int) -> LMConfig:
    """The model with LongMamba around each state-space model that has step sizes, also inside other mixers.

    Parameters keep their names. Raises ConfigError where the pattern has none.
    """
    blocks = {
        name: replace(
            block,
            **{
                part: _wrap_in_long_mamba(getattr(block, part), training_length, context_length)
                for part in ("mixer", "channel")
            },
        )
        for name, block in config.blocks.items()
    }
    if not any(_find_long_mamba(blocks[name]) for name in config.layer_names):
        raise ConfigError(
            f"none of the layers {sorted(set(config.layer_names))} has step sizes that LongMamba could filter; the model "
            "needs Mamba2 or DiagonalSSM, alone or as a path of Parallel"
        )
    return replace(config, blocks=blocks)


def _wrap_in_long_mamba(mixer: MixerConfig, training_length: int, context_length: int) -> MixerConfig:
    if isinstance(mixer, LongMamba):
        return replace(mixer, training_length=training_length, context_length=context_length)
    if isinstance(mixer, Mamba2 | DiagonalSSM):
        return LongMamba(mixer=mixer, training_length=training_length, context_length=context_length)
    hints = get_type_hints(type(mixer))
    parts = [name for name in vars(mixer) if hints.get(name) is MixerConfig]
    return replace(
        mixer, **{name: _wrap_in_long_mamba(getattr(mixer, name), training_length, context_length) for name in parts}
    )


class StepSizeRecorder(StepFilter):
    """Lets every step pass and holds the last ones that did."""

    def __call__(self, dt: Float[Array, "*batch C"]) -> Float[Array, "*batch C"]:
        self.recorded_dt = Statistic(dt)
        return dt


def calibrate_step_filters(
    config: LMConfig, model: LM, tokens: Int[Array, "B L"], *, min_retention: float = 0.05, clip_quantile: float = 0.95
) -> LM:
    """The model with thresholds for each LongMamba's context; rows are one document each, of its training length.

    Layers run one after another, without filters. Raises ConfigError where nothing is to be filtered, or rows have
    another length, or the model inserts landmarks.
    """
    wanted = {
        mixer.context_length: mixer for name in config.layer_names for mixer in _find_long_mamba(config.blocks[name])
    }
    wanted = {context: mixer for context, mixer in wanted.items() if context > mixer.training_length}
    trained = {mixer.training_length for mixer in wanted.values()}
    if len(wanted) != 1:
        raise ConfigError(f"contexts to calibrate for are {sorted(wanted)}; there must be one, above `trained`")
    if trained != {tokens.shape[1]}:
        raise ConfigError(f"rows have {tokens.shape[1]} tokens; LongMamba was trained on {sorted(trained)}")
    if config.landmark_block_size is not None:
        raise ConfigError("a model that inserts landmarks cannot be calibrated: its layers see other rows")
    model, (context,) = nnx.clone(model), wanted
    model.apply_lower_bounds()
    seq = jax.tree.map(jnp.asarray, unpacked_seq_info(*tokens.shape))
    r, found = model.embedding[tokens].astype(jnp.float32), {}
    for place in layer_paths(parse_pattern(config.pattern, list(config.blocks))):
        graph, weights = nnx.split(_module_at(model, place.path))
        r, steps = _record_step_sizes(graph, jax.tree.map(lambda w, place=place: w[place.stack_index], weights), r, seq)
        found |= {(place, path): seen for path, seen in steps.items()}
    flat = dict(nnx.to_flat_state(nnx.state(model, Statistic)))
    values = {path: np.array(leaf[...]) for path, leaf in flat.items()}
    for (place, path), (dt, rates) in found.items():
        chosen = step_thresholds(np.asarray(dt), np.asarray(rates), context, min_retention, clip_quantile)
        values[(*place.path, *path, "filter", "threshold")][place.stack_index] = chosen
    new = [(path, leaf.replace(jnp.asarray(values[path]))) for path, leaf in flat.items()]
    nnx.update(model, nnx.from_flat_state(new))
    return model


@functools.partial(jax.jit, static_argnums=0)
def _record_step_sizes(graph: nnx.GraphDef, weights: nnx.State, r: Float[Array, "B L D"], seq: SeqInfo):
    """The stream after a block, and by path the steps and rates of its filtered modules."""
    block = nnx.merge(graph, weights)
    parts = {path: n for path, n in nnx.iter_graph(block) if isinstance(n, StepFilteredModule) and n.filter is not None}
    recorders = {path: StepSizeRecorder(part.decay_rates().shape[0], 0.0) for path, part in parts.items()}
    for path, part in parts.items():
        part.filter = recorders[path]
    r, _ = block(r, seq)
    return r, {path: (recorders[path].recorded_dt[...], part.decay_rates()) for path, part in parts.items()}


def step_thresholds(
    dt: Float[np.ndarray, "B L C"],
    rates: Float[np.ndarray, " C"],
    context_length: int,
    min_retention: float,
    clip_quantile: float,
) -> Float[np.ndarray, " C"]:
    """See the head of the file; rows are averaged, and so are their sorted steps."""
    cut = np.minimum(dt, np.quantile(dt, clip_quantile, axis=(0, 1), keepdims=True))
    lasting = np.exp(-rates * cut.sum(axis=1)).mean(axis=0) > min_retention
    curve = -np.sort(-dt, axis=1).mean(axis=0)
    length = len(curve)
    at = np.linspace(0, length - 1, context_length)
    stretched = np.stack([np.interp(at, np.arange(length), channel) for channel in curve.T], axis=1)
    rank = (np.cumsum(stretched, axis=0) < curve.sum(axis=0)).sum(axis=0)
    found = np.take_along_axis(stretched, np.minimum(rank, context_length - 1)[None], axis=0)[0]
    return np.where(lasting & (context_length > length), found, 0).astype(np.float32)


def _find_long_mamba(config: Any) -> list[LongMamba]:
    inside = [getattr(config, field.name) for field in fields(config)] if isinstance(config, Config) else []
    found = [part for value in inside for part in _find_long_mamba(value)]
    return [config, *found] if isinstance(config, LongMamba) else found


def _module_at(model: nnx.Module, path: tuple) -> nnx.Module:
    module: Any = model
    for name in path:
        module = module[name] if isinstance(name, int) else getattr(module, name)
    return module
