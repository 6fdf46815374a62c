"""Element-wise gated recurrence in XLA: a scan over time in chunks, in float32.

The forward pass saves the states between chunks and the backward pass recomputes each chunk, so the [B, T, D, N] states
never exist at once. On a CPU an associative scan within the chunk is two to five times slower, because it reads and
writes every state at each of its levels.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from recallax.pallas_kernels.chunking import join_time, single_document, split_time
from recallax.pallas_kernels.selective_scan.reference import SelectiveScanArgs

CHUNK = 64
"""Tokens of a chunk."""


class _SelectiveScanChunk(NamedTuple):
    x: Float[Array, "B C D"]
    rate: Float[Array, "B C D"]
    b: Float[Array, "B C N"]
    c: Float[Array, "B C N"]
    document_starts: Bool[Array, "B C"]
    """True where a document starts, which resets the state."""
    valid: Bool[Array, "B C"]


def selective_scan(args: SelectiveScanArgs) -> tuple[Float[Array, "B T D"], Float[Array, "B D N"]]:
    """Compute the recurrence in chunks.

    The arguments and the result are those of `selective_scan.reference.selective_scan`.
    """
    x, rate, a, b, c, state, document_ids = args
    length = x.shape[1]
    document_ids = single_document(*x.shape[:2]) if document_ids is None else document_ids
    chunk_size = min(CHUNK, length)
    previous = jnp.pad(document_ids.index[:, :-1], ((0, 0), (1, 0)))
    arrays = (part.astype(jnp.float32) for part in (x, rate, b, c))
    row = _SelectiveScanChunk(*arrays, document_starts=document_ids.index != previous, valid=document_ids.valid)
    valid = split_time(jnp.pad(document_ids.valid, ((0, 0), (0, -length % chunk_size))), chunk_size)
    chunks = jax.tree.map(lambda part: split_time(part, chunk_size), row)._replace(valid=valid)
    chunks = chunks._replace(document_starts=chunks.document_starts & valid)
    a = a.astype(jnp.float32)

    @jax.checkpoint  # save the states between chunks for the backward pass, not those within a chunk
    def body(state: Array, chunk: _SelectiveScanChunk) -> tuple[Array, Array]:
        def step(state: Array, token: _SelectiveScanChunk) -> tuple[Array, Array]:
            previous = jnp.where(token.document_starts[:, None, None], 0, state)
            updated = jnp.exp(token.rate[..., None] * a[None]) * previous + token.x[..., None] * token.b[:, None]
            state = jnp.where(token.valid[:, None, None], updated, previous)
            return state, jnp.sum(state * token.c[:, None], axis=-1)

        state, out = jax.lax.scan(step, state, jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), chunk))
        return state, jnp.moveaxis(out, 0, 1).astype(x.dtype)

    state, out = jax.lax.scan(body, state, chunks)
    return join_time(out, length), state
