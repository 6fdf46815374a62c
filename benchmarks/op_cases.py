"""The ops as benchmarks call them: a function of named arrays, and inputs drawn for given sizes.

Shared by the timings against PyTorch, by those of long inputs, and by the test of memory.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np

from benchmarks.jobs import OpCall
from recallax.pallas_kernels.delta_rule import delta_rule
from recallax.pallas_kernels.linear_attention import linear_attention
from recallax.pallas_kernels.selective_scan import selective_scan
from recallax.pallas_kernels.short_conv import short_conv
from recallax.pallas_kernels.taylor_attention import taylor_attention
from recallax.pallas_kernels.window_attention import window_attention

WINDOW = 128
STATES = 16
"""N of the selective scan."""
TAPS = 4

type Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Case:
    """One op in one use."""

    forward: Callable[..., jax.Array]
    """The output; the final state is left out, as the opponents leave it out."""
    draw: Callable[[OpCall, np.random.Generator], Arrays]
    opponent: str | None = None
    """What the same is called in transformers."""
    chunks: tuple[int, ...] = ()
    """The opponent's: first the one that is fastest with backward here (eager), then one that may matter as well: the
    default of its model (Mamba-2), or one that is faster forward (Gated DeltaNet)."""

    def inputs(self, call: OpCall) -> Arrays:
        """Float32 inputs by name, the same at every call."""
        arrays = self.draw(call, np.random.default_rng(0))
        return {name: x.astype(np.float32) for name, x in arrays.items()}

    def backward(self, inputs: dict[str, Any], slope: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The output and the gradients of all inputs, given that of the output."""
        out, pull = jax.vjp(lambda inputs: self.forward(**inputs), inputs)
        (gradients,) = pull(slope)
        return out, gradients


def _keys(call: OpCall, rng: np.random.Generator) -> Arrays:
    """Queries, keys of length 1 and values."""
    tokens = (call.batch, call.length, call.heads)
    k = rng.normal(size=(*tokens, call.keys))
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    return {"q": rng.normal(size=(*tokens, call.keys)), "k": k, "v": rng.normal(size=(*tokens, call.values))}


def _decayed(per_channel: bool, call: OpCall, rng: np.random.Generator) -> Arrays:
    """Those and a memory that lasts between 10 and 1000 tokens."""
    arrays = _keys(call, rng)
    shape = arrays["k"].shape if per_channel else arrays["k"].shape[:3]
    return arrays | {"log_decay": -(10.0 ** rng.uniform(-3, -1, size=shape))}


def _erasing(draw: Callable[[OpCall, np.random.Generator], Arrays], call: OpCall, rng: np.random.Generator) -> Arrays:
    arrays = draw(call, rng)
    return arrays | {"beta": rng.uniform(0.1, 0.9, size=arrays["k"].shape[:3])}


def _state_space(call: OpCall, rng: np.random.Generator) -> Arrays:
    """Inputs, step sizes and rates as in a Mamba-2 at initialisation."""
    parts = _keys(call, rng)
    dt = 10.0 ** rng.uniform(-3, -1, size=parts["k"].shape[:3])
    return {"x": parts["v"], "dt": dt, "a": -rng.uniform(1, 16, size=call.heads), "b": parts["k"], "c": parts["q"]}


def _channels(call: OpCall, rng: np.random.Generator) -> Arrays:
    return {"x": rng.normal(size=(call.batch, call.length, call.heads * call.values))}


def _scanned(call: OpCall, rng: np.random.Generator) -> Arrays:
    x = _channels(call, rng)["x"]
    b, c = rng.normal(size=(2, *x.shape[:2], STATES))
    a = -np.tile(np.arange(1.0, STATES + 1), (x.shape[2], 1))
    return {"x": x, "rate": 10.0 ** rng.uniform(-3, -1, size=x.shape), "a": a, "b": b, "c": c}


def _convolved(call: OpCall, rng: np.random.Generator) -> Arrays:
    x = _channels(call, rng)["x"]
    return {"x": x, "weight": rng.normal(size=(TAPS, x.shape[2]))}


def _delta(q: Any, k: Any, v: Any, beta: Any, log_decay: Any = None) -> jax.Array:
    return delta_rule(q, k, v, erase=beta, write=beta, log_decay=log_decay)[0]


def _mamba2(x: Any, dt: Any, a: Any, b: Any, c: Any) -> jax.Array:
    return linear_attention(c, b, x * dt[..., None], log_decay=dt * a[None, None], scale=1.0)[0]


def _output(op: Callable[..., tuple[jax.Array, Any]]) -> Callable[..., jax.Array]:
    return lambda *arguments, **inputs: op(*arguments, **inputs)[0]


_token, _channel = partial(_decayed, False), partial(_decayed, True)
_linear, _window = _output(linear_attention), _output(partial(window_attention, window=WINDOW))
CASES: dict[str, Case] = {
    "gated_delta_net": Case(_delta, partial(_erasing, _token), "torch_chunk_gated_delta_rule", (64, 32)),
    "mamba2": Case(_mamba2, _state_space, "mamba2_chunk_scan", (64, 256)),
    "linear_attention": Case(_linear, _keys),
    "linear_attention, token decay": Case(_linear, _token),
    "linear_attention, channel decay": Case(_linear, _channel),
    "taylor_attention": Case(_output(taylor_attention), _keys),
    "delta_rule": Case(_delta, partial(_erasing, _keys)),
    "delta_rule, token decay": Case(_delta, partial(_erasing, _token)),
    "delta_rule, channel decay": Case(_delta, partial(_erasing, _channel)),
    "selective_scan": Case(_output(selective_scan), _scanned),
    "window_attention": Case(_window, _keys),
    "short_conv": Case(_output(short_conv), _convolved),
}
RACED = tuple(name for name, case in CASES.items() if case.opponent)
ALONE = tuple(name for name, case in CASES.items() if not case.opponent)


def held_bytes(case: Case, call: OpCall, *, backward: bool) -> int:
    """Bytes of temporaries and outputs of the compiled op, its inputs left out; nothing is run."""
    inputs = case.inputs(call)
    slope = jax.eval_shape(lambda inputs: case.forward(**inputs), inputs)
    if backward:
        compiled = jax.jit(case.backward).lower(inputs, slope).compile()
    else:
        compiled = jax.jit(case.forward).lower(**inputs).compile()
    held = compiled.memory_analysis()
    if held is None:
        raise RuntimeError("this backend does not tell what a compiled function holds")
    return held.temp_size_in_bytes + held.output_size_in_bytes
