"""The gradients of the exact linear memory on Hopper after both walks: each chunk for itself, 64 channels at a time.

With U given, a chunk is the function (`mosaic_gpu_walks.py`)

    O = sum_m b_m Q S_m + (G * Q K^T) U          V - U = sum_m a_m K S_m + (G- * K K^T) U
    S_0' = b_0C S_0 + b_1C S_1 + K^T (c_0 U)     S_1' = stays_C S_1 + K^T (c_1 U)

of everything else, whose slopes are dO, -dV and dS'.
"""

import functools
from typing import NamedTuple

import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from recallax.pallas_kernels.delta_rule.mosaic_gpu_gradients import PART, by_chunks
from recallax.pallas_kernels.mosaic_gpu import CHUNK, MATRIX, ROWS, accumulate, along_rows, load, vector, zeros

SQUARE, SHAPE = (CHUNK, CHUNK), (CHUNK, PART)

type Vectors = tuple[Float[Array, "B H T"], ...]
type Kept = tuple[Float[Array, "B H N K V"], ...]
"""Of each state."""


class Weights(NamedTuple):
    """What tokens weigh with; of vectors one per state, the momentum's last."""

    now: Float[Array, "B H T C"]
    """G: gradients of the chunk's tokens, as queries meet them."""
    before: Float[Array, "B H T C"]
    """G-: as later gradients do."""
    finds: Vectors
    reads: Vectors
    leaves: Vectors
    stays: Vectors

    def vectors(self) -> Vectors:
        """In the order of `mosaic_gpu_walks.Vectors`."""
        return *self.finds, *self.reads, *self.leaves, *self.stays


def chunk_gradients(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    values: tuple[Float[Array, "B T H V"], Float[Array, "B T H V"], Float[Array, "B T H V"]],
    states: tuple[Kept, Kept],
    weights: Weights,
    *,
    interpret: bool,
) -> tuple[Float[Array, "B T H K"], Float[Array, "B T H K"], Weights]:
    """Of q, k and the weights. values: dO, U and dV; states: S and dS'."""
    vectors, count = (*weights.finds, *weights.reads, *weights.leaves), len(states[0])
    chunk = functools.partial(_chunk, interpret)
    sums = ((CHUNK,),) * 2 + ((),) * (5 * count - 1)
    given = weights.now, weights.before, *vectors
    dq, dk, sums = by_chunks(chunk, q, k, values, (*states[0], *states[1]), given, sums, interpret=interpret)
    now, before, *sums = (jnp.sum(x, axis=2) for x in sums)
    finds, reads, leaves, ends = (sums[i : i + count] for i in range(0, 4 * count, count))
    reads = (x + _at_end(end) for x, end in zip(reads, ends, strict=True))
    stays = (_at_end(x) for x in sums[4 * count :])
    return dq, dk, Weights(now, before, tuple(finds), tuple(reads), tuple(leaves), tuple(stays))


def _at_end(x: Float[Array, "B H T"]) -> Float[Array, "B H T"]:
    """The sum of each chunk at its last token."""
    sums = jnp.sum(x.reshape(*x.shape[:2], -1, CHUNK), axis=3, keepdims=True)
    return jnp.pad(sums, ((0, 0),) * 3 + ((CHUNK - 1, 0),)).reshape(x.shape)


def _chunk(interpret, keys, wide, held, weights, slopes, pairs, staged):
    """As of `by_chunks`; the slopes of what moves the states are per channel and not per token."""
    (q, k), (grad, new, slope) = ([x.at[i] for i in range(x.shape[0])] for x in (keys, wide))
    squares, vectors, squares_out, sums_out = weights[:2], weights[2:], slopes[:2], slopes[2:]
    count = len(vectors) // 3
    states, late = ([held.at[i + n] for i in range(count)] for n in (0, count))
    finds, reads, leaves = (range(i, i + count) for i in range(0, 3 * count, count))
    for i, (slope_here, tokens, sign) in enumerate(((grad, q, 1.0), (slope, k, -1.0))):
        pair, alike = accumulate(
            (zeros(*SQUARE), (slope_here, new.transpose((1, 0)))),
            (zeros(*SQUARE), (tokens, k.transpose((1, 0)))),
            interpret=interpret,
        )
        pair *= sign
        squares_out[i][...] = pair * alike
        pairs.at[i][...] = (pair * vector(squares[i], MATRIX)).astype(pairs.dtype)
    plgpu.commit_smem()

    def through(total, x, matrices, tokens, which, sign):
        """Add x S_m^T, their rows weighed, and leave what each weight is owed."""
        for state, i in zip(matrices, which, strict=True):
            (part,) = accumulate((zeros(*SHAPE), (x, state.transpose((1, 0)))), interpret=interpret)
            part *= sign
            sums_out[i][...] = jnp.sum(load(tokens) * part, axis=1)
            total += part * along_rows(vector(vectors[i], ROWS), SHAPE)
        return total

    dq = through(zeros(*SHAPE), grad, states, q, reads, 1.0)
    (dq,) = accumulate((dq, (pairs.at[0], k)), interpret=interpret)
    staged.at[0][...] = dq.astype(staged.dtype)
    dk = through(zeros(*SHAPE), slope, states, k, finds, -1.0)
    dk = through(dk, new, late, k, leaves, 1.0)
    products = (pairs.at[0].transpose((1, 0)), q), (pairs.at[1], k), (pairs.at[1].transpose((1, 0)), k)
    (dk,) = accumulate((dk, *products), interpret=interpret)
    staged.at[1][...] = dk.astype(staged.dtype)
    moved = [(state, late[0]) for state in states] + [*zip(states, late, strict=True)][1:]
    for out, (state, after) in zip(sums_out[3 * count :], moved, strict=True):
        out[...] = jnp.sum(load(state) * load(after), axis=1)
