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

from recallax.models.importing.form import SAME, TRANSPOSED, Form, chain, scaled

type Shapes = Mapping[str, tuple[int, ...]]
SHOWN = 5
"""Names that an error lists before it counts the rest."""
LARGER = 16
"""A parameter this many times as large as its weights is refused before it is made: a config may claim any size."""


class WeightsError(ValueError):
    """Weights that do not fit the model."""


class Entry(NamedTuple):
    """Keys of theirs, names of ours, and the form between the two."""

    theirs: tuple[str, ...]
    ours: tuple[str, ...]
    form: Form = SAME


def one(theirs: str, ours: str, form: Form = SAME) -> Entry:
    """One key, one parameter."""
    return Entry((theirs,), (ours,), form)


def linear(theirs: str, ours: str, multiplier: float = 1.0) -> Entry:
    """A projection without bias, and the multiplier that they apply to what it gives."""
    form = TRANSPOSED if multiplier == 1 else chain(scaled(multiplier), TRANSPOSED)
    return one(f"{theirs}.weight", f"{ours}.kernel", form)


def convert(entries: Sequence[Entry], weights: Mapping[str, np.ndarray], shapes: Shapes) -> dict[str, np.ndarray]:
    """Our parameters by name, in float32, from their weights by key; `shapes` are those of our parameters, by name.

    Raises WeightsError naming keys that are missing or left over, arrays of another shape than the model needs, and a
    map that does not fill every parameter once.
    """
    _check_map(entries, shapes)
    _check_keys(entries, weights)
    return {name: array for entry in entries for name, array in _converted(entry, weights, shapes)}


def revert(entries: Sequence[Entry], parameters: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Their weights by key from our parameters by name, in rows (C order): `convert` read backwards.

    Raises WeightsError for a map that does not use every parameter once.
    """
    _check_map(entries, {name: array.shape for name, array in parameters.items()})
    found: dict[str, np.ndarray] = {}
    for entry in entries:
        made = entry.form.to_theirs(tuple(np.asarray(parameters[name]) for name in entry.ours))
        found |= {key: np.asarray(array, order="C") for key, array in zip(entry.theirs, made, strict=True)}
    return found


def _converted(entry: Entry, weights: Mapping[str, np.ndarray], shapes: Shapes) -> list[tuple[str, np.ndarray]]:
    wanted = sum(math.prod(shapes[name]) for name in entry.ours)
    if wanted > LARGER * sum(np.asarray(weights[key]).size for key in entry.theirs):
        raise WeightsError(
            f"{', '.join(entry.theirs)} would need {wanted} numbers; give the config.json of these weights"
        )
    # An import must find what an export would write.
    expected = entry.form.to_theirs(tuple(np.zeros(shapes[name], np.float32) for name in entry.ours))
    arrays = tuple(np.asarray(weights[key]) for key in entry.theirs)
    for key, array, like in zip(entry.theirs, arrays, expected, strict=True):
        if array.shape != like.shape:
            ours = ", ".join(f"{name} {shapes[name]}" for name in entry.ours)
            raise WeightsError(
                f"{key} has shape {array.shape}; it must be {like.shape}, since it becomes {ours}. "
                "Give the config.json that belongs to these weights."
            )
    made = entry.form.to_ours(tuple(array.astype(np.float32) for array in arrays))
    return list(zip(entry.ours, made, strict=True))


def _check_keys(entries: Sequence[Entry], weights: Mapping[str, np.ndarray]) -> None:
    wanted = {key for entry in entries for key in entry.theirs}
    faults = []
    if missing := sorted(wanted - set(weights)):
        faults.append(f"the weights lack {_listed(missing)}")
    if unused := sorted(set(weights) - wanted):
        faults.append(f"the model has no place for {_listed(unused)}")
    if faults:
        remedy = "Give all shards and the config.json that belongs to them; leave out what is no weight."
        raise WeightsError(f"{'; '.join(faults)}. {remedy}")


def _check_map(entries: Sequence[Entry], shapes: Shapes) -> None:
    theirs = Counter(key for entry in entries for key in entry.theirs)
    ours = Counter(name for entry in entries for name in entry.ours)
    faults = {
        "uses more than once": [name for side in (theirs, ours) for name, count in side.items() if count > 1],
        "fills no": list(shapes.keys() - ours.keys()),
        "fills what the model lacks,": list(ours.keys() - shapes.keys()),
    }
    for fault, names in faults.items():
        if names:
            raise WeightsError(f"the key map {fault} {_listed(sorted(names))}; mend the map of this layout")


def _listed(names: Sequence[str]) -> str:
    rest = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(map(repr, names[:SHOWN])) + rest
