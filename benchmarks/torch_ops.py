# pyright: reportMissingImports=false
# (torch lives in an environment of its own, with another Python.)
"""PyTorch's side of `op_speed`: the chunked forms that transformers falls back to without its kernels.

Needs Python 3.11, torch, transformers and numpy, and nothing of recallax. Started by the driver with a folder, a mode
(`eager` or `compile`), the length of a chunk and a file for outputs and gradients.
"""

import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
import transformers
from torch import Tensor
from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan
from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

from benchmarks.jobs import OpCall
from benchmarks.worker import Work, serve


def gated_delta_net(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, *, chunk: int) -> Tensor:
    return torch_chunk_gated_delta_rule(q, k, v, g=log_decay, beta=beta, chunk_size=chunk)[0]


def mamba2(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, *, chunk: int) -> Tensor:
    return mamba2_chunk_scan(x, dt, a, b, c, chunk_size=chunk)


class Torch(Work):
    """Both directions of an op."""

    def __init__(self, folder: Path, mode: str, chunk: int):
        call = OpCall.read(folder)
        torch.set_num_threads(call.threads)
        arrays = {name: torch.from_numpy(x) for name, x in np.load(folder / "inputs.npz").items()}
        self.slope = arrays.pop("slope")
        self.inputs = arrays
        op = partial({"gated_delta_net": gated_delta_net, "mamba2": mamba2}[call.op], chunk=chunk)
        self.op = torch.compile(op, dynamic=False) if mode == "compile" else op

    def step(self, part: str, index: int) -> dict[str, Tensor]:
        if part == "forward":
            with torch.no_grad():
                return {"out": self.op(**self.inputs)}
        inputs = {name: x.detach().requires_grad_() for name, x in self.inputs.items()}
        out = self.op(**inputs)
        gradients = torch.autograd.grad(out, list(inputs.values()), self.slope)
        return {"out": out.detach(), **dict(zip(inputs, gradients, strict=True))}

    def read(self, result: dict[str, Tensor]) -> list[float]:
        return []


def main(folder: Path, mode: str, chunk: int, results: str) -> None:
    work = Torch(folder, mode, chunk)
    found = {name: x.numpy() for name, x in work.step("backward", 0).items()}
    np.savez(folder / results, allow_pickle=False, **found)
    serve(work, {"torch": torch.__version__, "transformers": transformers.__version__})


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4])
