"""Grid of a TPU kernel over rows, value heads and chunks, and the layout of sequences that it needs.

Sequences are head-major, [B, H, T, W], so that any width is a whole lane axis. Scalars per token are rows of a matrix
per chunk, [B, H, N, R, C], with time along the lanes: as a column, each would occupy 128 lanes in memory.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from recallax.pallas_kernels.dispatch import Unsupported, require_platform

MAX_HEADS_PER_STEP = 4
"""Upper bound of the value heads per grid step. More heads overlap more products and need more VMEM."""
TILE_ROWS = 16
"""Rows of a bfloat16 tile; chunk lengths are multiples of it."""
LANES = 128
"""Lanes of a vector register: the last axis of a tile."""


class ChunkGrid(NamedTuple):
    """Grid of a chunk scan, with axes (row, group of value heads, chunk)."""

    batch: int
    num_heads: int
    """Total number of value heads."""
    heads_per_step: int
    """Value heads of a grid step."""
    chunk_size: int
    num_chunks: int
    reverse: bool = False
    """Scan backward in time."""

    @property
    def grid(self) -> tuple[int, int, int]:
        """Number of grid steps along each axis."""
        return (self.batch, self.num_heads // self.heads_per_step, self.num_chunks)

    @property
    def padded_length(self) -> int:
        """Length of the sequence, padded to whole chunks."""
        return self.chunk_size * self.num_chunks

    def chunk_index(self, n: Any) -> Any:
        """Index of the chunk of the n-th step."""
        return self.num_chunks - 1 - n if self.reverse else n


def make_chunk_grid(max_chunk_size: int, length: int, v: Float[Array, "B T H V"], num_k_heads: int) -> ChunkGrid:
    """Build the grid of a sequence that is padded to whole chunks.

    Args:
        max_chunk_size: Upper bound of the tokens of a chunk.
        length: Tokens of the sequence.
        v: Values, for the number of rows and value heads.
        num_k_heads: Number of query and key heads; divides the number of value heads.

    Raises:
        Unsupported: The platform is not a TPU and kernels are not interpreted.
    """
    require_platform("tpu")
    rows, _, heads, _ = v.shape
    share = heads // num_k_heads
    fits = (n for n in range(MAX_HEADS_PER_STEP, 0, -1) if heads % n == 0 and (share % n == 0 or n % share == 0))
    return ChunkGrid(rows, heads, next(fits), *chunk_size_and_count(max_chunk_size, length))


def chunk_size_and_count(max_chunk_size: int, length: int) -> tuple[int, int]:
    """Return the length and number of the chunks; a sequence shorter than a chunk is one chunk."""
    chunk = min(max_chunk_size, -(-length // TILE_ROWS) * TILE_ROWS)
    return chunk, -(-length // chunk)


def head_major(x: Float[Array, "B T H W"], chunk_grid: ChunkGrid) -> Float[Array, "B H P W"]:
    """Move the time axis after the heads and pad it with zeros to whole chunks; P is the padded length."""
    return jnp.moveaxis(jnp.pad(x, ((0, 0), (0, chunk_grid.padded_length - x.shape[1]), (0, 0), (0, 0))), 1, 2)


def time_major(x: Float[Array, "B H P W"], length: int) -> Float[Array, "B T H W"]:
    """Undo `head_major` and remove its padding."""
    return jnp.moveaxis(x, 1, 2)[:, :length]


def split_chunks(x: Float[Array, "B H P"], chunk_grid: ChunkGrid) -> Float[Array, "B H N C"]:
    """Split time into chunks."""
    return x.reshape(*x.shape[:2], chunk_grid.num_chunks, chunk_grid.chunk_size)


def require_uniform_dtype(**arrays: Array) -> None:
    """Raise Unsupported unless all arrays are float32 or all are bfloat16."""
    dtypes = {x.dtype for x in arrays.values()}
    if len(dtypes) > 1 or not dtypes <= {jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16)}:
        listed = ", ".join(f"{name} is {x.dtype}" for name, x in arrays.items())
        raise Unsupported(f"{listed}; they must all be float32 or all bfloat16")


def sum_per_group(x: Float[Array, "B H T K"], num_k_heads: int) -> Float[Array, "B G T K"]:
    """Sum over the value heads that share a key head."""
    return jnp.sum(x.reshape(x.shape[0], num_k_heads, -1, *x.shape[2:]), axis=2) if num_k_heads < x.shape[1] else x
