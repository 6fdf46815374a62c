# pyright: reportMissingImports=false
# (torch lives in an environment of its own, with another Python.)
"""PyTorch's side of `train_speed`: the two-layer model of `recallax.models.zoology_lm` as its users would write it.

Needs Python 3.11, torch and numpy, and nothing of recallax. Started by the driver with a folder and a mode: `eager`
or `compile`.
"""

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.messages import (
    BATCHES,
    CONV_SIZE,
    PARAMETERS,
    OptimizerMessage,
    TrainingMessage,
    check_arrays,
    read_arrays,
)
from benchmarks.worker import Workload, serve_workload


class BaseConv(nn.Module):
    """y = conv(x) * (W x + b) + x.

    The convolution is the sum of its shifted inputs: faster here than `F.conv1d` with a group per channel, eager as
    well as compiled.
    """

    def __init__(self, width: int, taps: int = CONV_SIZE):
        super().__init__()
        self.taps = nn.Parameter(torch.empty(taps, width))
        self.bias = nn.Parameter(torch.empty(width))
        self.gate = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        count, length = self.taps.shape[0], x.shape[1]
        past = F.pad(x, (0, 0, count - 1, 0))
        y = self.bias + sum(self.taps[i] * past[:, i : i + length] for i in range(count))
        return y * self.gate(x) + x


class Projections(nn.Module):
    """The maps to queries, keys and values and back."""

    def __init__(self, width: int, keys: int):
        super().__init__()
        self.q = nn.Linear(width, keys, bias=False)
        self.k = nn.Linear(width, keys, bias=False)
        self.v = nn.Linear(width, width, bias=False)
        self.out = nn.Linear(width, width, bias=False)


class Based(Projections):
    """Attention with the weights 1 + s + s^2 / 2, all pairs at once: the fast form at these lengths."""

    def __init__(self, width: int, keys: int):
        super().__init__(width, keys)
        self.scale = keys**-0.5

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.q(x), self.k(x), self.v(x)
        s = q @ k.transpose(1, 2) * self.scale
        weights = torch.tril(1 + s + s * s / 2)
        return self.out(weights @ v / weights.sum(-1, keepdim=True))


class Attention(Projections):
    """Causal softmax attention with one head."""

    def __init__(self, width: int):
        super().__init__(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part(x)[:, None] for part in (self.q, self.k, self.v))
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True)[:, 0])


class Block(nn.Module):
    """r <- r + mixer(norm(r)), then r <- r + norm(r)."""

    def __init__(self, width: int, mixer: nn.Module):
        super().__init__()
        self.mixer = mixer
        self.mixer_norm = nn.RMSNorm(width, eps=1e-5)
        self.channel_norm = nn.RMSNorm(width, eps=1e-5)

    def forward(self, r: Tensor) -> Tensor:
        r = r + self.mixer(self.mixer_norm(r))
        return r + self.channel_norm(r)


class Model(nn.Module):
    """Embedding, two blocks, a norm and the tied output projection at the labelled positions; returns the loss.

    Args:
        message: The model's sizes.
    """

    def __init__(self, message: TrainingMessage):
        super().__init__()
        width = message.d_model
        mixers: dict[str, Callable[[], nn.Module]] = {
            "based": lambda: Based(width, message.feature_dim),
            "attention": lambda: Attention(width),
        }
        self.embedding = nn.Embedding(message.vocab_size, width)
        self.blocks = nn.ModuleList([Block(width, BaseConv(width)), Block(width, mixers[message.mixer]())])
        self.norm = nn.RMSNorm(width, eps=1e-5)

    def forward(self, tokens: Tensor, positions: Tensor, targets: Tensor) -> Tensor:
        r = self.embedding(tokens)
        for block in self.blocks:
            r = block(r)
        labelled = r.gather(1, positions[..., None].expand(-1, -1, r.shape[2]))
        logits = F.linear(self.norm(labelled), self.embedding.weight)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def load_model(message: TrainingMessage, parameters: dict[str, np.ndarray]) -> Model:
    """Build the model with given parameters.

    Args:
        message: The model's sizes.
        parameters: By name, as `TrainingMessage.parameter_specs` declares them.

    Returns:
        The model.

    Raises:
        HandoverError: The model has other parameters than those declared.
    """
    model = Model(message)
    check_arrays(model.state_dict(), message.parameter_specs(), "the PyTorch model")
    model.load_state_dict({name: torch.tensor(x) for name, x in parameters.items()})
    return model


class TorchTraining(Workload):
    """The model, a fused AdamW with clipping, and the batches as tensors.

    Args:
        folder: Where recallax's side wrote what the opponent starts from.
        mode: "eager" or "compile".

    Raises:
        HandoverError: Parameters, batches or settings are not those declared.
    """

    def __init__(self, folder: Path, mode: str):
        message = TrainingMessage.read(folder)
        torch.set_num_threads(message.threads)
        self.model = load_model(message, read_arrays(folder / PARAMETERS, message.parameter_specs()))
        stored = read_arrays(folder / BATCHES, message.batch_specs())
        self.batches = [torch.from_numpy(stored[name]).long() for name in ("tokens", "positions", "targets")]
        settings = OptimizerMessage.read(folder)
        self.rates, self.max_grad_norm = settings.learning_rates, settings.max_grad_norm
        decay = [p for p in self.model.parameters() if p.ndim >= 2]
        rest = [p for p in self.model.parameters() if p.ndim < 2]
        self.optimizer = torch.optim.AdamW(
            [{"params": decay, "weight_decay": settings.weight_decay}, {"params": rest, "weight_decay": 0.0}],
            betas=(settings.b1, settings.b2),
            eps=settings.eps,
            fused=True,
        )
        self.loss: Callable[..., Tensor] = {
            "eager": lambda: self.model,
            "compile": lambda: torch.compile(self.model, fullgraph=True, dynamic=False),
        }[mode]()

    def step(self, part: str, index: int) -> tuple[Tensor, Tensor]:
        for group in self.optimizer.param_groups:
            group["lr"] = self.rates[index]
        self.optimizer.zero_grad()
        loss = self.loss(*(each[index] for each in self.batches))
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.max_grad_norm)
        self.optimizer.step()
        return loss.detach(), norm

    def read(self, result: tuple[Tensor, Tensor]) -> list[float]:
        return [float(result[0]), float(result[1])]


def main(folder: Path, mode: str) -> None:
    """Reply to the driver."""
    serve_workload(TorchTraining(folder, mode), {"torch": torch.__version__})


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
