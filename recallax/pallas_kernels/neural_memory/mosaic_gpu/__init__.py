"""The linear memory with a gradient per token on Hopper: the delta rule's route, with weights and momentum as states.

    U = T (V - a_0 K W - a_1 K S),   T = (I + G- * K K^T)^{-1}          minus the slopes of `xla.py`'s exact chunks

What tokens weigh gradients and states with (G, a, b, c) is a matter of gates and documents alone and comes first, in
XLA (`inner.weigh`), as does what the initial weights add (`exact.py`). Then all chunks' scores and inverses, then a
walk over time that carries both states (`mosaic_gpu_walks.py`). For the gradients that walk also keeps U and the
states before each chunk, a walk backward leaves those of V and of the states behind each chunk, and then every chunk is
for itself (`mosaic_gpu_gradients.py`).
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from recallax.pallas_kernels.chunking import DocumentIds, chunk_masks
from recallax.pallas_kernels.delta_rule.mosaic_gpu.delta_chunk_loops import WG_COLUMNS, DeltaKernelConfig
from recallax.pallas_kernels.dispatch import Unsupported, use_interpreter
from recallax.pallas_kernels.mosaic_gpu.triangular_inverse import inverse_scratch, store_unit_lower_inverse
from recallax.pallas_kernels.mosaic_gpu.warpgroup_primitives import (
    CHUNK,
    WGMMA,
    copy_smem_to_gmem,
    launch_kernel,
    load_vector,
    smem_matrix,
    wgmma_accumulate,
    zero_accumulator,
)
from recallax.pallas_kernels.neural_memory.inner_optimizer import InnerOptimizer
from recallax.pallas_kernels.neural_memory.mosaic_gpu.backward import (
    ChunkCoefficients,
    StateCoefficients,
    memory_chunk_grads,
)
from recallax.pallas_kernels.neural_memory.mosaic_gpu.memory_chunk_loops import (
    MemoryResiduals,
    memory_backward_loop,
    memory_forward_loop,
)
from recallax.pallas_kernels.neural_memory.sequential_memory import (
    require_sequential,
    shifted_coefficients,
    subtract_initial_weights,
)
from recallax.pallas_kernels.neural_memory.update_coefficients import (
    FastWeights,
    MemoryInputs,
    OuterParams,
    pad_to_chunks,
    update_coefficients,
)

SUPPORTED_HEAD_DIMS = (64, 128)
"""Of keys and values: what a warpgroup's registers and the tensor cores' tiles are made for."""

type LinearMemoryStates = tuple[Float[Array, "B H K V"], ...]


class _LinearMemoryInputs(NamedTuple):
    """T is a multiple of the chunk."""

    q: Float[Array, "B T H K"]
    k: Float[Array, "B T H K"]
    v: Float[Array, "B T H V"]
    coefficients: ChunkCoefficients
    states: LinearMemoryStates


def neural_memory(
    learner: InnerOptimizer, fixed: OuterParams, tokens: MemoryInputs, document_ids: DocumentIds, memory: FastWeights
) -> tuple[Float[Array, "B M H D"], FastWeights]:
    """The op's form for Hopper: bfloat16, 64 or 128 wide."""
    require_sequential(learner, fixed)
    interpret = use_interpreter("gpu")
    if tokens.q.shape[3] not in SUPPORTED_HEAD_DIMS:
        raise Unsupported(f"the memory is {tokens.q.shape[3]} wide; it must be one of {SUPPORTED_HEAD_DIMS}")
    for name, x in zip("qkv", tokens[:3], strict=True):
        if x.dtype != jnp.bfloat16:
            raise Unsupported(f"{name} is {x.dtype}; it must be bfloat16")
    (name,), length = memory.delta, tokens.q.shape[1]
    tokens, document_ids = pad_to_chunks(tokens, document_ids, CHUNK)
    q, k, v = tokens[:3]
    keep = jnp.where(document_ids.valid[..., None, None], tokens.log_decay.astype(jnp.float32), 0)
    starts = document_ids.index != jnp.pad(document_ids.index[:, :-1], ((0, 0), (1, 0)))
    v, read, left = subtract_initial_weights(
        learner, fixed.initial_weights[name].astype(jnp.float32), q, k, v, keep, starts
    )
    states = (memory.delta[name], *memory.momentum.values())
    weights = jax.checkpoint(functools.partial(_chunk_coefficients, learner))(tokens, document_ids)
    out, after = _linear_memory(interpret, _LinearMemoryInputs(q, k, v, weights, states))
    momentum = {name: after[1]} if learner.momentum else {}
    return (out.astype(jnp.float32) + read).astype(q.dtype)[:, :length], FastWeights({name: after[0] + left}, momentum)


