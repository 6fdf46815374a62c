# pyright: reportMissingImports=false
# (torch and fla live where the GPU is.)
"""The ops as `kernels` races them: recallax's call, fla's call, inputs, and the least work there is."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax

from recallax.pallas_kernels.delta_rule import delta_rule
from recallax.pallas_kernels.linear_attention import linear_attention
from recallax.pallas_kernels.taylor_attention import state_width, taylor_attention

CHUNK = 64
"""Of the least work: tokens between which scores are formed."""


class Shape(NamedTuple):
    rows: int
    tokens: int
    heads: int
    keys: int
    values: int


class Work(NamedTuple):
    """Of one token of one head."""

    flops: float
    bytes: float


type Tensors = dict[str, Any]


@dataclass(frozen=True)
class Race:
    """One op in one use; inputs are named alike on both sides."""

    ours: Callable[[dict[str, jax.Array], str], jax.Array]
    theirs: Callable[[Tensors], Any]
    draw: Callable[[Shape], Tensors]
    forward: Callable[[Shape], Work]
    backward: Callable[[Shape], Work]
    widths: tuple[tuple[int, int], ...] = ((64, 64), (128, 128))

    def seconds(self, shape: Shape, backward: bool, flops: float, bandwidth: float) -> float:
        """What a machine of these rates needs at least; the two passes of `backward` come on top of the forward."""
        count = shape.rows * shape.tokens * shape.heads
        parts = [self.forward(shape), *([self.backward(shape)] if backward else [])]
        return sum(count * max(work.flops / flops, work.bytes / bandwidth) for work in parts)


def _bf16(*shape: int) -> Any:
    import torch

    return torch.randn(shape, device="cuda", dtype=torch.bfloat16)


def _plain(shape: Shape) -> Tensors:
    b, t, h, keys, values = shape
    return {"q": _bf16(b, t, h, keys), "k": _bf16(b, t, h, keys), "v": _bf16(b, t, h, values)}


def _gated(shape: Shape) -> Tensors:
    """A memory that lasts between 10 and 1000 tokens, float32 as in both libraries' layers."""
    import torch

    uniform = torch.rand(shape[:3], device="cuda")
    return _plain(shape) | {"g": -(10.0 ** (-3 + 2 * uniform))}


def _channels(shape: Shape) -> Tensors:
    import torch

    uniform = torch.rand(shape[:4], device="cuda")
    return _plain(shape) | {"g": -(10.0 ** (-3 + 2 * uniform))}


def _erasing(draw: Callable[[Shape], Tensors]) -> Callable[[Shape], Tensors]:
    def drawn(shape: Shape) -> Tensors:
        import torch

        tensors = draw(shape)
        k = torch.nn.functional.normalize(tensors["k"].float(), dim=-1).to(torch.bfloat16)
        return tensors | {"k": k, "beta": torch.rand(shape[:3], device="cuda")}

    return drawn


def _linear(inputs: dict[str, jax.Array], form: str) -> jax.Array:
    q, k, v = (inputs[name] for name in ("q", "k", "v"))
    return linear_attention(q, k, v, log_decay=inputs.get("g"), implementation=form)[0]


def _delta(inputs: dict[str, jax.Array], form: str) -> jax.Array:
    q, k, v, g, beta = (inputs[name] for name in ("q", "k", "v", "g", "beta"))
    return delta_rule(q, k, v, erase=beta, write=beta, log_decay=g, implementation=form)[0]


def _taylor(inputs: dict[str, jax.Array], form: str) -> jax.Array:
    return taylor_attention(inputs["q"], inputs["k"], inputs["v"], implementation=form)[0]


def _fla_linear(x: Tensors) -> Any:
    from fla.ops.linear_attn import chunk_linear_attn

    return chunk_linear_attn(x["q"], x["k"], x["v"], normalize=False)[0]


def _fla_simple(x: Tensors) -> Any:
    from fla.ops.simple_gla import chunk_simple_gla

    return chunk_simple_gla(x["q"], x["k"], x["v"], g=x["g"])[0]


def _fla_gla(x: Tensors) -> Any:
    from fla.ops.gla import chunk_gla

    return chunk_gla(x["q"], x["k"], x["v"], g=x["g"])[0]


def _fla_gated_delta(x: Tensors) -> Any:
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    return chunk_gated_delta_rule(x["q"], x["k"], x["v"], g=x["g"], beta=x["beta"])[0]


def _fla_kda(x: Tensors) -> Any:
    from fla.ops.kda import chunk_kda

    return chunk_kda(x["q"], x["k"], x["v"], g=x["g"], beta=x["beta"])[0]


def _fla_based(x: Tensors) -> Any:
    from fla.ops.based import parallel_based

    return parallel_based(x["q"], x["k"], x["v"])


def _additive(gate: Callable[[Shape], int]) -> tuple[Callable[[Shape], Work], Callable[[Shape], Work]]:
    """Scores within a chunk and the carried state, in both passes; `gate` is bytes of float32 decay per token."""

    def forward(s: Shape) -> Work:
        flops = 2 * CHUNK * (s.keys + s.values) + 4 * s.keys * s.values
        return Work(flops, 2 * (2 * s.keys + 2 * s.values) + gate(s))

    def backward(s: Shape) -> Work:
        """Two passes: the gradient of q walks forward in time, those of k and v backward."""
        flops = 2 * CHUNK * (4 * s.keys + 3 * s.values) + 10 * s.keys * s.values
        return Work(flops, 2 * (6 * s.keys + 5 * s.values) + 4 * gate(s))

    return forward, backward


def _tied(gate: Callable[[Shape], int]) -> tuple[Callable[[Shape], Work], Callable[[Shape], Work]]:
    """With erasing: the triangular system on top, and chunk states saved for the backward."""

    def forward(s: Shape) -> Work:
        flops = 2 * CHUNK * (3 * s.keys + 2 * s.values) + 6 * s.keys * s.values + 4 * CHUNK**2 / 3
        return Work(flops, 2 * (2 * s.keys + 2 * s.values) + gate(s) + 4)

    def backward(s: Shape) -> Work:
        flops = 2 * CHUNK * (6 * s.keys + 5 * s.values) + 18 * s.keys * s.values
        return Work(flops, 2 * (6 * s.keys + 6 * s.values) + 4 * s.keys * s.values / CHUNK + 4 * gate(s))

    return forward, backward


def _features(s: Shape) -> Work:
    count = state_width(s.keys, "symmetric")
    return Work(2 * CHUNK * (s.keys + s.values) + 4 * count * s.values, 2 * (2 * s.keys + 2 * s.values))


def _features_back(s: Shape) -> Work:
    count = state_width(s.keys, "symmetric")
    flops = 2 * CHUNK * (4 * s.keys + 3 * s.values) + 10 * count * s.values
    return Work(flops, 2 * (6 * s.keys + 5 * s.values))


RACES: dict[str, Race] = {
    "linear_attention": Race(_linear, _fla_linear, _plain, *_additive(lambda s: 0)),
    "simple_gla": Race(_linear, _fla_simple, _gated, *_additive(lambda s: 4)),
    "gla": Race(_linear, _fla_gla, _channels, *_additive(lambda s: 4 * s.keys)),
    "gated_delta_net": Race(_delta, _fla_gated_delta, _erasing(_gated), *_tied(lambda s: 4)),
    "kda": Race(_delta, _fla_kda, _erasing(_channels), *_tied(lambda s: 4 * s.keys)),
    "based": Race(_taylor, _fla_based, _plain, _features, _features_back, widths=((16, 64),)),
}
