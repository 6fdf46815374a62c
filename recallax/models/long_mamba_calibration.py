"""LongMamba for trained models: wrap state-space mixers, and calibrate the thresholds of their step filters.

For rows of the training length L and a context of S tokens:

- A channel is global if a row decays it by no less than `min_retention`: exp(-rate sum_t dt_t) > min_retention, with
  steps clipped at their `clip_quantile` quantile.
- The threshold of a global channel is a step size: the L sorted steps are stretched to S, and the threshold is the step
  at the rank at which their cumulative sum reaches the sum of the L steps. The channel then decays over S tokens about
  as much as over L.
- Other channels have the threshold 0, so every step passes.

The published code also sorts the clipped steps. Beyond a few training lengths its threshold is then among equal steps
and lets all of them pass, which gives up to twice the decay, so the sorted steps are not clipped here. Source:
LongMamba (arXiv 2504.16053), section 4, and its settings for Mamba-2 (minimum retention 0.05, the largest 5 %
clipped).
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
from recallax.models.parameter_paths import layer_paths, module_at
from recallax.types import SeqInfo, unpacked_seq_info


def with_long_mamba(config: LMConfig, training_length: int, context_length: int) -> LMConfig:
    """Wrap each state-space mixer with step sizes in LongMamba, also inside other mixers; parameters keep their names.

    Args:
        config: The model config.
        training_length: Tokens of the rows that the model was trained on.
        context_length: Tokens of the contexts that it will read.

    Returns:
        The wrapped model config.

    Raises:
        ConfigError: If no layer has step sizes.
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
            f"none of the layers {sorted(set(config.layer_names))} has step sizes for LongMamba to filter; the model "
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
    """A step filter that lets every step pass and records the last ones."""

    def __call__(self, dt: Float[Array, "*batch C"]) -> Float[Array, "*batch C"]:
        self.recorded_dt = Statistic(dt)
        return dt


def calibrate_step_filters(
    config: LMConfig, model: LM, tokens: Int[Array, "B L"], *, min_retention: float = 0.05, clip_quantile: float = 0.95
) -> LM:
    """Set the thresholds of a model's LongMamba filters. The layers run one after another, without filters.

    Args:
        config: The model config.
        model: The model; it is not modified.
        tokens: Token ids; each row is one document of the training length.
        min_retention: Smallest retention over a row of a global channel.
        clip_quantile: Quantile of the steps at which they are clipped to find global channels.

    Returns:
        The model with thresholds.

    Raises:
        ConfigError: If there is not exactly one context longer than the training length, the rows have another length,
            or the model inserts landmarks.
    """
    context_length = _context_to_calibrate(config, tokens.shape[1])
    model = nnx.clone(model)
    model.apply_lower_bounds()
    seq = jax.tree.map(jnp.asarray, unpacked_seq_info(*tokens.shape))
    r = model.embedding[tokens].astype(jnp.float32)
    statistics = dict(nnx.to_flat_state(nnx.state(model, Statistic)))
    values = {path: np.array(leaf[...]) for path, leaf in statistics.items()}
    for layer in layer_paths(config.terms):
        graph, weights = nnx.split(module_at(model, layer.path))
        weights = jax.tree.map(lambda w, index=layer.stack_index: w[index], weights)
        r, recorded = _record_step_sizes(graph, weights, r, seq)
        for path, (dt, rates) in recorded.items():
            thresholds = step_thresholds(
                np.asarray(dt), np.asarray(rates), context_length, min_retention, clip_quantile
            )
            values[(*layer.path, *path, "filter", "threshold")][layer.stack_index] = thresholds
    updated = [(path, leaf.replace(jnp.asarray(values[path]))) for path, leaf in statistics.items()]
    nnx.update(model, nnx.from_flat_state(updated))
    return model


def _context_to_calibrate(config: LMConfig, row_length: int) -> int:
    """Return the context length of the filters, after a check of the config and the rows."""
    mixers = [mixer for name in config.layer_names for mixer in _find_long_mamba(config.blocks[name])]
    filtered = {m.context_length: m.training_length for m in mixers if m.context_length > m.training_length}
    if len(filtered) != 1:
        raise ConfigError(f"contexts to calibrate are {sorted(filtered)}; there must be one, above `training_length`")
    ((context_length, training_length),) = filtered.items()
    if training_length != row_length:
        raise ConfigError(f"rows have {row_length} tokens; LongMamba has training_length {training_length}")
    if config.landmark_block_size is not None:
        raise ConfigError("a model that inserts landmarks cannot be calibrated: its layers see longer rows")
    return context_length


@functools.partial(jax.jit, static_argnums=0)
def _record_step_sizes(graph: nnx.GraphDef, weights: nnx.State, r: Float[Array, "B L D"], seq: SeqInfo):
    """Apply a block; return the residual stream, and the steps and decay rates of its filtered modules by path."""
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
    """Compute the threshold of each channel from recorded steps. The retention and the sorted steps are row averages.

    Args:
        dt: Step sizes of rows of the training length L.
        rates: Decay rates of the channels.
        context_length: Tokens of the context.
        min_retention: Smallest retention over a row of a global channel.
        clip_quantile: Quantile of the steps at which they are clipped to find global channels.

    Returns:
        Float32 thresholds; 0 for channels that are not global.
    """
    clipped = np.minimum(dt, np.quantile(dt, clip_quantile, axis=(0, 1), keepdims=True))
    is_global = np.exp(-rates * clipped.sum(axis=1)).mean(axis=0) > min_retention
    descending = -np.sort(-dt, axis=1).mean(axis=0)
    length = len(descending)
    points = np.linspace(0, length - 1, context_length)
    stretched = np.stack([np.interp(points, np.arange(length), channel) for channel in descending.T], axis=1)
    rank = (np.cumsum(stretched, axis=0) < descending.sum(axis=0)).sum(axis=0)
    thresholds = np.take_along_axis(stretched, np.minimum(rank, context_length - 1)[None], axis=0)[0]
    return np.where(is_global & (context_length > length), thresholds, 0).astype(np.float32)


def _find_long_mamba(config: Any) -> list[LongMamba]:
    values = [getattr(config, field.name) for field in fields(config)] if isinstance(config, Config) else []
    mixers = [mixer for value in values for mixer in _find_long_mamba(value)]
    return [config, *mixers] if isinstance(config, LongMamba) else mixers
