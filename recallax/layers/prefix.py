"""A memory that has read a document's prefix before it reads the document: prefix linear attention, over any member.

    S_t = cell(S_{t-1}; k_t, v_t, gates of the writer),   S_0 = cell over the prefix, in its order, by a second writer

For a sum (BASED, linear attention) that is the paper's form: encoder keys and values of the whole prefix are added to
numerator and denominator beside the causal ones,

    y_i = phi(q_i) [ sum_{j<=i} phi(k_j) v_j^T + sum_{j in prefix} phi(k^e_j) v^e_j^T ]
          / phi(q_i) [ sum_{j<=i} phi(k_j)     + sum_{j in prefix} phi(k^e_j) ]

at every i, in the prefix too. A member that forgets has read the prefix as a document of its own, of which the second
reading is the continuation. Queries, convolution, gate parameters and readout serve both readings; a convolution does
not look from one into the other. Nothing but this layer reads ahead, and it reads no further than the prefix.

Both readings are one call of the op over rows that hold the prefix before its document, so packed documents may each
have one. What reads no prefix (`step`, rows without one) is the member itself. Padding is never written: a key of 0
would still have the feature 1, which is how the published code gives pads most of the weight.

State: the member's.
Source: Arora et al. 2024 (Just Read Twice, arXiv 2407.05483), section 4.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from recallax.config import ConfigError
from recallax.layers.base import MixerConfig, Site, State
from recallax.layers.memory import MemoryConfig, MemoryMixer
from recallax.pallas_kernels.chunking import documents
from recallax.pallas_kernels.moved import moved
from recallax.types import Precision, SeqInfo


@dataclass(frozen=True, kw_only=True)
class Prefix(MixerConfig):
    """Reads `SeqInfo.prefix` twice; it must lie within one prefill, at the beginning of its document."""

    memory: MemoryConfig
    max_prefix: int | None = None
    """Most prefix tokens of a row, by which the op's rows are longer. A row with more is all NaN. None is any."""

    def __post_init__(self) -> None:
        if self.max_prefix is not None and self.max_prefix < 1:
            raise ConfigError(f"Prefix.max_prefix is {self.max_prefix}; it must be at least 1, or None for whole rows")

    def build(self, d_model: int, site: Site, *, precision: Precision, rngs: nnx.Rngs) -> "PrefixMixer":
        return PrefixMixer(self, d_model, site, precision=precision, rngs=rngs)


class PrefixMixer(MemoryMixer):
    """See the head of the file."""

    def __init__(self, config: Prefix, d_model: int, site: Site, *, precision: Precision, rngs: nnx.Rngs):
        super().__init__(config.memory, d_model, site, precision=precision, rngs=rngs)
        self.encoder = config.memory.writer(d_model, precision=precision, rngs=rngs)
        self.max_prefix = config.max_prefix

    def run(self, x: Float[Array, "B T D"], seq: SeqInfo, state: State) -> tuple[Float[Array, "B T H V"], State]:
        segments = jnp.asarray(seq.segments)
        encode, first, second, fits = readings(segments, jnp.asarray(seq.prefix), self.max_prefix or x.shape[1])

        def joined(ahead: Array, again: Array) -> Array:
            return move(ahead, first) + move(again, second)

        streams = {name: move(part, second) for name, part in self.query(x).items()}
        ahead, again = self.encoder(move(x, encode)), self.writer(x)
        streams |= {name: joined(ahead[name], part) for name, part in again.items()}
        positions, document = (joined(move(part, encode), part) for part in (jnp.asarray(seq.positions), segments))
        # Ids of their own for the two readings of a document, which a convolution does not look across.
        reading = 2 * document + (first.source < first.target.shape[1]).astype(document.dtype)
        y, state = self.cell.run(streams, positions, document, state, jnp.where(document > 0, reading, 0))
        y = move(y, Move(second.target, second.source))
        return jax.tree.map(lambda part: _poisoned(part, fits), (y, state))


class Move(NamedTuple):
    """Where N entries of each row go among M places, in both directions; M or N stand for nowhere and nothing."""

    source: Int[Array, "B M"]
    target: Int[Array, "B N"]


class Readings(NamedTuple):
    """Prefix tokens drawn together, and the places of both readings in rows of T + E tokens."""

    encode: Move
    """From tokens T to prefix tokens E."""
    first: Move
    """From prefix tokens E to T + E."""
    second: Move
    """From tokens T to T + E."""
    fits: Bool[Array, " B"]
    """The row has at most E prefix tokens."""


def readings(segments: Int[Array, "B T"], prefix: Bool[Array, "B T"], most: int) -> Readings:
    """The order `prefix, document` for each document of a row, with room for `most` prefix tokens of a row."""
    docs, length = documents(segments), segments.shape[1]
    room = min(most, length)
    time = jnp.arange(length)[None]
    read = prefix & docs.valid
    count = jnp.cumsum(read, axis=1)
    begins = jnp.pad(docs.index[:, 1:] != docs.index[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    start = jax.lax.cummax(jnp.where(begins, time, 0), axis=1)
    ends = jnp.roll(begins, -1, axis=1)  # the row's first token begins a document, so its last one ends one
    last = jax.lax.cummin(jnp.where(ends, time, length), axis=1, reverse=True)
    earlier = jnp.take_along_axis(count, last, axis=1)  # prefix tokens of this document and of those before it
    encode = _move(jnp.where(read, count - 1, room), room)
    # A document's first reading begins where the second one would, were it not for the prefix tokens up to its end.
    place = jnp.where(encode.source < length, move(start + count - 1, encode), length + room)
    first = _move(place, length + room)
    return Readings(encode, first, _move(time + earlier, length + room), count[:, -1] <= room)


def move(x: Array, where: Move) -> Array:
    """[B, N, ...] to [B, M, ...]; 0 at places where nothing goes."""
    return moved(x, *where)


def _move(target: Int[Array, "B N"], places: int) -> Move:
    rows, entries = target.shape
    source = jnp.full((rows, places), entries, target.dtype)
    index = jnp.broadcast_to(jnp.arange(entries, dtype=target.dtype), target.shape)
    return Move(source.at[jnp.arange(rows)[:, None], target].set(index, mode="drop"), target)


def _poisoned(x: Array, fits: Bool[Array, " B"]) -> Array:
    return jnp.where(fits.reshape(-1, *[1] * (x.ndim - 1)), x, jnp.nan)
