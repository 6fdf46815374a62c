"""A curriculum's stages against a model: for every parameter whether it trains, and what sets it."""

import math
from collections.abc import Mapping
from dataclasses import replace
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Int

from recallax.config import ConfigError, suggest_name
from recallax.models import accounting
from recallax.models.lm import LMConfig
from recallax.models.parameter_paths import LeafPath, layer_paths, parameter_paths
from recallax.models.pattern import parse_pattern
from recallax.train.curriculum.stages import Curriculum, Ramp, Stage
from recallax.train.run_config import RunConfig


class ParameterNames(NamedTuple):
    """What a parameter is called; one of repeated layers has several names, and is one array."""

    layer_names: tuple[str, ...]
    """By the number of each of its layers, or its path where it belongs to none."""
    block_name: str | None
    """By the name of their block."""

    def matches(self, pattern: str) -> bool:
        """Whether a pattern means it. Raises ConfigError where it means some of its layers."""
        hits = [fnmatchcase(name, pattern) for name in self.layer_names]
        if self.block_name is not None and fnmatchcase(self.block_name, pattern):
            return True
        if any(hits) and not all(hits):
            raise ConfigError(
                f"the pattern {pattern!r} matches {self.layer_names[hits.index(True)]} and not "
                f"{self.layer_names[hits.index(False)]}, which are one array because the model's pattern repeats them; name "
                f"all of them, as {self.block_name}, or spell the model's pattern without *"
            )
        return all(hits)


class ParameterMask(NamedTuple):
    """What a step does to the parameters in a stage; trees with the structure of the parameters."""

    trainable: dict
    """A bool per parameter."""
    ramps: Mapping[LeafPath, Ramp]
    """By path, for those that are set."""
    ramp_steps: int
    """Over which ramps run."""

    def apply_ramps(self, params: dict, stage_step: Int[Array, ""]) -> dict:
        """The parameters in step `stage_step` of the stage."""
        flat: dict[LeafPath, Any] = flatten_dict(params)
        for path, ramp in self.ramps.items():
            share = stage_step.astype(jnp.float32) / max(self.ramp_steps - 1, 1)
            value = jnp.where(stage_step >= self.ramp_steps - 1, ramp.end, ramp.start + (ramp.end - ramp.start) * share)
            flat[path] = jnp.full_like(flat[path], value)
        return unflatten_dict(flat)

    def stop_frozen_gradients(self, params: dict) -> dict:
        """The parameters, with no gradient where none is wanted: the backward pass is never built there."""
        return self.select(params, jax.tree.map(jax.lax.stop_gradient, params))

    def select(self, trained: Any, frozen: Any) -> dict:
        """Leaf by leaf from the first where it trains, and else from the second, bit for bit."""
        return jax.tree.map(lambda trains, new, old: new if trains else old, self.trainable, trained, frozen)


class ResolvedStage(NamedTuple):
    """A stage made executable."""

    config: RunConfig
    """The run's, with the stage's task and coefficients."""
    mask: ParameterMask | None
    """None without a curriculum: everything trains."""


def resolve_stages(config: RunConfig) -> list[ResolvedStage]:
    """The stages of a run, in order. Raises ConfigError naming the stage and pattern that does not fit the model."""
    if config.curriculum is None:
        return [ResolvedStage(config, None)]
    names, shapes = parameter_names(config.model, config.task.vocab_size)
    return [_resolve_stage(config, stage, names, shapes) for stage in config.curriculum.stages]


def describe_stages(config: RunConfig, curriculum: Curriculum) -> list[str]:
    """Lines for each stage: its rule, how many parameters train and on what lengths, the gates that are set."""
    _, shapes = parameter_names(config.model, config.task.vocab_size)
    lines = []
    for number, (stage, lesson) in enumerate(zip(curriculum.stages, resolve_stages(config), strict=True), 1):
        assert lesson.mask is not None
        flat = flatten_dict(lesson.mask.trainable)
        count = sum(math.prod(shape) for path, (shape, _) in shapes.items() if flat[path])
        lengths = ", ".join(map(str, lesson.config.task.lengths("train")))
        rule = " ".join([type(stage.until).__name__, *(f"{name}={value}" for name, value in vars(stage.until).items())])
        gates = [f"{r.gate} {r.start:g}" + ("" if r.start == r.end else f" to {r.end:g}") for r in stage.ramps]
        lines.append(f"  {number}  {stage.name:<14}{rule}")
        lines.append(f"{'':19}{count:,} parameters train, on rows of {lengths} tokens")
        lines += [f"{'':19}{'; '.join(gates)}"] if gates else []
    return lines


