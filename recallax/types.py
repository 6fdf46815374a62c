# pyright: strict
"""Types that are shared by tasks, models and layers: batches, sequence information, precision and auxiliary losses.

Letters in shape annotations: B batch, T time, D model width, H heads, G key/value heads, K key width, V value width,
F feature width, N labelled positions, W window.
"""

from typing import Any, NamedTuple, get_args, get_type_hints

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

type DType = DTypeLike
AnyArray = Array | np.ndarray


class SeqInfo(NamedTuple):
    """Positions, documents and random key of a batch of sequences, as mixers receive them."""

    positions: Int[AnyArray, "B T"]
    """Position of each token within its document, from 0."""
    segment_ids: Int[AnyArray, "B T"]
    """Document number of each token; 0 is padding. Tokens of different documents never interact."""
    prefix: Bool[AnyArray, "B T"]
    """True for tokens of the document's context, which may be read in both directions (JRT)."""
    key: PRNGKeyArray | None = None
    """Random key of dropout and masks; None in evaluation."""


class StepInfo(NamedTuple):
    """Position and activity of each row in one decoding step."""

    position: Int[AnyArray, " B"]
    """Position of the token within its document, from 0."""
    active: Bool[AnyArray, " B"]
    """Rows that are False keep their state bit for bit and output 0."""


class Batch(NamedTuple):
    """One training or evaluation batch; all rows have the same length T."""

    tokens: Int[AnyArray, "B T"]
    targets: Int[AnyArray, "B T"]
    """Target token *at* each position; next-token tasks have already shifted it."""
    weights: Float[AnyArray, "B T"]
    """Weight of each position in loss and accuracy; 0 at positions without a target."""
    term: Int[AnyArray, "B T"]
    """Index into `Task.terms` of the loss term that each position belongs to."""
    group: Int[AnyArray, "B T"]
    """Index into `Task.groups` of each position's group in sliced metrics."""
    seq: SeqInfo


class Precision(NamedTuple):
    """Dtypes of a model. Sums over time are float32 in any case."""

    param: DType = jnp.float32
    """Dtype of the parameters."""
    compute: DType = jnp.float32
    """Dtype of activations and matrix products."""


class Mean(NamedTuple):
    """A weighted mean in a form that can be accumulated; its value is `total / weight`."""

    total: Float[AnyArray, ""]
    weight: Float[AnyArray, ""]


Aux = dict[str, Mean]
"""Auxiliary losses and diagnostics of a module by name; the names are fixed when the module is built."""
DIAGNOSTIC_PREFIX = "diagnostic/"
"""Prefix of the names of means that are logged but are not part of the loss."""


def add_aux(a: Aux, b: Aux) -> Aux:
    """Merge two sets of means.

    Args:
        a: Means by name.
        b: Means by name.

    Returns:
        All means; totals and weights of names that occur in both are added.
    """
    pooled = {
        name: Mean(a[name].total + b[name].total, a[name].weight + b[name].weight) for name in a.keys() & b.keys()
    }
    return {**a, **b, **pooled}


def unpacked_seq_info(batch: int, length: int, prefix: int = 0) -> SeqInfo:
    """Build the `SeqInfo` of rows that hold one document each, without padding.

    Args:
        batch: Number of rows.
        length: Tokens per row.
        prefix: Number of tokens at the beginning of each row that belong to its prefix.

    Returns:
        numpy arrays of shape [batch, length], without a random key.
    """
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), (batch, length))
    return SeqInfo(positions, np.ones((batch, length), np.int32), positions < prefix)


def check_shapes(value: tuple[Any, ...]) -> None:
    """Check the shapes and dtypes of a NamedTuple's fields against its annotations.

    jaxtyping's import hook checks the arguments of functions but does not look into a NamedTuple, so entry points
    call this function.

    Args:
        value: An instance of a NamedTuple whose fields have jaxtyping annotations.

    Raises:
        TypeError: A field has another rank or dtype than its annotation, or a letter stands for two sizes.
    """
    sizes: dict[str, int] = {}
    name = type(value).__name__
    for field, annotation in get_type_hints(type(value)).items():
        array: Any = getattr(value, field)
        hint: Any = next(iter(get_args(annotation)), annotation)
        if not hasattr(hint, "dim_str") or array is None or jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
            continue
        dims: list[str] = hint.dim_str.split()
        shape: tuple[int, ...] = array.shape
        if len(dims) != len(shape):
            raise TypeError(f"{name}.{field} has shape {shape}; it must be [{hint.dim_str}]")
        for dim, size in zip(dims, shape, strict=True):
            if sizes.setdefault(dim, size) != size:
                raise TypeError(f"{name}.{field} has {dim} = {size}; its other fields have {dim} = {sizes[dim]}")
        if array.dtype.name not in hint.dtypes:
            raise TypeError(f"{name}.{field} has dtype {array.dtype}; it must be one of {', '.join(hint.dtypes)}")
