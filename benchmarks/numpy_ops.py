"""A NumPy opponent for `op_speed` and `kernels`: the recurrences token by token in float64.

It takes the place of PyTorch and flash-linear-attention in tests: it reads the same files, accepts the same arrays, and
its results are compared in the same way. Gradients are central differences, so it is for tiny sizes only.
"""

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.messages import INPUTS, OpMessage, check_arrays, read_arrays, write_arrays
from benchmarks.worker import Workload, serve_workload

STEP = 1e-5
"""Step size of the central differences."""


def linear_attention(q: Any, k: Any, v: Any, log_decay: Any = None, scale: float | None = None) -> np.ndarray:
    """Linear attention: S_t = diag(exp(g_t)) S_{t-1} + k_t v_t^T, o_t = scale S_t^T q_t.

    Args:
        q, k: [B, T, H, K].
        v: [B, T, H, V].
        log_decay: g, [B, T, H] or [B, T, H, K]; None for no decay.
        scale: K**-0.5 by default.

    Returns:
        [B, T, H, V].
    """
    return gated_delta_rule(q, k, v, log_decay, None, scale)


def gated_delta_rule(
    q: Any, k: Any, v: Any, log_decay: Any = None, beta: Any = None, scale: float | None = None
) -> np.ndarray:
    """The gated delta rule: D = diag(exp(g_t)) S_{t-1}, S_t = D + b_t k_t (v_t - D^T k_t)^T, o_t = scale S_t^T q_t.

    Args:
        q, k: [B, T, H, K].
        v: [B, T, H, V].
        log_decay: g, [B, T, H] or [B, T, H, K]; None for no decay.
        beta: b, [B, T, H]; None for linear attention, which adds k_t v_t^T.
        scale: K**-0.5 by default.

    Returns:
        [B, T, H, V].
    """
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    batch, length, heads, width = q.shape
    scale = width**-0.5 if scale is None else scale
    decay = np.ones((*q.shape[:3], 1)) if log_decay is None else np.exp(np.asarray(log_decay, np.float64))
    decay = decay if decay.ndim == 4 else decay[..., None]
    state = np.zeros((batch, heads, width, v.shape[-1]))
    out = np.empty_like(v)
    for t in range(length):
        state = decay[:, t, :, :, None] * state
        new = v[:, t]
        if beta is not None:
            strength = np.asarray(beta, np.float64)[:, t, :, None]
            new = strength * (new - np.einsum("bhk,bhkv->bhv", k[:, t], state))
        state = state + k[:, t, :, :, None] * new[:, :, None, :]
        out[:, t] = scale * np.einsum("bhk,bhkv->bhv", q[:, t], state)
    return out


def mamba2(x: Any, dt: Any, a: Any, b: Any, c: Any) -> np.ndarray:
    """Mamba-2's scan: S_t = exp(dt_t a) S_{t-1} + dt_t b_t x_t^T, o_t = S_t^T c_t.

    Args:
        x: [B, T, H, V].
        dt: [B, T, H].
        a: [H].
        b, c: [B, T, H, K].

    Returns:
        [B, T, H, V].
    """
    x, dt, a = (np.asarray(each, np.float64) for each in (x, dt, a))
    return linear_attention(c, b, x * dt[..., None], log_decay=dt * a, scale=1.0)


def based(q: Any, k: Any, v: Any) -> np.ndarray:
    """BASED's attention: causal weights 1 + s + s^2 / 2 with s = q k^T / sqrt(K), divided by their sum.

    Args:
        q, k: [B, T, H, K].
        v: [B, T, H, V].

    Returns:
        [B, T, H, V].
    """
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    s = np.einsum("bihk,bjhk->bhij", q, k) * q.shape[-1] ** -0.5
    weights = np.tril(1 + s + s * s / 2)
    return np.einsum("bhij,bjhv->bihv", weights / weights.sum(-1, keepdims=True), v)


OPS: dict[str, Callable[..., np.ndarray]] = {"gated_delta_net": gated_delta_rule, "mamba2": mamba2}


def central_differences(function: Callable[..., float], arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Differentiate a scalar function of named arrays.

    Args:
        function: Takes the arrays by name.
        arrays: Float64, by name; changed in place meanwhile and restored.

    Returns:
        The gradients, float64, by name.
    """
    gradients = {name: np.empty_like(x) for name, x in arrays.items()}
    for name, x in arrays.items():
        for index in np.ndindex(x.shape):
            value = x[index]
            x[index] = value + STEP
            above = function(**arrays)
            x[index] = value - STEP
            gradients[name][index] = (above - function(**arrays)) / (2 * STEP)
            x[index] = value
    return gradients


class NumpyOp(Workload):
    """An op, forward and with the gradients of all its inputs.

    Args:
        folder: Where recallax's side wrote the inputs.

    Raises:
        HandoverError: The inputs are not those declared.
    """

    def __init__(self, folder: Path):
        self.message = OpMessage.read(folder)
        arrays = read_arrays(folder / INPUTS, self.message.file_specs())
        self.d_out = arrays.pop("d_out").astype(np.float64)
        self.inputs = {name: x.astype(np.float64) for name, x in arrays.items()}
        self.op = OPS[self.message.op]

    def step(self, part: str, index: int) -> dict[str, np.ndarray]:
        found = {"out": self.op(**self.inputs)}
        if part == "backward":
            found |= central_differences(lambda **inputs: float((self.op(**inputs) * self.d_out).sum()), self.inputs)
        return found

    def read(self, result: dict[str, np.ndarray]) -> list[float]:
        return []

    def write(self, path: Path) -> None:
        """Write the output and all gradients to a file. Raises HandoverError if they are not as declared."""
        found = {name: x.astype(np.float32) for name, x in self.step("backward", 0).items()}
        check_arrays(found, self.message.result_specs(), "NumPy's results")
        write_arrays(path, found, self.message.result_specs())


def main(folder: Path, mode: str, chunk: int, results: str) -> None:
    """Write the results, then reply to the driver. The mode and the chunk make no difference here."""
    workload = NumpyOp(folder)
    workload.write(folder / results)
    serve_workload(workload, {"numpy": np.__version__})


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4])
