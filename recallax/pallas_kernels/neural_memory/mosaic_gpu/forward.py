"""Forward pass of the linear memory: scores and inverses of all chunks, then a loop over time per block of values."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from recallax.pallas_kernels.mosaic_gpu.kernel_launch import LaunchConfig, launch_kernel
from recallax.pallas_kernels.mosaic_gpu.state_chunk_loop import WG_COLUMNS, StateLoopConfig
from recallax.pallas_kernels.mosaic_gpu.triangular_inverse import inverse_scratch, store_unit_lower_inverse
from recallax.pallas_kernels.mosaic_gpu.warpgroup_primitives import (
    CHUNK,
    CHUNK_SHAPE,
    WGMMA,
    copy_smem_to_gmem,
    load_vector,
    smem_matrix,
    wgmma_accumulate,
    zero_accumulator,
)
from recallax.pallas_kernels.neural_memory.mosaic_gpu.memory_chunk_loops import (
    ChunkCoefficients,
    MemoryResidualRefs,
    StateCoefficients,
    memory_forward_loop,
)

UNIT_SCALE = 1.0
"""The memory does not scale its scores."""

type MemoryStates = tuple[Float[Array, "B H K V"], ...]
"""The weights, and the momentum if there is any."""


class LinearMemoryInputs(NamedTuple):
    """Differentiable inputs. T is a multiple of the chunk."""

    q: Float[Array, "B T H K"]
    k: Float[Array, "B T H K"]
    v: Float[Array, "B T H V"]
    coefficients: ChunkCoefficients
    states: MemoryStates


class MemoryTokens(NamedTuple):
    """Per-token arrays of a loop's launch; in its kernel, references to them."""

    q: Float[Array, "B T H K"]
    k: Float[Array, "B T H K"]
    values: Float[Array, "B T H V"]
    """v; in the backward loop the gradient of the output."""
    scores: Float[Array, "B H T C"]
    inverse: Float[Array, "B H T D"]
    vectors: StateCoefficients

    def of_block(self) -> tuple[list, list]:
        """Return the references of this block to the matrices and to the vectors along time."""
        row, head, columns = block_position()
        tokens = [x.at[row, :, head] for x in (self.q, self.k)] + [self.values.at[row, :, head, columns]]
        tokens += [x.at[row, head] for x in (self.scores, self.inverse)]
        return tokens, [x.at[row, head] for x in self.vectors]


class LinearMemoryResiduals(NamedTuple):
    """Arrays that the backward pass needs."""

    inputs: LinearMemoryInputs
    scores: Float[Array, "B H T C"]
    inverse: Float[Array, "B H T D"]
    updates: Float[Array, "B T H V"]
    """U."""
    states: tuple[Float[Array, "B H N K V"], ...]
    """The states before each chunk."""


def linear_memory_primal(config: LaunchConfig, inputs: LinearMemoryInputs):
    """Return the output and the final states."""
    scores, inverse = _scores_and_inverses(inputs)
    return _launch_forward(inputs, scores, inverse, save_residuals=False)[:2]


def linear_memory_fwd(config: LaunchConfig, inputs: LinearMemoryInputs):
    """Return the output and the final states, and the residuals."""
    scores, inverse = _scores_and_inverses(inputs)
    out, final_states, saved = _launch_forward(inputs, scores, inverse, save_residuals=True)
    return (out, final_states), LinearMemoryResiduals(inputs, scores, inverse, *saved)


