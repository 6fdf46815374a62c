"""The element-wise gated recurrence in chunks: an associative scan within a chunk, a carried state between chunks.

The [B, T, D, N] states exist for one chunk at a time, in the backward pass too. Float32 throughout.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from recallax.pallas_kernels.chunking import Documents, join_time, split_time

CHUNK = 32


class _Chunk(NamedTuple):
    x: Float[Array, "B C D"]
    rate: Float[Array, "B C D"]
    b: Float[Array, "B C N"]
    c: Float[Array, "B C N"]
    starts: Bool[Array, "B C"]
    """A document begins here: what came before is forgotten."""
    valid: Bool[Array, "B C"]


def selective_scan(
    x: Float[Array, "B T D"],
    rate: Float[Array, "B T D"],
    a: Float[Array, "D N"],
    b: Float[Array, "B T N"],
    c: Float[Array, "B T N"],
    state: Float[Array, "B D N"],
    docs: Documents,
) -> tuple[Float[Array, "B T D"], Float[Array, "B D N"]]:
    """The op's XLA form."""
    length = x.shape[1]
    chunk = min(CHUNK, length)
    before = jnp.pad(docs.index[:, :-1], ((0, 0), (1, 0)))
    wide = (part.astype(jnp.float32) for part in (x, rate, b, c))
    whole = _Chunk(*wide, starts=docs.index != before, valid=docs.valid)
    filled = split_time(jnp.pad(docs.valid, ((0, 0), (0, -length % chunk))), chunk)
    chunks = jax.tree.map(lambda part: split_time(part, chunk), whole)._replace(valid=filled)
    chunks = chunks._replace(starts=chunks.starts & filled)
    a = a.astype(jnp.float32)

    @jax.checkpoint  # keep the states between chunks for the backward, not those within
    def body(state: Array, part: _Chunk) -> tuple[Array, Array]:
        valid = part.valid[..., None, None]
        log = jnp.where(valid, part.rate[..., None] * a[None, None], 0)
        factor = jnp.where(part.starts[..., None, None], 0, jnp.exp(log))
        wrote = jnp.where(valid, part.x[..., None] * part.b[:, :, None], 0)
        factors, sums = jax.lax.associative_scan(_then, (factor, wrote), axis=1)
        states = factors * state[:, None] + sums
        return states[:, -1], jnp.sum(states * part.c[:, :, None], axis=-1).astype(x.dtype)

    state, out = jax.lax.scan(body, state, chunks)
    return join_time(out, length), state


def _then(first: tuple[Array, Array], second: tuple[Array, Array]) -> tuple[Array, Array]:
    """The affine map h -> f h + s of two steps."""
    return first[0] * second[0], first[1] * second[0] + second[1]
