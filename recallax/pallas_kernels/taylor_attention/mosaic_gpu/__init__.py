"""BASED on Hopper: numerators and denominators in one pass, features built on the tensor cores.

With a column of ones beside the keys and queries, s' = 1 + q.k is one product, and the kernel of a pair is
f = 1 + s + s^2/2 = (1 + s'^2)/2. Features (`mosaic_gpu_features.py`) never leave the registers, for queries as the left
operand of phi(q) S, for keys, transposed, of S + phi(k)^T v. The state is 3 x 64 features of which the first 153 are
used; it and the denominators' z are carried in float32. `mosaic_gpu_gradients.py` has the gradients.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from recallax.pallas_kernels import feature_maps
from recallax.pallas_kernels.chunking import DocumentIds
from recallax.pallas_kernels.dispatch import Unsupported, use_interpreter
from recallax.pallas_kernels.mosaic_gpu.cumulative_decay import CumulativeDecay, cumulative_decay
from recallax.pallas_kernels.mosaic_gpu.sequence_splits import (
    LaunchConfig,
    choose_num_splits,
    merge_rows,
    merge_rows_head_major,
    split_gates,
    split_rows,
)
from recallax.pallas_kernels.mosaic_gpu.warpgroup_primitives import (
    CHUNK,
    WGMMA,
    WGMMA_COL,
    WGMMA_ROW,
    broadcast_per_column,
    broadcast_per_row,
    chunk_pipeline,
    launch_kernel,
    opaque_zero,
    scale_rows,
    smem_matrix,
    store_through_smem,
    wgmma_accumulate,
    zero_accumulator,
)
from recallax.pallas_kernels.taylor_attention.mosaic_gpu.backward import (
    TaylorKernelInputs,
    taylor_attention_grads,
    taylor_split_states,
)
from recallax.pallas_kernels.taylor_attention.mosaic_gpu.taylor_features import (
    FEATURE_TILE,
    HEAD_K_DIM,
    HEAD_V_DIM,
    KEY_SELECTION,
    NUM_FEATURE_TILES,
    PADDED_HEAD_K_DIM,
    QUERY_SELECTION,
    feature_tile,
    selection_matrices,
    tile_slice,
)
from recallax.pallas_kernels.taylor_attention.mosaic_gpu.taylor_features import feature_scales as feature_scales


def taylor_attention(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H V"],
    state: Float[Array, "B H F V"] | None,
    document_ids: DocumentIds | None,
    feature_map: Callable[[Array], Array],
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H F V"]]:
    """The op's form for Hopper: bfloat16, 16 channels of keys, 64 of values beside the ones, symmetric features."""
    interpret = use_interpreter("gpu")
    if feature_map is not feature_maps.taylor:
        raise Unsupported("features is not the symmetric expansion, which it must be")
    for name, size, wanted in (("K", q.shape[3], HEAD_K_DIM), ("V", v.shape[3] - 1, HEAD_V_DIM)):
        if size != wanted:
            raise Unsupported(f"{name} is {size}; it must be {wanted}")
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dtype != jnp.bfloat16:
            raise Unsupported(f"{name} is {x.dtype}; it must be bfloat16")
    if state is None:
        width = 1 + HEAD_K_DIM + HEAD_K_DIM * (HEAD_K_DIM + 1) // 2
        state = jnp.zeros((v.shape[0], v.shape[2], width, v.shape[3]), jnp.float32)
    length = q.shape[1]
    segments = choose_num_splits(v.shape[0] * v.shape[2], -(-length // CHUNK))
    extra = -length % (CHUNK * segments)

    def padded(x):
        return jnp.pad(x, ((0, 0), (0, extra)) + ((0, 0),) * (x.ndim - 2))

    if document_ids is not None:
        document_ids = DocumentIds(
            jnp.pad(document_ids.index, ((0, 0), (0, extra)), mode="edge"), padded(document_ids.valid)
        )
    ones = jnp.ones_like(q[..., :1])
    room = jnp.zeros((*q.shape[:3], PADDED_HEAD_K_DIM - HEAD_K_DIM - 1), q.dtype)
    # What is padded has no ones either, so that all its features are 0.
    q, k = (padded(jnp.concatenate([x, ones, room], axis=3)) for x in (q, k))
    gates = cumulative_decay(None, document_ids, 1, CHUNK)
    scales = feature_scales()[None, None, :, None]
    filled = jnp.pad(state * scales, ((0, 0), (0, 0), (0, NUM_FEATURE_TILES * FEATURE_TILE - state.shape[2]), (0, 0)))
    inputs = TaylorKernelInputs(q, k, padded(v[..., :-1]), filled[..., :-1], filled[..., -1])
    out, total, final, final_total = _taylor_attention(LaunchConfig(1.0, segments, interpret), inputs, gates)
    final = jnp.concatenate([final, final_total[..., None]], axis=3)[:, :, : state.shape[2]] / scales
    total = jnp.moveaxis(total, 1, 2)[..., None].astype(v.dtype)
    return jnp.concatenate([out, total], axis=3)[:, :length], final


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _taylor_attention(config: LaunchConfig, inputs: TaylorKernelInputs, gates: CumulativeDecay | None):
    """Numerators in v's dtype, denominators [B, H, T], the final state and its sums in float32."""
    n, (q, k, v, state, totals) = config.num_splits, inputs
    ones = jnp.ones((v.shape[0], v.shape[2], v.shape[1]), jnp.float32)
    first = taylor_split_states(k, v, ones, gates, state, totals, n, reverse=False, interpret=config.interpret)
    q, k, v = (split_rows(x, n) for x in (q, k, v))
    out, total, final, final_total = _forward(q, k, v, split_gates(gates, n), *first, config.interpret)
    return merge_rows(out, n), merge_rows_head_major(total, n), final[n - 1 :: n], final_total[n - 1 :: n]


def _taylor_attention_fwd(config, inputs, gates):
    return _taylor_attention(config, inputs, gates), (inputs, gates)


def _taylor_attention_bwd(config, residuals, cotangents):
    (inputs, gates), (grad, *rest) = residuals, cotangents
    return taylor_attention_grads(
        inputs, gates, grad, *rest, num_splits=config.num_splits, interpret=config.interpret
    ), None


_taylor_attention.defvjp(_taylor_attention_fwd, _taylor_attention_bwd)


def _forward(q, k, v, gates, state, z, interpret):
    b, t, h, _ = q.shape

    def forward(q, k, v, gates, picks, start, start_total, out, total, final, final_total):
        row, head = lax.axis_index("row"), lax.axis_index("head")

        def scoped(held, sums, picked, kept, staged, arrived):
            def context(pipeline):
                plgpu.copy_gmem_to_smem(picks, picked, arrived)
                plgpu.copy_gmem_to_smem(start_total.at[row, head], sums.at[0], arrived)
                plgpu.barrier_wait(arrived)
                states = pipeline(
                    [
                        plgpu.load(start.at[row, head, tile_slice(i)], layout=WGMMA, optimized=False)
                        for i in range(NUM_FEATURE_TILES)
                    ]
                )
                for i in range(NUM_FEATURE_TILES):
                    final[row, head, tile_slice(i)] = states[i]
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(sums.at[0], final_total.at[row, head])
                plgpu.wait_smem_to_gmem(0)

            def chunk(index, q, k, v, *rest):
                *gates, states = rest
                zero = opaque_zero(index[0])
                room = held.at[zero], sums.at[zero], picked.at[zero], kept.at[zero] if gates else None
                time = pl.ds(index[0] * CHUNK, CHUNK)
                part, total[row, head, time] = _chunk_outputs(q, k, v, gates, states, room, interpret)
                store_through_smem((staged.at[zero], part, out.at[row, time, head]))
                return _update_states(k, v, gates, states, room, interpret)

            along = [gate.at[row, 0] for gate in gates]
            tokens = [x.at[row, :, head] for x in (q, k, v)]
            chunk_pipeline(chunk, tokens, along, context, 1, None, 1, chunk_order=lambda step: step)

        pl.run_scoped(
            scoped,
            smem_matrix(1, NUM_FEATURE_TILES * FEATURE_TILE, HEAD_V_DIM, tile=64),
            plgpu.SMEM((1, NUM_FEATURE_TILES * FEATURE_TILE), jnp.float32),
            smem_matrix(1, 3, NUM_FEATURE_TILES * FEATURE_TILE, PADDED_HEAD_K_DIM, tile=32),
            smem_matrix(1, 2, CHUNK, PADDED_HEAD_K_DIM, tile=PADDED_HEAD_K_DIM),
            smem_matrix(1, CHUNK, HEAD_V_DIM, tile=64),
            plgpu.Barrier(num_arrivals=2),
            collective_axes="worker",
        )

    return launch_kernel(
        forward,
        out_type=(
            jax.ShapeDtypeStruct(v.shape, v.dtype),
            jax.ShapeDtypeStruct((b, h, t), jnp.float32),
            jax.ShapeDtypeStruct(state.shape, jnp.float32),
            jax.ShapeDtypeStruct(z.shape, jnp.float32),
        ),
        grid={"row": b, "head": h},
        num_consumer_wgs=1,
        interpret=interpret,
    )(q, k, v, gates or (), selection_matrices()[None], state, z)


def _chunk_outputs(q, k, v, gates, states, scratch, interpret):
    """One chunk's numerators and denominators.

    room: for the state as an operand, the features' sums, the matrices that pick columns, and, with documents, for the
    queries and keys that do not see the state before the chunk or are not in the one behind it as zeros.
    """
    square, dtype, (held, sums, picked, kept) = (CHUNK, CHUNK), v.dtype, scratch
    own = q
    if gates:
        rows, last = plgpu.load(gates[0], layout=WGMMA_ROW), plgpu.load(gates[0].at[CHUNK - 1])
        left = jnp.exp2(last - plgpu.load(gates[1], layout=WGMMA_ROW))
        for i, (x, factor) in enumerate(((q, jnp.exp2(rows)), (k, left))):
            kept.at[i][...] = scale_rows(x, factor, interpret=interpret).astype(dtype)
        own = kept.at[0]
    for i in range(NUM_FEATURE_TILES):
        held.at[tile_slice(i)][...] = states[i].astype(dtype)
    plgpu.commit_smem()
    out, totals = zero_accumulator(CHUNK, HEAD_V_DIM), []
    for i in range(NUM_FEATURE_TILES):
        phi = feature_tile(own, picked, i, QUERY_SELECTION, interpret)
        seen_sums = phi * broadcast_per_column(plgpu.load(sums.at[tile_slice(i)], layout=WGMMA_COL), square)
        totals.append(jnp.sum(seen_sums, axis=1))
        (out,) = wgmma_accumulate((out, (phi.astype(dtype), held.at[tile_slice(i)])), interpret=interpret)
    total = totals[0] + totals[1] + totals[2]
    (scores,) = wgmma_accumulate((zero_accumulator(*square), (q, k.transpose((1, 0)))), interpret=interpret)
    scores = 0.5 + 0.5 * scores * scores
    query, key = (plgpu.broadcasted_iota(jnp.int32, square, axis, layout=WGMMA) for axis in (0, 1))
    seen = query >= key
    if gates:
        rows = plgpu.load(gates[0], layout=WGMMA_ROW)
        gap = broadcast_per_row(rows, square) - broadcast_per_column(plgpu.load(gates[1], layout=WGMMA_COL), square)
        scores *= jnp.exp2(jnp.where(seen, gap, -jnp.inf))
    else:
        scores = jnp.where(seen, scores, 0.0)
    total += jnp.sum(scores, axis=1)
    (out,) = wgmma_accumulate((out, (scores.astype(dtype), v)), interpret=interpret)
    return out.astype(dtype), total


def _update_states(k, v, gates, states, scratch, interpret):
    """The state behind a chunk; the features' sums are replaced."""
    (_, sums, picked, kept), after = scratch, []
    k = kept.at[1] if gates else k
    for i, state in enumerate(states):
        phi = feature_tile(k, picked, i, KEY_SELECTION, interpret, transposed=True)
        total = plgpu.load(sums.at[tile_slice(i)], layout=WGMMA_ROW)
        if gates:
            remaining = jnp.exp2(plgpu.load(gates[0].at[CHUNK - 1]))
            state, total = state * remaining, total * remaining
        sums.at[tile_slice(i)][...] = total + jnp.sum(phi, axis=1)
        (state,) = wgmma_accumulate((state, (phi.astype(v.dtype), v)), interpret=interpret)
        after.append(state)
    return after
