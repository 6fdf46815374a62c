"""Changes of layout between another implementation's arrays and ours, each with its way back.

A form takes the arrays of one entry of a key map, in the order in which the entry names them: one or several of theirs
to one or several of ours. Theirs come as PyTorch keeps them, with the outputs of a projection on the first axis.
"""

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import NamedTuple

import numpy as np

type Arrays = tuple[np.ndarray, ...]


class ArrayTransform(NamedTuple):
    """Both directions; each undoes the other (up to rounding where numbers change)."""

    forward: Callable[[Arrays], Arrays]
    inverse: Callable[[Arrays], Arrays]


def chain(*transforms: ArrayTransform) -> ArrayTransform:
    """One form after the other, as seen from theirs."""

    def to_ours(arrays: Arrays) -> Arrays:
        for transform in transforms:
            arrays = transform.forward(arrays)
        return arrays

    def to_theirs(arrays: Arrays) -> Arrays:
        for transform in reversed(transforms):
            arrays = transform.inverse(arrays)
        return arrays

    return ArrayTransform(to_ours, to_theirs)


def per_array(
    forward: Callable[[np.ndarray], np.ndarray], inverse: Callable[[np.ndarray], np.ndarray]
) -> ArrayTransform:
    """The same for every array."""
    return ArrayTransform(lambda arrays: tuple(map(forward, arrays)), lambda arrays: tuple(map(inverse, arrays)))


IDENTITY = per_array(lambda x: x, lambda x: x)
TRANSPOSE = per_array(lambda x: x.T, lambda x: x.T)
"""A projection: [outputs, inputs] to [inputs, outputs]."""
DEPTHWISE_CONV = per_array(lambda x: x[:, 0].T, lambda x: x.T[:, None])
"""A depthwise convolution: [channels, 1, taps] to [taps, channels]. The last tap is the token's own in both."""


def reshape(source_shape: tuple[int, ...], target_shape: tuple[int, ...]) -> ArrayTransform:
    """The same numbers in the same order."""
    return per_array(lambda x: x.reshape(target_shape), lambda x: x.reshape(source_shape))


def add_offset(offset: float) -> ArrayTransform:
    """Ours is theirs plus a number: 1 for a norm that multiplies by 1 + w."""
    return per_array(lambda x: x + offset, lambda x: x - offset)


def multiply(factor: float | np.ndarray) -> ArrayTransform:
    """Ours includes a multiplier that they apply apart: a number, or an array that broadcasts against theirs."""
    return per_array(lambda x: (x * factor).astype(x.dtype), lambda x: (x / factor).astype(x.dtype))


def permute_first_axis(order: np.ndarray) -> ArrayTransform:
    """Place i on our first axis is place `order[i]` on theirs."""
    return per_array(lambda x: x[order], lambda x: x[np.argsort(order)])


def lazy_transform(make_transform: Callable[[], ArrayTransform]) -> ArrayTransform:
    """A form that is made when there are arrays to change: a config may claim any size, and an index takes it."""
    return ArrayTransform(
        lambda arrays: make_transform().forward(arrays), lambda arrays: make_transform().inverse(arrays)
    )


def split_first_axis(*widths: int) -> ArrayTransform:
    """One array of theirs is several of ours, which follow one another on its first axis."""
    return ArrayTransform(lambda arrays: _split(arrays, widths), _concat)


def concat_first_axis(*widths: int) -> ArrayTransform:
    """Several arrays of theirs are one of ours, in which they follow one another on the first axis."""
    return ArrayTransform(_concat, lambda arrays: _split(arrays, widths))


def _split(arrays: Arrays, widths: Sequence[int]) -> Arrays:
    (whole,) = arrays
    return tuple(np.split(whole, list(accumulate(widths))[:-1]))


def _concat(arrays: Arrays) -> Arrays:
    return (np.concatenate(arrays),)