def parameter_names(
    model: LMConfig, vocab_size: int
) -> tuple[dict[LeafPath, ParameterNames], dict[LeafPath, tuple[tuple[int, ...], int]]]:
    """What every parameter is called, and its shape with the number of its stacked leading axes, by its path."""
    built = accounting.abstract_model(model, vocab_size)
    places = parameter_paths(built, layer_paths(parse_pattern(model.pattern, list(model.blocks))))
    called: dict[LeafPath, list[str]] = {}
    stacked: dict[LeafPath, int] = {}
    for name, place in places.items():
        called.setdefault(place.path, []).append(name)
        stacked[place.path] = len(place.stack_index)
    leaves = dict(nnx.to_flat_state(nnx.state(built, nnx.Param)))
    shapes = {path: (tuple(leaves[path].shape), count) for path, count in stacked.items()}
    return {
        path: ParameterNames(tuple(found), _block_parameter_name(model, found[0])) for path, found in called.items()
    }, shapes


def _block_parameter_name(model: LMConfig, name: str) -> str | None:
    if not name.startswith("layers."):
        return None
    _, number, rest = name.split(".", 2)
    return f"blocks.{model.layer_names[int(number)]}.{rest}"


def _resolve_stage(
    config: RunConfig, stage: Stage, names: dict[LeafPath, ParameterNames], shapes: dict[LeafPath, Any]
) -> ResolvedStage:
    ramps: dict[LeafPath, Ramp] = {}
    for ramp in stage.ramps:
        for path in _match_parameters(stage, ramp.gate, names):
            shape, stacked = shapes[path]
            if math.prod(shape[stacked:]) != 1:
                raise ConfigError(
                    f"the stage {stage.name!r} ramps {names[path].layer_names[0]}, which has the shape "
                    f"{list(shape[stacked:])}; what is ramped must be one number per layer, such as *.gates.attention"
                )
            if path in ramps:
                raise ConfigError(
                    f"the stage {stage.name!r} ramps {names[path].layer_names[0]} twice, by {ramps[path].gate!r} and by "
                    f"{ramp.gate!r}; one of them must go"
                )
            ramps[path] = ramp
    wanted, frozen = (
        {path for pattern in patterns for path in _match_parameters(stage, pattern, names)}
        for patterns in (stage.trainable, stage.frozen)
    )
    trains = {path: path in wanted and path not in frozen and path not in ramps for path in names}
    if not any(trains.values()):
        raise ConfigError(
            f"the stage {stage.name!r} trains nothing: all of {list(stage.trainable)} is frozen or ramped; leave some out"
        )
    train = replace(config.train, loss_weights=config.train.loss_weights | stage.loss_weights)
    own = replace(config, task=stage.task or config.task, train=train, curriculum=None)
    return ResolvedStage(own, ParameterMask(unflatten_dict(trains), ramps, stage.until.min_duration()))


def _match_parameters(stage: Stage, pattern: str, names: dict[LeafPath, ParameterNames]) -> list[LeafPath]:
    """The parameters that a pattern means; never none."""
    try:
        found = [path for path, called in names.items() if called.matches(pattern)]
    except ConfigError as error:
        raise ConfigError(f"the stage {stage.name!r}: {error}") from error
    if not found:
        known = sorted({name.block_name or name.layer_names[0] for name in names.values()})
        like = get_close_matches(pattern, known, n=6, cutoff=0.0)
        raise ConfigError(
            f"the stage {stage.name!r} names {pattern!r}, which is no parameter{suggest_name(pattern, like)}"
        )
    return found
