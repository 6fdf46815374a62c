"""One head's walks over time for the exact linear memory, with weights and momentum in registers.

With S_m the states before a chunk (the weights, and the momentum if there is any), T = (I + G- * K K^T)^{-1} and P the
scores of queries and keys, weighed by G; U is minus the slopes:

    U = T (V - sum_m a_m K S_m)                           O = sum_m b_m Q S_m + P U
    S_0 <- b_0C S_0 + b_1C S_1 + K^T (c_0 U)              S_1 <- stays_C S_1 + K^T (c_1 U)
    dV = T^T (P^T dO + sum_m c_m K dS_m)
    dS_m <- b_mC dS_0 (+ stays_C dS_1) + Q^T (b_m dO) - K^T (a_m dV)

a, b and c have an entry per token; b and `momentum_decay` of a chunk's last token move the states.
"""

from typing import Any, NamedTuple

from jax.experimental.pallas import mosaic_gpu as plgpu

from recallax.pallas_kernels.delta_rule.mosaic_gpu.delta_chunk_loops import (
    WG_COLUMNS,
    DeltaKernelConfig,
    apply_inverse,
    state_chunk_loop,
)
from recallax.pallas_kernels.mosaic_gpu.warpgroup_primitives import (
    CHUNK,
    WGMMA_ROW,
    Ref,
    broadcast_per_row,
    copy_smem_to_gmem,
    load_smem_f32,
    wgmma_accumulate,
    zero_accumulator,
)

WG_SHAPE = (CHUNK, WG_COLUMNS)


class CoefficientRefs(NamedTuple):
    """What each token weighs states with, [T]; one per state."""

    state_to_key: list[Ref]
    """a: as its gradient meets them."""
    state_to_query: list[Ref]
    """b: as its query meets them."""
    update_to_end: list[Ref]
    """c: its gradient in them behind the chunk."""
    momentum_decay: list[Ref]
    """The momentum before the chunk in that behind the token; none without momentum."""

    @classmethod
    def from_refs(cls, refs: list[Ref]) -> "CoefficientRefs":
        """From all in order."""
        n = 2 if len(refs) > 3 else 1
        return cls(refs[:n], refs[n : 2 * n], refs[2 * n : 3 * n], refs[3 * n :])


class MemoryResiduals(NamedTuple):
    """Where a walk leaves what the gradients need, in global memory."""

    updates: Ref
    """[T, V]: U, or dV."""
    states: list[Ref]
    """[N, K, V]: S before each chunk, or dS behind it, in bfloat16."""


def memory_forward_loop(
    config: DeltaKernelConfig,
    tokens: list[Ref],
    vectors: list[Ref],
    initial_states: list[Ref],
    out: Ref,
    final_states: list[Ref],
    residuals: MemoryResiduals | None,
) -> None:
    """Forward in time. tokens: q, k, v, the scores and the inverses, [T, width] each. vectors: as of `CoefficientRefs`."""
    count, interpret = len(initial_states), config.interpret

    def chunk(room, columns, time, step, refs, vectors, states):
        (q, k, v, scores, inverse), vectors = refs, CoefficientRefs.from_refs(vectors)
        held, (high, low, staged, *more) = room[:count], room[count:]
        if residuals is not None:
            plgpu.wait_smem_to_gmem(1, wait_read_only=True)  # for the last chunk's copies of the states
        for ref, state in zip(held, states, strict=True):
            ref[...] = state.astype(v.dtype)
        plgpu.commit_smem()
        if residuals is not None:
            copy_smem_to_gmem(*((ref, x.at[step, :, columns]) for ref, x in zip(held, residuals.states, strict=True)))
        plgpu.wait_smem_to_gmem(0 if residuals is None else 1, wait_read_only=True)
        wanted = load_smem_f32(v.at[:, columns]) - _weighted_state_products(k, held, vectors.state_to_key, interpret)
        (new,) = apply_inverse(inverse, wanted, (high, low), interpret)
        high[...] = new.astype(v.dtype)
        arriving = [low, *more]
        for ref, leaves in zip(arriving, vectors.update_to_end, strict=True):
            ref[...] = (new * _broadcast_coefficient(leaves)).astype(v.dtype)
        plgpu.commit_smem()
        (part,) = wgmma_accumulate(
            (_weighted_state_products(q, held, vectors.state_to_query, interpret), (scores, high)), interpret=interpret
        )
        staged[...] = part.astype(v.dtype)
        moved = states[0] * _last_token(vectors.state_to_query[0])
        if count > 1:
            moved += states[1] * _last_token(vectors.state_to_query[1])
        moved = [moved, *(x * _last_token(stays) for x, stays in zip(states[1:], vectors.momentum_decay, strict=True))]
        pairs = zip(moved, arriving, strict=True)
        states = wgmma_accumulate(*((x, (k.transpose((1, 0)), ref)) for x, ref in pairs), interpret=interpret)
        plgpu.commit_smem()
        copy_smem_to_gmem(
            (staged, out.at[time, columns]),
            *([] if residuals is None else [(high, residuals.updates.at[time, columns])]),
        )
        return states

    heights = (config.head_k_dim,) * count + (CHUNK,) * (2 + count)
    state_chunk_loop(config, chunk, tokens, vectors, initial_states, final_states, heights, reverse=False)


