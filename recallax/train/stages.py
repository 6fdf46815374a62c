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

from recallax.config import ConfigError, nearest
from recallax.models import accounting
from recallax.models.lm import LMConfig
from recallax.models.pattern import parse
from recallax.models.placement import Path, layer_places, parameter_places
from recallax.train.curriculum import Curriculum, Ramp, Stage
from recallax.train.run import RunConfig


class Names(NamedTuple):
    """What a parameter is called; one of repeated layers has several names, and is one array."""

    layers: tuple[str, ...]
    """By the number of each of its layers, or its path where it belongs to none."""
    block: str | None
    """By the name of their block."""

    def match(self, pattern: str) -> bool:
        """Whether a pattern means it. Raises ConfigError where it means some of its layers."""
        hits = [fnmatchcase(name, pattern) for name in self.layers]
        if self.block is not None and fnmatchcase(self.block, pattern):
            return True
        if any(hits) and not all(hits):
            raise ConfigError(
                f"the pattern {pattern!r} matches {self.layers[hits.index(True)]} and not "
                f"{self.layers[hits.index(False)]}, which are one array because the model's pattern repeats them; name "
                f"all of them, as {self.block}, or spell the model's pattern without *"
            )
        return all(hits)


class Part(NamedTuple):
    """What a step does to the parameters in a stage; trees with the structure of the parameters."""

    trains: dict
    """A bool per parameter."""
    ramps: Mapping[Path, Ramp]
    """By path, for those that are set."""
    steps: int
    """Over which ramps run."""

    def ramped(self, params: dict, within: Int[Array, ""]) -> dict:
        """The parameters in step `within` of the stage."""
        flat: dict[Path, Any] = flatten_dict(params)
        for path, ramp in self.ramps.items():
            share = within.astype(jnp.float32) / max(self.steps - 1, 1)
            value = jnp.where(within >= self.steps - 1, ramp.end, ramp.start + (ramp.end - ramp.start) * share)
            flat[path] = jnp.full_like(flat[path], value)
        return unflatten_dict(flat)

    def differentiated(self, params: dict) -> dict:
        """The parameters, with no gradient where none is wanted: the backward pass is never built there."""
        return self.chosen(params, jax.tree.map(jax.lax.stop_gradient, params))

    def chosen(self, moved: Any, kept: Any) -> dict:
        """Leaf by leaf from the first where it trains, and else from the second, bit for bit."""
        return jax.tree.map(lambda trains, new, old: new if trains else old, self.trains, moved, kept)


class Lesson(NamedTuple):
    """A stage made executable."""

    config: RunConfig
    """The run's, with the stage's task and coefficients."""
    part: Part | None
    """None without a curriculum: everything trains."""


def lessons(config: RunConfig) -> list[Lesson]:
    """The stages of a run, in order. Raises ConfigError naming the stage and pattern that does not fit the model."""
    if config.curriculum is None:
        return [Lesson(config, None)]
    names, shapes = parameter_names(config.model, config.task.vocab_size)
    return [_lesson(config, stage, names, shapes) for stage in config.curriculum.stages]


def describe_stages(config: RunConfig, curriculum: Curriculum) -> list[str]:
    """Lines for each stage: its rule, how many parameters train and on what lengths, the gates that are set."""
    _, shapes = parameter_names(config.model, config.task.vocab_size)
    lines = []
    for number, (stage, lesson) in enumerate(zip(curriculum.stages, lessons(config), strict=True), 1):
        assert lesson.part is not None
        flat = flatten_dict(lesson.part.trains)
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
) -> tuple[dict[Path, Names], dict[Path, tuple[tuple[int, ...], int]]]:
    """What every parameter is called, and its shape with the number of its stacked leading axes, by its path."""
    built = accounting.abstract_model(model, vocab_size)
    places = parameter_places(built, layer_places(parse(model.pattern, list(model.blocks))))
    called: dict[Path, list[str]] = {}
    stacked: dict[Path, int] = {}
    for name, place in places.items():
        called.setdefault(place.path, []).append(name)
        stacked[place.path] = len(place.index)
    leaves = dict(nnx.to_flat_state(nnx.state(built, nnx.Param)))
    shapes = {path: (tuple(leaves[path].shape), count) for path, count in stacked.items()}
    return {path: Names(tuple(found), _by_block(model, found[0])) for path, found in called.items()}, shapes


def _by_block(model: LMConfig, name: str) -> str | None:
    if not name.startswith("layers."):
        return None
    _, number, rest = name.split(".", 2)
    return f"blocks.{model.layers[int(number)]}.{rest}"


def _lesson(config: RunConfig, stage: Stage, names: dict[Path, Names], shapes: dict[Path, Any]) -> Lesson:
    ramps: dict[Path, Ramp] = {}
    for ramp in stage.ramps:
        for path in _matches(stage, ramp.gate, names):
            shape, stacked = shapes[path]
            if math.prod(shape[stacked:]) != 1:
                raise ConfigError(
                    f"the stage {stage.name!r} ramps {names[path].layers[0]}, which has the shape "
                    f"{list(shape[stacked:])}; what is ramped must be one number per layer, such as *.gates.attention"
                )
            if path in ramps:
                raise ConfigError(
                    f"the stage {stage.name!r} ramps {names[path].layers[0]} twice, by {ramps[path].gate!r} and by "
                    f"{ramp.gate!r}; one of them must go"
                )
            ramps[path] = ramp
    wanted, frozen = (
        {path for pattern in patterns for path in _matches(stage, pattern, names)}
        for patterns in (stage.trains, stage.frozen)
    )
    trains = {path: path in wanted and path not in frozen and path not in ramps for path in names}
    if not any(trains.values()):
        raise ConfigError(
            f"the stage {stage.name!r} trains nothing: all of {list(stage.trains)} is frozen or ramped; leave some out"
        )
    train = replace(config.train, loss_weights=config.train.loss_weights | stage.loss_weights)
    own = replace(config, task=stage.task or config.task, train=train, curriculum=None)
    return Lesson(own, Part(unflatten_dict(trains), ramps, stage.until.least()))


def _matches(stage: Stage, pattern: str, names: dict[Path, Names]) -> list[Path]:
    """The parameters that a pattern means; never none."""
    try:
        found = [path for path, called in names.items() if called.match(pattern)]
    except ConfigError as error:
        raise ConfigError(f"the stage {stage.name!r}: {error}") from error
    if not found:
        known = sorted({name.block or name.layers[0] for name in names.values()})
        like = get_close_matches(pattern, known, n=6, cutoff=0.0)
        raise ConfigError(f"the stage {stage.name!r} names {pattern!r}, which is no parameter{nearest(pattern, like)}")
    return found
