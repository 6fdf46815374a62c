# pyright: reportMissingImports=false
# (torch lives where the GPU is.)
"""The ops on an NVIDIA GPU against flash-linear-attention's Triton kernels, on the same tensors in one process.

    python -m benchmarks.kernel_speed [--only gla,based] [--quick]  measure, and append rows to results/kernels.jsonl
    python -m benchmarks.kernel_speed --crossover     the length from which BASED is faster than cuDNN attention
    python -m benchmarks.kernel_speed --report        the newest rows as a table

It needs a GPU, PyTorch and fla-core (a wheel of pure Python). Both sides run alternately, bursts of calls each, so that
launching overlaps with computing as in training. Errors are against the XLA implementation in float32 on the same
inputs. `fla_ops` has the opponent's calls, and `numpy_ops` takes its place in tests.
"""

import argparse
import importlib.metadata
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from benchmarks import fla_ops
from benchmarks.gpu_compare import COMPARISONS, Arrays, Comparison, Shape
from benchmarks.messages import ArraySpec, check_arrays
from recallax.pallas_kernels.dispatch import Unsupported
from recallax.train.log import git_commit

RESULTS = Path(__file__).parent / "results" / "kernels.jsonl"
SHAPES = ((8, 4096, 16), (1, 32_768, 16), (32, 1024, 4))
"""Rows, tokens and heads."""
IMPLEMENTATIONS = ("mosaic_gpu", "xla")
ROUNDS, CALLS_PER_BURST = 10, 10
PEAK_FLOPS, PEAK_BANDWIDTH = 800e12, 3.0e12
"""Peak rates of an H100 in practice, per second: bfloat16 products, device memory."""
COLUMNS = (
    "op",
    "B T H K V",
    "pass",
    "implementation",
    "ours ms",
    "fla ms",
    "fla ÷ ours",
    "roofline",
    "error, fla's",
    "MiB, fla's",
)

