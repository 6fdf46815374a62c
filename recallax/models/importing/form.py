"""Changes of layout between another implementation's arrays and ours, each with its way back.

A form takes the arrays of one entry of a key map, in the order in which the entry names them: one or several of theirs
to one or several of ours. Theirs come as PyTorch keeps them, with the outputs of a projection on the first axis.
"""

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import NamedTuple

import numpy as np

type Arrays = tuple[np.ndarray, ...]


class Form(NamedTuple):
    """Both directions; each undoes the other (up to rounding where numbers change)."""

    to_ours: Callable[[Arrays], Arrays]
    to_theirs: Callable[[Arrays], Arrays]


def chain(*forms: Form) -> Form:
    """One form after the other, as seen from theirs."""

    def to_ours(arrays: Arrays) -> Arrays:
        for form in forms:
            arrays = form.to_ours(arrays)
        return arrays

    def to_theirs(arrays: Arrays) -> Arrays:
        for form in reversed(forms):
            arrays = form.to_theirs(arrays)
        return arrays

    return Form(to_ours, to_theirs)


def each(to_ours: Callable[[np.ndarray], np.ndarray], to_theirs: Callable[[np.ndarray], np.ndarray]) -> Form:
    """The same for every array."""
    return Form(lambda arrays: tuple(map(to_ours, arrays)), lambda arrays: tuple(map(to_theirs, arrays)))


SAME = each(lambda x: x, lambda x: x)
TRANSPOSED = each(lambda x: x.T, lambda x: x.T)
"""A projection: [outputs, inputs] to [inputs, outputs]."""
TAPS = each(lambda x: x[:, 0].T, lambda x: x.T[:, None])
"""A depthwise convolution: [channels, 1, taps] to [taps, channels]. The last tap is the token's own in both."""


def reshaped(theirs: tuple[int, ...], ours: tuple[int, ...]) -> Form:
    """The same numbers in the same order."""
    return each(lambda x: x.reshape(ours), lambda x: x.reshape(theirs))


def shifted(by: float) -> Form:
    """Ours is theirs plus a number: 1 for a norm that multiplies by 1 + w."""
    return each(lambda x: x + by, lambda x: x - by)


def scaled(factor: float | np.ndarray) -> Form:
    """Ours includes a multiplier that they apply apart: a number, or an array that broadcasts against theirs."""
    return each(lambda x: (x * factor).astype(x.dtype), lambda x: (x / factor).astype(x.dtype))


def reordered(order: np.ndarray) -> Form:
    """Place i on our first axis is place `order[i]` on theirs."""
    return each(lambda x: x[order], lambda x: x[np.argsort(order)])


def lazily(make: Callable[[], Form]) -> Form:
    """A form that is made when there are arrays to change: a config may claim any size, and an index takes it."""
    return Form(lambda arrays: make().to_ours(arrays), lambda arrays: make().to_theirs(arrays))


def parted(*widths: int) -> Form:
    """One array of theirs is several of ours, which follow one another on its first axis."""
    return Form(lambda arrays: _part(arrays, widths), _join)


def joined(*widths: int) -> Form:
    """Several arrays of theirs are one of ours, in which they follow one another on the first axis."""
    return Form(_join, lambda arrays: _part(arrays, widths))


def _part(arrays: Arrays, widths: Sequence[int]) -> Arrays:
    (whole,) = arrays
    return tuple(np.split(whole, list(accumulate(widths))[:-1]))


def _join(arrays: Arrays) -> Arrays:
    return (np.concatenate(arrays),)
