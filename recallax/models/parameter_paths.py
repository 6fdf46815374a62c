"""Names of parameters that do not depend on how layers are stacked, and the location of each in a module.

A parameter lies at a path in the module and, below a repeated stack, at an index into its leading axes. Layers are
named by their absolute number, so all spellings of a pattern have the same names.
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
    """Return the path of every layer of a model.

    Args:
        terms: The parsed pattern of the model.
        path: The path of the stack.

    Returns:
        One path per layer, in order.
    """
    paths: list[ParameterPath] = []
    for number, term in enumerate(terms):
        part = (*path, "parts", number)
        if isinstance(term.body, str) and term.repeat == 1:
            paths.append(ParameterPath(part, ()))
            continue
        body = (Term(term.body, 1),) if isinstance(term.body, str) else term.body
        inner = layer_paths(body, (*part, "body"))
        paths += [ParameterPath(p.path, (index, *p.stack_index)) for index in range(term.repeat) for p in inner]
    return paths


def parameter_paths(
    module: nnx.Module,
    layers: Sequence[ParameterPath] = (),
    variable_types: tuple[type[nnx.Variable], ...] = (nnx.Param,),
) -> dict[str, ParameterPath]:
    """Return the path of every parameter by name.

    Args:
        module: The module; its arrays may be abstract.
        layers: The paths of its layers, if it is a model.
        variable_types: The types of variables to include.

    Returns:
        Paths by name. Names below a layer begin with `layers.` and the layer's absolute number.
    """
    paths: dict[str, ParameterPath] = {}
    for path, _ in nnx.to_flat_state(nnx.state(module, variable_types)):
        inside = [(n, layer) for n, layer in enumerate(layers) if path[: len(layer.path)] == layer.path]
        for number, layer in inside:
            paths[_dotted_name("layers", number, *path[len(layer.path) :])] = ParameterPath(path, layer.stack_index)
        if not inside:
            paths[_dotted_name(*path)] = ParameterPath(path, ())
    return paths


def module_at(module: nnx.Module, path: LeafPath) -> Any:
    """Return the submodule at a path.

    Args:
        module: The root.
        path: Attribute names, and indices into lists.

    Returns:
        The submodule.
    """
    node: Any = module
    for name in path:
        node = node[name] if isinstance(name, int) else getattr(node, name)
    return node


def parameter_shapes(module: nnx.Module, paths: Mapping[str, ParameterPath]) -> dict[str, tuple[int, ...]]:
    """Return the shape of every variable without the axes of repeated stacks.

    Args:
        module: The module; its arrays may be abstract.
        paths: Paths by name.

    Returns:
        Shapes by name.
    """
    leaves = dict(nnx.to_flat_state(nnx.state(module)))
    return {name: tuple(leaves[p.path].shape)[len(p.stack_index) :] for name, p in paths.items()}


def unstack_parameters(leaves: Mapping[LeafPath, Any], paths: Mapping[str, ParameterPath]) -> dict[str, np.ndarray]:
    """Convert the leaves of a module to named arrays.

    Args:
        leaves: Arrays by path; those of repeated stacks have leading axes.
        paths: Paths by name.

    Returns:
        Arrays by name, without the leading axes of stacks.
    """
    arrays = {path: np.asarray(leaf) for path, leaf in leaves.items()}
    return {name: arrays[p.path][p.stack_index] for name, p in paths.items()}


def stack_parameters(
    arrays: Mapping[str, np.ndarray], paths: Mapping[str, ParameterPath], leaves: Mapping[LeafPath, Any]
) -> dict[LeafPath, np.ndarray]:
    """Convert named arrays to the leaves of a module: the inverse of `unstack_parameters`.

    Args:
        arrays: Arrays by name.
        paths: Paths by name; they must fill all leaves.
        leaves: The shape and dtype of every leaf by path.

    Returns:
        Arrays by path.
    """
    values = {path: np.empty(leaf.shape, leaf.dtype) for path, leaf in leaves.items()}
    for name, p in paths.items():
        values[p.path][p.stack_index] = arrays[name]
    return values


def fill_parameters[M: nnx.Module](
    module: M, paths: Mapping[str, ParameterPath], arrays: Mapping[str, np.ndarray]
) -> M:
    """Return a module with given variables.

    Args:
        module: The module; its arrays may be abstract (`nnx.eval_shape`).
        paths: Paths by name; they must include all parameters and statistics.
        arrays: Arrays by name.

    Returns:
        The module with concrete arrays.

    Raises:
        ValueError: If the module has variables besides parameters and statistics.
    """
    graph, variables, rest = nnx.split(module, (nnx.Param, Statistic), ...)
    if nnx.to_flat_state(rest):
        raise ValueError(f"{type(module).__name__} has variables besides parameters and statistics, which have no name")
    leaves = dict(nnx.to_flat_state(variables))
    values = stack_parameters(arrays, paths, leaves)
    filled = [(path, leaf.replace(jnp.asarray(values[path]))) for path, leaf in leaves.items()]
    return nnx.merge(graph, nnx.from_flat_state(filled))


def _dotted_name(*path: Any) -> str:
    return ".".join(map(str, path))
