"""The ops as benchmarks call them: a function of named arrays, and inputs drawn for given sizes.

Shared by the comparison with PyTorch, by the timings of long inputs, and by the test of memory.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np

from benchmarks.messages import OpMessage
from recallax.pallas_kernels.delta_rule import delta_rule
from recallax.pallas_kernels.linear_attention import linear_attention
from recallax.pallas_kernels.selective_scan import selective_scan
from recallax.pallas_kernels.short_conv import short_conv
from recallax.pallas_kernels.taylor_attention import taylor_attention
from recallax.pallas_kernels.window_attention import window_attention

WINDOW = 128
STATE_DIM = 16
"""N of the selective scan."""
CONV_SIZE = 4

type Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class OpCase:
    """One op in one use."""

    forward: Callable[..., jax.Array]
    """Takes the inputs by name and returns the output without the final state, which the opponents do not return."""
    draw: Callable[[OpMessage, np.random.Generator], Arrays]
    opponent: str | None = None
    """Its name in transformers."""
    chunks: tuple[int, ...] = ()
    """Sizes of the opponent's chunks: first the one that is fastest with backward here (eager), then the default of its
    model (Mamba-2), or one that is faster forward (Gated DeltaNet)."""

    def inputs(self, message: OpMessage) -> Arrays:
        """Return float32 inputs by name, the same at every call."""
        arrays = self.draw(message, np.random.default_rng(0))
        return {name: x.astype(np.float32) for name, x in arrays.items()}

    def backward(self, inputs: dict[str, Any], d_out: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Run the op with its gradients.

        Args:
            inputs: By name.
            d_out: The gradient of the output.

        Returns:
            The output, and the gradients of the inputs by name.
        """
        out, pull = jax.vjp(lambda inputs: self.forward(**inputs), inputs)
        (gradients,) = pull(d_out)
        return out, gradients


def _draw_qkv(message: OpMessage, rng: np.random.Generator) -> Arrays:
    """Queries, keys of length 1 and values."""
    tokens = (message.batch, message.length, message.heads)
    k = rng.normal(size=(*tokens, message.keys))
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    return {"q": rng.normal(size=(*tokens, message.keys)), "k": k, "v": rng.normal(size=(*tokens, message.values))}


def _draw_with_decay(per_channel: bool, message: OpMessage, rng: np.random.Generator) -> Arrays:
    """With the log-decay of a memory of 10 to 1000 tokens."""
    arrays = _draw_qkv(message, rng)
    shape = arrays["k"].shape if per_channel else arrays["k"].shape[:3]
    return arrays | {"log_decay": -(10.0 ** rng.uniform(-3, -1, size=shape))}


def _with_beta(
    draw: Callable[[OpMessage, np.random.Generator], Arrays], message: OpMessage, rng: np.random.Generator
) -> Arrays:
    arrays = draw(message, rng)
    return arrays | {"beta": rng.uniform(0.1, 0.9, size=arrays["k"].shape[:3])}


def _draw_mamba2(message: OpMessage, rng: np.random.Generator) -> Arrays:
    """Inputs, step sizes and rates as in a Mamba-2 at initialization."""
    parts = _draw_qkv(message, rng)
    dt = 10.0 ** rng.uniform(-3, -1, size=parts["k"].shape[:3])
    return {"x": parts["v"], "dt": dt, "a": -rng.uniform(1, 16, size=message.heads), "b": parts["k"], "c": parts["q"]}


def _draw_channels(message: OpMessage, rng: np.random.Generator) -> Arrays:
    return {"x": rng.normal(size=(message.batch, message.length, message.heads * message.values))}


def _draw_selective_scan(message: OpMessage, rng: np.random.Generator) -> Arrays:
    x = _draw_channels(message, rng)["x"]
    b, c = rng.normal(size=(2, *x.shape[:2], STATE_DIM))
    a = -np.tile(np.arange(1.0, STATE_DIM + 1), (x.shape[2], 1))
    return {"x": x, "rate": 10.0 ** rng.uniform(-3, -1, size=x.shape), "a": a, "b": b, "c": c}


