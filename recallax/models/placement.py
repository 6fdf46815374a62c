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

type Path = tuple[Any, ...]


class Place(NamedTuple):
    """A path in a module, and an index into the leading axes of the parameters below it."""

    path: Path
    index: tuple[int, ...]


def layer_places(terms: Sequence[Term], path: Path = ("stack",)) -> list[Place]:
    """The place of every layer of a model with this pattern, in order."""
    found: list[Place] = []
    for number, term in enumerate(terms):
        here = (*path, "parts", number)
        if isinstance(term.body, str) and term.repeat == 1:
            found.append(Place(here, ()))
            continue
        body = (Term(term.body, 1),) if isinstance(term.body, str) else term.body
        inside = layer_places(body, (*here, "body"))
        found += [Place(place.path, (turn, *place.index)) for turn in range(term.repeat) for place in inside]
    return found


def parameter_places(
    module: nnx.Module, layers: Sequence[Place] = (), kinds: tuple[type[nnx.Variable], ...] = (nnx.Param,)
) -> dict[str, Place]:
    """The place of every parameter by its name; `layers` are the module's, if it is a model.

    kinds: the variables that count; statistics, for instance, may be asked for besides.
    """
    found: dict[str, Place] = {}
    for path, _ in nnx.to_flat_state(nnx.state(module, kinds)):
        inside = [(n, layer) for n, layer in enumerate(layers) if path[: len(layer.path)] == layer.path]
        for number, layer in inside:
            found[_name("layers", number, *path[len(layer.path) :])] = Place(path, layer.index)
        if not inside:
            found[_name(*path)] = Place(path, ())
    return found


def parameter_shapes(module: nnx.Module, places: Mapping[str, Place]) -> dict[str, tuple[int, ...]]:
    """The shape of every variable by its name, without the axes of repeated stacks."""
    leaves = dict(nnx.to_flat_state(nnx.state(module)))
    return {name: tuple(leaves[place.path].shape)[len(place.index) :] for name, place in places.items()}


def unstacked(leaves: Mapping[Path, Any], places: Mapping[str, Place]) -> dict[str, np.ndarray]:
    """Every named parameter out of the leaves of a module, by their paths; repeated stacks are taken apart."""
    held = {path: np.asarray(leaf) for path, leaf in leaves.items()}
    return {name: held[place.path][place.index] for name, place in places.items()}


def stacked(
    arrays: Mapping[str, np.ndarray], places: Mapping[str, Place], leaves: Mapping[Path, Any]
) -> dict[Path, np.ndarray]:
    """The other way round: values for `leaves`, which say shape and dtype, from named parameters."""
    values = {path: np.empty(leaf.shape, leaf.dtype) for path, leaf in leaves.items()}
    for name, place in places.items():
        values[place.path][place.index] = arrays[name]
    return values


def filled[M: nnx.Module](module: M, places: Mapping[str, Place], arrays: Mapping[str, np.ndarray]) -> M:
    """The module with these variables in place of its own, which may be abstract (`nnx.eval_shape`).

    Raises ValueError if it holds anything besides parameters and statistics that has no value.
    """
    graph, params, rest = nnx.split(module, (nnx.Param, Statistic), ...)
    if nnx.to_flat_state(rest):
        raise ValueError(f"{type(module).__name__} holds more than has a name; nothing says what the rest should be")
    leaves = dict(nnx.to_flat_state(params))
    values = stacked(arrays, places, leaves)
    new = [(path, leaf.replace(jnp.asarray(values[path]))) for path, leaf in leaves.items()]
    return nnx.merge(graph, nnx.from_flat_state(new))


def _name(*path: Any) -> str:
    return ".".join(map(str, path))
