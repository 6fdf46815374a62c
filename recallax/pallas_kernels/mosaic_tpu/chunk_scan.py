"""Scan over the chunks of a sequence in a TPU kernel, with the state carried in VMEM.

A kernel is defined by a body for one chunk of one head, in plain jax.numpy on matrices:

    body(states, *inputs) -> (states, outputs)

`chunk_scan` runs it over all rows, heads and chunks. A grid step applies it to the same chunk of several heads by
`jax.vmap`, whose independent products overlap in the matrix units. Chunks are the last axis of the grid and run
sequentially, forward or backward in time; the states stay in VMEM, in the blocks that become the final states. Bodies
are pure, so backward kernels call `jax.vjp` on them inside the kernel.

Sequences are head-major, [B, H, T, W], so that any width is a whole lane axis. Scalars per token are rows of a matrix
per chunk, [B, H, N, R, C], with time along the lanes: as a column, each would occupy 128 lanes in memory.
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

from recallax.pallas_kernels.dispatch import Unsupported, interpreting, require_platform

INTERPRET_PARAMS: Any = pltpu.InterpretParams()
"""Interpreter options of the kernels within `dispatch.interpret_kernels()`."""
MAX_HEADS_PER_STEP = 4
"""Upper bound of the value heads per grid step. More heads overlap more products and need more VMEM."""
TILE_ROWS = 16
"""Rows of a bfloat16 tile; chunk lengths are multiples of it."""
LANES = 128
"""Lanes of a vector register: the last axis of a tile."""

type Matrices = tuple[Array, ...]
type ChunkBody = Callable[..., tuple[Matrices, Matrices]]
"""(states, one matrix per input) -> (states, one matrix per output)"""


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


@dataclass(frozen=True)
class ChunkOperand(abc.ABC):
    """An array, or the shape and dtype of an output, and where the matrices of each grid step lie in it."""

    array: Any

    @abc.abstractmethod
    def spec(self, chunk_grid: ChunkGrid) -> pl.BlockSpec:
        """Return the block of a grid step."""

    def read(self, ref: Any, chunk_grid: ChunkGrid) -> Array:
        """Load the matrices of the step's value heads, [heads_per_step, ...]."""
        return ref[0]

    def write(self, ref: Any, value: Array) -> None:
        """Store the matrices of the step's value heads, cast to the array's dtype."""
        ref[0] = value.astype(ref.dtype)


