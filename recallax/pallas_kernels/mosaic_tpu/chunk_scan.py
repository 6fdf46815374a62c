"""The skeleton of the kernels for TPUs: a walk over the chunks of a sequence with a state carried in VMEM.

A kernel is a function of one head's chunk, in plain jax.numpy on matrices:

    body(states, *inputs) -> (states, outputs)

`chunk_scan` runs it over all rows, heads and chunks. A grid step takes the same chunk of several heads by `jax.vmap`, whose
independent chains of products fill the units side by side. Chunks are the last axis of the grid and run one after
another, forward or backward in time; states stay in VMEM, in the blocks that become the final states. Since bodies are
pure, backward kernels call `jax.vjp` on them inside the kernel.

Sequences are head-major, [B, H, T, W], so that any width is a whole lane axis. Numbers per token are rows of a matrix
per chunk, [B, H, N, R, C], with time along the lanes: as columns each would take 128 lanes in memory.
"""

import abc
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from recallax.pallas_kernels.dispatch import Unsupported, use_interpreter

INTERPRET_PARAMS: Any = pltpu.InterpretParams()
"""What runs the kernels where there is no TPU, within `dispatch.interpreted()`."""
MAX_HEADS_PER_STEP = 4
"""Value heads of a grid step at most."""
TILE_ROWS = 16
"""Of bfloat16; a chunk that is the whole sequence is a multiple of it."""

type Matrices = tuple[Array, ...]
type ChunkBody = Callable[..., tuple[Matrices, Matrices]]
"""(states, a matrix per input) -> (states, a matrix per output)"""


