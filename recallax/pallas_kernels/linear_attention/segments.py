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

from recallax.pallas_kernels.linear_attention.gates import Gates
from recallax.pallas_kernels.mosaic_gpu import (
    CHUNK,
    ROWS,
    accumulate,
    decayed_rows,
    launch,
    load,
    matrix,
    pipelined,
    unknown_zero,
    zeros,
)

MULTIPROCESSORS = 132
"""Of an H100. A block of these kernels has one for itself."""
LEAST_CHUNKS = 8
"""In a segment: with fewer, starting and ending a block would cost more than walking."""


class How(NamedTuple):
    """What is known when a kernel is built."""

    scale: float
    segments: int
    interpret: bool


def number_of_segments(blocks: int, chunks: int) -> int:
    """Into how many segments rows of so many chunks are cut, where there is a block per row and head."""
    return max(1, min(MULTIPROCESSORS // blocks, chunks // LEAST_CHUNKS))


def cut(x: Shaped[Array, "B T ..."], segments: int) -> Shaped[Array, "N S ..."]:
    """Every segment as a row: N = B * segments."""
    return x.reshape(x.shape[0] * segments, -1, *x.shape[2:])


def join(x: Shaped[Array, "N S ..."], segments: int) -> Shaped[Array, "B T ..."]:
    """Undo `cut`."""
    return x.reshape(x.shape[0] // segments, -1, *x.shape[2:])


def cut_last(x: Shaped[Array, "B H T ..."], segments: int) -> Shaped[Array, "N H S ..."]:
    """As `cut`, where heads stand before time."""
    return jnp.moveaxis(cut(jnp.moveaxis(x, 2, 1), segments), 1, 2)


def join_last(x: Shaped[Array, "N H S ..."], segments: int) -> Shaped[Array, "B H T ..."]:
    """Undo `cut_last`."""
    return jnp.moveaxis(join(jnp.moveaxis(x, 2, 1), segments), 1, 2)


def cut_gates(gates: Gates | None, segments: int) -> Gates | None:
    return None if gates is None else Gates(cut_last(gates.query, segments), cut_last(gates.key, segments))


def first_states(
    x: Float[Array, "B T M X"],
    y: Float[Array, "B T N Y"],
    gates: Gates | None,
    state: Float[Array, "B H X Y"],
    segments: int,
    *,
    scale: float = 1.0,
    reverse: bool,
    interpret: bool,
) -> Float[Array, "C H X Y"]:
    """The state that each of the B * segments walks starts from: sums of x_t (scale y_t)^T as they have decayed.

    state: of the first in each row, or, in reverse, of the last. x and y have as many heads as the state, or fewer.
    """
    if segments == 1:
        return state
    heads = state.shape[1]
    parts = added(x, y, gates, heads, segments, scale=scale, reverse=reverse, interpret=interpret)
    factors = jnp.ones((len(parts), heads), jnp.float32)
    if gates is not None:
        factors = stays_of(gates, segments)
    return starts(parts, factors[:, :, None, None], state, reverse=reverse)


def stays_of(gates: Gates, segments: int) -> Float[Array, "N H"]:
    """What is left of a state behind each of the B * segments parts."""
    chunks = cut_last(gates.query[:, :, CHUNK - 1 :: CHUNK], segments)
    return jnp.exp2(jnp.sum(chunks, axis=2))


def starts(
    added: Float[Array, "N H X ..."],
    factors: Float[Array, "N H ..."],
    state: Float[Array, "B H X ..."],
    *,
    reverse: bool,
    through: Callable[[Array, Array], Array] = jnp.multiply,
) -> Float[Array, "N H X ..."]:
    """The state before each of the N / B segments of a row, or, in reverse, behind it: through(factor, state) + added
    is on a segment's other side."""

    def by_segment(x):
        return jnp.moveaxis(x.reshape(len(state), -1, *x.shape[1:]), 1, 0)

    def step(state, segment):
        factor, more = segment
        return through(factor, state) + more, state

    _, states = lax.scan(step, state, (by_segment(factors), by_segment(added)), reverse=reverse)
    return jnp.moveaxis(states, 0, 1).reshape(-1, *state.shape[1:])


def added(
    x: Float[Array, "B T M X"],
    y: Float[Array, "B T N Y"],
    gates: Gates | None,
    heads: int,
    segments: int,
    *,
    scale: float = 1.0,
    reverse: bool,
    interpret: bool,
) -> Float[Array, "C H X Y"]:
    """What each of the B * segments parts adds to the state by itself."""
    x, y = cut(x, segments), cut(y, segments)
    (rows, tokens, groups, height), (others, width) = x.shape, y.shape[2:]
    workers = min(height, width) // 64
    own = width // workers
    vectors = ()
    if gates is not None:
        whole = gates.query.reshape(*gates.query.shape[:2], -1, CHUNK)
        until_end = (whole[..., -1:] - gates.key.reshape(whole.shape)).reshape(gates.key.shape)
        reach = gates.query if reverse else until_end
        vectors = cut_last(reach, segments), cut_last(gates.query, segments)

    def add_up(x, y, vectors, out):
        row, head, worker = (lax.axis_index(name) for name in ("row", "head", "worker"))
        columns = pl.ds(worker * own, own)

        def scoped(decayed):
            def context(pipeline):
                out[row, head, :, columns] = pipeline(zeros(height, own))

            def chunk(index, x, y, *rest):
                *vectors, state = rest
                y, room = y.at[:, columns], decayed.at[unknown_zero(index[0]), worker]
                if vectors:
                    reach = jnp.exp2(plgpu.load(vectors[0], layout=ROWS))
                    room[...] = decayed_rows(y, reach, scale=scale, interpret=interpret).astype(y.dtype)
                    state *= jnp.exp2(plgpu.load(vectors[1].at[CHUNK - 1]))
                elif scale != 1:
                    room[...] = (load(y) * scale).astype(y.dtype)
                else:
                    room = y
                plgpu.commit_smem()
                (state,) = accumulate((state, (x.transpose((1, 0)), room)), interpret=interpret)
                return state

            last = tokens // CHUNK - 1
            pair = [
                x.at[row, :, lax.div(head, jnp.int32(heads // groups))],
                y.at[row, :, lax.div(head, jnp.int32(heads // others))],
            ]
            along = [vector.at[row, head] for vector in vectors]
            pipelined(chunk, pair, along, context, workers, 64, 3, order=lambda step: last - step if reverse else step)

        pl.run_scoped(scoped, matrix(1, workers, CHUNK, own, tile=64), collective_axes="worker")

    return launch(
        add_up,
        name="added",
        out=jax.ShapeDtypeStruct((rows, heads, height, width), jnp.float32),
        grid={"row": rows, "head": heads},
        workers=workers,
        interpret=interpret,
    )(x, y, vectors)
