"""Splits of rows in time, so that a few rows and heads occupy all multiprocessors of a GPU.

A first kernel computes the state that each split adds by itself, for all splits at once and from two inputs only. A
scan over the splits then gives the state before each split. After that every split is a row of its own with its own
initial state.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Shaped

from recallax.pallas_kernels.mosaic_gpu.chunk_pipeline import chunk_pipeline
from recallax.pallas_kernels.mosaic_gpu.cumulative_decay import CumulativeDecay
from recallax.pallas_kernels.mosaic_gpu.kernel_launch import launch_kernel
from recallax.pallas_kernels.mosaic_gpu.warpgroup_primitives import (
    CHUNK,
    WGMMA_ROW,
    load_smem_f32,
    opaque_zero,
    scale_rows,
    shared_group,
    smem_matrix,
    wgmma_accumulate,
    zero_accumulator,
)

NUM_SMS = 132
"""Multiprocessors of an H100. A block of these kernels occupies one of them."""
MIN_CHUNKS_PER_SPLIT = 8
"""Chunks of a split at least: with fewer, starting and ending a block costs more than its chunks."""
NUM_PREFETCH = 3
"""Chunks that TMA loads ahead; a chunk of these two inputs is small."""
STATE_TILE = 64
"""Columns of a shared-memory tile, and of the state per warpgroup."""


def choose_num_splits(num_blocks: int, num_chunks: int) -> int:
    """Return the number of splits of each row.

    Args:
        num_blocks: Blocks without splits: one per row and head.
        num_chunks: Chunks of a row.
    """
    return max(1, min(NUM_SMS // num_blocks, num_chunks // MIN_CHUNKS_PER_SPLIT))


def split_rows(x: Shaped[Array, "B T ..."], num_splits: int) -> Shaped[Array, "N S ..."]:
    """Make every split a row: N = B * num_splits."""
    return x.reshape(x.shape[0] * num_splits, -1, *x.shape[2:])


def merge_rows(x: Shaped[Array, "N S ..."], num_splits: int) -> Shaped[Array, "B T ..."]:
    """Undo `split_rows`."""
    return x.reshape(x.shape[0] // num_splits, -1, *x.shape[2:])


def split_rows_head_major(x: Shaped[Array, "B H T ..."], num_splits: int) -> Shaped[Array, "N H S ..."]:
    """Make every split a row where the head axis precedes the time axis."""
    return jnp.moveaxis(split_rows(jnp.moveaxis(x, 2, 1), num_splits), 1, 2)


def merge_rows_head_major(x: Shaped[Array, "N H S ..."], num_splits: int) -> Shaped[Array, "B H T ..."]:
    """Undo `split_rows_head_major`."""
    return jnp.moveaxis(merge_rows(jnp.moveaxis(x, 2, 1), num_splits), 1, 2)


def split_gates(gates: CumulativeDecay | None, num_splits: int) -> CumulativeDecay | None:
    """Make every split of the gates a row."""
    if gates is None:
        return None
    return CumulativeDecay(split_rows_head_major(gates.query, num_splits), split_rows_head_major(gates.key, num_splits))


def split_initial_states(
    x: Float[Array, "B T M X"],
    y: Float[Array, "B T N Y"],
    gates: CumulativeDecay | None,
    state: Float[Array, "B H X Y"],
    num_splits: int,
    *,
    scale: float = 1.0,
    reverse: bool,
) -> Float[Array, "C H X Y"]:
    """Compute the state before each of C = B * num_splits splits: decayed sums of x_t (scale y_t)^T.

    Args:
        x: Left factors, with H heads or a divisor of H.
        y: Right factors, with H heads or a divisor of H.
        gates: Cumulative decays; None: no decay.
        state: State before each row; in reverse, after it.
        num_splits: Splits of a row.
        scale: Factor of y.
        reverse: Sum backward in time and return the state after each split.
    """
    if num_splits == 1:
        return state
    num_heads = state.shape[1]
    increments = split_state_increments(x, y, gates, num_heads, num_splits, scale=scale, reverse=reverse)
    decays = jnp.ones((len(increments), num_heads), jnp.float32)
    if gates is not None:
        decays = split_decay(gates, num_splits)
    return propagate_split_states(increments, decays[:, :, None, None], state, reverse=reverse)


def split_decay(gates: CumulativeDecay, num_splits: int) -> Float[Array, "N H"]:
    """Return the decay of a state over each split."""
    chunks = split_rows_head_major(gates.query[:, :, CHUNK - 1 :: CHUNK], num_splits)
    return jnp.exp2(jnp.sum(chunks, axis=2))


def propagate_split_states(
    increments: Float[Array, "N H X ..."],
    transitions: Float[Array, "N H ..."],
    state: Float[Array, "B H X ..."],
    *,
    reverse: bool,
    apply_transition: Callable[[Array, Array], Array] = jnp.multiply,
) -> Float[Array, "N H X ..."]:
    """Compute the state before each of the N / B splits of a row with `state <- transition(state) + increment`.

    Args:
        increments: State that each split adds by itself.
        transitions: Linear map of each split on the state before it.
        state: State before each row; in reverse, after it.
        reverse: Go backward in time and return the state after each split.
        apply_transition: `apply_transition(transition, state) -> state`.
    """

    def by_split(x):
        return jnp.moveaxis(x.reshape(len(state), -1, *x.shape[1:]), 1, 0)

    def step(state, split):
        transition, increment = split
        return apply_transition(transition, state) + increment, state

    _, states = lax.scan(step, state, (by_split(transitions), by_split(increments)), reverse=reverse)
    return jnp.moveaxis(states, 0, 1).reshape(-1, *state.shape[1:])


def split_state_increments(
    x: Float[Array, "B T M X"],
    y: Float[Array, "B T N Y"],
    gates: CumulativeDecay | None,
    num_heads: int,
    num_splits: int,
    *,
    scale: float = 1.0,
    reverse: bool,
) -> Float[Array, "C H X Y"]:
    """Compute the state that each of C = B * num_splits splits adds by itself; arguments of `split_initial_states`."""
    x, y = split_rows(x, num_splits), split_rows(y, num_splits)
    (rows, _, _, height), width = x.shape, y.shape[3]
    num_wgs = min(height, width) // STATE_TILE
    vectors = ()
    if gates is not None:
        by_chunk = gates.query.reshape(*gates.query.shape[:2], -1, CHUNK)
        to_end = (by_chunk[..., -1:] - gates.key.reshape(by_chunk.shape)).reshape(gates.key.shape)
        boundary_decay = gates.query if reverse else to_end
        vectors = split_rows_head_major(boundary_decay, num_splits), split_rows_head_major(gates.query, num_splits)
    return launch_kernel(
        _increment_kernel(num_wgs, scale, reverse),
        name="added",
        out_type=jax.ShapeDtypeStruct((rows, num_heads, height, width), jnp.float32),
        grid={"row": rows, "head": num_heads},
        num_consumer_wgs=num_wgs,
    )(x, y, vectors)


def _increment_kernel(num_wgs: int, scale: float, reverse: bool) -> Callable[..., None]:
    """Build the body of `split_state_increments`: each warpgroup owns columns of the state."""

    def increments(x, y, vectors, out):
        row, head, warpgroup = (lax.axis_index(name) for name in ("row", "head", "warpgroup"))
        num_heads, height, width = out.shape[1:]
        wg_columns = width // num_wgs
        columns = pl.ds(warpgroup * wg_columns, wg_columns)

        def scoped(decayed_smem):
            def context(pipeline):
                out[row, head, :, columns] = pipeline(zero_accumulator(height, wg_columns))

            def chunk(index, x, y, *rest):
                *vectors, state = rest
                y, decayed = y.at[:, columns], decayed_smem.at[opaque_zero(index[0]), warpgroup]
                if vectors:
                    factor = jnp.exp2(plgpu.load(vectors[0], layout=WGMMA_ROW))
                    decayed[...] = scale_rows(y, factor, scale=scale).astype(y.dtype)
                    state *= jnp.exp2(plgpu.load(vectors[1].at[CHUNK - 1]))
                elif scale != 1:
                    decayed[...] = (load_smem_f32(y) * scale).astype(y.dtype)
                else:
                    decayed = y
                plgpu.commit_smem()
                (state,) = wgmma_accumulate((state, (x.transpose((1, 0)), decayed)))
                return state

            last = x.shape[1] // CHUNK - 1
            tokens = [z.at[row, :, shared_group(head, num_heads, z.shape[2])] for z in (x, y)]
            chunk_pipeline(
                chunk,
                tokens,
                [vector.at[row, head] for vector in vectors],
                context,
                num_wgs,
                STATE_TILE,
                NUM_PREFETCH,
                chunk_order=lambda step: last - step if reverse else step,
            )

        pl.run_scoped(scoped, smem_matrix(1, num_wgs, CHUNK, wg_columns, tile=STATE_TILE), collective_axes="warpgroup")

    return increments