class TokenOperand(ChunkOperand):
    """[B, G, T, W] with matrices [C, W]; each of G heads is shared by H / G consecutive value heads."""

    def spec(self, chunk_grid: ChunkGrid) -> pl.BlockSpec:
        _, groups, _, width = self.array.shape
        share = chunk_grid.num_heads // groups
        block_heads = max(1, chunk_grid.heads_per_step // share)
        steps_per_block = max(1, share // chunk_grid.heads_per_step)
        return pl.BlockSpec(
            (1, block_heads, chunk_grid.chunk_size, width),
            lambda b, h, n: (b, h // steps_per_block, chunk_grid.chunk_index(n), 0),
        )

    def read(self, ref: Any, chunk_grid: ChunkGrid) -> Array:
        share = chunk_grid.num_heads // self.array.shape[1]
        return ref[0] if share == 1 else jnp.stack([ref[0, h // share] for h in range(chunk_grid.heads_per_step)])


class StateOperand(ChunkOperand):
    """[B, H, K, V] with matrices [K, V], the same block for all chunks."""

    def spec(self, chunk_grid: ChunkGrid) -> pl.BlockSpec:
        return pl.BlockSpec((1, chunk_grid.heads_per_step, *self.array.shape[2:]), lambda b, h, n: (b, h, 0, 0))


@dataclass(frozen=True)
class ChannelOperand(ChunkOperand):
    """[B, T, D] with matrices [C, lanes]; a group of `lanes` channels acts as a head. One head per grid step."""

    lanes: int

    def spec(self, chunk_grid: ChunkGrid) -> pl.BlockSpec:
        return pl.BlockSpec((1, chunk_grid.chunk_size, self.lanes), lambda b, h, n: (b, chunk_grid.chunk_index(n), h))

    def read(self, ref: Any, chunk_grid: ChunkGrid) -> Array:
        return ref[...]

    def write(self, ref: Any, value: Array) -> None:
        ref[...] = value.astype(ref.dtype)


class PerHeadOperand(ChunkOperand):
    """[H, R, W] with matrices [R, W], the same for all rows and chunks. One head per grid step."""

    def spec(self, chunk_grid: ChunkGrid) -> pl.BlockSpec:
        return pl.BlockSpec((1, *self.array.shape[1:]), lambda b, h, n: (h, 0, 0))

    def read(self, ref: Any, chunk_grid: ChunkGrid) -> Array:
        return ref[...]


class SharedOperand(ChunkOperand):
    """[R, W], one matrix that all grid steps share."""

    def spec(self, chunk_grid: ChunkGrid) -> pl.BlockSpec:
        return pl.BlockSpec(self.array.shape, lambda b, h, n: (0, 0))

    def read(self, ref: Any, chunk_grid: ChunkGrid) -> Array:
        return jnp.broadcast_to(ref[...], (chunk_grid.heads_per_step, *self.array.shape))


class PerChunkOperand(ChunkOperand):
    """[B, H, N, R, W], one matrix per chunk: a state, or rows of scalars per token."""

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
    """Run `body` over all rows, heads and chunks.

    Args:
        name: Name of the kernel.
        body: (states, one matrix per input) -> (states, one matrix per output), all float32.
        chunk_grid: The grid.
        states: Initial states in float32.
        inputs: Input arrays.
        outputs: Shapes, dtypes and layouts of the outputs; values are cast to the dtype.

    Returns:
        Final states [B, H, ...] in float32, and the outputs.
    """
    state_operands = [StateOperand(x) for x in states]
    all_inputs, all_outputs = (*state_operands, *inputs), (*state_operands, *outputs)
    num_states, num_inputs = len(state_operands), len(all_inputs)

    def kernel(*refs: Any) -> None:
        initial_refs, input_refs = refs[:num_states], refs[num_states:num_inputs]
        state_refs, output_refs = refs[num_inputs : num_inputs + num_states], refs[num_inputs + num_states :]

        @pl.when(pl.program_id(2) == 0)
        def _() -> None:
            for ref, initial in zip(state_refs, initial_refs, strict=True):
                ref[...] = initial[...]

        before = tuple(x.read(ref, chunk_grid) for x, ref in zip(state_operands, state_refs, strict=True))
        matrices = (x.read(ref, chunk_grid).astype(jnp.float32) for x, ref in zip(inputs, input_refs, strict=True))
        after, results = jax.vmap(body)(before, *matrices)
        for operand, ref, value in zip(all_outputs, (*state_refs, *output_refs), (*after, *results), strict=True):
            operand.write(ref, value)

    results = pl.pallas_call(
        kernel,
        out_shape=tuple(jax.ShapeDtypeStruct(x.array.shape, x.array.dtype) for x in all_outputs),
        grid=chunk_grid.grid,
        in_specs=[x.spec(chunk_grid) for x in all_inputs],
        out_specs=tuple(x.spec(chunk_grid) for x in all_outputs),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        interpret=INTERPRET_PARAMS if interpreting() else False,
        name=name,
    )(*(x.array for x in all_inputs))
    return results[:num_states], results[num_states:]


def save_states(body: ChunkBody) -> ChunkBody:
    """Extend the body by outputs that save the states before each chunk, for the backward pass."""

    def saving_body(states: Matrices, *inputs: Array) -> tuple[Matrices, Matrices]:
        after, out = body(states, *inputs)
        return after, (*out, *states)

    return saving_body


def vjp_body(body: ChunkBody) -> ChunkBody:
    """Return the backward body of a body with one output, to be scanned in reverse.

    Its states are the gradients of the states. Its inputs are the gradient of the output, the states before the chunk
    and the body's inputs; its outputs are the gradients of the body's inputs.
    """

    def backward_body(state_grads: Matrices, grad: Array, *residuals: Array) -> tuple[Matrices, Matrices]:
        states, inputs = residuals[: len(state_grads)], residuals[len(state_grads) :]
        _, pull = jax.vjp(body, states, *inputs)
        previous_grads, *input_grads = pull((state_grads, (grad,)))
        return previous_grads, tuple(input_grads)

    return backward_body


def output_shape(*shape: int, dtype: DTypeLike = jnp.float32) -> jax.ShapeDtypeStruct:
    """Return the shape and dtype of an output."""
    return jax.ShapeDtypeStruct(shape, dtype)


def sum_per_group(x: Float[Array, "B H T K"], num_k_heads: int) -> Float[Array, "B G T K"]:
    """Sum over the value heads that share a key head."""
    return jnp.sum(x.reshape(x.shape[0], num_k_heads, -1, *x.shape[2:]), axis=2) if num_k_heads < x.shape[1] else x


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def dot(a: Float[Array, "I J"], b: Float[Array, "J K"], dtype: DTypeLike) -> Float[Array, "I K"]:
    """Product a b of float32 matrices; operands are rounded to `dtype`, also in the backward pass."""
    return _dot_general(a, b, 1, 0, dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def dot_nt(a: Float[Array, "I J"], b: Float[Array, "K J"], dtype: DTypeLike) -> Float[Array, "I K"]:
    """Product a b^T, rounded as in `dot`."""
    return _dot_general(a, b, 1, 1, dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def dot_tn(a: Float[Array, "J I"], b: Float[Array, "J K"], dtype: DTypeLike) -> Float[Array, "I K"]:
    """Product a^T b, rounded as in `dot`."""
    return _dot_general(a, b, 0, 0, dtype)


def _dot_general(a: Array, b: Array, i: int, j: int, dtype: DTypeLike) -> Array:
    """Contract axis i of a with axis j of b. The batching rule keeps heads in front, also for an unbatched operand."""
    precision = jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None
    multiply = functools.partial(jax.lax.dot_general, precision=precision, preferred_element_type=jnp.float32)

    @jax.custom_batching.custom_vmap
    def product(a: Array, b: Array) -> Array:
        return multiply(a, b, (((i,), (j,)), ((), ())))

    @product.def_vmap
    def _(size: int, batched: list[bool], a: Array, b: Array) -> tuple[Array, bool]:
        a, b = (
            x if is_batched else jnp.broadcast_to(x, (size, *x.shape))
            for x, is_batched in zip((a, b), batched, strict=True)
        )
        return multiply(a, b, (((i + 1,), (j + 1,)), ((0,), (0,)))), True

    return product(a.astype(dtype), b.astype(dtype))


def _define_vjp(product: Any, left: Callable[..., Array], right: Callable[..., Array]) -> None:
    """Register a product's vector-Jacobian product.

    Args:
        product: The product, a `jax.custom_vjp`.
        left: Gradient of the first operand, from both operands, the product's gradient and the dtype.
        right: Gradient of the second operand, from the same arguments.
    """
    product.defvjp(
        lambda a, b, dtype: (product(a, b, dtype), (a, b)),
        lambda dtype, operands, grad: (left(*operands, grad, dtype), right(*operands, grad, dtype)),
    )


_define_vjp(dot, lambda a, b, s, to: _dot_general(s, b, 1, 1, to), lambda a, b, s, to: _dot_general(a, s, 0, 0, to))
_define_vjp(dot_nt, lambda a, b, s, to: _dot_general(s, b, 1, 0, to), lambda a, b, s, to: _dot_general(s, a, 0, 0, to))
_define_vjp(dot_tn, lambda a, b, s, to: _dot_general(b, s, 1, 1, to), lambda a, b, s, to: _dot_general(a, s, 1, 0, to))
