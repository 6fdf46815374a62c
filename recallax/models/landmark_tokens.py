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
from recallax.pallas_kernels.gather_with_inverse import gather_with_inverse
from recallax.types import Precision, SeqInfo, StepInfo


class LandmarkIndices(NamedTuple):
    """How tokens and the slots of the longer row belong together."""

    slot_of_token: Int[Array, "B T"]
    """The slot of each token."""
    token_of_slot: Int[Array, "B U"]
    """The token of each slot; T at landmarks and padding."""


class LandmarkTokens(nnx.Module):
    """The landmark's embedding, and where it goes; `block_size` is the number of tokens before each."""

    def __init__(self, block_size: int, width: int, *, precision: Precision, rngs: nnx.Rngs):
        self.block_size = block_size
        self.embedding = parameter(0.02 * jax.random.normal(rngs.params(), (width,), precision.param), ("embed",))

    def expanded_length(self, tokens: int) -> int:
        """Of a document with its landmarks."""
        return tokens + tokens // self.block_size

    def insert(self, x: Float[Array, "B T D"], seq: SeqInfo) -> tuple[Float[Array, "B U D"], SeqInfo, LandmarkIndices]:
        """Embeddings and information with landmarks in place. A landmark follows the last token of its block at once,
        also at the end of a row; U = T + ceil(T / every), whatever the documents."""
        rows, length = jnp.asarray(seq.positions).shape
        positions, segments = jnp.asarray(seq.positions), jnp.asarray(seq.segment_ids)
        ends = (segments > 0) & (positions % self.block_size == self.block_size - 1)
        earlier = jnp.cumsum(ends, axis=1) - ends.astype(jnp.int32)
        place = jnp.arange(length)[None] + earlier
        total = length + -(-length // self.block_size)
        row = jnp.arange(rows)[:, None]
        source = jnp.full((rows, total), length).at[row, place].set(jnp.arange(length)[None])
        before = jax.lax.cummax(jnp.where(source < length, source, 0), axis=1)  # the token here or the last one

        def following(values: Array) -> Array:
            return jnp.take_along_axis(values, before, axis=1)

        landmark = (source == length) & following(ends) & (jnp.arange(total)[None] == following(place) + 1)
        real = source < length
        inserted = jnp.where(
            landmark[..., None], self.embedding[...].astype(x.dtype), gather_with_inverse(x, source, place)
        )
        expanded = SeqInfo(
            following(positions + positions // self.block_size) + landmark.astype(positions.dtype),
            jnp.where(real | landmark, following(segments), 0),
            following(jnp.asarray(seq.prefix)) & (real | landmark),
            seq.key,
        )
        return inserted, expanded, LandmarkIndices(place, source)

    def token_step_info(self, info: StepInfo) -> StepInfo:
        """Where a token of a step stands among the landmarks."""
        position = jnp.asarray(info.position)
        return StepInfo(position + position // self.block_size, info.active)

    def landmark_step_info(self, info: StepInfo) -> StepInfo:
        """The landmark that follows this token, active where one does."""
        position = jnp.asarray(info.position)
        ends = position % self.block_size == self.block_size - 1
        return StepInfo(position + position // self.block_size + 1, jnp.asarray(info.active) & ends)

    def embedding_rows(self, batch_size: int) -> Float[Array, "B D"]:
        """The embedding, once per row."""
        embedding = self.embedding[...].astype(jnp.float32)
        return jnp.broadcast_to(embedding, (batch_size, len(embedding)))


def drop_landmarks(r: Float[Array, "B U D"], indices: LandmarkIndices) -> Float[Array, "B T D"]:
    """What came out at the tokens."""
    return gather_with_inverse(r, indices.slot_of_token, indices.token_of_slot)
