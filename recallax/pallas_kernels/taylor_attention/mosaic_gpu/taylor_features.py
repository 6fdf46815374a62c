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

from recallax.pallas_kernels.mosaic_gpu.warpgroup_primitives import Ref, wgmma_accumulate, zero_accumulator

HEAD_K_DIM, HEAD_V_DIM = 16, 64
"""Of keys and of values, BASED's own."""
PADDED_HEAD_K_DIM = 2 * HEAD_K_DIM
"""Columns of the keys beside which the ones are, and zeros to fill up."""
FEATURE_TILE = 64
"""Features that are worked on together."""
NUM_FEATURE_TILES = 3
KEY_SELECTION, QUERY_SELECTION = 1, 2
"""Which of the matrices picks the second column."""


def _feature_columns() -> list[tuple[int, int]]:
    """The two columns whose product each feature is, in the order of `feature_maps.taylor`; the ones are column 16."""
    squares = [(i, j) for i in range(HEAD_K_DIM) for j in range(i, HEAD_K_DIM)]
    return [(HEAD_K_DIM, HEAD_K_DIM), *((i, HEAD_K_DIM) for i in range(HEAD_K_DIM)), *squares]


def feature_scales() -> Float[Array, " F"]:
    """What the kernel's features are of the op's: its squares are without sqrt(1/2)."""
    return jnp.asarray([math.sqrt(2) if i == j < HEAD_K_DIM else 1 for i, j in _feature_columns()], jnp.float32)


def selection_matrices() -> Float[Array, "3 F D"]:
    """Rows that pick a feature's first column, its second, and its second with a square's 1/2."""
    chosen = np.zeros((3, NUM_FEATURE_TILES * FEATURE_TILE, PADDED_HEAD_K_DIM), np.float32)
    for feature, (i, j) in enumerate(_feature_columns()):
        chosen[0, feature, i] = chosen[KEY_SELECTION, feature, j] = 1
        chosen[QUERY_SELECTION, feature, j] = 0.5 if i == j < HEAD_K_DIM else 1
    return jnp.asarray(chosen, jnp.bfloat16)


def tile_slice(i: Any) -> Any:
    """Where tile i of the features is."""
    return pl.ds(i * FEATURE_TILE, FEATURE_TILE)


def feature_factors(
    x: Ref, selections: Ref, i: Any, second_selection: int, interpret: bool, *, transposed: bool = False
) -> tuple[jax.Array, jax.Array]:
    """Whose product tile i of the features of x is, in float32: along the rows if transposed, else the columns."""
    picks = [selections.at[n, tile_slice(i)] for n in (0, second_selection)]
    if transposed:
        pairs = [(pick, x.transpose((1, 0))) for pick in picks]
    else:
        pairs = [(x, pick.transpose((1, 0))) for pick in picks]
    one, other = wgmma_accumulate(
        *((zero_accumulator(FEATURE_TILE, FEATURE_TILE), pair) for pair in pairs), interpret=interpret
    )
    return one, other


def feature_tile(
    x: Ref, selections: Ref, i: Any, second_selection: int, interpret: bool, *, transposed: bool = False
) -> jax.Array:
    """Tile i of the features of x in float32."""
    one, other = feature_factors(x, selections, i, second_selection, interpret, transposed=transposed)
    return one * other
