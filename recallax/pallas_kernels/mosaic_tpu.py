"""The skeleton of the kernels for TPUs: a walk over the chunks of a sequence with a state carried in VMEM.

A kernel is a function of one head's chunk, in plain jax.numpy on matrices:

    body(states, *inputs) -> (states, outputs)

`walk` runs it over all rows, heads and chunks. A grid step takes the same chunk of several heads by `jax.vmap`, whose
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

from recallax.pallas_kernels.dispatch import Unsupported, interpreting

INTERPRETER: Any = pltpu.InterpretParams()
"""What runs the kernels where there is no TPU, within `dispatch.interpreted()`."""
SIDE_BY_SIDE = 4
"""Value heads of a grid step at most."""
ROWS_OF_A_TILE = 16
"""Of bfloat16; a chunk that is the whole sequence is a multiple of it."""

type Matrices = tuple[Array, ...]
type Body = Callable[..., tuple[Matrices, Matrices]]
"""(states, a matrix per input) -> (states, a matrix per output)"""


class Steps(NamedTuple):
    """How a walk is cut into grid steps (row, block of heads, chunk)."""

    rows: int
    heads: int
    """Value heads in all."""
    block: int
    """Value heads of a grid step."""
    chunk: int
    chunks: int
    interpret: bool
    reverse: bool = False
    """Backward in time."""

    @property
    def grid(self) -> tuple[int, int, int]:
        return (self.rows, self.heads // self.block, self.chunks)

    @property
    def length(self) -> int:
        return self.chunk * self.chunks

    def time(self, n: Any) -> Any:
        """The chunk that the n-th step takes."""
        return self.chunks - 1 - n if self.reverse else n


def steps_of(op_chunk: int, length: int, v: Float[Array, "B T H V"], groups: int) -> Steps:
    """Steps over a sequence that is padded to whole chunks. Raises Unsupported where there is no TPU."""
    interpret = interpreting("tpu")
    rows, _, heads, _ = v.shape
    share = heads // groups
    fits = (n for n in range(SIDE_BY_SIDE, 0, -1) if heads % n == 0 and (share % n == 0 or n % share == 0))
    return Steps(rows, heads, next(fits), *whole_chunks(op_chunk, length), interpret)


def whole_chunks(op_chunk: int, length: int) -> tuple[int, int]:
    """Length and number of the chunks of a sequence; one that is shorter than a chunk is one chunk."""
    chunk = min(op_chunk, -(-length // ROWS_OF_A_TILE) * ROWS_OF_A_TILE)
    return chunk, -(-length // chunk)


def head_major(x: Float[Array, "B T H W"], steps: Steps) -> Float[Array, "B H P W"]:
    """Time behind the heads, padded with zeros to whole chunks."""
    return jnp.moveaxis(jnp.pad(x, ((0, 0), (0, steps.length - x.shape[1]), (0, 0), (0, 0))), 1, 2)


def time_major(x: Float[Array, "B H P W"], length: int) -> Float[Array, "B T H W"]:
    """Undo `head_major`."""
    return jnp.moveaxis(x, 1, 2)[:, :length]


def in_chunks(x: Float[Array, "B H P"], steps: Steps) -> Float[Array, "B H N C"]:
    """Time cut into chunks."""
    return x.reshape(*x.shape[:2], steps.chunks, steps.chunk)


def require_dtypes(**arrays: Array) -> None:
    """Raise Unsupported unless all are float32 or all bfloat16."""
    dtypes = {x.dtype for x in arrays.values()}
    if len(dtypes) > 1 or not dtypes <= {jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16)}:
        held = ", ".join(f"{name} is {x.dtype}" for name, x in arrays.items())
        raise Unsupported(f"{held}; they must all be float32 or all bfloat16")


@dataclass(frozen=True)
class Operand(abc.ABC):
    """An array, or the shape and dtype of an output, and how the matrices of a grid step lie in it."""

    array: Any

    @abc.abstractmethod
    def spec(self, steps: Steps) -> pl.BlockSpec:
        """The block of a grid step."""

    def read(self, ref: Any, steps: Steps) -> Array:
        """The matrices of the step's value heads, [block, ...]."""
        return ref[0]

    def write(self, ref: Any, value: Array) -> None:
        ref[0] = value.astype(ref.dtype)


