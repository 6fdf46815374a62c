"""Loops over the chunks of one head for the linear memory, with weights and momentum in registers.

With S_m the states before a chunk (the weights, and the momentum if there is any), T = (I + G- * K K^T)^{-1} and P the
scores of queries and keys, weighted by G; U is minus the gradients of the memory's loss:

    U = T (V - sum_m a_m K S_m)                           O = sum_m b_m Q S_m + P U
    S_0 <- b_0C S_0 + b_1C S_1 + K^T (c_0 U)              S_1 <- decay_C S_1 + K^T (c_1 U)
    dV = T^T (P^T dO + sum_m c_m K dS_m)
    dS_m <- b_mC dS_0 (+ decay_C dS_1) + Q^T (b_m dO) - K^T (a_m dV)

a, b and c have an entry per token; b and `momentum_decay` of a chunk's last token move the states.
"""

from typing import Any, NamedTuple

from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from recallax.pallas_kernels.mosaic_gpu.state_chunk_loop import (
    WG_SHAPE,
    StateLoopConfig,
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

type StateCoefficients = tuple[Float[Array, "B H T"], ...]
"""A coefficient of each token per state: the weights, then the momentum if there is any."""


class ChunkCoefficients(NamedTuple):
    """Coefficients of states and updates, computed before the kernels."""

    update_to_query: Float[Array, "B H T C"]
    """G: factors of the chunk's updates in the weights that queries read."""
    update_to_key: Float[Array, "B H T C"]
    """G-: factors of the chunk's updates in the weights that later gradients see."""
    state_to_key: StateCoefficients
    """a: factors of the states in the weights that a token's gradient sees."""
    state_to_query: StateCoefficients
    """b: factors of the states in the weights that a query reads."""
    update_to_end: StateCoefficients
    """c: factors of a token's update in the states after the chunk."""
    momentum_decay: StateCoefficients
    """Factor of the momentum before the chunk in the momentum after the token; empty without momentum."""

    def vectors(self) -> StateCoefficients:
        """Return the vectors in the order of `_CoefficientRefs`."""
        return *self.state_to_key, *self.state_to_query, *self.update_to_end, *self.momentum_decay


class _CoefficientRefs(NamedTuple):
    """The vectors of `ChunkCoefficients` for one chunk, [C] each."""

    state_to_key: list[Ref]
    state_to_query: list[Ref]
    update_to_end: list[Ref]
    momentum_decay: list[Ref]

    @classmethod
    def from_refs(cls, refs: list[Ref]) -> "_CoefficientRefs":
        """Group the references by coefficient: 3 without momentum, 7 with it."""
        n = 2 if len(refs) > 3 else 1
        return cls(refs[:n], refs[n : 2 * n], refs[2 * n : 3 * n], refs[3 * n :])


class MemoryResidualRefs(NamedTuple):
    """References in global memory to what a loop stores for the gradients."""

    updates: Ref
    """[T, V]: U; in the backward loop dV."""
    states: list[Ref]
    """[N, K, V]: S before each chunk, or dS after it, in bfloat16."""


def memory_forward_loop(
    config: StateLoopConfig,
    tokens: list[Ref],
    vectors: list[Ref],
    initial_states: list[Ref],
    out: Ref,
    final_states: list[Ref],
    residuals: MemoryResidualRefs | None,
) -> None:
    """Process the chunks of one head forward in time.

    Args:
        config: Sizes.
        tokens: References to q, k, v, the scores and the inverses, [T, width] each.
        vectors: References [T] in the order of `ChunkCoefficients.vectors`.
        initial_states: References [K, V].
        out: Reference [T, V].
        final_states: References [K, V].
        residuals: Where U and the states are stored; None: they are not stored.
    """
    count = len(initial_states)

    def chunk(scratch, columns, time, step, refs, vectors, states):
        (q, k, v, scores, inverse), coefficients = refs, _CoefficientRefs.from_refs(vectors)
        states_smem, (high, low, out_smem, *more) = scratch[:count], scratch[count:]
        _store_states(states_smem, states, v.dtype, step, columns, residuals)
        plgpu.wait_smem_to_gmem(0 if residuals is None else 1, wait_read_only=True)
        rhs = load_smem_f32(v.at[:, columns])
        rhs = rhs - _weighted_state_products(k, states_smem, coefficients.state_to_key)
        (updates,) = apply_inverse(inverse, rhs, (high, low))
        high[...] = updates.astype(v.dtype)
        weighted_updates = [low, *more]
        for ref, factor in zip(weighted_updates, coefficients.update_to_end, strict=True):
            ref[...] = (updates * _broadcast_coefficient(factor)).astype(v.dtype)
        plgpu.commit_smem()
        read = _weighted_state_products(q, states_smem, coefficients.state_to_query)
        (chunk_out,) = wgmma_accumulate((read, (scores, high)))
        out_smem[...] = chunk_out.astype(v.dtype)
        decayed = states[0] * _last_token(coefficients.state_to_query[0])
        if count > 1:
            decayed += states[1] * _last_token(coefficients.state_to_query[1])
        others = zip(states[1:], coefficients.momentum_decay, strict=True)
        decayed = [decayed, *(x * _last_token(decay) for x, decay in others)]
        pairs = zip(decayed, weighted_updates, strict=True)
        states = wgmma_accumulate(*((x, (k.transpose((1, 0)), ref)) for x, ref in pairs))
        plgpu.commit_smem()
        saved = [] if residuals is None else [(high, residuals.updates.at[time, columns])]
        copy_smem_to_gmem((out_smem, out.at[time, columns]), *saved)
        return states

    heights = (config.head_k_dim,) * count + (CHUNK,) * (2 + count)
    state_chunk_loop(config, chunk, tokens, vectors, initial_states, final_states, heights, reverse=False)


def memory_backward_loop(
    config: StateLoopConfig,
    tokens: list[Ref],
    vectors: list[Ref],
    final_state_grads: list[Ref],
    initial_state_grads: list[Ref],
    residuals: MemoryResidualRefs,
) -> None:
    """Process the chunks of one head backward in time.

    Args:
        config: Sizes.
        tokens: References as in `memory_forward_loop`, with the gradient of the output in place of v.
        vectors: References [T] in the order of `ChunkCoefficients.vectors`.
        final_state_grads: References [K, V].
        initial_state_grads: References [K, V].
        residuals: Where dV and the gradients of the states are stored.
    """
    count = len(final_state_grads)

    def chunk(scratch, columns, time, step, refs, vectors, states):
        (q, k, out_grad, scores, inverse), coefficients = refs, _CoefficientRefs.from_refs(vectors)
        states_smem, (high, low, v_grad_smem) = scratch[:count], scratch[count:]
        out_grad = out_grad.at[:, columns]
        dtype = out_grad.dtype
        _store_states(states_smem, states, dtype, step, columns, residuals)
        from_states = _weighted_state_products(k, states_smem, coefficients.update_to_end)
        (v_grad,) = wgmma_accumulate((from_states, (scores.transpose((1, 0)), out_grad)))
        plgpu.wait_smem_to_gmem(1, wait_read_only=True)
        (v_grad,) = apply_inverse(inverse, v_grad, (high, low), transposed=True)
        v_grad_smem[...] = v_grad.astype(dtype)
        new_states = [states[0] * _last_token(factor) for factor in coefficients.state_to_query]
        if count > 1:
            new_states[1] += states[1] * _last_token(coefficients.momentum_decay[0])
        factors = zip(coefficients.state_to_key, coefficients.state_to_query, strict=True)
        for i, (to_key, to_query) in enumerate(factors):
            high[...] = (v_grad * -_broadcast_coefficient(to_key)).astype(dtype)
            low[...] = (load_smem_f32(out_grad) * _broadcast_coefficient(to_query)).astype(dtype)
            plgpu.commit_smem()
            pairs = (k.transpose((1, 0)), high), (q.transpose((1, 0)), low)
            (new_states[i],) = wgmma_accumulate((new_states[i], *pairs))
            plgpu.commit_smem()  # all warps have read, also before the chunk is released
        copy_smem_to_gmem((v_grad_smem, residuals.updates.at[time, columns]))
        return new_states

    heights = (config.head_k_dim,) * count + (CHUNK,) * 3
    state_chunk_loop(config, chunk, tokens, vectors, final_state_grads, initial_state_grads, heights, reverse=True)


def _store_states(states_smem, states, dtype, step, columns, residuals):
    """Store the states at the border of a chunk as operands, and in global memory if there are residuals."""
    if residuals is not None:
        plgpu.wait_smem_to_gmem(1, wait_read_only=True)  # for the last chunk's copies of the states
    for ref, state in zip(states_smem, states, strict=True):
        ref[...] = state.astype(dtype)
    plgpu.commit_smem()
    if residuals is not None:
        pairs = zip(states_smem, residuals.states, strict=True)
        copy_smem_to_gmem(*((ref, x.at[step, :, columns]) for ref, x in pairs))


def _weighted_state_products(x, state_refs, vectors):
    """Return the sum of the products of x with each state, their rows weighted."""
    total: Any = None
    for state, vector in zip(state_refs, vectors, strict=True):
        (product,) = wgmma_accumulate((zero_accumulator(*WG_SHAPE), (x, state)))
        product *= _broadcast_coefficient(vector)
        total = product if total is None else total + product
    return total


def _broadcast_coefficient(vector):
    """Load a vector [C] and repeat it over the columns of the warpgroup."""
    return broadcast_per_row(plgpu.load(vector, layout=WGMMA_ROW), WG_SHAPE)


def _last_token(vector):
    """Load the entry of the chunk's last token."""
    return plgpu.load(vector.at[CHUNK - 1])
