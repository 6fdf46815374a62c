"""Features of BASED's kernel on Hopper: products of two columns each, gathered on the tensor cores.

With a column of ones beside the keys and queries every feature is the product of two columns: 1 * 1, x_i * 1 and
x_i * x_j with i <= j. Selection matrices gather both factors of 64 features at a time, exactly:

    phi(x) = (x A^T) * (x B^T)

The factor 1/2 of a square is applied to the queries alone; the op's state has sqrt(1/2) in both.
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
"""Widths of keys and of values: those of BASED."""
PADDED_HEAD_K_DIM = 2 * HEAD_K_DIM
"""Columns of the padded keys: the channels, a column of ones, and zeros."""
FEATURE_TILE = 64
"""Features that are processed together."""
NUM_FEATURE_TILES = 3
NUM_PADDED_FEATURES = NUM_FEATURE_TILES * FEATURE_TILE
FIRST_SELECTION, KEY_SELECTION, QUERY_SELECTION = 0, 1, 2
"""Selection matrices: of the first column, and of the second column for keys and for queries."""
NUM_SELECTIONS = 3


def _feature_columns() -> list[tuple[int, int]]:
    """Return the two columns of each feature, in the order of `feature_maps.taylor`; the ones are column 16."""
    squares = [(i, j) for i in range(HEAD_K_DIM) for j in range(i, HEAD_K_DIM)]
    return [(HEAD_K_DIM, HEAD_K_DIM), *((i, HEAD_K_DIM) for i in range(HEAD_K_DIM)), *squares]


def feature_scales() -> Float[Array, " F"]:
    """Return the ratio of the kernel's features to the op's: the kernel's squares lack the factor sqrt(1/2)."""
    return jnp.asarray([math.sqrt(2) if i == j < HEAD_K_DIM else 1 for i, j in _feature_columns()], jnp.float32)


def selection_matrices() -> Float[Array, "3 F D"]:
    """Return the matrices that select a feature's first column, its second, and its second with a square's 1/2."""
    selections = np.zeros((NUM_SELECTIONS, NUM_PADDED_FEATURES, PADDED_HEAD_K_DIM), np.float32)
    for feature, (i, j) in enumerate(_feature_columns()):
        selections[FIRST_SELECTION, feature, i] = selections[KEY_SELECTION, feature, j] = 1
        selections[QUERY_SELECTION, feature, j] = 0.5 if i == j < HEAD_K_DIM else 1
    return jnp.asarray(selections, jnp.bfloat16)


def tile_slice(i: Any) -> Any:
    """Return the slice of tile i of the features."""
    return pl.ds(i * FEATURE_TILE, FEATURE_TILE)


def feature_factors(
    x: Ref, selections: Ref, i: Any, second_selection: int, *, transposed: bool = False
) -> tuple[jax.Array, jax.Array]:
    """Return the two factors of tile i of the features, [tokens, 64] or transposed, in float32.

    Args:
        x: Reference [C, D] to queries or keys.
        selections: Reference to the selection matrices.
        i: Index of the tile.
        second_selection: `KEY_SELECTION` or `QUERY_SELECTION`.
        transposed: Features are along the rows.
    """
    picks = [selections.at[n, tile_slice(i)] for n in (FIRST_SELECTION, second_selection)]
    if transposed:
        pairs = [(pick, x.transpose((1, 0))) for pick in picks]
    else:
        pairs = [(x, pick.transpose((1, 0))) for pick in picks]
    first, second = wgmma_accumulate(*((zero_accumulator(FEATURE_TILE, FEATURE_TILE), pair) for pair in pairs))
    return first, second


def feature_tile(x: Ref, selections: Ref, i: Any, second_selection: int, *, transposed: bool = False) -> jax.Array:
    """Return tile i of the features in float32; arguments as in `feature_factors`."""
    first, second = feature_factors(x, selections, i, second_selection, transposed=transposed)
    return first * second
