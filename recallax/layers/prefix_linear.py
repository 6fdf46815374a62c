"""Prefix linear attention (JRT): a memory processes a document's prefix first, and then the whole document.

    S_t = cell(S_{t-1}; k_t, v_t, gates),   S_0 = cell over the prefix, with encoder projections of keys, values, gates

For memories that are sums (BASED, linear attention) this is the paper's form: encoder keys and values of the whole
prefix are added to numerator and denominator beside the causal ones,

    y_i = phi(q_i) [ sum_{j<=i} phi(k_j) v_j^T + sum_{j in prefix} phi(k^e_j) v^e_j^T ]
          / phi(q_i) [ sum_{j<=i} phi(k_j)     + sum_{j in prefix} phi(k^e_j) ]

at every i, also in the prefix. A memory with decay processes the prefix as the beginning of a longer document. Both
passes share queries, convolution, gate parameters and output projection; the convolution does not cross from one pass
to the other. Only this layer reads ahead, and no further than the end of the prefix.

Both passes are one call of the op over rows in which each prefix is placed before its document, so every packed
document may have a prefix. Without a prefix (in `step`, or in rows without one) the layer equals the memory itself.
Padding is not written to the memory; in the published code it is, and a padding key of 0 still has the feature 1, so
that padding gets most of the weight.

State: that of the memory.
Source: Arora et al. 2024 (Just Read Twice, arXiv 2407.05483), section 4.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from recallax.config import require_at_least
from recallax.layers.base import LayerInfo, MixerConfig, State
from recallax.layers.memory import MemoryConfig, MemoryMixer
from recallax.pallas_kernels.chunking import index_documents
from recallax.pallas_kernels.gather_with_inverse import gather_with_inverse
from recallax.types import Precision, SeqInfo


@dataclass(frozen=True, kw_only=True)
class PrefixLinear(MixerConfig):
    """A memory that processes each document's prefix twice (JRT-RNN). A prefix must lie within one prefill."""

    memory: MemoryConfig
    """Config of the memory."""
    max_prefix_len: int | None = None
    """Largest number of prefix tokens in a row; rows with more are NaN. None: the length of the row."""

    def __post_init__(self) -> None:
        require_at_least(1, "PrefixLinear.", max_prefix_len=self.max_prefix_len)

    @property
    def prefix_limit(self) -> int | None:
        return self.max_prefix_len

    def build(self, d_model: int, layer: LayerInfo, *, precision: Precision, rngs: nnx.Rngs) -> "PrefixLinearMixer":
        return PrefixLinearMixer(self, d_model, layer, precision=precision, rngs=rngs)


class PrefixLinearMixer(MemoryMixer):
    """Memory with a second projection of keys, values and gates for the first pass over the prefix."""

    def __init__(self, config: PrefixLinear, d_model: int, layer: LayerInfo, *, precision: Precision, rngs: nnx.Rngs):
        super().__init__(config.memory, d_model, layer, precision=precision, rngs=rngs)
        self.encoder = config.memory.kv_proj(d_model, precision=precision, rngs=rngs)
        self.max_prefix_len = config.max_prefix_len

    def run(self, x: Float[Array, "B T D"], seq: SeqInfo, state: State) -> tuple[Float[Array, "B T H V"], State]:
        positions, segment_ids = jnp.asarray(seq.positions), jnp.asarray(seq.segment_ids)
        max_prefix_len = self.max_prefix_len or x.shape[1]
        to_prefix, first, second, fits = two_pass_layout(segment_ids, jnp.asarray(seq.prefix), max_prefix_len)

        def place_passes(prefix: Array, document: Array) -> Array:
            return apply_index_map(prefix, first) + apply_index_map(document, second)

        projections = {name: apply_index_map(part, second) for name, part in self.query(x).items()}
        encoded, written = self.encoder(apply_index_map(x, to_prefix)), self.writer(x)
        projections |= {name: place_passes(encoded[name], part) for name, part in written.items()}
        row_positions, row_segments = (
            place_passes(apply_index_map(part, to_prefix), part) for part in (positions, segment_ids)
        )
        # The two passes over a document have different ids for the convolution, which does not cross between them.
        pass_ids = 2 * row_segments + (first.source < first.target.shape[1]).astype(row_segments.dtype)
        pass_ids = jnp.where(row_segments > 0, pass_ids, 0)
        y, state = self.cell.run(projections, row_positions, row_segments, state, pass_ids)
        y = apply_index_map(y, IndexMap(second.target, second.source))
        return jax.tree.map(lambda part: _nan_unless(part, fits), (y, state))


