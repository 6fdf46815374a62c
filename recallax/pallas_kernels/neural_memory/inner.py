"""The inner optimiser of a chunk as a matrix: what each token's gradient, and the carried state, weigh in each token's
weights.

    S_t = momentum_t S_{t-1} - lr_t g_t        W_t = keep_t W_{t-1} + S_t

is linear in the gradients g, so within a chunk W_t = beta_t W' + f_t S' - sum_s G_ts g_s, with W' and S' at its start.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from recallax.pallas_kernels.chunking import Documents
from recallax.pallas_kernels.decay import decayed_scores
from recallax.pallas_kernels.neural_memory.learner import Learner, Weights
from recallax.pallas_kernels.product import product


class Tokens(NamedTuple):
    """What a memory is fed with, per head; L matrices learn."""

    q: Float[Array, "*batch H D"]
    k: Float[Array, "*batch H D"]
    v: Float[Array, "*batch H D"]
    lr: Float[Array, "*batch H L"]
    log_momentum: Float[Array, "*batch H L"]
    log_keep: Float[Array, "*batch H L"]


class Memory(NamedTuple):
    """What a memory has learned, of the matrices that learn; float32 [B, H, I, O]."""

    change: Weights
    """Of the weights, from the initial ones."""
    momentum: Weights
    """Empty for a learner without."""


class Fixed(NamedTuple):
    """What a memory starts from, learned outside; per head."""

    weights: Weights
    """[H, I, O]"""
    gain: Float[Array, "H D"]
    offset: Float[Array, "H D"]
    start: Memory | None = None
    """[H, I, O], float32: what the memory has learned when a document begins; None is nothing, the initial weights."""


def beginning(fixed: Fixed, memory: Memory) -> Memory:
    """The memory of every row before its document's first token; also for one head of one row."""
    if fixed.start is None:
        return jax.tree.map(jnp.zeros_like, memory)
    return jax.tree.map(lambda a, b: jnp.broadcast_to(a.astype(b.dtype), b.shape), fixed.start, memory)


class Weighing(NamedTuple):
    """Weights in W_t, of every token t of a chunk; float32."""

    carried: Float[Array, "B H L C"]
    """beta: of the weights that the document's tokens found when the chunk began, or the document."""
    momentum: Float[Array, "B H L C"]
    """f: of the carried momentum."""
    gradients: Float[Array, "B H L C C"]
    """G: of minus the gradient of each token up to t."""
    last_momentum: Float[Array, "B H L"]
    """Of the carried momentum in that of the chunk's end."""
    last_gradients: Float[Array, "B H L C"]
    """Of minus each gradient in the momentum of the chunk's end."""


def weigh(learner: Learner, tokens: Tokens, visible: Bool[Array, "B C C"]) -> Weighing:
    """visible: token t may see token s: s <= t, of one document, and s is not padding; padding does nothing."""
    b, c, h, layers = tokens.lr.shape
    here = jnp.diagonal(visible, axis1=1, axis2=2)[..., None, None]

    def flat(x: Array) -> Array:
        return jnp.where(here, x.astype(jnp.float32), 0).reshape(b, c, h * layers)

    def apart(x: Array) -> Array:
        return x.reshape(b, h, layers, *x.shape[2:])

    lr, log_momentum, log_keep = (flat(x) for x in (tokens.lr, tokens.log_momentum, tokens.log_keep))
    seen = visible.astype(jnp.float32)
    beta, since = (jnp.exp(product("bts,bsl->blt", seen, x)) for x in (log_keep, log_momentum))
    ones = jnp.ones((b, c, h * layers, 1), jnp.float32)
    kept = decayed_scores(ones, ones, log_keep[..., None], visible)
    lr = jnp.moveaxis(lr, 1, 2)
    if learner.momentum:
        spread = decayed_scores(ones, ones, log_momentum[..., None], visible)
        gradients = product("bltr,blrs->blts", kept, spread) * lr[:, :, None]
    else:
        spread, gradients = jnp.zeros_like(kept), kept * lr[:, :, None]
    if learner.step == "mean":
        gradients /= jnp.maximum(jnp.sum(seen, axis=-1), 1)[:, None, :, None]
    return Weighing(
        carried=apart(beta),
        momentum=apart(product("bltr,blr->blt", kept, since)),
        gradients=apart(gradients),
        last_momentum=apart(since[..., -1]),
        last_gradients=apart(spread[..., -1, :] * lr),
    )


def filled(tokens: Tokens, docs: Documents, chunk: int) -> tuple[Tokens, Documents]:
    """Padding at the end, up to a multiple of a chunk; it belongs to the last document."""
    more = -docs.index.shape[1] % chunk
    padded = jax.tree.map(lambda x: jnp.pad(x, [(0, 0), (0, more)] + [(0, 0)] * (x.ndim - 2)), tokens)
    index = jnp.pad(docs.index, ((0, 0), (0, more)), mode="edge")
    return padded, Documents(index, jnp.pad(docs.valid, ((0, 0), (0, more))))
