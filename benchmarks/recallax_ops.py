"""recallax's side of `op_speed`: an op compiled by XLA. It writes the inputs that the opponents read."""

import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks.messages import INPUTS, RECALLAX_RESULTS, OpMessage, write_arrays
from benchmarks.op_benchmarks import OP_BENCHMARKS
from benchmarks.worker import Workload, serve_workload


class RecallaxOp(Workload):
    """An op, forward and with the gradients of all its inputs.

    Args:
        message: The op and its sizes.
    """

    def __init__(self, message: OpMessage):
        self.message = message
        case = OP_BENCHMARKS[message.op]
        self.inputs: dict[str, Any] = jax.tree.map(jax.numpy.asarray, case.inputs(message))
        self.forward = jax.jit(case.forward)
        self.backward = jax.jit(case.backward)
        shape = jax.eval_shape(self.forward, **self.inputs).shape
        self.d_out: Any = jax.numpy.asarray(np.random.default_rng(1).normal(size=shape), "float32")

    def step(self, part: str, index: int) -> Any:
        if part == "forward":
            return jax.block_until_ready(self.forward(**self.inputs))
        return jax.block_until_ready(self.backward(self.inputs, self.d_out))

    def read(self, result: Any) -> list[float]:
        return []

    def write(self, folder: Path) -> None:
        """Write the inputs, and the outputs and gradients that the opponents' are compared with.

        Args:
            folder: Both sides' folder.

        Raises:
            HandoverError: Inputs or results are not those declared.
        """
        write_arrays(folder / INPUTS, {**self.inputs, "d_out": self.d_out}, self.message.file_specs())
        out, gradients = self.backward(self.inputs, self.d_out)
        write_arrays(folder / RECALLAX_RESULTS, {"out": out, **gradients}, self.message.result_specs())


def main(folder: Path) -> None:
    """Write what the opponents read, if the op has any, then reply to the driver."""
    message = OpMessage.read(folder)
    workload = RecallaxOp(message)
    if OP_BENCHMARKS[message.op].opponent:
        workload.write(folder)
    serve_workload(workload, {"jax": jax.__version__})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