def memory_backward_loop(
    config: DeltaKernelConfig,
    tokens: list[Ref],
    vectors: list[Ref],
    final_state_grads: list[Ref],
    initial_state_grads: list[Ref],
    residuals: MemoryResiduals,
) -> None:
    """Backward in time. Arguments as of `memory_forward_loop`, with the output's gradient for v."""
    count, interpret = len(final_state_grads), config.interpret

    def chunk(room, columns, time, step, refs, vectors, states):
        (q, k, grad, scores, inverse), vectors = refs, CoefficientRefs.from_refs(vectors)
        held, (high, low, staged) = room[:count], room[count:]
        grad = grad.at[:, columns]
        plgpu.wait_smem_to_gmem(1, wait_read_only=True)
        for ref, state in zip(held, states, strict=True):
            ref[...] = state.astype(grad.dtype)
        plgpu.commit_smem()
        copy_smem_to_gmem(*((ref, x.at[step, :, columns]) for ref, x in zip(held, residuals.states, strict=True)))
        slope = _weighted_state_products(k, held, vectors.update_to_end, interpret), (scores.transpose((1, 0)), grad)
        (slope,) = wgmma_accumulate(slope, interpret=interpret)
        plgpu.wait_smem_to_gmem(1, wait_read_only=True)
        (slope,) = apply_inverse(inverse, slope, (high, low), interpret, transposed=True)
        staged[...] = slope.astype(grad.dtype)
        moved = [states[0] * _last_token(reads) for reads in vectors.state_to_query]
        if count > 1:
            moved[1] += states[1] * _last_token(vectors.momentum_decay[0])
        for i, (finds, reads) in enumerate(zip(vectors.state_to_key, vectors.state_to_query, strict=True)):
            high[...] = (slope * -_broadcast_coefficient(finds)).astype(grad.dtype)
            low[...] = (load_smem_f32(grad) * _broadcast_coefficient(reads)).astype(grad.dtype)
            plgpu.commit_smem()
            pairs = (k.transpose((1, 0)), high), (q.transpose((1, 0)), low)
            (moved[i],) = wgmma_accumulate((moved[i], *pairs), interpret=interpret)
            plgpu.commit_smem()  # all warps have read, also before the chunk is released
        copy_smem_to_gmem((staged, residuals.updates.at[time, columns]))
        return moved

    heights = (config.head_k_dim,) * count + (CHUNK,) * 3
    state_chunk_loop(config, chunk, tokens, vectors, final_state_grads, initial_state_grads, heights, reverse=True)


def _weighted_state_products(x, state_refs, vectors, interpret):
    """The sum of the products with each state, their rows weighed."""
    total: Any = None
    for state, vector in zip(state_refs, vectors, strict=True):
        (part,) = wgmma_accumulate((zero_accumulator(*WG_SHAPE), (x, state)), interpret=interpret)
        part *= _broadcast_coefficient(vector)
        total = part if total is None else total + part
    return total


def _broadcast_coefficient(vector):
    return broadcast_per_row(plgpu.load(vector, layout=WGMMA_ROW), WG_SHAPE)


def _last_token(vector):
    return plgpu.load(vector.at[CHUNK - 1])
