"""The skeleton of the kernels for TPUs: a walk over the chunks of a sequence with a state carried in VMEM.

A kernel is a function of one head's chunk, in plain jax.numpy on matrices:

    body(state [K, V], *inputs) -> (state, *outputs)

`walk` runs it over all rows, heads and chunks. A grid step takes the same chunk of several heads, so that their
independent chains of products fill the units side by side. Chunks are the last axis of the grid and run one after
another, forward or backward in time; the state stays in VMEM, in the block that becomes the final state. Since bodies
are pure, backward kernels call `jax.vjp` on them inside the kernel.

Sequences are head-major, [B, H, T, W], so that any width is a whole lane axis. Numbers per token are rows,
[B, H, R, T], with time along the lanes: as columns each would take 128 lanes in memory.
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

INTERPRETER: Any = pltpu.InterpretParams()
"""What runs the kernels where there is no TPU, within `dispatch.interpreted()`."""
SIDE_BY_SIDE = 4
"""Value heads of a grid step at most."""

type Index = tuple[int, ...]


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
    def grid(self) -> Index:
        return (self.rows, self.heads // self.block, self.chunks)

    def time(self, n: Any) -> Any:
        """The chunk that the n-th step takes."""
        return self.chunks - 1 - n if self.reverse else n


@dataclass(frozen=True)
class Operand(abc.ABC):
    """An array, or the shape and dtype of an output, and how the matrix of a head's chunk is found in it."""

    array: Any

    @abc.abstractmethod
    def spec(self, steps: Steps) -> pl.BlockSpec:
        """The block of a grid step."""

    def at(self, head: int, steps: Steps) -> Index:
        """Where in the block the matrix of one of its value heads lies."""
        return (0, head)


class Tokens(Operand):
    """[B, G, T, W], each of G heads shared by H / G value heads in a row; a chunk is [C, W]."""

    def spec(self, steps: Steps) -> pl.BlockSpec:
        _, groups, _, width = self.array.shape
        share = steps.heads // groups
        own, shared = max(1, steps.block // share), max(1, share // steps.block)
        return pl.BlockSpec((1, own, steps.chunk, width), lambda b, h, n: (b, h // shared, steps.time(n), 0))

    def at(self, head: int, steps: Steps) -> Index:
        share = steps.heads // self.array.shape[1]
        return (0, head // share)  # 0 where a step takes part of a group


class Rows(Operand):
    """[B, H, R, T], numbers per token; a chunk is [R, C]."""

    def spec(self, steps: Steps) -> pl.BlockSpec:
        rows = self.array.shape[2]
        return pl.BlockSpec((1, steps.block, rows, steps.chunk), lambda b, h, n: (b, h, 0, steps.time(n)))


class States(Operand):
    """[B, H, K, V], the same for all chunks."""

    def spec(self, steps: Steps) -> pl.BlockSpec:
        return pl.BlockSpec((1, steps.block, *self.array.shape[2:]), lambda b, h, n: (b, h, 0, 0))


class Saved(Operand):
    """[B, H, N, K, V], a state per chunk."""

    def spec(self, steps: Steps) -> pl.BlockSpec:
        shape = self.array.shape[3:]
        return pl.BlockSpec((1, steps.block, 1, *shape), lambda b, h, n: (b, h, steps.time(n), 0, 0))

    def at(self, head: int, steps: Steps) -> Index:
        return (0, head, 0)


def walk(
    name: str,
    body: Callable[..., tuple[Array, ...]],
    steps: Steps,
    state: Float[Array, "B H K V"],
    inputs: Sequence[Operand],
    outputs: Sequence[Operand],
) -> tuple[Array, ...]:
    """Run `body` over all chunks; returns the final float32 state [B, H, K, V], then the outputs.

    body: (state [K, V], a matrix per input) -> (state, a matrix per output), all float32; outputs are cast to their
    dtype.
    """
    carried = States(state)
    count = len(inputs)

    def kernel(first: Any, *refs: Any) -> None:
        held, results = refs[count], refs[count + 1 :]

        @pl.when(pl.program_id(2) == 0)
        def _() -> None:
            held[...] = first[...]

        for head in range(steps.block):
            matrices = (x.at(head, steps) for x in inputs)
            own = carried.at(head, steps)
            read = (ref[at].astype(jnp.float32) for ref, at in zip(refs[:count], matrices, strict=True))
            new, *out = body(held[own], *read)
            held[own] = new
            for operand, ref, value in zip(outputs, results, out, strict=True):
                ref[operand.at(head, steps)] = value.astype(ref.dtype)

    made = (carried, *outputs)
    return pl.pallas_call(
        kernel,
        out_shape=tuple(jax.ShapeDtypeStruct(x.array.shape, x.array.dtype) for x in made),
        grid=steps.grid,
        in_specs=[x.spec(steps) for x in (carried, *inputs)],
        out_specs=tuple(x.spec(steps) for x in made),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        interpret=INTERPRETER if steps.interpret else False,
        name=name,
    )(state, *(x.array for x in inputs))


def block_of(heads: int, groups: int) -> int:
    """Value heads of a grid step: as many as fit that are a divisor or a multiple of those that share a key head."""
    share = heads // groups
    fits = (n for n in range(SIDE_BY_SIDE, 0, -1) if heads % n == 0 and (share % n == 0 or n % share == 0))
    return next(fits)


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
    exact = jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None
    axes = (((i,), (j,)), ((), ()))
    a, b = a.astype(dtype), b.astype(dtype)
    return jax.lax.dot_general(a, b, axes, precision=exact, preferred_element_type=jnp.float32)


def _differentiable(product: Any, left: Callable[..., Array], right: Callable[..., Array]) -> None:
    """left, right: the operands' slopes, given both operands, the product's slope and the dtype."""
    product.defvjp(
        lambda a, b, dtype: (product(a, b, dtype), (a, b)),
        lambda dtype, operands, slope: (left(*operands, slope, dtype), right(*operands, slope, dtype)),
    )


_differentiable(mm, lambda a, b, s, to: _contract(s, b, 1, 1, to), lambda a, b, s, to: _contract(a, s, 0, 0, to))
_differentiable(mm_t, lambda a, b, s, to: _contract(s, b, 1, 0, to), lambda a, b, s, to: _contract(s, a, 0, 0, to))
_differentiable(t_mm, lambda a, b, s, to: _contract(b, s, 1, 1, to), lambda a, b, s, to: _contract(a, s, 1, 0, to))
