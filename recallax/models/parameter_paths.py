"""Where a named parameter lies in a module: at its own path, or at an index into the parameters of a repeated stack.

The layers of a model are named by their absolute number, so the same names serve every spelling of a pattern.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx

from recallax.layers.base import Statistic
from recallax.models.pattern import Term

type LeafPath = tuple[Any, ...]


class ParameterPath(NamedTuple):
    """A path in a module, and an index into the leading axes of the parameters below it."""

    path: LeafPath
    stack_index: tuple[int, ...]


def layer_paths(terms: Sequence[Term], path: LeafPath = ("stack",)) -> list[ParameterPath]:
    """The place of every layer of a model with this pattern, in order."""
    found: list[ParameterPath] = []
    for number, term in enumerate(terms):
        here = (*path, "parts", number)
        if isinstance(term.body, str) and term.repeat == 1:
            found.append(ParameterPath(here, ()))
            continue
        body = (Term(term.body, 1),) if isinstance(term.body, str) else term.body
        inside = layer_paths(body, (*here, "body"))
        found += [
            ParameterPath(place.path, (turn, *place.stack_index)) for turn in range(term.repeat) for place in inside
        ]
    return found


def parameter_paths(
    module: nnx.Module,
    layers: Sequence[ParameterPath] = (),
    variable_types: tuple[type[nnx.Variable], ...] = (nnx.Param,),
) -> dict[str, ParameterPath]:
    """The place of every parameter by its name; `layers` are the module's, if it is a model.

    kinds: the variables that count; statistics, for instance, may be asked for besides.
    """
    found: dict[str, ParameterPath] = {}
    for path, _ in nnx.to_flat_state(nnx.state(module, variable_types)):
        inside = [(n, layer) for n, layer in enumerate(layers) if path[: len(layer.path)] == layer.path]
        for number, layer in inside:
            found[_dotted_name("layers", number, *path[len(layer.path) :])] = ParameterPath(path, layer.stack_index)
        if not inside:
            found[_dotted_name(*path)] = ParameterPath(path, ())
    return found


def parameter_shapes(module: nnx.Module, paths: Mapping[str, ParameterPath]) -> dict[str, tuple[int, ...]]:
    """The shape of every variable by its name, without the axes of repeated stacks."""
    leaves = dict(nnx.to_flat_state(nnx.state(module)))
    return {name: tuple(leaves[place.path].shape)[len(place.stack_index) :] for name, place in paths.items()}


def unstack_parameters(leaves: Mapping[LeafPath, Any], paths: Mapping[str, ParameterPath]) -> dict[str, np.ndarray]:
    """Every named parameter out of the leaves of a module, by their paths; repeated stacks are taken apart."""
    held = {path: np.asarray(leaf) for path, leaf in leaves.items()}
    return {name: held[place.path][place.stack_index] for name, place in paths.items()}


def stack_parameters(
    arrays: Mapping[str, np.ndarray], paths: Mapping[str, ParameterPath], leaves: Mapping[LeafPath, Any]
) -> dict[LeafPath, np.ndarray]:
    """The other way round: values for `leaves`, which say shape and dtype, from named parameters."""
    values = {path: np.empty(leaf.shape, leaf.dtype) for path, leaf in leaves.items()}
    for name, place in paths.items():
        values[place.path][place.stack_index] = arrays[name]
    return values


def fill_parameters[M: nnx.Module](
    module: M, paths: Mapping[str, ParameterPath], arrays: Mapping[str, np.ndarray]
) -> M:
    """The module with these variables in place of its own, which may be abstract (`nnx.eval_shape`).

    Raises ValueError if it holds anything besides parameters and statistics that has no value.
    """
    graph, params, rest = nnx.split(module, (nnx.Param, Statistic), ...)
    if nnx.to_flat_state(rest):
        raise ValueError(f"{type(module).__name__} holds more than has a name; nothing says what the rest should be")
    leaves = dict(nnx.to_flat_state(params))
    values = stack_parameters(arrays, paths, leaves)
    new = [(path, leaf.replace(jnp.asarray(values[path]))) for path, leaf in leaves.items()]
    return nnx.merge(graph, nnx.from_flat_state(new))


def _dotted_name(*path: Any) -> str:
    return ".".join(map(str, path))
