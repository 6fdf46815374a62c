"""The arrays that travel between the parts, with their shapes.

Dimension letters: B batch, T time, D model width, H heads, G key/value heads, K key width, V value width,
F feature width, N labelled positions, W window.
"""

from typing import NamedTuple, get_args, get_type_hints

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

type DType = DTypeLike
AnyArray = Array | np.ndarray


class SeqInfo(NamedTuple):
    """What a mixer may know about the sequence besides its content."""

    positions: Int[AnyArray, "B T"]
    """Position within its document, from 0."""
    segment_ids: Int[AnyArray, "B T"]
    """Document number; 0 is padding. Documents never see each other."""
    prefix: Bool[AnyArray, "B T"]
    """The context that a document begins with, before anything is asked: it may be read in both directions (JRT)."""
    key: PRNGKeyArray | None = None
    """Source of dropout and random masks; None in evaluation."""


class StepInfo(NamedTuple):
    """What a mixer may know about one token of decoding."""

    position: Int[AnyArray, " B"]
    active: Bool[AnyArray, " B"]
    """Rows that are False keep their state bit for bit and output 0."""


class Batch(NamedTuple):
    """One training or evaluation batch: every row has the same length T."""

    tokens: Int[AnyArray, "B T"]
    targets: Int[AnyArray, "B T"]
    """Wanted prediction *at* each position (already shifted where the task is next-token)."""
    weights: Float[AnyArray, "B T"]
    """Weight of each position in loss and accuracy; 0 where nothing is asked."""
    term: Int[AnyArray, "B T"]
    """Which of the task's loss terms a position belongs to (an index into `Task.terms`)."""
    group: Int[AnyArray, "B T"]
    """Bucket for sliced metrics (an index into `Task.groups`)."""
    seq: SeqInfo


class Precision(NamedTuple):
    """Parameters are kept in `param`, products are taken in `compute`; sums over time are float32 always."""

    param: DType = jnp.float32
    compute: DType = jnp.float32


class Mean(NamedTuple):
    """A weighted mean that can still be added to: its value is `total / weight`."""

    total: Float[AnyArray, ""]
    weight: Float[AnyArray, ""]


Aux = dict[str, Mean]
"""Extra loss terms and diagnostics of a module; the keys are fixed when the module is built."""
DIAGNOSTIC_PREFIX = "diagnostic/"
"""What the names of means begin with that are logged and no part of the loss."""


def add_aux(a: Aux, b: Aux) -> Aux:
    """Both sets of means; those of one name are pooled."""
    pooled = {
        name: Mean(a[name].total + b[name].total, a[name].weight + b[name].weight) for name in a.keys() & b.keys()
    }
    return {**a, **b, **pooled}


def unpacked_seq_info(batch: int, length: int, prefix: int = 0) -> SeqInfo:
    """`SeqInfo` of rows that are one document each, with a prefix: numpy arrays of shape [batch, length]."""
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), (batch, length))
    return SeqInfo(positions, np.ones((batch, length), np.int32), positions < prefix)


def check_shapes(value: tuple) -> None:
    """Check the shapes and dtypes of a NamedTuple's fields against its annotations.

    jaxtyping's import hook checks arguments of functions but never looks into a NamedTuple, so entry points
    call this. Letters must agree between the fields; raises TypeError naming the field.
    """
    sizes: dict[str, int] = {}
    name = type(value).__name__
    for field, hint in get_type_hints(type(value)).items():
        array = getattr(value, field)
        hint = next(iter(get_args(hint)), hint)
        if not hasattr(hint, "dim_str") or array is None or jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
            continue
        dims = hint.dim_str.split()
        if len(dims) != array.ndim:
            raise TypeError(f"{name}.{field} has shape {array.shape}; it must be [{hint.dim_str}]")
        for dim, size in zip(dims, array.shape, strict=True):
            if sizes.setdefault(dim, size) != size:
                raise TypeError(f"{name}.{field} has {dim} = {size}; its other fields have {dim} = {sizes[dim]}")
        if array.dtype.name not in hint.dtypes:
            raise TypeError(f"{name}.{field} has dtype {array.dtype}; it must be one of {', '.join(hint.dtypes)}")
