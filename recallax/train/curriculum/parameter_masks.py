"""Names of parameters, patterns over them, and masks of the parameters that train."""

from collections.abc import Mapping
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
from recallax.train.curriculum.stages import Ramp


class ParameterNames(NamedTuple):
    """The names of one array; repeated layers share one array and have a name each."""

    layer_names: tuple[str, ...]
    """One name per layer, with the number of the layer; the path of a parameter outside the layers."""
    block_name: str | None
    """The name with the name of the block in place of the layer number; None outside the layers."""

    def matches(self, pattern: str) -> bool:
        """Return whether a shell pattern matches the array.

        Args:
            pattern: Pattern over layer names and block names.

        Returns:
            True if it matches the block name, or the names of all layers.

        Raises:
            ConfigError: The pattern matches some of the layers that share the array.
        """
        hits = [fnmatchcase(name, pattern) for name in self.layer_names]
        if self.block_name is not None and fnmatchcase(self.block_name, pattern):
            return True
        if any(hits) and not all(hits):
            raise ConfigError(
                f"the pattern {pattern!r} matches {self.layer_names[hits.index(True)]} and not "
                f"{self.layer_names[hits.index(False)]}, which are one array because the model's pattern repeats them; "
                f"match all of them, as {self.block_name}, or write the model's pattern without *"
            )
        return all(hits)


class ParameterShape(NamedTuple):
    """The shape of one array."""

    shape: tuple[int, ...]
    num_stacked_axes: int
    """Number of leading axes that index repeated layers."""


class ParameterMask(NamedTuple):
    """The treatment of the parameters in a stage; trees have the structure of the parameters."""

    trainable: dict
    """A bool per parameter."""
    ramps: Mapping[LeafPath, Ramp]
    """Ramps of the parameters that the stage sets, by path."""
    ramp_steps: int
    """Number of steps that a ramp takes."""

    def apply_ramps(self, params: dict, stage_step: Int[Array, ""]) -> dict:
        """Return the parameters with the ramped ones set.

        Args:
            params: Parameters after the previous step.
            stage_step: Number of steps of the stage before this one.

        Returns:
            A tree of the same structure.
        """
        flat: dict[LeafPath, Any] = flatten_dict(params)
        for path, ramp in self.ramps.items():
            share = stage_step.astype(jnp.float32) / max(self.ramp_steps - 1, 1)
            value = jnp.where(stage_step >= self.ramp_steps - 1, ramp.end, ramp.start + (ramp.end - ramp.start) * share)
            flat[path] = jnp.full_like(flat[path], value)
        return unflatten_dict(flat)

    def stop_frozen_gradients(self, params: dict) -> dict:
        """Apply `stop_gradient` to frozen parameters, so that their backward pass is not built."""
        return self.select(params, jax.tree.map(jax.lax.stop_gradient, params))

    def select(self, trained: Any, frozen: Any) -> dict:
        """Take the trainable leaves from `trained` and the others, unchanged, from `frozen`.

        Args:
            trained: Tree of all parameters after a step.
            frozen: The same tree before it.

        Returns:
            The tree.
        """
        return jax.tree.map(lambda trains, new, old: new if trains else old, self.trainable, trained, frozen)


def parameter_names(
    model: LMConfig, vocab_size: int
) -> tuple[dict[LeafPath, ParameterNames], dict[LeafPath, ParameterShape]]:
    """Return the names and the shape of every parameter of a model.

    Args:
        model: Config of the model.
        vocab_size: Number of token ids of the task.

    Returns:
        Names by path, and shapes by path.
    """
    module = accounting.abstract_model(model, vocab_size)
    paths = parameter_paths(module, layer_paths(parse_pattern(model.pattern, list(model.blocks))))
    layer_names: dict[LeafPath, list[str]] = {}
    num_stacked_axes: dict[LeafPath, int] = {}
    for name, place in paths.items():
        layer_names.setdefault(place.path, []).append(name)
        num_stacked_axes[place.path] = len(place.stack_index)
    leaves = dict(nnx.to_flat_state(nnx.state(module, nnx.Param)))
    names = {
        path: ParameterNames(tuple(own), _block_parameter_name(model, own[0])) for path, own in layer_names.items()
    }
    shapes = {path: ParameterShape(tuple(leaves[path].shape), count) for path, count in num_stacked_axes.items()}
    return names, shapes


def match_parameters(names: Mapping[LeafPath, ParameterNames], pattern: str, stage: str) -> list[LeafPath]:
    """Return the parameters that a pattern of a stage matches.

    Args:
        names: Names of the parameters by path.
        pattern: Shell pattern.
        stage: Name of the stage, for error messages.

    Returns:
        Their paths; at least one.

    Raises:
        ConfigError: The pattern matches nothing, or some of the layers that share an array.
    """
    try:
        matched = [path for path, own in names.items() if own.matches(pattern)]
    except ConfigError as error:
        raise ConfigError(f"stage {stage!r}: {error}") from error
    if not matched:
        known = sorted({name.block_name or name.layer_names[0] for name in names.values()})
        similar = get_close_matches(pattern, known, n=6, cutoff=0.0)
        raise ConfigError(f"stage {stage!r}: no parameter matches {pattern!r}{suggest_name(pattern, similar)}")
    return matched


def _block_parameter_name(model: LMConfig, name: str) -> str | None:
    if not name.startswith("layers."):
        return None
    _, number, rest = name.split(".", 2)
    return f"blocks.{model.layer_names[int(number)]}.{rest}"
