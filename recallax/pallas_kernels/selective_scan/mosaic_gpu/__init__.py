"""The element-wise gated recurrence on Hopper: 64 channels in the registers of a block, token after token.

The states of a channel lie along a row of a register matrix, so that what belongs to a channel is a vector along the
rows, and B and C are vectors along the columns. Only inputs and outputs pass through global memory, and for the
backward pass a state every 16 tokens, from which that pass recomputes the states in between. The register layout needs
a multiple of eight states, so states are padded with zeros: with one state per channel, seven of eight are zero.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from recallax.pallas_kernels.dispatch import Unsupported, use_interpreter
from recallax.pallas_kernels.mosaic_gpu.cumulative_decay import LOG2E
from recallax.pallas_kernels.mosaic_gpu.kernel_launch import LaunchConfig, kernel_custom_vjp
from recallax.pallas_kernels.selective_scan.mosaic_gpu.backward import selective_scan_bwd
from recallax.pallas_kernels.selective_scan.mosaic_gpu.forward import (
    selective_scan_fwd,
    selective_scan_primal,
)
from recallax.pallas_kernels.selective_scan.mosaic_gpu.scan_blocks import (
    BLOCK_CHANNELS,
    CHUNK,
    STATE_MULTIPLE,
    SelectiveScanInputs,
)
from recallax.pallas_kernels.selective_scan.reference import SelectiveScanArgs

MAX_STATES = 32
"""States per channel at most: the backward pass keeps 16 tokens' states in shared memory."""
MAX_RESIDENT_BLOCKS = 528
"""Blocks that run at once on an H100: four on each of 132 multiprocessors."""
MIN_TOKENS_PER_SPLIT = 512
"""Tokens of a split at least: with fewer, starting and ending a block costs more than its tokens."""
NUM_PASSES = 2
"""Passes over each split, in place of one over the row: as many splits, or fewer, would gain nothing."""

_scan = kernel_custom_vjp(selective_scan_primal, selective_scan_fwd, selective_scan_bwd)


def selective_scan(args: SelectiveScanArgs) -> tuple[Float[Array, "B T D"], Float[Array, "B D N"]]:
    """Compute the selective scan on Hopper.

    The arguments and the result are those of `selective_scan.reference.selective_scan`.

    Raises:
        Unsupported: If the dtype or N is not supported, or if there is neither a GPU nor `interpret_kernels()`.
    """
    x, rate, a, b, c, state, document_ids = args
    interpret = use_interpreter("gpu")
    if x.dtype not in (jnp.float32, jnp.bfloat16):
        raise Unsupported(f"x is {x.dtype}; it must be float32 or bfloat16")
    (rows, length, channels), states = x.shape, a.shape[1]
    if states > MAX_STATES:
        raise Unsupported(f"N is {states}; it must be at most {MAX_STATES}")
    num_splits = _choose_num_scan_splits(rows * -(-channels // BLOCK_CHANNELS), length)
    padding, state_mask = -length % (CHUNK * num_splits), None
    if document_ids is not None:
        # Padding keeps the state and does not write; the first token of a document drops the state before it.
        valid = document_ids.valid[..., None]
        x, rate = (jnp.where(valid, part, jnp.zeros((), part.dtype)) for part in (x, rate))
        state_mask = jnp.diff(document_ids.index, axis=1, prepend=0) == 0
        state_mask = jnp.pad(state_mask.astype(jnp.float32), ((0, 0), (0, padding)), constant_values=1.0)
        # One entry per state: a copy of one entry per token would be too small for TMA.
        state_mask = jnp.repeat(state_mask[..., None], states + -states % STATE_MULTIPLE, axis=2)
    inputs = _padded_inputs(SelectiveScanInputs(x, rate, a, b, c, state), padding)
    out, final_state = _scan(LaunchConfig(1.0, num_splits, interpret), inputs, state_mask)
    return out[:, :length, :channels], final_state[:, :channels, :states]


def _choose_num_scan_splits(num_blocks: int, length: int) -> int:
    """Return the number of splits of each row, where rows and channels alone give `num_blocks` blocks."""
    num_splits = min(MAX_RESIDENT_BLOCKS // num_blocks, length // MIN_TOKENS_PER_SPLIT)
    return num_splits if num_splits > NUM_PASSES else 1


def _padded_inputs(inputs: SelectiveScanInputs, num_padding: int) -> SelectiveScanInputs:
    """Pad tokens, channels and states, and convert all inputs but x to float32."""
    x, rate, a, b, c, state = inputs
    time = (0, num_padding)
    channels, states = (0, -x.shape[2] % BLOCK_CHANNELS), (0, -a.shape[1] % STATE_MULTIPLE)

    def pad_f32(part, *widths):
        return jnp.pad(part.astype(jnp.float32), widths)

    return SelectiveScanInputs(
        jnp.pad(x, ((0, 0), time, channels)),
        pad_f32(rate, (0, 0), time, channels),
        pad_f32(a * LOG2E, channels, states),
        pad_f32(b, (0, 0), time, states),
        pad_f32(c, (0, 0), time, states),
        pad_f32(state, (0, 0), channels, states),
    )