class Tokens(Operand):
    """[B, G, T, W], each of G heads shared by H / G value heads in a row; a chunk is [C, W]."""

    def spec(self, steps: Steps) -> pl.BlockSpec:
        _, groups, _, width = self.array.shape
        share = steps.heads // groups
        own, shared = max(1, steps.block // share), max(1, share // steps.block)
        return pl.BlockSpec((1, own, steps.chunk, width), lambda b, h, n: (b, h // shared, steps.time(n), 0))

    def read(self, ref: Any, steps: Steps) -> Array:
        share = steps.heads // self.array.shape[1]
        return ref[0] if share == 1 else jnp.stack([ref[0, h // share] for h in range(steps.block)])


class States(Operand):
    """[B, H, K, V], the same for all chunks."""

    def spec(self, steps: Steps) -> pl.BlockSpec:
        return pl.BlockSpec((1, steps.block, *self.array.shape[2:]), lambda b, h, n: (b, h, 0, 0))


@dataclass(frozen=True)
class Lanes(Operand):
    """[B, T, D], whose channels are the heads, `lanes` of them each; a chunk is [C, lanes]. One head per grid step."""

    lanes: int

    def spec(self, steps: Steps) -> pl.BlockSpec:
        return pl.BlockSpec((1, steps.chunk, self.lanes), lambda b, h, n: (b, steps.time(n), h))

    def read(self, ref: Any, steps: Steps) -> Array:
        return ref[...]

    def write(self, ref: Any, value: Array) -> None:
        ref[...] = value.astype(ref.dtype)


class PerHead(Operand):
    """[H, R, W], a matrix for all chunks and rows. One head per grid step."""

    def spec(self, steps: Steps) -> pl.BlockSpec:
        return pl.BlockSpec((1, *self.array.shape[1:]), lambda b, h, n: (h, 0, 0))

    def read(self, ref: Any, steps: Steps) -> Array:
        return ref[...]


class Shared(Operand):
    """[R, W], one matrix for all."""

    def spec(self, steps: Steps) -> pl.BlockSpec:
        return pl.BlockSpec(self.array.shape, lambda b, h, n: (0, 0))

    def read(self, ref: Any, steps: Steps) -> Array:
        return jnp.broadcast_to(ref[...], (steps.block, *self.array.shape))


class Chunks(Operand):
    """[B, H, N, R, W], a matrix per chunk: a state, or rows of numbers per token."""

    def spec(self, steps: Steps) -> pl.BlockSpec:
        shape = self.array.shape[3:]
        return pl.BlockSpec((1, steps.block, 1, *shape), lambda b, h, n: (b, h, steps.time(n), 0, 0))

    def read(self, ref: Any, steps: Steps) -> Array:
        return ref[0, :, 0]

    def write(self, ref: Any, value: Array) -> None:
        ref[0, :, 0] = value.astype(ref.dtype)


def walk(
    name: str,
    body: Body,
    steps: Steps,
    states: Sequence[Float[Array, "B H _ _"]],
    inputs: Sequence[Operand],
    outputs: Sequence[Operand],
) -> tuple[Matrices, Matrices]:
    """Run `body` over all chunks; returns the final states, [B, H, ...] in float32, and the outputs.

    body: (states, a matrix per input) -> (states, a matrix per output), all float32; outputs are cast to their dtype.
    """
    carried = [States(x) for x in states]
    given, made = (*carried, *inputs), (*carried, *outputs)

    def kernel(*refs: Any) -> None:
        first, read = refs[: len(carried)], refs[len(carried) : len(given)]
        held, written = refs[len(given) : len(given) + len(carried)], refs[len(given) + len(carried) :]

        @pl.when(pl.program_id(2) == 0)
        def _() -> None:
            for ref, start in zip(held, first, strict=True):
                ref[...] = start[...]

        before = tuple(x.read(ref, steps) for x, ref in zip(carried, held, strict=True))
        matrices = (x.read(ref, steps).astype(jnp.float32) for x, ref in zip(inputs, read, strict=True))
        after, results = jax.vmap(body)(before, *matrices)
        for operand, ref, value in zip(made, (*held, *written), (*after, *results), strict=True):
            operand.write(ref, value)

    results = pl.pallas_call(
        kernel,
        out_shape=tuple(jax.ShapeDtypeStruct(x.array.shape, x.array.dtype) for x in made),
        grid=steps.grid,
        in_specs=[x.spec(steps) for x in given],
        out_specs=tuple(x.spec(steps) for x in made),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        interpret=INTERPRETER if steps.interpret else False,
        name=name,
    )(*(x.array for x in given))
    return results[: len(carried)], results[len(carried) :]


def keeping(body: Body) -> Body:
    """The body, with the states before the chunk as further outputs: what the backward pass starts from."""

    def kept(states: Matrices, *inputs: Array) -> tuple[Matrices, Matrices]:
        after, out = body(states, *inputs)
        return after, (*out, *states)

    return kept


def pulling(body: Body) -> Body:
    """The slopes of a body of one output, backward in time: the states are slopes of states; the inputs are the
    output's slope, the states before the chunk and the body's inputs, whose slopes are the outputs."""

    def pulled(late: Matrices, slope: Array, *rest: Array) -> tuple[Matrices, Matrices]:
        states, inputs = rest[: len(late)], rest[len(late) :]
        _, pull = jax.vjp(body, states, *inputs)
        early, *slopes = pull((late, (slope,)))
        return early, tuple(slopes)

    return pulled


def shaped(*shape: int, dtype: DTypeLike = jnp.float32) -> jax.ShapeDtypeStruct:
    """The shape and dtype of an output."""
    return jax.ShapeDtypeStruct(shape, dtype)


def per_group(x: Float[Array, "B H T K"], groups: int) -> Float[Array, "B G T K"]:
    """The sum over the value heads that share a key head."""
    return jnp.sum(x.reshape(x.shape[0], groups, -1, *x.shape[2:]), axis=2) if groups < x.shape[1] else x


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def mm(a: Float[Array, "I J"], b: Float[Array, "J K"], dtype: DTypeLike) -> Float[Array, "I K"]:
    """a b of float32 matrices that are rounded to `dtype` for the product; so are the slopes of products."""
    return _contract(a, b, 1, 0, dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def mm_t(a: Float[Array, "I J"], b: Float[Array, "K J"], dtype: DTypeLike) -> Float[Array, "I K"]:
    """a b^T"""
    return _contract(a, b, 1, 1, dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def t_mm(a: Float[Array, "J I"], b: Float[Array, "J K"], dtype: DTypeLike) -> Float[Array, "I K"]:
    """a^T b"""
    return _contract(a, b, 0, 0, dtype)


def _contract(a: Array, b: Array, i: int, j: int, dtype: DTypeLike) -> Array:
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


def _differentiable(product: Any, left: Callable[..., Array], right: Callable[..., Array]) -> None:
    """left, right: the operands' slopes, given both operands, the product's slope and the dtype."""
    product.defvjp(
        lambda a, b, dtype: (product(a, b, dtype), (a, b)),
        lambda dtype, operands, slope: (left(*operands, slope, dtype), right(*operands, slope, dtype)),
    )


_differentiable(mm, lambda a, b, s, to: _contract(s, b, 1, 1, to), lambda a, b, s, to: _contract(a, s, 0, 0, to))
_differentiable(mm_t, lambda a, b, s, to: _contract(s, b, 1, 0, to), lambda a, b, s, to: _contract(s, a, 0, 0, to))
_differentiable(t_mm, lambda a, b, s, to: _contract(b, s, 1, 1, to), lambda a, b, s, to: _contract(a, s, 1, 0, to))
