"""recallax's side of `op_speed`: an op compiled by XLA. It writes the inputs that the opponents read."""

import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks.jobs import OpCall
from benchmarks.op_cases import CASES
from benchmarks.worker import Work, serve


class Recallax(Work):
    """Both directions of an op."""

    def __init__(self, call: OpCall):
        case = CASES[call.op]
        self.arrays = case.inputs(call)
        self.inputs: dict[str, Any] = jax.tree.map(jax.numpy.asarray, self.arrays)
        self.forward = jax.jit(case.forward)
        self.backward = jax.jit(case.backward)
        shape = jax.eval_shape(self.forward, **self.inputs).shape
        self.slope: Any = jax.numpy.asarray(np.random.default_rng(1).normal(size=shape), "float32")

    def step(self, part: str, index: int) -> Any:
        if part == "forward":
            return jax.block_until_ready(self.forward(**self.inputs))
        return jax.block_until_ready(self.backward(self.inputs, self.slope))

    def read(self, result: Any) -> list[float]:
        return []

    def write(self, folder: Path) -> None:
        """The inputs, and what came of them."""
        np.savez(folder / "inputs.npz", allow_pickle=False, **self.arrays, slope=np.asarray(self.slope))
        out, gradients = self.backward(self.inputs, self.slope)
        found = {name: np.asarray(x) for name, x in {"out": out, **gradients}.items()}
        np.savez(folder / "recallax.npz", allow_pickle=False, **found)


def main(folder: Path) -> None:
    call = OpCall.read(folder)
    work = Recallax(call)
    if CASES[call.op].opponent:
        work.write(folder)
    serve(work, {"jax": jax.__version__})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
