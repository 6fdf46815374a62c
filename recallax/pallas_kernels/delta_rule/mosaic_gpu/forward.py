"""Forward pass of the delta rule with a decay per token: inverses of all chunks, then a loop over time per head."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from recallax.pallas_kernels.chunking import DocumentIds
from recallax.pallas_kernels.delta_rule.mosaic_gpu.delta_chunk_loops import (
    ResidualRefs,
    chunk_states_shape,
    delta_forward_loop,
)
from recallax.pallas_kernels.delta_rule.mosaic_gpu.delta_sequence_splits import forward_split_states, merge_residuals
from recallax.pallas_kernels.mosaic_gpu.cumulative_decay import CumulativeDecay, cumulative_decay
from recallax.pallas_kernels.mosaic_gpu.kernel_launch import LaunchConfig, launch_kernel
from recallax.pallas_kernels.mosaic_gpu.sequence_splits import merge_rows, split_rows, split_rows_head_major
from recallax.pallas_kernels.mosaic_gpu.state_chunk_loop import StateLoopConfig
from recallax.pallas_kernels.mosaic_gpu.triangular_inverse import chunk_inverses
from recallax.pallas_kernels.mosaic_gpu.warpgroup_primitives import shared_group


class DeltaRuleInputs(NamedTuple):
    """Differentiable inputs. T is a multiple of the chunk."""

    q: Float[Array, "B T G K"]
    k: Float[Array, "B T G K"]
    v: Float[Array, "B T H V"]
    erase: Float[Array, "B T H"]
    write: Float[Array, "B T H"]
    log2_decay: Float[Array, "B T H"] | None
    state: Float[Array, "B H K V"]


class DeltaTokens(NamedTuple):
    """Per-token arrays of a launch, in which every split is a row; in a kernel, references to them."""

    q: Float[Array, "N S G K"]
    k: Float[Array, "N S G K"]
    values: Float[Array, "N S H V"]
    """v; in the backward loop the gradient of the output."""
    inverse: Float[Array, "N H S D"]
    gates: CumulativeDecay | tuple[()]
    erase: Float[Array, "N H S"]
    write: Float[Array, "N H S"] | tuple[()]
    """Empty in the backward loop."""

    def of_head(self, row: Array, head: Array) -> tuple[list, list]:
        """Return references to the matrices q, k, values and inverses, and to the vectors, of one value head."""
        group = shared_group(head, self.values.shape[2], self.q.shape[2])
        tokens = [self.q.at[row, :, group], self.k.at[row, :, group]]
        tokens += [self.values.at[row, :, head], self.inverse.at[row, head]]
        vectors = [*self.gates, self.erase, *(() if isinstance(self.write, tuple) else (self.write,))]
        return tokens, [x.at[row, head] for x in vectors]


class DeltaResiduals(NamedTuple):
    """Arrays that the backward pass needs."""

    inputs: DeltaRuleInputs
    document_ids: DocumentIds | None
    inverse: Float[Array, "B H T D"]
    v_new: Float[Array, "B T H V"]
    """U."""
    states: Float[Array, "B H M K V"]
    """S before each chunk."""
    transitions: Float[Array, "N H K K"] | None
    """Linear map of each split on the state before it; None without splits."""


def delta_rule_primal(config: LaunchConfig, inputs: DeltaRuleInputs, document_ids: DocumentIds | None):
    """Return the output and the final state."""
    gates, erase = gates_and_erase(inputs, document_ids)
    inverse = chunk_inverses(inputs.k, gates, erase)
    return _forward(config, inputs, gates, inverse, save_residuals=False)[:2]


def delta_rule_fwd(config: LaunchConfig, inputs: DeltaRuleInputs, document_ids: DocumentIds | None):
    """Return the output and the final state, and the residuals."""
    gates, erase = gates_and_erase(inputs, document_ids)
    inverse = chunk_inverses(inputs.k, gates, erase)
    out, final_state, saved, transitions = _forward(config, inputs, gates, inverse, save_residuals=True)
    return (out, final_state), DeltaResiduals._make((inputs, document_ids, inverse, *saved, transitions))


def gates_and_erase(
    inputs: DeltaRuleInputs, document_ids: DocumentIds | None
) -> tuple[CumulativeDecay | None, Float[Array, "B H T"]]:
    """Return the cumulative decays, and the erase strengths with time last."""
    return cumulative_decay(inputs.log2_decay, document_ids, inputs.v.shape[2]), jnp.moveaxis(inputs.erase, 2, 1)


def split_gates_and(
    gates: CumulativeDecay | None, *vectors: Float[Array, "B T H"], num_splits: int
) -> tuple[CumulativeDecay | tuple[()], list[Float[Array, "N H S"]]]:
    """Split the rows of the cumulative decays, and of vectors whose time axis comes last in the result."""
    parts = [split_rows_head_major(x, num_splits) for x in (*(gates or ()), *(jnp.moveaxis(x, 2, 1) for x in vectors))]
    if gates is None:
        return (), parts
    return CumulativeDecay(*parts[:2]), parts[2:]


def _forward(config, inputs, gates, inverse, *, save_residuals):
    """Return the output, the final state, U and the states before the chunks if wanted, and the splits' transitions."""
    n, (q, k, v, erase, write, _, state) = config.num_splits, inputs
    q, k, v, inverse = split_rows(q, n), split_rows(k, n), split_rows(v, n), split_rows_head_major(inverse, n)
    gates, (erase, write) = split_gates_and(gates, erase, write, num_splits=n)
    tokens = DeltaTokens(q, k, v, inverse, gates, erase, write)

    def final_states(values, write, state):
        return _launch_forward(tokens._replace(values=values, write=write), state, config.scale, False)[1]

    keys = jnp.repeat(k, v.shape[2] // k.shape[2], axis=2)
    initial_states, transitions = forward_split_states(final_states, v, write, keys, state)
    out, final_state, saved = _launch_forward(tokens, initial_states, config.scale, save_residuals)
    return merge_rows(out, n), final_state[n - 1 :: n], merge_residuals(saved, n), transitions


def _launch_forward(tokens: DeltaTokens, state, scale, save_residuals):
    """Run `delta_forward_loop` on all rows and heads."""
    (rows, length, heads, v_dim), k_dim = tokens.values.shape, tokens.q.shape[3]
    config = StateLoopConfig(length, k_dim, v_dim, scale)

    def forward(tokens, initial_state, out, final_state, saved):
        row, head = lax.axis_index("row"), lax.axis_index("head")
        matrices, vectors = tokens.of_head(row, head)
        residuals = ResidualRefs(saved[0].at[row, :, head], saved[1].at[row, head]) if save_residuals else None
        initial_state, final_state = initial_state.at[row, head], final_state.at[row, head]
        delta_forward_loop(config, matrices, vectors, initial_state, out.at[row, :, head], final_state, residuals)

    out = jax.ShapeDtypeStruct(tokens.values.shape, tokens.values.dtype)
    saved = (out, chunk_states_shape(rows, heads, length, k_dim, v_dim)) if save_residuals else ()
    return launch_kernel(
        forward,
        out_type=(out, jax.ShapeDtypeStruct(state.shape, jnp.float32), saved),
        grid={"row": rows, "head": heads},
        num_consumer_wgs=config.num_consumer_wgs,
    )(tokens, state)
