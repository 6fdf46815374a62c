"""Landmark tokens, which the language model inserts after every block of a document and whose outputs it drops.

So tasks, losses and generation count in tokens of their own, and layers see a longer document: token p of a document
stands at position p + p // every, and its b-th landmark at b (every + 1) + every.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from recallax.layers.dense import parameter
from recallax.pallas_kernels.moved import moved
from recallax.types import Precision, SeqInfo, StepInfo


class Places(NamedTuple):
    """How tokens and the slots of the longer row belong together."""

    of_token: Int[Array, "B T"]
    """The slot of each token."""
    of_slot: Int[Array, "B U"]
    """The token of each slot; T at landmarks and padding."""


class Landmarks(nnx.Module):
    """The landmark's embedding, and where it goes; `every` is the number of tokens before each."""

    def __init__(self, every: int, width: int, *, precision: Precision, rngs: nnx.Rngs):
        self.every = every
        self.embedding = parameter(0.02 * jax.random.normal(rngs.params(), (width,), precision.param), ("embed",))

    def length(self, tokens: int) -> int:
        """Of a document with its landmarks."""
        return tokens + tokens // self.every

    def insert(self, x: Float[Array, "B T D"], seq: SeqInfo) -> tuple[Float[Array, "B U D"], SeqInfo, Places]:
        """Embeddings and information with landmarks in place. A landmark follows the last token of its block at once,
        also at the end of a row; U = T + ceil(T / every), whatever the documents."""
        rows, length = jnp.asarray(seq.positions).shape
        positions, segments = jnp.asarray(seq.positions), jnp.asarray(seq.segments)
        ends = (segments > 0) & (positions % self.every == self.every - 1)
        earlier = jnp.cumsum(ends, axis=1) - ends.astype(jnp.int32)
        place = jnp.arange(length)[None] + earlier
        total = length + -(-length // self.every)
        row = jnp.arange(rows)[:, None]
        source = jnp.full((rows, total), length).at[row, place].set(jnp.arange(length)[None])
        before = jax.lax.cummax(jnp.where(source < length, source, 0), axis=1)  # the token here or the last one

        def following(values: Array) -> Array:
            return jnp.take_along_axis(values, before, axis=1)

        landmark = (source == length) & following(ends) & (jnp.arange(total)[None] == following(place) + 1)
        real = source < length
        inserted = jnp.where(landmark[..., None], self.embedding[...].astype(x.dtype), moved(x, source, place))
        expanded = SeqInfo(
            following(positions + positions // self.every) + landmark.astype(positions.dtype),
            jnp.where(real | landmark, following(segments), 0),
            following(jnp.asarray(seq.prefix)) & (real | landmark),
            seq.key,
        )
        return inserted, expanded, Places(place, source)

    def at(self, info: StepInfo) -> StepInfo:
        """Where a token of a step stands among the landmarks."""
        position = jnp.asarray(info.position)
        return StepInfo(position + position // self.every, info.active)

    def after(self, info: StepInfo) -> StepInfo:
        """The landmark that follows this token, active where one does."""
        position = jnp.asarray(info.position)
        ends = position % self.every == self.every - 1
        return StepInfo(position + position // self.every + 1, jnp.asarray(info.active) & ends)

    def rows(self, count: int) -> Float[Array, "B D"]:
        """The embedding, once per row."""
        embedding = self.embedding[...].astype(jnp.float32)
        return jnp.broadcast_to(embedding, (count, len(embedding)))


def dropped(r: Float[Array, "B U D"], places: Places) -> Float[Array, "B T D"]:
    """What came out at the tokens."""
    return moved(r, places.of_token, places.of_slot)
