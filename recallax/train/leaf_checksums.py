"""Dtypes, shapes and checksums of the leaves of a training state."""

import hashlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

type LeafDescription = dict[str, Any]


def describe_leaves(state: Any) -> dict[str, LeafDescription]:
    """Return the form and the checksum of every leaf of a state.

    Args:
        state: A tree of jax arrays or `jax.ShapeDtypeStruct`.

    Returns:
        By path, `form` (dtype and shape as text) and `sha256`, which is None for a leaf without local values.

    Raises:
        TypeError: A leaf is something else.
    """
    described = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        name = jax.tree_util.keystr(path)
        if not isinstance(leaf, jax.Array | jax.ShapeDtypeStruct):
            raise TypeError(f"state{name} is {type(leaf).__name__}; a checkpoint contains jax arrays only")
        form = f"{leaf.dtype} {list(leaf.shape)}"
        described[name] = {"form": form, "sha256": _checksum(form, leaf)}
    return described


def _checksum(form: str, leaf: jax.Array | jax.ShapeDtypeStruct) -> str | None:
    if not isinstance(leaf, jax.Array) or not (leaf.is_fully_addressable or leaf.is_fully_replicated):
        return None
    key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    values = np.asarray(jax.random.key_data(leaf) if key else leaf)
    return hashlib.sha256(form.encode() + values.tobytes()).hexdigest()


def leaf_differences(saved: dict[str, LeafDescription], expected: dict[str, LeafDescription]) -> list[str]:
    """Compare the forms of two states.

    Args:
        saved: Description of the saved state.
        expected: Description of the expected state.

    Returns:
        A line `state<path>: saved <form>, expected <form>` for every leaf whose form differs.
    """
    none = {"form": "nothing"}
    pairs = {name: (saved.get(name, none)["form"], expected.get(name, none)["form"]) for name in saved | expected}
    return [f"state{name}: saved {old}, expected {new}" for name, (old, new) in sorted(pairs.items()) if old != new]
