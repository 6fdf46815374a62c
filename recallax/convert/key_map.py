"""Key maps: which arrays of a source checkpoint become which parameters of recallax, and by which transform.

A key map is strict: it uses each source key exactly once, it fills each parameter exactly once, and all shapes are
checked. Parameters are named by their path in the model, with the absolute number of the layer instead of its position
in the pattern: `embedding`, `layers.3.mixer.q.kernel`, `norm.scale`.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from recallax.convert.array_transforms import IDENTITY, TRANSPOSE, ArrayTransform, chain, multiply
from recallax.convert.safetensors_file import DTYPES
from recallax.convert.weights_error import WeightsError

type Shapes = Mapping[str, tuple[int, ...]]
MAX_LISTED = 5
"""Names that an error lists before it counts the rest."""
MAX_SIZE_RATIO = 16
"""A parameter this many times larger than its source arrays is rejected before it is allocated, since a config.json may
state any size."""


class KeyMapEntry(NamedTuple):
    """Source keys, parameter names, and the transform between their arrays."""

    source: tuple[str, ...]
    """Keys of the source checkpoint."""
    target: tuple[str, ...]
    """Names of recallax parameters."""
    transform: ArrayTransform = IDENTITY


def parameter_entry(source: str, target: str, transform: ArrayTransform = IDENTITY) -> KeyMapEntry:
    """Map one source key to one parameter.

    Args:
        source: The source key.
        target: The parameter's name.
        transform: From the source array to the parameter.

    Returns:
        The entry.
    """
    return KeyMapEntry((source,), (target,), transform)


def linear_entry(source: str, target: str, multiplier: float = 1.0) -> KeyMapEntry:
    """Map the weight of a linear projection.

    Args:
        source: The source module; its key is `source.weight`, [outputs, inputs].
        target: The recallax module; its parameter is `target.kernel`, [inputs, outputs].
        multiplier: A factor that the source implementation applies to the output, folded into the kernel.

    Returns:
        The entry.
    """
    transform = TRANSPOSE if multiplier == 1 else chain(multiply(multiplier), TRANSPOSE)
    return parameter_entry(f"{source}.weight", f"{target}.kernel", transform)


def apply_key_map(
    entries: Sequence[KeyMapEntry], weights: Mapping[str, np.ndarray], shapes: Shapes
) -> dict[str, np.ndarray]:
    """Convert a source checkpoint to parameters.

    Args:
        entries: The key map.
        weights: Source arrays by key.
        shapes: Shapes of all parameters by name.

    Returns:
        Parameters by name, in float32.

    Raises:
        WeightsError: If keys are missing or unused, an array has another shape than the model needs or values that are
            not finite in float32, or the key map does not fill every parameter exactly once.
    """
    _check_entries(entries, shapes)
    _check_keys(entries, weights)
    return {name: array for entry in entries for name, array in _convert_entry(entry, weights, shapes)}


def apply_inverse_key_map(
    entries: Sequence[KeyMapEntry], parameters: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Convert parameters to a source checkpoint: the inverse of `apply_key_map`.

    Args:
        entries: The key map.
        parameters: Parameters by name.

    Returns:
        Source arrays by key, C-contiguous.

    Raises:
        WeightsError: If the key map does not use every parameter exactly once.
    """
    _check_entries(entries, {name: array.shape for name, array in parameters.items()})
    weights: dict[str, np.ndarray] = {}
    for entry in entries:
        arrays = entry.transform.inverse(tuple(np.asarray(parameters[name]) for name in entry.target))
        weights |= {key: np.asarray(array, order="C") for key, array in zip(entry.source, arrays, strict=True)}
    return weights


def _convert_entry(
    entry: KeyMapEntry, weights: Mapping[str, np.ndarray], shapes: Shapes
) -> list[tuple[str, np.ndarray]]:
    required_size = sum(math.prod(shapes[name]) for name in entry.target)
    if required_size > MAX_SIZE_RATIO * sum(np.asarray(weights[key]).size for key in entry.source):
        raise WeightsError(
            f"{', '.join(entry.source)} would need {required_size} numbers; give the config.json of these weights"
        )
    # The expected source shapes are those that an export of the model would write.
    expected = entry.transform.inverse(tuple(np.zeros(shapes[name], np.float32) for name in entry.target))
    arrays = tuple(np.asarray(weights[key]) for key in entry.source)
    for key, array, like in zip(entry.source, arrays, expected, strict=True):
        if array.shape != like.shape:
            targets = ", ".join(f"{name} {shapes[name]}" for name in entry.target)
            raise WeightsError(
                f"{key} has shape {array.shape}; it must be {like.shape}, since it becomes {targets}. "
                "Give the config.json that belongs to these weights."
            )
    numbers = (_as_float32(key, array) for key, array in zip(entry.source, arrays, strict=True))
    return list(zip(entry.target, entry.transform.forward(tuple(numbers)), strict=True))


def _as_float32(key: str, array: np.ndarray) -> np.ndarray:
    if array.dtype not in DTYPES.values():
        raise WeightsError(f"{key} has dtype {array.dtype}; weights must be one of {', '.join(DTYPES)}: convert it")
    with np.errstate(over="ignore"):
        converted = array.astype(np.float32)
    finite = np.isfinite(converted)
    if not finite.all():
        index = tuple(int(i) for i in np.argwhere(~finite)[0])
        raise WeightsError(
            f"{key} has {int((~finite).sum())} values that are not finite in float32, the first {array[index]} at "
            f"{index}; weights must be finite numbers of float32: give weights that are not damaged"
        )
    return converted


def _check_keys(entries: Sequence[KeyMapEntry], weights: Mapping[str, np.ndarray]) -> None:
    required = {key for entry in entries for key in entry.source}
    errors = []
    if missing := sorted(required - set(weights)):
        errors.append(f"the weights lack {_format_names(missing)}")
    if unused := sorted(set(weights) - required):
        errors.append(f"the model has no parameter for {_format_names(unused)}")
    if errors:
        remedy = "Give all shards and the config.json that belongs to them; remove keys that are not weights."
        raise WeightsError(f"{'; '.join(errors)}. {remedy}")


def _check_entries(entries: Sequence[KeyMapEntry], shapes: Shapes) -> None:
    source = Counter(key for entry in entries for key in entry.source)
    target = Counter(name for entry in entries for name in entry.target)
    errors = {
        "uses more than once": [name for counts in (source, target) for name, n in counts.items() if n > 1],
        "does not fill": list(shapes.keys() - target.keys()),
        "fills names that the model lacks:": list(target.keys() - shapes.keys()),
    }
    for error, names in errors.items():
        if names:
            raise WeightsError(f"the key map {error} {_format_names(sorted(names))}; correct the layout's key map")


def _format_names(names: Sequence[str]) -> str:
    rest = f" and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else ""
    return ", ".join(map(repr, names[:MAX_LISTED])) + rest