type Row = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: Arguments; those of the process by default.

    Returns:
        The exit status.
    """
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.kernel_speed", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--only", help=f"ops, by comma: {', '.join(COMPARISONS)}")
    parser.add_argument("--quick", action="store_true", help="the smallest size only")
    parser.add_argument("--crossover", action="store_true", help="measure BASED against cuDNN's attention by length")
    parser.add_argument("--report", action="store_true", help="print the table of the results file, measure nothing")
    arguments = parser.parse_args(argv)
    if arguments.report:
        print(report([json.loads(line) for line in RESULTS.read_text().splitlines()]))
        return 0
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch needs some of the memory as well
    if jax.default_backend() != "gpu":
        sys.exit(f"benchmarks.kernel_speed needs an NVIDIA GPU and finds a {jax.default_backend()}")
    if arguments.crossover:
        crossover()
        return 0
    names = list(COMPARISONS) if arguments.only is None else arguments.only.split(",")
    for name in names:
        for size in SHAPES[-1:] if arguments.quick else SHAPES:
            for keys, values in COMPARISONS[name].widths:
                for row in compare(name, Shape(*size, keys, values)):
                    with RESULTS.open("a") as file:
                        file.write(json.dumps(row) + "\n")
                    print(report([row]).splitlines()[-1], flush=True)
    return 0


def hand_over(comparison: Comparison, shape: Shape) -> tuple[Arrays, jax.Array]:
    """Draw what both sides compute with.

    Args:
        comparison: The op and its inputs.
        shape: Their sizes.

    Returns:
        The inputs by name, and a gradient of the output.

    Raises:
        HandoverError: The inputs, or recallax's output, do not have the declared shapes and dtypes.
    """
    inputs = comparison.draw(shape)
    specs = comparison.inputs(shape)
    check_arrays(inputs, specs, "the inputs drawn")
    out = jax.eval_shape(partial(comparison.op, implementation="xla"), **inputs)
    check_arrays({"out": out}, {"out": specs["v"]}, "recallax's output")
    d_out = jax.random.normal(jax.random.key(1), out.shape).astype(out.dtype)
    return inputs, d_out


def compare(name: str, shape: Shape) -> list[Row]:
    """Measure one comparison.

    Args:
        name: A key of `COMPARISONS`.
        shape: Sizes of the inputs.

    Returns:
        One row per implementation and pass.

    Raises:
        HandoverError: One side does not take or return what is declared.
    """
    import torch

    comparison = COMPARISONS[name]
    inputs, d_out = hand_over(comparison, shape)
    tensors = {n: torch.from_dlpack(x) for n, x in inputs.items()}
    specs = {"out": comparison.inputs(shape)["v"]} | dict(sorted(comparison.inputs(shape).items()))
    exact = {n: x.astype(jnp.float32) for n, x in inputs.items()}
    rows = []
    for backward in (False, True):
        theirs = _torch_call(name, tensors, torch.from_dlpack(d_out) if backward else None)
        theirs()  # fla tunes itself
        results = theirs()
        # Gradients may come in another dtype than the inputs, so that their shapes alone count.
        found = dict(zip(specs, results, strict=False))
        check_arrays(
            {n: ArraySpec(tuple(x.shape), specs[n].dtype) for n, x in found.items()},
            {n: spec for n, spec in specs.items() if backward or n == "out"},
            "fla's results",
        )
        out_theirs = [jnp.from_dlpack(x.contiguous()).astype(jnp.float32) for x in results]
        expected = _jax_call(comparison, "xla", exact, d_out.astype(jnp.float32) if backward else None)[0]()
        for implementation in IMPLEMENTATIONS:
            try:
                ours, held = _jax_call(comparison, implementation, inputs, d_out if backward else None)
            except Unsupported as reason:
                print(f"{name} {shape} {implementation}: {reason}", file=sys.stderr)
                continue
            times = interleaved_times(
                TimedCall(ours, jax.block_until_ready), TimedCall(theirs, lambda _: torch.cuda.synchronize())
            )
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            theirs()
            best = comparison.seconds(shape, backward, PEAK_FLOPS, PEAK_BANDWIDTH)
            rows.append(
                {
                    "op": name,
                    "shape": list(shape),
                    "pass": "forward+backward" if backward else "forward",
                    "implementation": implementation,
                    **{f"{side}_{stat}_ms": value for side, pair in times.items() for stat, value in pair.items()},
                    "ratio": round(times["fla"]["median"] / times["ours"]["median"], 3),
                    "roofline": round(1e3 * best / times["ours"]["median"], 3),
                    "error": relative_error(ours(), expected),
                    "fla_error": relative_error(out_theirs, expected),
                    "bytes": held,
                    "fla_bytes": torch.cuda.max_memory_allocated() - before,
                    "device": jax.devices()[0].device_kind,
                    "jax": jax.__version__,
                    **{m: importlib.metadata.version(m) for m in ("torch", "triton", "fla-core")},
                    "commit": git_commit(),
                }
            )
    return rows


class TimedCall(NamedTuple):
    """One library's call, and how to wait for its results."""

    call: Callable[[], Any]
    wait: Callable[[Any], Any]

    def time_burst(self) -> float:
        """Return the seconds per call of several calls that are waited for once."""
        begin = time.perf_counter()
        for _ in range(CALLS_PER_BURST - 1):
            self.call()
        self.wait(self.call())
        return (time.perf_counter() - begin) / CALLS_PER_BURST


def interleaved_times(ours: TimedCall, theirs: TimedCall) -> dict[str, dict[str, float]]:
    """Run both sides alternately.

    Args:
        ours: recallax's call.
        theirs: fla's call.

    Returns:
        Milliseconds per call, least and median over the rounds, without a first round to warm up.
    """
    rounds = [(ours.time_burst(), theirs.time_burst()) for _ in range(ROUNDS + 1)][1:]
    return {
        name: {"min": round(1e3 * min(x), 4), "median": round(1e3 * statistics.median(x), 4)}
        for name, x in zip(("ours", "fla"), zip(*rounds, strict=True), strict=True)
    }


