"""A NumPy opponent for `train_speed`: the model of `torch_mqar` in float64, with AdamW.

It takes the place of PyTorch in tests: it reads the same files under the same names. Gradients are central
differences, so it is for tiny models only.
"""

import sys
from pathlib import Path

import numpy as np

from benchmarks.messages import BATCHES, PARAMETERS, OptimizerMessage, TrainingMessage, read_arrays
from benchmarks.numpy_ops import based, central_differences
from benchmarks.worker import Workload, serve_workload

NORM_EPS = 1e-5


def rms_norm(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Divide by the root of the mean square over the last axis, and multiply by a weight."""
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + NORM_EPS) * weight


def softmax_attention(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Causal softmax attention with one head; q and k are [B, T, K], v is [B, T, V]."""
    s = q @ k.swapaxes(1, 2) * q.shape[-1] ** -0.5
    weights = np.tril(np.exp(s - s.max(-1, keepdims=True)))
    return weights / weights.sum(-1, keepdims=True) @ v


def base_conv(x: np.ndarray, taps: np.ndarray, bias: np.ndarray, weight: np.ndarray, gate_bias: np.ndarray):
    """y = conv(x) * (W x + b) + x; x is [B, T, D], taps are [W, D]."""
    count, length = taps.shape[0], x.shape[1]
    past = np.pad(x, ((0, 0), (count - 1, 0), (0, 0)))
    y = bias + sum(taps[i] * past[:, i : i + length] for i in range(count))
    return y * (x @ weight.T + gate_bias) + x


class NumpyTraining(Workload):
    """The model, AdamW with clipping, and the batches.

    Args:
        folder: Where recallax's side wrote what the opponent starts from.

    Raises:
        HandoverError: Parameters, batches or settings are not those declared.
    """

    def __init__(self, folder: Path):
        self.message = TrainingMessage.read(folder)
        stored = read_arrays(folder / PARAMETERS, self.message.parameter_specs())
        self.parameters = {name: x.astype(np.float64) for name, x in stored.items()}
        self.batches = read_arrays(folder / BATCHES, self.message.batch_specs())
        self.optimizer = OptimizerMessage.read(folder)
        self.first = {name: np.zeros_like(x) for name, x in self.parameters.items()}
        self.second = {name: np.zeros_like(x) for name, x in self.parameters.items()}
        self.count = 0

    def loss(self, tokens: np.ndarray, positions: np.ndarray, targets: np.ndarray, **p: np.ndarray) -> float:
        """Return the mean cross-entropy.

        Args:
            tokens: [B, T].
            positions: Of the labels, [B, N].
            targets: Ids at these positions, [B, N].
            **p: The parameters by name.
        """
        r = p["embedding.weight"][tokens]
        for index in range(2):
            block = f"blocks.{index}"
            x = rms_norm(r, p[f"{block}.mixer_norm.weight"])
            mixer = f"{block}.mixer"
            if index == 0:
                gate = p[f"{mixer}.gate.weight"], p[f"{mixer}.gate.bias"]
                r = r + base_conv(x, p[f"{mixer}.taps"], p[f"{mixer}.bias"], *gate)
            else:
                q, k, v = (x @ p[f"{mixer}.{name}.weight"].T for name in "qkv")
                if self.message.mixer == "based":
                    out = based(*(each[:, :, None] for each in (q, k, v)))[:, :, 0]
                else:
                    out = softmax_attention(q, k, v)
                r = r + out @ p[f"{mixer}.out.weight"].T
            r = r + rms_norm(r, p[f"{block}.channel_norm.weight"])
        features = rms_norm(np.take_along_axis(r, positions[..., None], axis=1), p["norm.weight"])
        logits = features @ p["embedding.weight"].T
        top = logits.max(-1, keepdims=True)
        normaliser = np.log(np.exp(logits - top).sum(-1)) + top[..., 0]
        return float((normaliser - np.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]).mean())

    def step(self, part: str, index: int) -> tuple[float, float]:
        batch = [self.batches[name][index] for name in ("tokens", "positions", "targets")]
        loss = self.loss(*batch, **self.parameters)
        gradients = central_differences(lambda **p: self.loss(*batch, **p), self.parameters)
        norm = float(np.sqrt(sum((x * x).sum() for x in gradients.values())))
        optimizer, self.count = self.optimizer, self.count + 1
        rate = optimizer.learning_rates[index]
        for name, parameter in self.parameters.items():
            gradient = gradients[name] * min(1.0, optimizer.max_grad_norm / norm)
            self.first[name] = optimizer.b1 * self.first[name] + (1 - optimizer.b1) * gradient
            self.second[name] = optimizer.b2 * self.second[name] + (1 - optimizer.b2) * gradient**2
            mean = self.first[name] / (1 - optimizer.b1**self.count)
            root = np.sqrt(self.second[name] / (1 - optimizer.b2**self.count))
            decay = optimizer.weight_decay * parameter if parameter.ndim >= 2 else 0.0
            self.parameters[name] = parameter - rate * (mean / (root + optimizer.eps) + decay)
        return loss, norm

    def read(self, result: tuple[float, float]) -> list[float]:
        return list(result)


def main(folder: Path, mode: str) -> None:
    """Reply to the driver. The mode makes no difference here."""
    serve_workload(NumpyTraining(folder), {"numpy": np.__version__})


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
