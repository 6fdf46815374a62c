"""Rows cut into segments, so that few rows and heads keep a GPU busy: two levels instead of one walk over time.

What each segment adds to the state is computed first, for all at once and reading two inputs only; the states at their
ends follow from one another, and then every segment is a row of its own with the state that it starts from.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Shaped

from recallax.pallas_kernels.mosaic_gpu.cumulative_decay import CumulativeDecay
from recallax.pallas_kernels.mosaic_gpu.warpgroup_primitives import (
    CHUNK,
    WGMMA_ROW,
    chunk_pipeline,
    launch_kernel,
    load_smem_f32,
    opaque_zero,
    scale_rows,
    smem_matrix,
    wgmma_accumulate,
    zero_accumulator,
)

NUM_SMS = 132
"""Of an H100. A block of these kernels has one for itself."""
MIN_CHUNKS_PER_SPLIT = 8
"""In a segment: with fewer, starting and ending a block would cost more than walking."""


class LaunchConfig(NamedTuple):
    """What is known when a kernel is built."""

    scale: float
    num_splits: int
    interpret: bool


def choose_num_splits(num_blocks: int, num_chunks: int) -> int:
    """Into how many segments rows of so many chunks are cut, where there is a block per row and head."""
    return max(1, min(NUM_SMS // num_blocks, num_chunks // MIN_CHUNKS_PER_SPLIT))


def split_rows(x: Shaped[Array, "B T ..."], num_splits: int) -> Shaped[Array, "N S ..."]:
    """Every segment as a row: N = B * segments."""
    return x.reshape(x.shape[0] * num_splits, -1, *x.shape[2:])


def merge_rows(x: Shaped[Array, "N S ..."], num_splits: int) -> Shaped[Array, "B T ..."]:
    """Undo `split_rows`."""
    return x.reshape(x.shape[0] // num_splits, -1, *x.shape[2:])


def split_rows_head_major(x: Shaped[Array, "B H T ..."], num_splits: int) -> Shaped[Array, "N H S ..."]:
    """As `split_rows`, where heads stand before time."""
    return jnp.moveaxis(split_rows(jnp.moveaxis(x, 2, 1), num_splits), 1, 2)


def merge_rows_head_major(x: Shaped[Array, "N H S ..."], num_splits: int) -> Shaped[Array, "B H T ..."]:
    """Undo `split_rows_head_major`."""
    return jnp.moveaxis(merge_rows(jnp.moveaxis(x, 2, 1), num_splits), 1, 2)


def split_gates(gates: CumulativeDecay | None, num_splits: int) -> CumulativeDecay | None:
    return (
        None
        if gates is None
        else CumulativeDecay(
            split_rows_head_major(gates.query, num_splits), split_rows_head_major(gates.key, num_splits)
        )
    )


def split_initial_states(
    x: Float[Array, "B T M X"],
    y: Float[Array, "B T N Y"],
    gates: CumulativeDecay | None,
    state: Float[Array, "B H X Y"],
    num_splits: int,
    *,
    scale: float = 1.0,
    reverse: bool,
    interpret: bool,
) -> Float[Array, "C H X Y"]:
    """The state that each of the B * segments walks starts from: sums of x_t (scale y_t)^T as they have decayed.

    state: of the first in each row, or, in reverse, of the last. x and y have as many heads as the state, or fewer.
    """
    if num_splits == 1:
        return state
    heads = state.shape[1]
    parts = split_state_increments(x, y, gates, heads, num_splits, scale=scale, reverse=reverse, interpret=interpret)
    factors = jnp.ones((len(parts), heads), jnp.float32)
    if gates is not None:
        factors = split_decay(gates, num_splits)
    return propagate_split_states(parts, factors[:, :, None, None], state, reverse=reverse)


def split_decay(gates: CumulativeDecay, num_splits: int) -> Float[Array, "N H"]:
    """What is left of a state behind each of the B * segments parts."""
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
    """The state before each of the N / B segments of a row, or, in reverse, behind it: through(factor, state) + added
    is on a segment's other side."""

    def by_segment(x):
        return jnp.moveaxis(x.reshape(len(state), -1, *x.shape[1:]), 1, 0)

    def step(state, segment):
        factor, more = segment
        return apply_transition(factor, state) + more, state

    _, states = lax.scan(step, state, (by_segment(transitions), by_segment(increments)), reverse=reverse)
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
    interpret: bool,
) -> Float[Array, "C H X Y"]:
    """What each of the B * segments parts adds to the state by itself."""
    x, y = split_rows(x, num_splits), split_rows(y, num_splits)
    (rows, tokens, groups, height), (others, width) = x.shape, y.shape[2:]
    workers = min(height, width) // 64
    own = width // workers
    vectors = ()
    if gates is not None:
        whole = gates.query.reshape(*gates.query.shape[:2], -1, CHUNK)
        until_end = (whole[..., -1:] - gates.key.reshape(whole.shape)).reshape(gates.key.shape)
        reach = gates.query if reverse else until_end
        vectors = split_rows_head_major(reach, num_splits), split_rows_head_major(gates.query, num_splits)

    def add_up(x, y, vectors, out):
        row, head, worker = (lax.axis_index(name) for name in ("row", "head", "worker"))
        columns = pl.ds(worker * own, own)

        def scoped(decayed):
            def context(pipeline):
                out[row, head, :, columns] = pipeline(zero_accumulator(height, own))

            def chunk(index, x, y, *rest):
                *vectors, state = rest
                y, room = y.at[:, columns], decayed.at[opaque_zero(index[0]), worker]
                if vectors:
                    reach = jnp.exp2(plgpu.load(vectors[0], layout=WGMMA_ROW))
                    room[...] = scale_rows(y, reach, scale=scale, interpret=interpret).astype(y.dtype)
                    state *= jnp.exp2(plgpu.load(vectors[1].at[CHUNK - 1]))
                elif scale != 1:
                    room[...] = (load_smem_f32(y) * scale).astype(y.dtype)
                else:
                    room = y
                plgpu.commit_smem()
                (state,) = wgmma_accumulate((state, (x.transpose((1, 0)), room)), interpret=interpret)
                return state

            last = tokens // CHUNK - 1
            pair = [
                x.at[row, :, lax.div(head, jnp.int32(num_heads // groups))],
                y.at[row, :, lax.div(head, jnp.int32(num_heads // others))],
            ]
            along = [vector.at[row, head] for vector in vectors]
            chunk_pipeline(
                chunk, pair, along, context, workers, 64, 3, chunk_order=lambda step: last - step if reverse else step
            )

        pl.run_scoped(scoped, smem_matrix(1, workers, CHUNK, own, tile=64), collective_axes="worker")

    return launch_kernel(
        add_up,
        name="added",
        out_type=jax.ShapeDtypeStruct((rows, num_heads, height, width), jnp.float32),
        grid={"row": rows, "head": num_heads},
        num_consumer_wgs=workers,
        interpret=interpret,
    )(x, y, vectors)