def _draw_short_conv(message: OpMessage, rng: np.random.Generator) -> Arrays:
    x = _draw_channels(message, rng)["x"]
    return {"x": x, "weight": rng.normal(size=(CONV_SIZE, x.shape[2]))}


def _delta(q: Any, k: Any, v: Any, beta: Any, log_decay: Any = None) -> jax.Array:
    return delta_rule(q, k, v, erase=beta, write=beta, log_decay=log_decay)[0]


def _mamba2(x: Any, dt: Any, a: Any, b: Any, c: Any) -> jax.Array:
    return linear_attention(c, b, x * dt[..., None], log_decay=dt * a[None, None], scale=1.0)[0]


def _linear_attention(q: Any, k: Any, v: Any, log_decay: Any = None) -> jax.Array:
    return linear_attention(q, k, v, log_decay=log_decay)[0]


def _taylor(q: Any, k: Any, v: Any) -> jax.Array:
    return taylor_attention(q, k, v)[0]


def _window_attention(q: Any, k: Any, v: Any) -> jax.Array:
    return window_attention(q, k, v, window=WINDOW)[0]


def _scan(x: Any, rate: Any, a: Any, b: Any, c: Any) -> jax.Array:
    return selective_scan(x, rate, a=a, b=b, c=c)[0]


def _conv(x: Any, weight: Any) -> jax.Array:
    return short_conv(x, weight)[0]


_draw_with_scalar_decay, _draw_with_channel_decay = partial(_draw_with_decay, False), partial(_draw_with_decay, True)
OP_BENCHMARKS: dict[str, OpCase] = {
    "gated_delta_net": OpCase(
        _delta, partial(_with_beta, _draw_with_scalar_decay), "torch_chunk_gated_delta_rule", (64, 32)
    ),
    "mamba2": OpCase(_mamba2, _draw_mamba2, "mamba2_chunk_scan", (64, 256)),
    "linear_attention": OpCase(_linear_attention, _draw_qkv),
    "linear_attention, token decay": OpCase(_linear_attention, _draw_with_scalar_decay),
    "linear_attention, channel decay": OpCase(_linear_attention, _draw_with_channel_decay),
    "taylor_attention": OpCase(_taylor, _draw_qkv),
    "delta_rule": OpCase(_delta, partial(_with_beta, _draw_qkv)),
    "delta_rule, token decay": OpCase(_delta, partial(_with_beta, _draw_with_scalar_decay)),
    "delta_rule, channel decay": OpCase(_delta, partial(_with_beta, _draw_with_channel_decay)),
    "selective_scan": OpCase(_scan, _draw_selective_scan),
    "window_attention": OpCase(_window_attention, _draw_qkv),
    "short_conv": OpCase(_conv, _draw_short_conv),
}
COMPARED = tuple(name for name, case in OP_BENCHMARKS.items() if case.opponent)
"""Cases with an opponent."""
STANDALONE_OPS = tuple(name for name, case in OP_BENCHMARKS.items() if not case.opponent)
"""Cases without one."""


def temporary_and_output_bytes(benchmark: OpCase, message: OpMessage, *, backward: bool) -> int:
    """Compile an op and return the bytes of its temporaries and outputs; nothing is run.

    Args:
        case: The op.
        message: Its sizes.
        backward: Whether the gradients of all inputs are included.

    Raises:
        RuntimeError: The backend does not report the memory of compiled functions.
    """
    inputs = benchmark.inputs(message)
    d_out = jax.eval_shape(lambda inputs: benchmark.forward(**inputs), inputs)
    if backward:
        compiled = jax.jit(benchmark.backward).lower(inputs, d_out).compile()
    else:
        compiled = jax.jit(benchmark.forward).lower(**inputs).compile()
    held = compiled.memory_analysis()
    if held is None:
        raise RuntimeError("this backend does not report the memory of compiled functions")
    return held.temp_size_in_bytes + held.output_size_in_bytes
