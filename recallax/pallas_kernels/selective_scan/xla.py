"""The element-wise gated recurrence, a walk over time in chunks, float32 throughout.

The backward pass keeps the states between chunks and walks each chunk again, so the [B, T, D, N] states never exist at
once. An associative scan within the chunk would be the choice for wide machines; on a CPU it is two to five times
slower, since it reads and writes every state at each of its levels.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from recallax.pallas_kernels.chunking import DocumentIds, join_time, single_document, split_time

CHUNK = 64


class _SelectiveScanChunk(NamedTuple):
    x: Float[Array, "B C D"]
    rate: Float[Array, "B C D"]
    b: Float[Array, "B C N"]
    c: Float[Array, "B C N"]
    document_starts: Bool[Array, "B C"]
    """A document begins here: what came before is forgotten."""
    valid: Bool[Array, "B C"]


def selective_scan(
    x: Float[Array, "B T D"],
    rate: Float[Array, "B T D"],
    a: Float[Array, "D N"],
    b: Float[Array, "B T N"],
    c: Float[Array, "B T N"],
    state: Float[Array, "B D N"],
    document_ids: DocumentIds | None,
) -> tuple[Float[Array, "B T D"], Float[Array, "B D N"]]:
    """The op's XLA form."""
    length = x.shape[1]
    document_ids = single_document(*x.shape[:2]) if document_ids is None else document_ids
    chunk = min(CHUNK, length)
    before = jnp.pad(document_ids.index[:, :-1], ((0, 0), (1, 0)))
    wide = (part.astype(jnp.float32) for part in (x, rate, b, c))
    whole = _SelectiveScanChunk(*wide, document_starts=document_ids.index != before, valid=document_ids.valid)
    filled = split_time(jnp.pad(document_ids.valid, ((0, 0), (0, -length % chunk))), chunk)
    chunks = jax.tree.map(lambda part: split_time(part, chunk), whole)._replace(valid=filled)
    chunks = chunks._replace(document_starts=chunks.document_starts & filled)
    a = a.astype(jnp.float32)

    @jax.checkpoint  # keep the states between chunks for the backward, not those within
    def body(state: Array, part: _SelectiveScanChunk) -> tuple[Array, Array]:
        def step(state: Array, token: _SelectiveScanChunk) -> tuple[Array, Array]:
            kept = jnp.where(token.document_starts[:, None, None], 0, state)
            new = jnp.exp(token.rate[..., None] * a[None]) * kept + token.x[..., None] * token.b[:, None]
            state = jnp.where(token.valid[:, None, None], new, kept)
            return state, jnp.sum(state * token.c[:, None], axis=-1)

        state, out = jax.lax.scan(step, state, jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), part))
        return state, jnp.moveaxis(out, 0, 1).astype(x.dtype)

    state, out = jax.lax.scan(body, state, chunks)
    return join_time(out, length), state
