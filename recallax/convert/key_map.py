"""Key maps: which arrays of another implementation become which parameters of ours, and in what form. Strict.

Every key of theirs is used exactly once, every parameter of ours is filled exactly once, and all shapes are checked.
Our parameters are named by their path in the model, with the absolute number of a layer in place of its spot in the
pattern: `embedding`, `layers.3.mixer.q.kernel`, `norm.scale`.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from recallax.convert.array_transforms import IDENTITY, TRANSPOSE, ArrayTransform, chain, multiply

type Shapes = Mapping[str, tuple[int, ...]]
MAX_LISTED = 5
"""Names that an error lists before it counts the rest."""
MAX_SIZE_RATIO = 16
"""A parameter this many times as large as its weights is refused before it is made: a config may claim any size."""


class WeightsError(ValueError):
    """Weights that do not fit the model."""


class KeyMapEntry(NamedTuple):
    """Keys of theirs, names of ours, and the form between the two."""

    source: tuple[str, ...]
    target: tuple[str, ...]
    transform: ArrayTransform = IDENTITY


def parameter_entry(source: str, target: str, transform: ArrayTransform = IDENTITY) -> KeyMapEntry:
    """One key, one parameter."""
    return KeyMapEntry((source,), (target,), transform)


def linear_entry(source: str, target: str, multiplier: float = 1.0) -> KeyMapEntry:
    """A projection without bias, and the multiplier that they apply to what it gives."""
    form = TRANSPOSE if multiplier == 1 else chain(multiply(multiplier), TRANSPOSE)
    return parameter_entry(f"{source}.weight", f"{target}.kernel", form)


def apply_key_map(
    entries: Sequence[KeyMapEntry], weights: Mapping[str, np.ndarray], shapes: Shapes
) -> dict[str, np.ndarray]:
    """Our parameters by name, in float32, from their weights by key; `shapes` are those of our parameters, by name.

    Raises WeightsError naming keys that are missing or left over, arrays of another shape than the model needs, and a
    map that does not fill every parameter once.
    """
    _check_map(entries, shapes)
    _check_keys(entries, weights)
    return {name: array for entry in entries for name, array in _convert_entry(entry, weights, shapes)}


def apply_inverse_key_map(
    entries: Sequence[KeyMapEntry], parameters: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Their weights by key from our parameters by name, in rows (C order): `apply_key_map` read backwards.

    Raises WeightsError for a map that does not use every parameter once.
    """
    _check_map(entries, {name: array.shape for name, array in parameters.items()})
    found: dict[str, np.ndarray] = {}
    for entry in entries:
        made = entry.transform.inverse(tuple(np.asarray(parameters[name]) for name in entry.target))
        found |= {key: np.asarray(array, order="C") for key, array in zip(entry.source, made, strict=True)}
    return found


def _convert_entry(
    entry: KeyMapEntry, weights: Mapping[str, np.ndarray], shapes: Shapes
) -> list[tuple[str, np.ndarray]]:
    wanted = sum(math.prod(shapes[name]) for name in entry.target)
    if wanted > MAX_SIZE_RATIO * sum(np.asarray(weights[key]).size for key in entry.source):
        raise WeightsError(
            f"{', '.join(entry.source)} would need {wanted} numbers; give the config.json of these weights"
        )
    # An import must find what an export would write.
    expected = entry.transform.inverse(tuple(np.zeros(shapes[name], np.float32) for name in entry.target))
    arrays = tuple(np.asarray(weights[key]) for key in entry.source)
    for key, array, like in zip(entry.source, arrays, expected, strict=True):
        if array.shape != like.shape:
            ours = ", ".join(f"{name} {shapes[name]}" for name in entry.target)
            raise WeightsError(
                f"{key} has shape {array.shape}; it must be {like.shape}, since it becomes {ours}. "
                "Give the config.json that belongs to these weights."
            )
    made = entry.transform.forward(tuple(array.astype(np.float32) for array in arrays))
    return list(zip(entry.target, made, strict=True))


def _check_keys(entries: Sequence[KeyMapEntry], weights: Mapping[str, np.ndarray]) -> None:
    wanted = {key for entry in entries for key in entry.source}
    faults = []
    if missing := sorted(wanted - set(weights)):
        faults.append(f"the weights lack {_format_names(missing)}")
    if unused := sorted(set(weights) - wanted):
        faults.append(f"the model has no place for {_format_names(unused)}")
    if faults:
        remedy = "Give all shards and the config.json that belongs to them; leave out what is no weight."
        raise WeightsError(f"{'; '.join(faults)}. {remedy}")


def _check_map(entries: Sequence[KeyMapEntry], shapes: Shapes) -> None:
    theirs = Counter(key for entry in entries for key in entry.source)
    ours = Counter(name for entry in entries for name in entry.target)
    faults = {
        "uses more than once": [name for side in (theirs, ours) for name, count in side.items() if count > 1],
        "fills no": list(shapes.keys() - ours.keys()),
        "fills what the model lacks,": list(ours.keys() - shapes.keys()),
    }
    for fault, names in faults.items():
        if names:
            raise WeightsError(f"the key map {fault} {_format_names(sorted(names))}; mend the map of this layout")


def _format_names(names: Sequence[str]) -> str:
    rest = f" and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else ""
    return ", ".join(map(repr, names[:MAX_LISTED])) + rest