def _jax_call(
    comparison: Comparison, implementation: str, inputs: Arrays, d_out: jax.Array | None
) -> tuple[Callable[[], list], int]:
    """A compiled call that returns the output, with `d_out` the gradients too; and the bytes of its temporaries."""

    def forward(inputs: Arrays) -> jax.Array:
        return comparison.op(**inputs, implementation=implementation)

    def both(inputs: Arrays, d_out: jax.Array) -> tuple[jax.Array, Arrays]:
        out, pull = jax.vjp(forward, inputs)
        return out, pull(d_out)[0]

    arguments = (inputs,) if d_out is None else (inputs, d_out)
    compiled = jax.jit(forward if d_out is None else both).lower(*arguments).compile()
    held = compiled.memory_analysis()
    return lambda: jax.tree.leaves(compiled(*arguments)), held.temp_size_in_bytes if held else 0


def _torch_call(name: str, tensors: dict[str, Any], d_out: Any) -> Callable[[], list]:
    """fla's call; the gradients are in the order of `jax.tree.leaves`, by name."""
    import torch

    op = fla_ops.OPS[name]
    if d_out is None:
        with torch.no_grad():
            return lambda: [op(**tensors)]
    leaves = {name: x.detach().clone().requires_grad_() for name, x in tensors.items()}

    def call() -> list:
        out = op(**leaves)
        gradients = torch.autograd.grad(out, list(leaves.values()), d_out)
        by_name = dict(zip(leaves, gradients, strict=True))
        return [out.detach(), *(by_name[name] for name in sorted(by_name))]

    return call


def relative_error(found: Sequence[jax.Array], expected: Sequence[jax.Array]) -> float:
    """Return the largest error of any array, relative to its largest entry.

    Args:
        found: Arrays of any dtype.
        expected: float32 arrays of the same shapes.
    """
    pairs = zip(found, expected, strict=True)
    return max(float(jnp.abs(x.astype(jnp.float32) - y).max() / jnp.abs(y).max()) for x, y in pairs)


def crossover() -> None:
    """Print the milliseconds of BASED and of cuDNN's causal attention, forward, over 32768 tokens of 16 heads."""
    for length in (512, 1024, 2048, 4096, 8192, 16_384):
        keys = jax.random.split(jax.random.key(0), 3)
        q, k, v = (jax.random.normal(key, (32_768 // length, length, 16, 64), jnp.bfloat16) for key in keys)
        attend = jax.jit(partial(jax.nn.dot_product_attention, is_causal=True, implementation="cudnn"))
        calls: dict[str, Callable[[], Any]] = {"cudnn": partial(attend, q, k, v)}
        inputs = {"q": q[..., :16], "k": k[..., :16], "v": v}
        for implementation in IMPLEMENTATIONS:
            try:
                calls[implementation], _ = _jax_call(COMPARISONS["based"], implementation, inputs, None)
            except Unsupported as reason:
                print(f"{implementation}: {reason}", file=sys.stderr)
        sides = {name: TimedCall(call, jax.block_until_ready) for name, call in calls.items()}
        rounds = [{name: side.time_burst() for name, side in sides.items()} for _ in range(ROUNDS + 1)][1:]
        medians = {name: 1e3 * statistics.median(seconds[name] for seconds in rounds) for name in sides}
        print(f"{length:>6} tokens", "  ".join(f"{name} {ms:.3f} ms" for name, ms in medians.items()), flush=True)


def report(rows: list[Row]) -> str:
    """Return the newest row of each setting as a Markdown table."""
    newest = {(r["op"], *r["shape"], r["pass"], r["implementation"], r["device"]): r for r in rows}
    lines = ["| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|"]
    for row in newest.values():
        cells = (
            row["op"],
            " ".join(map(str, row["shape"])),
            row["pass"],
            row["implementation"],
            f"{row['ours_median_ms']:.3f}",
            f"{row['fla_median_ms']:.3f}",
            f"**{row['ratio']:.2f}**",
            f"{row['roofline']:.0%}",
            f"{row['error']:.1e}, {row['fla_error']:.1e}",
            f"{row['bytes'] / 2**20:.0f}, {row['fla_bytes'] / 2**20:.0f}",
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
