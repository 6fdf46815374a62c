"""One token of BASED on Hopper: the state is read and written once.

A block processes the state of one head, 64 features in registers at a time. Where the number of features is no multiple
of 64, the last tile overlaps the one before it: the features in both are computed twice, equally, and counted once.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from recallax.pallas_kernels.dispatch import Unsupported, use_interpreter
from recallax.pallas_kernels.mosaic_gpu.kernel_inputs import SUPPORTED_HEAD_DIMS
from recallax.pallas_kernels.mosaic_gpu.kernel_launch import launch_kernel
from recallax.pallas_kernels.mosaic_gpu.warpgroup_primitives import (
    WGMMA,
    WGMMA_COL,
    WGMMA_ROW,
    broadcast_per_column,
    broadcast_per_row,
    load_vector,
    row_and_column_iota,
)

FEATURE_ROWS = 64
"""Features that are processed together: the rows of a register matrix."""


def add_and_read(
    q: Float[Array, "B H F"],
    k: Float[Array, "B H F"],
    v: Float[Array, "B H V"],
    kv: Float[Array, "B H F V"],
) -> tuple[Float[Array, "B H V"], Float[Array, "B H F V"]]:
    """Add one token to the state and read it, S + k v^T and its product with q, all in float32.

    Args:
        q: Features of the query; F is at least 64.
        k: Features of the key.
        v: Values; V is 64 or 128.
        kv: The state S.

    Returns:
        The output and the new state.

    Raises:
        Unsupported: If V or F is not supported, or if there is neither a GPU nor `interpret_kernels()`.
    """
    use_interpreter("gpu")
    (rows, heads, features), v_dim = q.shape, v.shape[2]
    if v_dim not in SUPPORTED_HEAD_DIMS:
        raise Unsupported(f"V is {v_dim}; it must be one of {SUPPORTED_HEAD_DIMS}")
    if features < FEATURE_ROWS:
        raise Unsupported(f"there are {features} features; it takes at least {FEATURE_ROWS}")
    starts = [*range(0, features - FEATURE_ROWS, FEATURE_ROWS), features - FEATURE_ROWS]
    shape = (FEATURE_ROWS, v_dim)

    def step(q, k, v, state, out, new_state):
        row, head = lax.axis_index("row"), lax.axis_index("head")
        value = broadcast_per_column(load_vector(v.at[row, head], WGMMA_COL), shape)
        total, num_counted = None, 0
        for start in starts:
            own = pl.ds(start, FEATURE_ROWS)
            new = plgpu.load(state.at[row, head, own], layout=WGMMA, optimized=False)
            new += broadcast_per_row(load_vector(k.at[row, head, own], WGMMA_ROW), shape) * value
            new_state[row, head, own] = new
            i, _ = row_and_column_iota(shape)
            read = new * broadcast_per_row(load_vector(q.at[row, head, own], WGMMA_ROW), shape)
            read = jnp.sum(jnp.where(i >= num_counted - start, read, 0.0), axis=0)
            total, num_counted = read if total is None else total + read, start + FEATURE_ROWS
        out[row, head] = total

    return launch_kernel(
        step,
        out_type=(jax.ShapeDtypeStruct(v.shape, jnp.float32), jax.ShapeDtypeStruct(kv.shape, jnp.float32)),
        grid={"row": rows, "head": heads},
        num_consumer_wgs=1,
        num_producer_wgs=0,
        column_sums=True,
    )(q, k, v, kv)
