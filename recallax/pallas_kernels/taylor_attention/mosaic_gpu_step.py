"""One token of BASED on Hopper: the state is read and written once.

A block has the state of one head, 64 features in registers at a time; where their number is no multiple of 64 the last
ones overlap those before, are computed twice alike, and count once.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from recallax.pallas_kernels.dispatch import Unsupported, interpreting
from recallax.pallas_kernels.mosaic_gpu import (
    COLUMNS,
    MATRIX,
    ROWS,
    along_columns,
    along_rows,
    launch,
    rows_and_columns,
    vector,
)

ROW = 64
"""Features that are worked on together."""
VALUES = (64, 128)


def add_and_read(
    q: Float[Array, "B H F"],
    k: Float[Array, "B H F"],
    v: Float[Array, "B H V"],
    kv: Float[Array, "B H F V"],
) -> tuple[Float[Array, "B H V"], Float[Array, "B H F V"]]:
    """S + k v^T, and what the features q read of it; all float32, V of 64 or 128."""
    interpret = interpreting("gpu")
    (rows, heads, features), values = q.shape, v.shape[2]
    if values not in VALUES:
        raise Unsupported(f"V is {values}; it must be one of {VALUES}")
    if features < ROW:
        raise Unsupported(f"there are {features} features; it takes at least {ROW}")
    starts = [*range(0, features - ROW, ROW), features - ROW]
    shape = (ROW, values)

    def step(q, k, v, state, out, after):
        row, head = lax.axis_index("row"), lax.axis_index("head")
        value = along_columns(vector(v.at[row, head], COLUMNS), shape)
        total, counted = None, 0
        for start in starts:
            own = pl.ds(start, ROW)
            new = plgpu.load(state.at[row, head, own], layout=MATRIX, optimized=False)
            new += along_rows(vector(k.at[row, head, own], ROWS), shape) * value
            after[row, head, own] = new
            i, _ = rows_and_columns(shape)
            read = new * along_rows(vector(q.at[row, head, own], ROWS), shape)
            read = jnp.sum(jnp.where(i >= counted - start, read, 0.0), axis=0)
            total, counted = read if total is None else total + read, start + ROW
        out[row, head] = total

    return launch(
        step,
        out=(jax.ShapeDtypeStruct(v.shape, jnp.float32), jax.ShapeDtypeStruct(kv.shape, jnp.float32)),
        grid={"row": rows, "head": heads},
        workers=1,
        copiers=0,
        interpret=interpret,
        column_sums=True,
    )(q, k, v, kv)
