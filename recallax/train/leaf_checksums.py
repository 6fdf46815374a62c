"""Dtypes, shapes and checksums of the leaves of a training state, which may be sharded between processes.

A leaf that one process can read completely has one checksum, `sha256`. A leaf that is sharded between processes has a
checksum per shard, `shards`: index ranges, and the hash that the process with the first replica of the shard computed.
Either is verified on any mesh and any number of processes.
"""

import hashlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

type LeafDescription = dict[str, Any]
type IndexRanges = tuple[tuple[int, int], ...]
"""First index and end of a shard along every axis."""


def leaf_forms(state: Any) -> dict[str, str]:
    """Return the dtype and shape of every leaf of a state as text, by path.

    Args:
        state: A tree of jax arrays or `jax.ShapeDtypeStruct`.

    Raises:
        TypeError: A leaf is something else.
    """
    forms = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        name = jax.tree_util.keystr(path)
        if not isinstance(leaf, jax.Array | jax.ShapeDtypeStruct):
            raise TypeError(f"state{name} is {type(leaf).__name__}; a checkpoint contains jax arrays only")
        forms[name] = f"{leaf.dtype} {list(leaf.shape)}"
    return forms


def describe_leaves(state: Any) -> dict[str, LeafDescription]:
    """Return the form and the checksums of every leaf of a state; all processes must call it.

    Args:
        state: A tree of jax arrays.

    Returns:
        By path, `form` and `sha256`, which is None for a leaf that has `shards` instead: a list of `index` and
        `sha256`. Equal in all processes.

    Raises:
        TypeError: A leaf is not an array.
    """
    forms, described = leaf_forms(state), dict[str, LeafDescription]()
    arrays = _arrays_by_name(state)
    for name, form in forms.items():
        whole = _is_readable(arrays[name])
        described[name] = {"form": form, "sha256": _sha256(form, arrays[name]) if whole else None}
    sharded = [name for name, leaf in described.items() if leaf["sha256"] is None]
    shards = [(name, ranges) for name in sharded for ranges in _shard_ranges(arrays[name])]
    digests = np.zeros((len(shards), hashlib.sha256().digest_size), np.uint8)
    for number, (name, ranges) in enumerate(shards):
        for shard in arrays[name].addressable_shards:
            if shard.replica_id == 0 and _ranges(shard.index, arrays[name].shape) == ranges:
                digests[number] = np.frombuffer(bytes.fromhex(_sha256(described[name]["form"], shard.data)), np.uint8)
    if shards:  # each row is zero in all processes but the owner of the shard
        digests = np.asarray(multihost_utils.process_allgather(digests)).max(axis=0)
    for (name, ranges), digest in zip(shards, digests, strict=True):
        described[name].setdefault("shards", []).append({"index": ranges, "sha256": digest.tobytes().hex()})
    return described


def leaf_differences(saved: Mapping[str, LeafDescription], expected: Mapping[str, str]) -> list[str]:
    """Compare the forms of two states.

    Args:
        saved: Description of the saved state.
        expected: Forms of the expected state.

    Returns:
        A line `state<path>: saved <form>, expected <form>` for every leaf whose form differs.
    """
    forms = {name: leaf["form"] for name, leaf in saved.items()}
    pairs = {name: (forms.get(name, "nothing"), expected.get(name, "nothing")) for name in forms | dict(expected)}
    return [f"state{name}: saved {old}, expected {new}" for name, (old, new) in sorted(pairs.items()) if old != new]


def damaged_leaves(state: Any, saved: Mapping[str, LeafDescription]) -> list[str]:
    """Compare the values of a restored state with the checksums of the saved one; all processes must call it.

    Args:
        state: The restored state, with the leaves of `saved` and any shardings.
        saved: Description of the saved state.

    Returns:
        Paths of the leaves that do not match in this process. Leaves without a checksum, in checkpoints of earlier
        versions, match.
    """
    return [name for name, array in _arrays_by_name(state).items() if not _matches(array, saved[name])]


def _matches(array: jax.Array, saved: LeafDescription) -> bool:
    form = saved["form"]
    if saved["sha256"] is not None:
        expected = {tuple((0, size) for size in array.shape): saved["sha256"]}
    else:
        expected = {tuple(map(tuple, shard["index"])): shard["sha256"] for shard in saved.get("shards", [])}
    if not expected:
        return True
    if not _is_readable(array) and expected.keys() == set(_shard_ranges(array)):
        shards = [(_ranges(shard.index, array.shape), shard.data) for shard in array.addressable_shards]
        return all(_sha256(form, data) == expected[ranges] for ranges, data in shards)
    # On another mesh no process may have a whole shard. One leaf at a time is gathered, to bound the memory.
    values = np.asarray(array if _is_readable(array) else multihost_utils.process_allgather(array, tiled=True))
    parts = {ranges: values[(..., *(slice(*pair) for pair in ranges))] for ranges in expected}
    return all(_sha256(form, parts[ranges]) == sha256 for ranges, sha256 in expected.items())


def _arrays_by_name(state: Any) -> dict[str, jax.Array]:
    """Return the leaves by path, and the numbers of a typed PRNG key for the key."""
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(path): _numbers(leaf) for path, leaf in leaves}


def _numbers(leaf: Any) -> Any:
    is_key = isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return jax.random.key_data(leaf) if is_key else leaf


def _is_readable(array: jax.Array) -> bool:
    """Return True if this process can read the whole array."""
    return array.is_fully_addressable or array.is_fully_replicated


def _shard_ranges(array: jax.Array) -> list[IndexRanges]:
    """Return the index ranges of the distinct shards in all processes, in ascending order."""
    indices = array.sharding.devices_indices_map(array.shape).values()
    return sorted({_ranges(index, array.shape) for index in indices})


def _ranges(index: tuple[slice, ...], shape: tuple[int, ...]) -> IndexRanges:
    return tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True))


def _sha256(form: str, values: jax.Array | np.ndarray) -> str:
    return hashlib.sha256(form.encode() + np.asarray(values).tobytes()).hexdigest()
