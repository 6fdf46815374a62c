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
from recallax.layers.base import LayerInfo, MixerConfig, State
from recallax.layers.memory import MemoryConfig, MemoryMixer
from recallax.pallas_kernels.chunking import index_documents
from recallax.pallas_kernels.gather_with_inverse import gather_with_inverse
from recallax.types import Precision, SeqInfo


@dataclass(frozen=True, kw_only=True)
class PrefixLinear(MixerConfig):
    """Reads `SeqInfo.prefix` twice; it must lie within one prefill, at the beginning of its document."""

    memory: MemoryConfig
    max_prefix_len: int | None = None
    """Most prefix tokens of a row, by which the op's rows are longer. A row with more is all NaN. None is any."""

    def __post_init__(self) -> None:
        if self.max_prefix_len is not None and self.max_prefix_len < 1:
            raise ConfigError(
                f"PrefixLinear.max_prefix_len is {self.max_prefix_len}; it must be at least 1, or None for whole rows"
            )

    def build(self, d_model: int, layer: LayerInfo, *, precision: Precision, rngs: nnx.Rngs) -> "PrefixLinearMixer":
        return PrefixLinearMixer(self, d_model, layer, precision=precision, rngs=rngs)


class PrefixLinearMixer(MemoryMixer):
    """See the head of the file."""

    def __init__(self, config: PrefixLinear, d_model: int, layer: LayerInfo, *, precision: Precision, rngs: nnx.Rngs):
        super().__init__(config.memory, d_model, layer, precision=precision, rngs=rngs)
        self.encoder = config.memory.kv_proj(d_model, precision=precision, rngs=rngs)
        self.max_prefix_len = config.max_prefix_len

    def run(self, x: Float[Array, "B T D"], seq: SeqInfo, state: State) -> tuple[Float[Array, "B T H V"], State]:
        segments = jnp.asarray(seq.segment_ids)
        encode, first, second, fits = two_pass_layout(
            segments, jnp.asarray(seq.prefix), self.max_prefix_len or x.shape[1]
        )

        def joined(ahead: Array, again: Array) -> Array:
            return apply_index_map(ahead, first) + apply_index_map(again, second)

        streams = {name: apply_index_map(part, second) for name, part in self.query(x).items()}
        ahead, again = self.encoder(apply_index_map(x, encode)), self.writer(x)
        streams |= {name: joined(ahead[name], part) for name, part in again.items()}
        positions, document = (
            joined(apply_index_map(part, encode), part) for part in (jnp.asarray(seq.positions), segments)
        )
        # Ids of their own for the two readings of a document, which a convolution does not look across.
        reading = 2 * document + (first.source < first.target.shape[1]).astype(document.dtype)
        y, state = self.cell.run(streams, positions, document, state, jnp.where(document > 0, reading, 0))
        y = apply_index_map(y, IndexMap(second.target, second.source))
        return jax.tree.map(lambda part: _nan_unless(part, fits), (y, state))


class IndexMap(NamedTuple):
    """Where N entries of each row go among M places, in both directions; M or N stand for nowhere and nothing."""

    source: Int[Array, "B M"]
    target: Int[Array, "B N"]


class TwoPassLayout(NamedTuple):
    """Prefix tokens drawn together, and the places of both readings in rows of T + E tokens."""

    tokens_to_prefix: IndexMap
    """From tokens T to prefix tokens E."""
    prefix_to_row: IndexMap
    """From prefix tokens E to T + E."""
    tokens_to_row: IndexMap
    """From tokens T to T + E."""
    prefix_fits: Bool[Array, " B"]
    """The row has at most E prefix tokens."""


def two_pass_layout(segment_ids: Int[Array, "B T"], prefix: Bool[Array, "B T"], max_prefix_len: int) -> TwoPassLayout:
    """The order `prefix, document` for each document of a row, with room for `max_prefix_len` prefix tokens of a row."""
    docs, length = index_documents(segment_ids), segment_ids.shape[1]
    room = min(max_prefix_len, length)
    time = jnp.arange(length)[None]
    read = prefix & docs.valid
    count = jnp.cumsum(read, axis=1)
    begins = jnp.pad(docs.index[:, 1:] != docs.index[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    start = jax.lax.cummax(jnp.where(begins, time, 0), axis=1)
    ends = jnp.roll(begins, -1, axis=1)  # the row's first token begins a document, so its last one ends one
    last = jax.lax.cummin(jnp.where(ends, time, length), axis=1, reverse=True)
    earlier = jnp.take_along_axis(count, last, axis=1)  # prefix tokens of this document and of those before it
    encode = _index_map(jnp.where(read, count - 1, room), room)
    # A document's first reading begins where the second one would, were it not for the prefix tokens up to its end.
    place = jnp.where(encode.source < length, apply_index_map(start + count - 1, encode), length + room)
    first = _index_map(place, length + room)
    return TwoPassLayout(encode, first, _index_map(time + earlier, length + room), count[:, -1] <= room)


def apply_index_map(x: Array, index_map: IndexMap) -> Array:
    """[B, N, ...] to [B, M, ...]; 0 at places where nothing goes."""
    return gather_with_inverse(x, *index_map)


def _index_map(target: Int[Array, "B N"], num_places: int) -> IndexMap:
    rows, entries = target.shape
    source = jnp.full((rows, num_places), entries, target.dtype)
    index = jnp.broadcast_to(jnp.arange(entries, dtype=target.dtype), target.shape)
    return IndexMap(source.at[jnp.arange(rows)[:, None], target].set(index, mode="drop"), target)


def _nan_unless(x: Array, valid: Bool[Array, " B"]) -> Array:
    return jnp.where(valid.reshape(-1, *[1] * (x.ndim - 1)), x, jnp.nan)
