"""Landmark tokens, which the language model inserts after every block of a document and whose outputs it drops.

Tasks, losses and generation see a document without landmarks; the layers see a longer one. With block size n, token p
of a document has position p + p // n in the longer document, and its b-th landmark has position b (n + 1) + n.
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
    """The correspondence of the tokens of a row and the slots of the row with landmarks."""

    slot_of_token: Int[Array, "B T"]
    """The slot of each token."""
    token_of_slot: Int[Array, "B U"]
    """The token of each slot; T at landmarks and padding."""


class LandmarkTokens(nnx.Module):
    """The embedding of the landmark, and its insertion.

    Args:
        block_size: The number of tokens before each landmark.
        width: The model's width.
        precision: The dtypes of parameters and computation.
        rngs: Random number generators of the parameters.
    """

    def __init__(self, block_size: int, width: int, *, precision: Precision, rngs: nnx.Rngs):
        self.block_size = block_size
        self.embedding = parameter(0.02 * jax.random.normal(rngs.params(), (width,), precision.param), ("embed",))

    def expanded_length(self, tokens: int) -> int:
        """Return the length of a document with its landmarks.

        Args:
            tokens: The number of its tokens.

        Returns:
            The number of tokens and landmarks.
        """
        return tokens + tokens // self.block_size

    def insert(self, x: Float[Array, "B T D"], seq: SeqInfo) -> tuple[Float[Array, "B U D"], SeqInfo, LandmarkIndices]:
        """Insert landmarks after the last token of every complete block, also at the end of a row.

        Args:
            x: Embeddings of the tokens.
            seq: Their sequence information.

        Returns:
            Embeddings with landmarks, their sequence information, and the correspondence of tokens and slots. The
            length is U = T + ceil(T / block_size) for all documents.
        """
        rows, length = jnp.asarray(seq.positions).shape
        positions, segment_ids = jnp.asarray(seq.positions), jnp.asarray(seq.segment_ids)
        ends = (segment_ids > 0) & (positions % self.block_size == self.block_size - 1)
        earlier = jnp.cumsum(ends, axis=1) - ends.astype(jnp.int32)
        slot = jnp.arange(length)[None] + earlier
        total = length + -(-length // self.block_size)
        row = jnp.arange(rows)[:, None]
        source = jnp.full((rows, total), length).at[row, slot].set(jnp.arange(length)[None])
        previous = jax.lax.cummax(jnp.where(source < length, source, 0), axis=1)  # the slot's own or previous token

        def of_previous(values: Array) -> Array:
            return jnp.take_along_axis(values, previous, axis=1)

        landmark = (source == length) & of_previous(ends) & (jnp.arange(total)[None] == of_previous(slot) + 1)
        is_token = source < length
        inserted = jnp.where(
            landmark[..., None], self.embedding[...].astype(x.dtype), gather_with_inverse(x, source, slot)
        )
        expanded = SeqInfo(
            of_previous(positions + positions // self.block_size) + landmark.astype(positions.dtype),
            jnp.where(is_token | landmark, of_previous(segment_ids), 0),
            of_previous(jnp.asarray(seq.prefix)) & (is_token | landmark),
            seq.key,
        )
        return inserted, expanded, LandmarkIndices(slot, source)

    def token_step_info(self, info: StepInfo) -> StepInfo:
        """Convert the position of a token to that in the document with landmarks.

        Args:
            info: The token's step information.

        Returns:
            The step information for the layers.
        """
        position = jnp.asarray(info.position)
        return StepInfo(position + position // self.block_size, info.active)

    def landmark_step_info(self, info: StepInfo) -> StepInfo:
        """Return the step information of the landmark after a token.

        Args:
            info: The token's step information.

        Returns:
            The landmark's step information, active in rows where a landmark follows.
        """
        position = jnp.asarray(info.position)
        ends = position % self.block_size == self.block_size - 1
        return StepInfo(position + position // self.block_size + 1, jnp.asarray(info.active) & ends)

    def embedding_rows(self, batch_size: int) -> Float[Array, "B D"]:
        """Repeat the landmark's embedding.

        Args:
            batch_size: The number of rows.

        Returns:
            The float32 embedding of each row.
        """
        embedding = self.embedding[...].astype(jnp.float32)
        return jnp.broadcast_to(embedding, (batch_size, len(embedding)))


def drop_landmarks(r: Float[Array, "B U D"], indices: LandmarkIndices) -> Float[Array, "B T D"]:
    """Return the outputs at the tokens.

    Args:
        r: The outputs with landmarks.
        indices: The correspondence of tokens and slots.

    Returns:
        The outputs without landmarks.
    """
    return gather_with_inverse(r, indices.slot_of_token, indices.token_of_slot)