def _scores_and_inverses(inputs: LinearMemoryInputs) -> tuple[Float[Array, "B H T C"], Float[Array, "B H T D"]]:
    """Compute the scores P and the inverses T of all chunks, T as in `triangular_inverse.py`."""
    (b, t, h, width), dtype = inputs.q.shape, inputs.q.dtype

    def score(q, k, update_to_query, update_to_key, scores_out, inverse_out):
        row, head, time = lax.axis_index("row"), lax.axis_index("head"), pl.ds(lax.axis_index("chunk") * CHUNK, CHUNK)

        def scoped(queries, keys, scores_smem, scratch, loaded):
            plgpu.copy_gmem_to_smem(q.at[row, time, head], queries, loaded)
            plgpu.copy_gmem_to_smem(k.at[row, time, head], keys, loaded)
            plgpu.barrier_wait(loaded)
            (scores,) = wgmma_accumulate((zero_accumulator(*CHUNK_SHAPE), (queries, keys.transpose((1, 0)))))
            scores_smem[...] = (scores * load_vector(update_to_query.at[row, head, time], WGMMA)).astype(dtype)
            (scores,) = wgmma_accumulate((zero_accumulator(*CHUNK_SHAPE), (keys, keys.transpose((1, 0)))))
            store_unit_lower_inverse(scores * load_vector(update_to_key.at[row, head, time], WGMMA), scratch)
            plgpu.commit_smem()
            copy_smem_to_gmem(
                (scores_smem, scores_out.at[row, head, time]), (scratch[0], inverse_out.at[row, head, time])
            )
            plgpu.wait_smem_to_gmem(0)

        matrices = [smem_matrix(CHUNK, size, tile=64) for size in (width, width, CHUNK)]
        pl.run_scoped(scoped, *matrices, inverse_scratch(), plgpu.Barrier(num_arrivals=2))

    return launch_kernel(
        score,
        out_type=tuple(jax.ShapeDtypeStruct((b, h, t, n * CHUNK), dtype) for n in (1, 2)),
        grid={"row": b, "head": h, "chunk": t // CHUNK},
        num_consumer_wgs=1,
        num_producer_wgs=0,
    )(inputs.q, inputs.k, inputs.coefficients.update_to_query, inputs.coefficients.update_to_key)


def _launch_forward(inputs: LinearMemoryInputs, scores, inverse, *, save_residuals):
    """Return the output, the final states and, if wanted, U and the states before the chunks."""
    q, k, v, coefficients, states = inputs
    b, t, h, v_dim = v.shape
    config = StateLoopConfig(t, q.shape[3], WG_COLUMNS, UNIT_SCALE)

    def learn(tokens, initial_states, out, final_states, saved):
        row, head, columns = block_position()
        matrices, vectors = tokens.of_block()
        initial_states, final_states = (
            [x.at[row, head, :, columns] for x in refs] for refs in (initial_states, final_states)
        )
        residuals = None
        if save_residuals:
            saved_states = [x.at[row, head, :, :, columns] for x in saved[1]]
            residuals = MemoryResidualRefs(saved[0].at[row, :, head, columns], saved_states)
        out = out.at[row, :, head, columns]
        memory_forward_loop(config, matrices, vectors, initial_states, out, final_states, residuals)

    out = jax.ShapeDtypeStruct(v.shape, v.dtype)
    return launch_kernel(
        learn,
        out_type=(out, float32_shapes(states), (out, chunk_states_shapes(states, t)) if save_residuals else ()),
        grid={"row": b, "head": h, "part": v_dim // WG_COLUMNS},
        num_consumer_wgs=1,
    )(MemoryTokens(q, k, v, scores, inverse, coefficients.vectors()), states)


def block_position():
    """Return the row, the head and the columns of the values of this block."""
    return lax.axis_index("row"), lax.axis_index("head"), pl.ds(lax.axis_index("part") * WG_COLUMNS, WG_COLUMNS)


def float32_shapes(states: MemoryStates) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Return the shape of each state, in float32."""
    return tuple(jax.ShapeDtypeStruct(x.shape, jnp.float32) for x in states)


def chunk_states_shapes(states: MemoryStates, num_tokens: int) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Return the shape of each state of all chunks, in bfloat16."""
    return tuple(jax.ShapeDtypeStruct((*x.shape[:2], num_tokens // CHUNK, *x.shape[2:]), jnp.bfloat16) for x in states)
