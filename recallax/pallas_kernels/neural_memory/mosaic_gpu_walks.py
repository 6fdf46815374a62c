"""One head's walks over time for the exact linear memory, with weights and momentum in registers.

With S_m the states before a chunk (the weights, and the momentum if there is any), T = (I + G- * K K^T)^{-1} and P the
scores of queries and keys, weighed by G; U is minus the slopes:

    U = T (V - sum_m a_m K S_m)                           O = sum_m b_m Q S_m + P U
    S_0 <- b_0C S_0 + b_1C S_1 + K^T (c_0 U)              S_1 <- stays_C S_1 + K^T (c_1 U)
    dV = T^T (P^T dO + sum_m c_m K dS_m)
    dS_m <- b_mC dS_0 (+ stays_C dS_1) + Q^T (b_m dO) - K^T (a_m dV)

a, b and c have an entry per token; b and `stays` of a chunk's last token move the states.
"""

from typing import Any, NamedTuple

from jax.experimental.pallas import mosaic_gpu as plgpu

from recallax.pallas_kernels.delta_rule.walks import OWN, Walk, solved, walk
from recallax.pallas_kernels.mosaic_gpu import CHUNK, ROWS, Ref, accumulate, along_rows, load, send, zeros

SHAPE = (CHUNK, OWN)


class Vectors(NamedTuple):
    """What each token weighs states with, [T]; one per state."""

    finds: list[Ref]
    """a: as its gradient meets them."""
    reads: list[Ref]
    """b: as its query meets them."""
    leaves: list[Ref]
    """c: its gradient in them behind the chunk."""
    stays: list[Ref]
    """The momentum before the chunk in that behind the token; none without momentum."""

    @classmethod
    def of(cls, refs: list[Ref]) -> "Vectors":
        """From all in order."""
        n = 2 if len(refs) > 3 else 1
        return cls(refs[:n], refs[n : 2 * n], refs[2 * n : 3 * n], refs[3 * n :])


class Kept(NamedTuple):
    """Where a walk leaves what the gradients need, in global memory."""

    solved: Ref
    """[T, V]: U, or dV."""
    states: list[Ref]
    """[N, K, V]: S before each chunk, or dS behind it, in bfloat16."""


def ascend(
    sizes: Walk,
    tokens: list[Ref],
    vectors: list[Ref],
    starts: list[Ref],
    out: Ref,
    finals: list[Ref],
    kept: Kept | None,
) -> None:
    """Forward in time. tokens: q, k, v, the scores and the inverses, [T, width] each. vectors: as of `Vectors`."""
    count, interpret = len(starts), sizes.interpret

    def chunk(room, columns, time, step, refs, vectors, states):
        (q, k, v, scores, inverse), vectors = refs, Vectors.of(vectors)
        held, (high, low, staged, *more) = room[:count], room[count:]
        if kept is not None:
            plgpu.wait_smem_to_gmem(1, wait_read_only=True)  # for the last chunk's copies of the states
        for ref, state in zip(held, states, strict=True):
            ref[...] = state.astype(v.dtype)
        plgpu.commit_smem()
        if kept is not None:
            send(*((ref, x.at[step, :, columns]) for ref, x in zip(held, kept.states, strict=True)))
        plgpu.wait_smem_to_gmem(0 if kept is None else 1, wait_read_only=True)
        wanted = load(v.at[:, columns]) - _weighed(k, held, vectors.finds, interpret)
        (new,) = solved(inverse, wanted, (high, low), interpret)
        high[...] = new.astype(v.dtype)
        arriving = [low, *more]
        for ref, leaves in zip(arriving, vectors.leaves, strict=True):
            ref[...] = (new * _rows(leaves)).astype(v.dtype)
        plgpu.commit_smem()
        (part,) = accumulate((_weighed(q, held, vectors.reads, interpret), (scores, high)), interpret=interpret)
        staged[...] = part.astype(v.dtype)
        moved = states[0] * _last(vectors.reads[0])
        if count > 1:
            moved += states[1] * _last(vectors.reads[1])
        moved = [moved, *(x * _last(stays) for x, stays in zip(states[1:], vectors.stays, strict=True))]
        pairs = zip(moved, arriving, strict=True)
        states = accumulate(*((x, (k.transpose((1, 0)), ref)) for x, ref in pairs), interpret=interpret)
        plgpu.commit_smem()
        send((staged, out.at[time, columns]), *([] if kept is None else [(high, kept.solved.at[time, columns])]))
        return states

    heights = (sizes.width,) * count + (CHUNK,) * (2 + count)
    walk(sizes, chunk, tokens, vectors, starts, finals, heights, reverse=False)


def descend(
    sizes: Walk, tokens: list[Ref], vectors: list[Ref], starts: list[Ref], finals: list[Ref], kept: Kept
) -> None:
    """Backward in time. Arguments as of `ascend`, with the output's gradient for v."""
    count, interpret = len(starts), sizes.interpret

    def chunk(room, columns, time, step, refs, vectors, states):
        (q, k, grad, scores, inverse), vectors = refs, Vectors.of(vectors)
        held, (high, low, staged) = room[:count], room[count:]
        grad = grad.at[:, columns]
        plgpu.wait_smem_to_gmem(1, wait_read_only=True)
        for ref, state in zip(held, states, strict=True):
            ref[...] = state.astype(grad.dtype)
        plgpu.commit_smem()
        send(*((ref, x.at[step, :, columns]) for ref, x in zip(held, kept.states, strict=True)))
        slope = _weighed(k, held, vectors.leaves, interpret), (scores.transpose((1, 0)), grad)
        (slope,) = accumulate(slope, interpret=interpret)
        plgpu.wait_smem_to_gmem(1, wait_read_only=True)
        (slope,) = solved(inverse, slope, (high, low), interpret, transposed=True)
        staged[...] = slope.astype(grad.dtype)
        moved = [states[0] * _last(reads) for reads in vectors.reads]
        if count > 1:
            moved[1] += states[1] * _last(vectors.stays[0])
        for i, (finds, reads) in enumerate(zip(vectors.finds, vectors.reads, strict=True)):
            high[...] = (slope * -_rows(finds)).astype(grad.dtype)
            low[...] = (load(grad) * _rows(reads)).astype(grad.dtype)
            plgpu.commit_smem()
            pairs = (k.transpose((1, 0)), high), (q.transpose((1, 0)), low)
            (moved[i],) = accumulate((moved[i], *pairs), interpret=interpret)
            plgpu.commit_smem()  # all warps have read, also before the chunk is released
        send((staged, kept.solved.at[time, columns]))
        return moved

    heights = (sizes.width,) * count + (CHUNK,) * 3
    walk(sizes, chunk, tokens, vectors, starts, finals, heights, reverse=True)


def _weighed(x, held, vectors, interpret):
    """The sum of the products with each state, their rows weighed."""
    total: Any = None
    for state, vector in zip(held, vectors, strict=True):
        (part,) = accumulate((zeros(*SHAPE), (x, state)), interpret=interpret)
        part *= _rows(vector)
        total = part if total is None else total + part
    return total


def _rows(vector):
    return along_rows(plgpu.load(vector, layout=ROWS), SHAPE)


def _last(vector):
    return plgpu.load(vector.at[CHUNK - 1])