def _chunk_coefficients(learner: InnerOptimizer, tokens: MemoryInputs, document_ids: DocumentIds) -> ChunkCoefficients:
    b, t, h, _ = tokens.lr.shape
    tokens, parts = jax.tree.map(lambda x: x.reshape(-1, CHUNK, *x.shape[2:]), (tokens, document_ids))
    previous = jnp.pad(document_ids.index[:, CHUNK - 1 : -1 : CHUNK], ((0, 0), (1, 0)))
    masks = chunk_masks(parts, previous.reshape(-1))
    weighing = jax.tree.map(lambda x: x[:, :, 0], update_coefficients(learner, tokens, masks.visible))
    beta, f, before = shifted_coefficients(learner, tokens, weighing, masks.visible)
    own, states = masks.in_state_document[:, None].astype(jnp.float32), 2 if learner.momentum else 1

    def joined(x: Array) -> Array:
        return jnp.moveaxis(x.reshape(b, -1, *x.shape[1:]), 1, 2).reshape(b, h, t, *x.shape[3:])

    def vectors(*some: Array) -> StateCoefficients:
        return tuple(joined(x) for x in some[:states])

    return ChunkCoefficients(
        joined(weighing.gradients),
        joined(before),
        vectors(own * beta, own * f),
        vectors(own * weighing.initial_weights, own * weighing.initial_momentum),
        vectors(weighing.gradients[:, :, -1], weighing.final_gradients),
        vectors(weighing.final_momentum[..., None] * own) if learner.momentum else (),
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _linear_memory(interpret: bool, inputs: _LinearMemoryInputs) -> tuple[Float[Array, "B T H V"], LinearMemoryStates]:
    scores, inverse = _scores_and_inverses(interpret, inputs)
    return _forward(interpret, inputs, scores, inverse, save_residuals=False)[:2]


def _linear_memory_fwd(interpret, inputs):
    scores, inverse = _scores_and_inverses(interpret, inputs)
    out, after, kept = _forward(interpret, inputs, scores, inverse, save_residuals=True)
    return (out, after), (inputs, (scores, inverse), kept)


def _linear_memory_bwd(interpret, residuals, cotangents):
    (inputs, (scores, inverse), (new, states)), (grad, late) = residuals, cotangents
    q, k, _, weights, _ = inputs
    slope, slopes, first = _backward(interpret, inputs, scores, inverse, grad, late)
    values = grad, new, slope
    dq, dk, weights = memory_chunk_grads(q, k, values, (states, slopes), weights, interpret=interpret)
    return (_LinearMemoryInputs(dq, dk, slope, weights, first),)


_linear_memory.defvjp(_linear_memory_fwd, _linear_memory_bwd)


def _scores_and_inverses(
    interpret: bool, inputs: _LinearMemoryInputs
) -> tuple[Float[Array, "B H T C"], Float[Array, "B H T D"]]:
    """P and T of all chunks, T as in `mosaic_gpu_solve.py`."""
    (b, t, h, width), dtype = inputs.q.shape, inputs.q.dtype

    def score(q, k, now, before, scores, inverse):
        row, head, time = lax.axis_index("row"), lax.axis_index("head"), pl.ds(lax.axis_index("chunk") * CHUNK, CHUNK)

        def scoped(queries, keys, staged, rooms, arrived):
            plgpu.copy_gmem_to_smem(q.at[row, time, head], queries, arrived)
            plgpu.copy_gmem_to_smem(k.at[row, time, head], keys, arrived)
            plgpu.barrier_wait(arrived)
            (alike,) = wgmma_accumulate(
                (zero_accumulator(CHUNK, CHUNK), (queries, keys.transpose((1, 0)))), interpret=interpret
            )
            staged[...] = (alike * load_vector(now.at[row, head, time], WGMMA)).astype(dtype)
            (alike,) = wgmma_accumulate(
                (zero_accumulator(CHUNK, CHUNK), (keys, keys.transpose((1, 0)))), interpret=interpret
            )
            store_unit_lower_inverse(alike * load_vector(before.at[row, head, time], WGMMA), rooms, interpret)
            plgpu.commit_smem()
            copy_smem_to_gmem((staged, scores.at[row, head, time]), (rooms[0], inverse.at[row, head, time]))
            plgpu.wait_smem_to_gmem(0)

        tokens = [smem_matrix(CHUNK, size, tile=64) for size in (width, width, CHUNK)]
        pl.run_scoped(scoped, *tokens, inverse_scratch(), plgpu.Barrier(num_arrivals=2))

    return launch_kernel(
        score,
        out_type=tuple(jax.ShapeDtypeStruct((b, h, t, n * CHUNK), dtype) for n in (1, 2)),
        grid={"row": b, "head": h, "chunk": t // CHUNK},
        num_consumer_wgs=1,
        num_producer_wgs=0,
        interpret=interpret,
    )(inputs.q, inputs.k, inputs.coefficients.update_to_query, inputs.coefficients.update_to_key)


def _forward(interpret, inputs, scores, inverse, *, save_residuals):
    """The output, the final states and, if wanted, U and the states before the chunks."""
    q, k, v, weights, states = inputs
    b, t, h, values = v.shape
    sizes = DeltaKernelConfig(t, q.shape[3], WG_COLUMNS, 1.0, interpret)

    def learn(q, k, v, scores, inverse, vectors, starts, out, finals, kept):
        row, head, columns = _block_position()
        tokens, along = _block_refs(q, k, v, scores, inverse, vectors)
        starts, finals = ([x.at[row, head, :, columns] for x in some] for some in (starts, finals))
        left = None
        if save_residuals:
            left = MemoryResiduals(kept[0].at[row, :, head, columns], [x.at[row, head, :, :, columns] for x in kept[1]])
        memory_forward_loop(sizes, tokens, along, starts, out.at[row, :, head, columns], finals, left)

    chosen = jax.ShapeDtypeStruct(v.shape, v.dtype)
    return launch_kernel(
        learn,
        out_type=(chosen, _float32_shapes(states), (chosen, _chunk_states_shape(states, t)) if save_residuals else ()),
        grid={"row": b, "head": h, "part": values // WG_COLUMNS},
        num_consumer_wgs=1,
        interpret=interpret,
    )(q, k, v, scores, inverse, weights.vectors(), states)


def _backward(interpret, inputs, scores, inverse, grad, state_grads):
    """The gradients of V, of the states behind the chunks, and of the first states."""
    q, k, v, weights, _ = inputs
    b, t, h, values = v.shape
    sizes = DeltaKernelConfig(t, q.shape[3], WG_COLUMNS, 1.0, interpret)

    def unlearn(q, k, grad, scores, inverse, vectors, ends, slope, slopes, first):
        row, head, columns = _block_position()
        tokens, along = _block_refs(q, k, grad, scores, inverse, vectors)
        ends, first = ([x.at[row, head, :, columns] for x in some] for some in (ends, first))
        kept = MemoryResiduals(slope.at[row, :, head, columns], [x.at[row, head, :, :, columns] for x in slopes])
        memory_backward_loop(sizes, tokens, along, ends, first, kept)

    return launch_kernel(
        unlearn,
        out_type=(
            jax.ShapeDtypeStruct(v.shape, v.dtype),
            _chunk_states_shape(state_grads, t),
            _float32_shapes(state_grads),
        ),
        grid={"row": b, "head": h, "part": values // WG_COLUMNS},
        num_consumer_wgs=1,
        interpret=interpret,
    )(q, k, grad, scores, inverse, weights.vectors(), state_grads)


def _block_position():
    """Row, head and columns of the values of a block."""
    return lax.axis_index("row"), lax.axis_index("head"), pl.ds(lax.axis_index("part") * WG_COLUMNS, WG_COLUMNS)


def _block_refs(q, k, values, scores, inverse, vectors):
    """Of a block: what comes chunk by chunk, and the vectors along time."""
    row, head, columns = _block_position()
    tokens = [x.at[row, :, head] for x in (q, k)] + [values.at[row, :, head, columns]]
    return tokens + [x.at[row, head] for x in (scores, inverse)], [x.at[row, head] for x in vectors]


def _float32_shapes(states):
    return tuple(jax.ShapeDtypeStruct(x.shape, jnp.float32) for x in states)


def _chunk_states_shape(states, num_tokens):
    """States of all chunks."""
    return tuple(jax.ShapeDtypeStruct((*x.shape[:2], num_tokens // CHUNK, *x.shape[2:]), jnp.bfloat16) for x in states)
