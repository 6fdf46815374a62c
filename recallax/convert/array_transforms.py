"""Invertible transforms between the arrays of a source checkpoint and the parameters of recallax.

A transform takes the arrays of one key map entry, in the order of the entry: one or several source arrays become one or
several parameters. Source arrays have PyTorch's layout, with the outputs of a projection on the first axis.
"""

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import NamedTuple

import numpy as np

type Arrays = tuple[np.ndarray, ...]


class ArrayTransform(NamedTuple):
    """A pair of functions that invert each other, up to rounding where values change."""

    forward: Callable[[Arrays], Arrays]
    """From source arrays to parameters."""
    inverse: Callable[[Arrays], Arrays]
    """From parameters to source arrays."""


def chain(*transforms: ArrayTransform) -> ArrayTransform:
    """Compose transforms.

    Args:
        *transforms: Transforms in the order of the forward direction, from source to parameters.

    Returns:
        The composed transform.
    """

    def forward(arrays: Arrays) -> Arrays:
        for transform in transforms:
            arrays = transform.forward(arrays)
        return arrays

    def inverse(arrays: Arrays) -> Arrays:
        for transform in reversed(transforms):
            arrays = transform.inverse(arrays)
        return arrays

    return ArrayTransform(forward, inverse)


def per_array(
    forward: Callable[[np.ndarray], np.ndarray], inverse: Callable[[np.ndarray], np.ndarray]
) -> ArrayTransform:
    """Apply one function to each array of an entry.

    Args:
        forward: From one source array to one parameter.
        inverse: From one parameter to one source array.

    Returns:
        The transform.
    """
    return ArrayTransform(lambda arrays: tuple(map(forward, arrays)), lambda arrays: tuple(map(inverse, arrays)))


IDENTITY = per_array(lambda x: x, lambda x: x)
"""No change."""
TRANSPOSE = per_array(lambda x: x.T, lambda x: x.T)
"""The weight of a projection: [outputs, inputs] to [inputs, outputs]."""
DEPTHWISE_CONV = per_array(lambda x: x[:, 0].T, lambda x: x.T[:, None])
"""The weight of a depthwise convolution: [channels, 1, taps] to [taps, channels]. The last tap multiplies the current
token in both."""


def reshape(source_shape: tuple[int, ...], target_shape: tuple[int, ...]) -> ArrayTransform:
    """Reshape arrays without changing the order of their elements.

    Args:
        source_shape: Shape of the source array.
        target_shape: Shape of the parameter.

    Returns:
        The transform.
    """
    return per_array(lambda x: x.reshape(target_shape), lambda x: x.reshape(source_shape))


def add_offset(offset: float) -> ArrayTransform:
    """Add a constant: 1 for a norm that multiplies by 1 + weight.

    Args:
        offset: The parameter minus the source value.

    Returns:
        The transform.
    """
    return per_array(lambda x: x + offset, lambda x: x - offset)


def multiply(factor: float | np.ndarray) -> ArrayTransform:
    """Fold a multiplier into a weight, for models that apply it separately.

    Args:
        factor: A number, or an array that broadcasts against the source array.

    Returns:
        The transform; it preserves the dtype.
    """
    return per_array(lambda x: (x * factor).astype(x.dtype), lambda x: (x / factor).astype(x.dtype))


def permute_first_axis(order: np.ndarray) -> ArrayTransform:
    """Permute the first axis.

    Args:
        order: Source index of each index of the result.

    Returns:
        The transform.
    """
    return per_array(lambda x: x[order], lambda x: x[np.argsort(order)])


def lazy_transform(make_transform: Callable[[], ArrayTransform]) -> ArrayTransform:
    """Build a transform only when it is applied.

    A config.json may state any size, and an index array of that size would be allocated before the size is checked.

    Args:
        make_transform: Builds the transform.

    Returns:
        A transform that calls `make_transform` in each direction.
    """
    return ArrayTransform(
        lambda arrays: make_transform().forward(arrays), lambda arrays: make_transform().inverse(arrays)
    )


def split_first_axis(*widths: int) -> ArrayTransform:
    """Split one source array along its first axis into several parameters.

    Args:
        *widths: Sizes of the parts.

    Returns:
        The transform.
    """
    return ArrayTransform(lambda arrays: _split(arrays, widths), _concat)


def concat_first_axis(*widths: int) -> ArrayTransform:
    """Concatenate several source arrays along the first axis into one parameter.

    Args:
        *widths: Sizes of the parts.

    Returns:
        The transform.
    """
    return ArrayTransform(_concat, lambda arrays: _split(arrays, widths))


def _split(arrays: Arrays, widths: Sequence[int]) -> Arrays:
    (array,) = arrays
    return tuple(np.split(array, list(accumulate(widths))[:-1]))


def _concat(arrays: Arrays) -> Arrays:
    return (np.concatenate(arrays),)