class IndexMap(NamedTuple):
    """Injective map of N entries of each row to M places, in both directions."""

    source: Int[Array, "B M"]
    """Entry that each place receives; N: none."""
    target: Int[Array, "B N"]
    """Place of each entry; M: none."""


class TwoPassLayout(NamedTuple):
    """Index maps between T tokens, E prefix tokens, and rows of T + E places for both passes."""

    tokens_to_prefix: IndexMap
    """From tokens to prefix tokens."""
    prefix_to_row: IndexMap
    """From prefix tokens to the places of the first pass."""
    tokens_to_row: IndexMap
    """From tokens to the places of the second pass."""
    prefix_fits: Bool[Array, " B"]
    """True if the row has at most E prefix tokens."""


def two_pass_layout(segment_ids: Int[Array, "B T"], prefix: Bool[Array, "B T"], max_prefix_len: int) -> TwoPassLayout:
    """Place the prefix of each document before the document.

    Args:
        segment_ids: Document ids; 0 is padding.
        prefix: True for tokens of a prefix.
        max_prefix_len: Largest number of prefix tokens in a row.

    Returns:
        The places of both passes; E is the smaller of `max_prefix_len` and T.
    """
    docs, length = index_documents(segment_ids), segment_ids.shape[1]
    capacity = min(max_prefix_len, length)
    time = jnp.arange(length)[None]
    in_prefix = prefix & docs.valid
    count = jnp.cumsum(in_prefix, axis=1)
    starts = jnp.pad(docs.index[:, 1:] != docs.index[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    first_token = jax.lax.cummax(jnp.where(starts, time, 0), axis=1)
    ends = jnp.roll(starts, -1, axis=1)  # the roll is right for the last token too: the first one starts a document
    last_token = jax.lax.cummin(jnp.where(ends, time, length), axis=1, reverse=True)
    prefix_count = jnp.take_along_axis(count, last_token, axis=1)  # of this document and of earlier ones
    to_prefix = _index_map(jnp.where(in_prefix, count - 1, capacity), capacity)
    # The second pass of a token is placed after all prefix tokens up to its document's end. The first pass of a
    # document starts where the second pass of the document before it ends.
    place = apply_index_map(first_token + count - 1, to_prefix)
    place = jnp.where(to_prefix.source < length, place, length + capacity)
    first_pass = _index_map(place, length + capacity)
    second_pass = _index_map(time + prefix_count, length + capacity)
    return TwoPassLayout(to_prefix, first_pass, second_pass, count[:, -1] <= capacity)


def apply_index_map(x: Array, index_map: IndexMap) -> Array:
    """Move entries to their places.

    Args:
        x: Entries [B, N, ...].
        index_map: Map from N entries to M places.

    Returns:
        Places [B, M, ...]; 0 at places without an entry.
    """
    return gather_with_inverse(x, *index_map)


def _index_map(target: Int[Array, "B N"], num_places: int) -> IndexMap:
    rows, entries = target.shape
    source = jnp.full((rows, num_places), entries, target.dtype)
    index = jnp.broadcast_to(jnp.arange(entries, dtype=target.dtype), target.shape)
    return IndexMap(source.at[jnp.arange(rows)[:, None], target].set(index, mode="drop"), target)


def _nan_unless(x: Array, valid: Bool[Array, " B"]) -> Array:
    return jnp.where(valid.reshape(-1, *[1] * (x.ndim - 1)), x, jnp.nan)
