"""The ops as `kernels` compares them with flash-linear-attention: inputs, recallax's call, and a roofline."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from benchmarks.messages import ArraySpec
from recallax.pallas_kernels.delta_rule import delta_rule
from recallax.pallas_kernels.linear_attention import linear_attention
from recallax.pallas_kernels.taylor_attention import num_features, taylor_attention

CHUNK = 64
"""Chunk of the roofline in tokens: scores are computed between the tokens of one chunk."""


class Shape(NamedTuple):
    """Sizes of an op's inputs."""

    rows: int
    tokens: int
    heads: int
    keys: int
    values: int


class Cost(NamedTuple):
    """The least work for one token of one head."""

    flops: float
    bytes: float


type Arrays = dict[str, jax.Array]


@dataclass(frozen=True)
class Comparison:
    """One op with one set of inputs, which both sides take under the same names."""

    op: Callable[..., jax.Array]
    """recallax's: takes the inputs by name, and `implementation`."""
    inputs: Callable[[Shape], dict[str, ArraySpec]]
    forward: Callable[[Shape], Cost]
    backward: Callable[[Shape], Cost]
    widths: tuple[tuple[int, int], ...] = ((64, 64), (128, 128))
    """Widths of keys and values per head."""

    def seconds(self, shape: Shape, backward: bool, flops: float, bandwidth: float) -> float:
        """Return the roofline's time.

        Args:
            shape: Sizes of the inputs.
            backward: Whether the two backward passes are included besides the forward pass.
            flops: Of the machine, per second.
            bandwidth: Of the machine, in bytes per second.

        Returns:
            Seconds.
        """
        count = shape.rows * shape.tokens * shape.heads
        costs = [self.forward(shape), *([self.backward(shape)] if backward else [])]
        return sum(count * max(cost.flops / flops, cost.bytes / bandwidth) for cost in costs)

    def draw(self, shape: Shape, seed: int = 0) -> Arrays:
        """Draw the inputs.

        Queries, keys and values are normal; keys have unit length where there is a `beta`, which is uniform in [0, 1).
        The log-decay `g` is between -0.1 and -0.001: a memory of 10 to 1000 tokens.

        Args:
            shape: Sizes of the inputs.
            seed: Of the random numbers.

        Returns:
            The arrays of `inputs`, by name.
        """
        specs = self.inputs(shape)
        found: Arrays = {}
        for index, (name, spec) in enumerate(specs.items()):
            key = jax.random.fold_in(jax.random.key(seed), index)
            if name == "g":
                x = -(10.0 ** jax.random.uniform(key, spec.shape, minval=-3.0, maxval=-1.0))
            elif name == "beta":
                x = jax.random.uniform(key, spec.shape)
            else:
                x = jax.random.normal(key, spec.shape)
            if name == "k" and "beta" in specs:
                x = x / jnp.linalg.norm(x, axis=-1, keepdims=True)
            found[name] = x.astype(spec.dtype)
        return found


def _qkv(shape: Shape) -> dict[str, ArraySpec]:
    tokens = (shape.rows, shape.tokens, shape.heads)
    key, value = (ArraySpec((*tokens, width), "bfloat16") for width in (shape.keys, shape.values))
    return {"q": key, "k": key, "v": value}


def _gated(shape: Shape) -> dict[str, ArraySpec]:
    """A decay per token, float32 as in both libraries' layers."""
    return _qkv(shape) | {"g": ArraySpec((shape.rows, shape.tokens, shape.heads))}


def _channel_gated(shape: Shape) -> dict[str, ArraySpec]:
    return _qkv(shape) | {"g": ArraySpec((shape.rows, shape.tokens, shape.heads, shape.keys))}


def _with_beta(inputs: Callable[[Shape], dict[str, ArraySpec]]) -> Callable[[Shape], dict[str, ArraySpec]]:
    return lambda shape: inputs(shape) | {"beta": ArraySpec((shape.rows, shape.tokens, shape.heads))}


def _linear(q: Any, k: Any, v: Any, g: Any = None, *, implementation: str) -> jax.Array:
    return linear_attention(q, k, v, log_decay=g, implementation=implementation)[0]


def _delta(q: Any, k: Any, v: Any, g: Any, beta: Any, *, implementation: str) -> jax.Array:
    return delta_rule(q, k, v, erase=beta, write=beta, log_decay=g, implementation=implementation)[0]


def _taylor(q: Any, k: Any, v: Any, *, implementation: str) -> jax.Array:
    return taylor_attention(q, k, v, implementation=implementation)[0]


def _linear_cost(gate: Callable[[Shape], int]) -> tuple[Callable[[Shape], Cost], Callable[[Shape], Cost]]:
    """Linear attention: scores within a chunk and the carried state; `gate` gives the bytes of decay per token."""

    def forward(s: Shape) -> Cost:
        flops = 2 * CHUNK * (s.keys + s.values) + 4 * s.keys * s.values
        return Cost(flops, 2 * (2 * s.keys + 2 * s.values) + gate(s))

    def backward(s: Shape) -> Cost:
        """Two passes: one forward in time for the gradient of q, one backward for those of k and v."""
        flops = 2 * CHUNK * (4 * s.keys + 3 * s.values) + 10 * s.keys * s.values
        return Cost(flops, 2 * (6 * s.keys + 5 * s.values) + 4 * gate(s))

    return forward, backward


def _delta_cost(gate: Callable[[Shape], int]) -> tuple[Callable[[Shape], Cost], Callable[[Shape], Cost]]:
    """The delta rule: the triangular system on top, and chunk states stored for the backward pass."""

    def forward(s: Shape) -> Cost:
        flops = 2 * CHUNK * (3 * s.keys + 2 * s.values) + 6 * s.keys * s.values + 4 * CHUNK**2 / 3
        return Cost(flops, 2 * (2 * s.keys + 2 * s.values) + gate(s) + 4)

    def backward(s: Shape) -> Cost:
        flops = 2 * CHUNK * (6 * s.keys + 5 * s.values) + 18 * s.keys * s.values
        return Cost(flops, 2 * (6 * s.keys + 6 * s.values) + 4 * s.keys * s.values / CHUNK + 4 * gate(s))

    return forward, backward


def _based_forward(s: Shape) -> Cost:
    count = num_features(s.keys, "symmetric")
    return Cost(2 * CHUNK * (s.keys + s.values) + 4 * count * s.values, 2 * (2 * s.keys + 2 * s.values))


def _based_backward(s: Shape) -> Cost:
    count = num_features(s.keys, "symmetric")
    flops = 2 * CHUNK * (4 * s.keys + 3 * s.values) + 10 * count * s.values
    return Cost(flops, 2 * (6 * s.keys + 5 * s.values))


COMPARISONS: dict[str, Comparison] = {
    "linear_attention": Comparison(_linear, _qkv, *_linear_cost(lambda s: 0)),
    "simple_gla": Comparison(_linear, _gated, *_linear_cost(lambda s: 4)),
    "gla": Comparison(_linear, _channel_gated, *_linear_cost(lambda s: 4 * s.keys)),
    "gated_delta_net": Comparison(_delta, _with_beta(_gated), *_delta_cost(lambda s: 4)),
    "kda": Comparison(_delta, _with_beta(_channel_gated), *_delta_cost(lambda s: 4 * s.keys)),
    "based": Comparison(_taylor, _qkv, _based_forward, _based_backward, widths=((16, 64),)),
}
"""By name; the opponent's calls have the same names in `fla_ops.OPS`."""
