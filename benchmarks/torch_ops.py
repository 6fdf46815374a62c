# pyright: reportMissingImports=false
# (torch lives in an environment of its own, with another Python.)
"""PyTorch's side of `op_speed`: the chunked implementations that transformers uses where its kernels are missing.

Needs Python 3.11, torch, transformers and numpy, and nothing of recallax. Started by the driver with a folder, a mode
(`eager` or `compile`), the length of a chunk and the name of a file for the output and the gradients.
"""

import importlib.util
import sys
from functools import partial
from pathlib import Path

import torch
import transformers
from torch import Tensor
from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan
from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

from benchmarks.messages import INPUTS, OpMessage, read_arrays, write_arrays
from benchmarks.worker import Workload, serve_workload


def gated_delta_net(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, *, chunk: int) -> Tensor:
    """Qwen3-Next's gated delta rule; arguments as in `numpy_ops.gated_delta_rule`, in chunks of `chunk` tokens."""
    return torch_chunk_gated_delta_rule(q, k, v, g=log_decay, beta=beta, chunk_size=chunk)[0]


def mamba2(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, *, chunk: int) -> Tensor:
    """Mamba-2's scan; arguments as in `numpy_ops.mamba2`, in chunks of `chunk` tokens."""
    return mamba2_chunk_scan(x, dt, a, b, c, chunk_size=chunk)


class TorchOp(Workload):
    """An op, forward and with the gradients of all its inputs.

    Args:
        folder: Where recallax's side wrote the inputs.
        mode: "eager" or "compile".
        chunk: Tokens in a chunk.

    Raises:
        HandoverError: The inputs are not those declared.
    """

    def __init__(self, folder: Path, mode: str, chunk: int):
        self.message = OpMessage.read(folder)
        torch.set_num_threads(self.message.threads)
        arrays = read_arrays(folder / INPUTS, self.message.file_specs())
        tensors = {name: torch.from_numpy(x) for name, x in arrays.items()}
        self.d_out = tensors.pop("d_out")
        self.inputs = tensors
        op = partial({"gated_delta_net": gated_delta_net, "mamba2": mamba2}[self.message.op], chunk=chunk)
        self.op = torch.compile(op, dynamic=False) if mode == "compile" else op

    def step(self, part: str, index: int) -> dict[str, Tensor]:
        if part == "forward":
            with torch.no_grad():
                return {"out": self.op(**self.inputs)}
        inputs = {name: x.detach().requires_grad_() for name, x in self.inputs.items()}
        out = self.op(**inputs)
        gradients = torch.autograd.grad(out, list(inputs.values()), self.d_out)
        return {"out": out.detach(), **dict(zip(inputs, gradients, strict=True))}

    def read(self, result: dict[str, Tensor]) -> list[float]:
        return []

    def write(self, path: Path) -> None:
        """Write the output and all gradients to a file. Raises HandoverError if they are not as declared."""
        found = {name: x.numpy() for name, x in self.step("backward", 0).items()}
        write_arrays(path, found, self.message.result_specs())


def main(folder: Path, mode: str, chunk: int, results: str) -> None:
    """Write the results, then reply to the driver. Raises SystemExit where transformers would call fla instead."""
    if importlib.util.find_spec("fla"):
        sys.exit("transformers calls fla's kernels where fla is installed; use an environment without fla-core")
    workload = TorchOp(folder, mode, chunk)
    workload.write(folder / results)
    serve_workload(workload, {"torch": torch.__version__, "transformers": transformers.__version__})


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4])