class ChunkGrid(NamedTuple):
    """How a walk is cut into grid steps (row, block of heads, chunk)."""

    batch: int
    num_heads: int
    """Value heads in all."""
    heads_per_step: int
    """Value heads of a grid step."""
    chunk_size: int
    num_chunks: int
    interpret: bool
    reverse: bool = False
    """Backward in time."""

    @property
    def grid(self) -> tuple[int, int, int]:
        return (self.batch, self.num_heads // self.heads_per_step, self.num_chunks)

    @property
    def padded_length(self) -> int:
        return self.chunk_size * self.num_chunks

    def chunk_index(self, n: Any) -> Any:
        """The chunk that the n-th step takes."""
        return self.num_chunks - 1 - n if self.reverse else n


def make_chunk_grid(max_chunk_size: int, length: int, v: Float[Array, "B T H V"], num_k_heads: int) -> ChunkGrid:
    """Steps over a sequence that is padded to whole chunks. Raises Unsupported where there is no TPU."""
    interpret = use_interpreter("tpu")
    rows, _, heads, _ = v.shape
    share = heads // num_k_heads
    fits = (n for n in range(MAX_HEADS_PER_STEP, 0, -1) if heads % n == 0 and (share % n == 0 or n % share == 0))
    return ChunkGrid(rows, heads, next(fits), *chunk_size_and_count(max_chunk_size, length), interpret)


def chunk_size_and_count(max_chunk_size: int, length: int) -> tuple[int, int]:
    """Length and number of the chunks of a sequence; one that is shorter than a chunk is one chunk."""
    chunk = min(max_chunk_size, -(-length // TILE_ROWS) * TILE_ROWS)
    return chunk, -(-length // chunk)


def head_major(x: Float[Array, "B T H W"], chunk_grid: ChunkGrid) -> Float[Array, "B H P W"]:
    """Time behind the heads, padded with zeros to whole chunks."""
    return jnp.moveaxis(jnp.pad(x, ((0, 0), (0, chunk_grid.padded_length - x.shape[1]), (0, 0), (0, 0))), 1, 2)


def time_major(x: Float[Array, "B H P W"], length: int) -> Float[Array, "B T H W"]:
    """Undo `head_major`."""
    return jnp.moveaxis(x, 1, 2)[:, :length]


def split_chunks(x: Float[Array, "B H P"], chunk_grid: ChunkGrid) -> Float[Array, "B H N C"]:
    """Time cut into chunks."""
    return x.reshape(*x.shape[:2], chunk_grid.num_chunks, chunk_grid.chunk_size)


def require_uniform_dtype(**arrays: Array) -> None:
    """Raise Unsupported unless all are float32 or all bfloat16."""
    dtypes = {x.dtype for x in arrays.values()}
    if len(dtypes) > 1 or not dtypes <= {jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16)}:
        held = ", ".join(f"{name} is {x.dtype}" for name, x in arrays.items())
        raise Unsupported(f"{held}; they must all be float32 or all bfloat16")


@dataclass(frozen=True)
class ChunkOperand(abc.ABC):
    """An array, or the shape and dtype of an output, and how the matrices of a grid step lie in it."""

    array: Any

    @abc.abstractmethod
    def spec(self, chunk_grid: ChunkGrid) -> pl.BlockSpec:
        """The block of a grid step."""

    def read(self, ref: Any, chunk_grid: ChunkGrid) -> Array:
        """The matrices of the step's value heads, [block, ...]."""
        return ref[0]

    def write(self, ref: Any, value: Array) -> None:
        ref[0] = value.astype(ref.dtype)


class TokenOperand(ChunkOperand):
    """[B, G, T, W], each of G heads shared by H / G value heads in a row; a chunk is [C, W]."""

    def spec(self, chunk_grid: ChunkGrid) -> pl.BlockSpec:
        _, groups, _, width = self.array.shape
        share = chunk_grid.num_heads // groups
        own, shared = max(1, chunk_grid.heads_per_step // share), max(1, share // chunk_grid.heads_per_step)
        return pl.BlockSpec(
            (1, own, chunk_grid.chunk_size, width), lambda b, h, n: (b, h // shared, chunk_grid.chunk_index(n), 0)
        )

    def read(self, ref: Any, chunk_grid: ChunkGrid) -> Array:
        share = chunk_grid.num_heads // self.array.shape[1]
        return ref[0] if share == 1 else jnp.stack([ref[0, h // share] for h in range(chunk_grid.heads_per_step)])


class StateOperand(ChunkOperand):
    """[B, H, K, V], the same for all chunks."""

    def spec(self, chunk_grid: ChunkGrid) -> pl.BlockSpec:
        return pl.BlockSpec((1, chunk_grid.heads_per_step, *self.array.shape[2:]), lambda b, h, n: (b, h, 0, 0))


@dataclass(frozen=True)
class ChannelOperand(ChunkOperand):
    """[B, T, D], whose channels are the heads, `lanes` of them each; a chunk is [C, lanes]. One head per grid step."""

    lanes: int

    def spec(self, chunk_grid: ChunkGrid) -> pl.BlockSpec:
        return pl.BlockSpec((1, chunk_grid.chunk_size, self.lanes), lambda b, h, n: (b, chunk_grid.chunk_index(n), h))

    def read(self, ref: Any, chunk_grid: ChunkGrid) -> Array:
        return ref[...]

    def write(self, ref: Any, value: Array) -> None:
        ref[...] = value.astype(ref.dtype)


class PerHeadOperand(ChunkOperand):
    """[H, R, W], a matrix for all chunks and rows. One head per grid step."""

    def spec(self, chunk_grid: ChunkGrid) -> pl.BlockSpec:
        return pl.BlockSpec((1, *self.array.shape[1:]), lambda b, h, n: (h, 0, 0))

    def read(self, ref: Any, chunk_grid: ChunkGrid) -> Array:
        return ref[...]


class SharedOperand(ChunkOperand):
    """[R, W], one matrix for all."""

    def spec(self, chunk_grid: ChunkGrid) -> pl.BlockSpec:
        return pl.BlockSpec(self.array.shape, lambda b, h, n: (0, 0))

    def read(self, ref: Any, chunk_grid: ChunkGrid) -> Array:
        return jnp.broadcast_to(ref[...], (chunk_grid.heads_per_step, *self.array.shape))


class PerChunkOperand(ChunkOperand):
    """[B, H, N, R, W], a matrix per chunk: a state, or rows of numbers per token."""

    def spec(self, chunk_grid: ChunkGrid) -> pl.BlockSpec:
        shape = self.array.shape[3:]
        return pl.BlockSpec(
            (1, chunk_grid.heads_per_step, 1, *shape), lambda b, h, n: (b, h, chunk_grid.chunk_index(n), 0, 0)
        )

    def read(self, ref: Any, chunk_grid: ChunkGrid) -> Array:
        return ref[0, :, 0]

    def write(self, ref: Any, value: Array) -> None:
        ref[0, :, 0] = value.astype(ref.dtype)


def chunk_scan(
    name: str,
    body: ChunkBody,
    chunk_grid: ChunkGrid,
    states: Sequence[Float[Array, "B H _ _"]],
    inputs: Sequence[ChunkOperand],
    outputs: Sequence[ChunkOperand],
) -> tuple[Matrices, Matrices]:
    """Run `body` over all chunks; returns the final states, [B, H, ...] in float32, and the outputs.

    body: (states, a matrix per input) -> (states, a matrix per output), all float32; outputs are cast to their dtype.
    """
    carried = [StateOperand(x) for x in states]
    given, made = (*carried, *inputs), (*carried, *outputs)

    def kernel(*refs: Any) -> None:
        first, read = refs[: len(carried)], refs[len(carried) : len(given)]
        held, written = refs[len(given) : len(given) + len(carried)], refs[len(given) + len(carried) :]

        @pl.when(pl.program_id(2) == 0)
        def _() -> None:
            for ref, start in zip(held, first, strict=True):
                ref[...] = start[...]

        before = tuple(x.read(ref, chunk_grid) for x, ref in zip(carried, held, strict=True))
        matrices = (x.read(ref, chunk_grid).astype(jnp.float32) for x, ref in zip(inputs, read, strict=True))
        after, results = jax.vmap(body)(before, *matrices)
        for operand, ref, value in zip(made, (*held, *written), (*after, *results), strict=True):
            operand.write(ref, value)

    results = pl.pallas_call(
        kernel,
        out_shape=tuple(jax.ShapeDtypeStruct(x.array.shape, x.array.dtype) for x in made),
        grid=chunk_grid.grid,
        in_specs=[x.spec(chunk_grid) for x in given],
        out_specs=tuple(x.spec(chunk_grid) for x in made),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        interpret=INTERPRET_PARAMS if chunk_grid.interpret else False,
        name=name,
    )(*(x.array for x in given))
    return results[: len(carried)], results[len(carried) :]


def save_states(body: ChunkBody) -> ChunkBody:
    """The body, with the states before the chunk as further outputs: what the backward pass starts from."""

    def kept(states: Matrices, *inputs: Array) -> tuple[Matrices, Matrices]:
        after, out = body(states, *inputs)
        return after, (*out, *states)

    return kept


def vjp_body(body: ChunkBody) -> ChunkBody:
    """The slopes of a body of one output, backward in time: the states are slopes of states; the inputs are the
    output's slope, the states before the chunk and the body's inputs, whose slopes are the outputs."""

    def pulled(late: Matrices, slope: Array, *rest: Array) -> tuple[Matrices, Matrices]:
        states, inputs = rest[: len(late)], rest[len(late) :]
        _, pull = jax.vjp(body, states, *inputs)
        early, *slopes = pull((late, (slope,)))
        return early, tuple(slopes)

    return pulled


def output_shape(*shape: int, dtype: DTypeLike = jnp.float32) -> jax.ShapeDtypeStruct:
    """The shape and dtype of an output."""
    return jax.ShapeDtypeStruct(shape, dtype)


def sum_per_group(x: Float[Array, "B H T K"], num_k_heads: int) -> Float[Array, "B G T K"]:
    """The sum over the value heads that share a key head."""
    return jnp.sum(x.reshape(x.shape[0], num_k_heads, -1, *x.shape[2:]), axis=2) if num_k_heads < x.shape[1] else x


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def dot(a: Float[Array, "I J"], b: Float[Array, "J K"], dtype: DTypeLike) -> Float[Array, "I K"]:
    """a b of float32 matrices that are rounded to `dtype` for the product; so are the slopes of products."""
    return _dot_general(a, b, 1, 0, dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def dot_nt(a: Float[Array, "I J"], b: Float[Array, "K J"], dtype: DTypeLike) -> Float[Array, "I K"]:
    """a b^T"""
    return _dot_general(a, b, 1, 1, dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def dot_tn(a: Float[Array, "J I"], b: Float[Array, "J K"], dtype: DTypeLike) -> Float[Array, "I K"]:
    """a^T b"""
    return _dot_general(a, b, 0, 0, dtype)


def _dot_general(a: Array, b: Array, i: int, j: int, dtype: DTypeLike) -> Array:
    """The product over axis i of a and j of b. Heads stay in front, also where one operand is the same for all."""
    exact = jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None
    multiply = functools.partial(jax.lax.dot_general, precision=exact, preferred_element_type=jnp.float32)

    @jax.custom_batching.custom_vmap
    def product(a: Array, b: Array) -> Array:
        return multiply(a, b, (((i,), (j,)), ((), ())))

    @product.def_vmap
    def _(size: int, batched: list[bool], a: Array, b: Array) -> tuple[Array, bool]:
        a, b = (x if own else jnp.broadcast_to(x, (size, *x.shape)) for x, own in zip((a, b), batched, strict=True))
        return multiply(a, b, (((i + 1,), (j + 1,)), ((0,), (0,)))), True

    return product(a.astype(dtype), b.astype(dtype))


def _define_vjp(product: Any, left: Callable[..., Array], right: Callable[..., Array]) -> None:
    """left, right: the operands' slopes, given both operands, the product's slope and the dtype."""
    product.defvjp(
        lambda a, b, dtype: (product(a, b, dtype), (a, b)),
        lambda dtype, operands, slope: (left(*operands, slope, dtype), right(*operands, slope, dtype)),
    )


_define_vjp(dot, lambda a, b, s, to: _dot_general(s, b, 1, 1, to), lambda a, b, s, to: _dot_general(a, s, 0, 0, to))
_define_vjp(dot_nt, lambda a, b, s, to: _dot_general(s, b, 1, 0, to), lambda a, b, s, to: _dot_general(s, a, 0, 0, to))
_define_vjp(dot_tn, lambda a, b, s, to: _dot_general(b, s, 1, 1, to), lambda a, b, s, to: _dot_general(a, s, 1, 0, to))
