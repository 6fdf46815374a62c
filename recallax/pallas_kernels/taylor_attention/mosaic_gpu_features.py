"""The features of BASED's kernel on Hopper: products of two columns each, gathered on the tensor cores.

With a column of ones beside the keys and queries every feature is the product of two columns: 1 * 1, x_i * 1 and
x_i * x_j with i <= j. Matrices that pick columns gather both factors for 64 features at a time, exactly:

    phi(x) = (x A^T) * (x B^T)

A square's factor 1/2 is with the queries; the op's state has sqrt(1/2) with both.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from recallax.pallas_kernels.mosaic_gpu import Ref, accumulate, zeros

WIDTH, VALUES = 16, 64
"""Of keys and of values, BASED's own."""
COLUMN = 2 * WIDTH
"""Columns of the keys beside which the ones are, and zeros to fill up."""
TILE = 64
"""Features that are worked on together."""
TILES = 3
KEYS, QUERIES = 1, 2
"""Which of the matrices picks the second column."""


def _factors() -> list[tuple[int, int]]:
    """The two columns whose product each feature is, in the order of `feature_maps.taylor`; the ones are column 16."""
    squares = [(i, j) for i in range(WIDTH) for j in range(i, WIDTH)]
    return [(WIDTH, WIDTH), *((i, WIDTH) for i in range(WIDTH)), *squares]


def scales() -> Float[Array, " F"]:
    """What the kernel's features are of the op's: its squares are without sqrt(1/2)."""
    return jnp.asarray([math.sqrt(2) if i == j < WIDTH else 1 for i, j in _factors()], jnp.float32)


def picks() -> Float[Array, "3 F D"]:
    """Rows that pick a feature's first column, its second, and its second with a square's 1/2."""
    chosen = np.zeros((3, TILES * TILE, COLUMN), np.float32)
    for feature, (i, j) in enumerate(_factors()):
        chosen[0, feature, i] = chosen[KEYS, feature, j] = 1
        chosen[QUERIES, feature, j] = 0.5 if i == j < WIDTH else 1
    return jnp.asarray(chosen, jnp.bfloat16)


def tile(i: Any) -> Any:
    """Where tile i of the features is."""
    return pl.ds(i * TILE, TILE)


def factors(
    x: Ref, picked: Ref, i: Any, second: int, interpret: bool, *, transposed: bool = False
) -> tuple[jax.Array, jax.Array]:
    """Whose product tile i of the features of x is, in float32: along the rows if transposed, else the columns."""
    picks = [picked.at[n, tile(i)] for n in (0, second)]
    if transposed:
        pairs = [(pick, x.transpose((1, 0))) for pick in picks]
    else:
        pairs = [(x, pick.transpose((1, 0))) for pick in picks]
    one, other = accumulate(*((zeros(TILE, TILE), pair) for pair in pairs), interpret=interpret)
    return one, other


def features(x: Ref, picked: Ref, i: Any, second: int, interpret: bool, *, transposed: bool = False) -> jax.Array:
    """Tile i of the features of x in float32."""
    one, other = factors(x, picked, i, second, interpret, transposed=transposed)
    return one * other
