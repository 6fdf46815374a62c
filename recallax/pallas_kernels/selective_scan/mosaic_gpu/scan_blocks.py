"""Inputs, splits, pipeline and loads that the forward and backward kernels of the selective scan share."""

from typing import NamedTuple

import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from recallax.pallas_kernels.mosaic_gpu.sequence_splits import propagate_split_states, split_rows
from recallax.pallas_kernels.mosaic_gpu.warpgroup_primitives import (
    WGMMA,
    WGMMA_COL,
    WGMMA_ROW,
    broadcast_per_column,
    broadcast_per_row,
)

CHUNK = 16
"""Tokens between the states that are stored, and tokens that TMA loads together."""
BLOCK_CHANNELS = 64
"""Channels of a block: the rows of a register matrix."""
STATE_MULTIPLE = 8
"""The register layout needs a multiple of eight columns."""
NUM_PREFETCH, NUM_PREFETCH_BWD = 3, 1
"""Chunks that TMA loads ahead. With one in the backward pass, two blocks share a multiprocessor's memory."""


class SelectiveScanInputs(NamedTuple):
    """Differentiable inputs, padded to whole chunks and whole blocks of channels; float32 but for x."""

    x: Float[Array, "B T D"]
    rate: Float[Array, "B T D"]
    a: Float[Array, "D N"]
    """Times log2(e)."""
    b: Float[Array, "B T N"]
    c: Float[Array, "B T N"]
    state: Float[Array, "B D N"]

    def split(self, num_splits: int) -> "SelectiveScanInputs":
        """Make every split a row, except for the states."""
        tokens = {name: split_rows(getattr(self, name), num_splits) for name in ("x", "rate", "b", "c")}
        return self._replace(**tokens)


def split_boundary_states(boundary_state_fn, inputs: SelectiveScanInputs, state_mask, state, num_splits, *, reverse):
    """Compute the state before each split; in reverse, the gradient of the state after it.

    Args:
        boundary_state_fn: Maps the states before all splits to those after them; in reverse, gradients after to
            gradients before.
        inputs: Inputs of whole rows.
        state_mask: 0 where a token drops the state before it, [B, T, N]; None: no token does.
        state: State before each row; in reverse, the gradient after it.
        num_splits: Splits of a row.
        reverse: Go backward in time.
    """
    if num_splits == 1:
        return state
    rates = jnp.sum(split_rows(inputs.rate, num_splits), axis=1)[..., None]
    decay = jnp.exp2(rates * inputs.a[None])
    if state_mask is not None:
        decay = decay * jnp.min(split_rows(state_mask, num_splits), axis=1)[:, None]
    increments = boundary_state_fn(jnp.zeros(decay.shape, state.dtype))
    return propagate_split_states(increments, decay, state, reverse=reverse)


def scan_pipeline(chunk, tokens, state_vectors, init_carry, num_chunks, *, reverse=False):
    """Call `chunk(step, *blocks, carry) -> carry` for each chunk and return the last carry.

    A block of threads is one warpgroup, which also issues its copies, so that several blocks fit on a multiprocessor.

    Args:
        chunk: Work on one chunk; the blocks are references into shared memory.
        tokens: References [T, 64] in global memory.
        state_vectors: References [T, N] in global memory.
        init_carry: The first carry.
        num_chunks: Chunks of a row.
        reverse: Go backward in time.
    """

    def order(step):
        return num_chunks - 1 - step if reverse else step

    specs = [plgpu.BlockSpec((CHUNK, BLOCK_CHANNELS), lambda step: (order(step), 0)) for _ in tokens]
    specs += [plgpu.BlockSpec((CHUNK, x.shape[1]), lambda step: (order(step), 0)) for x in state_vectors]
    return plgpu.emit_pipeline(
        lambda index, *refs: chunk(order(index[0]), *refs),
        grid=(num_chunks,),
        in_specs=specs,
        max_concurrent_steps=1 + (NUM_PREFETCH_BWD if reverse else NUM_PREFETCH),
        init_carry=init_carry,
    )(*tokens, *state_vectors)


def load_channel_vector(ref, t, shape):
    """Load a token's vector of the channels and repeat it over the states."""
    return broadcast_per_row(plgpu.load(ref.at[t], layout=WGMMA_ROW).astype(jnp.float32), shape)


def load_state_vector(ref, t, shape):
    """Load a token's vector of the states and repeat it over the channels."""
    return broadcast_per_column(plgpu.load(ref.at[t], layout=WGMMA_COL), shape)


def load_decay(rate, a, state_mask, t):
    """Return the factors [64, N] of a token on the states: 2^(rate * a), and 0 where it drops them."""
    factor = jnp.exp2(load_channel_vector(rate, t, a.shape) * a)
    return factor * load_state_vector(state_mask[0], t, a.shape) if state_mask else factor


def load_matrix(ref):
    """Load a matrix from global memory."""
    return plgpu.load(ref, layout=WGMMA, optimized=False)
