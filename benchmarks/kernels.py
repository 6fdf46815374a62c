# pyright: reportMissingImports=false
# (torch lives where the GPU is.)
"""The ops on an NVIDIA GPU against flash-linear-attention's Triton kernels, on the same tensors in one process.

    python -m benchmarks.kernels [--only gla,based] [--quick]    measure, and append rows to results/kernels.jsonl
    python -m benchmarks.kernels --crossover                     from which length BASED is faster than cuDNN attention
    python -m benchmarks.kernels --report                        the newest rows as a table

It needs a GPU, PyTorch and fla-core (a wheel of pure Python). Both sides run in turns, bursts of calls each, so that
launching overlaps with computing as in training. Errors are against the XLA form in float32 on the same inputs.
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

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch wants some of the memory as well

import jax
import jax.numpy as jnp

from benchmarks.gpu_races import RACES, Race, Shape
from recallax.pallas_kernels.dispatch import Unsupported
from recallax.train.log import commit

RESULTS = Path(__file__).parent / "results" / "kernels.jsonl"
SIZES = ((8, 4096, 16), (1, 32_768, 16), (32, 1024, 4))
"""Rows, tokens and heads."""
FORMS = ("mosaic_gpu", "xla")
ROUNDS, BURST = 10, 10
FLOPS, BYTES = 800e12, 3.0e12
"""What an H100 does per second at best in practice: bfloat16 products, device memory."""
COLUMNS = (
    "op",
    "B T H K V",
    "pass",
    "form",
    "ours ms",
    "fla ms",
    "fla ÷ ours",
    "roofline",
    "error, fla's",
    "MiB, fla's",
)

type Row = dict[str, Any]
type Arrays = dict[str, jax.Array]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", help=f"ops, by comma: {', '.join(RACES)}")
    parser.add_argument("--quick", action="store_true", help="the smallest size only")
    parser.add_argument("--crossover", action="store_true")
    parser.add_argument("--report", action="store_true")
    arguments = parser.parse_args()
    if arguments.report:
        print(report([json.loads(line) for line in RESULTS.read_text().splitlines()]))
        return 0
    if jax.default_backend() != "gpu":
        sys.exit(f"benchmarks.kernels needs an NVIDIA GPU and finds a {jax.default_backend()}")
    if arguments.crossover:
        crossover()
        return 0
    names = list(RACES) if arguments.only is None else arguments.only.split(",")
    for name in names:
        for size in SIZES[-1:] if arguments.quick else SIZES:
            for keys, values in RACES[name].widths:
                for row in race(name, RACES[name], Shape(*size, keys, values)):
                    with RESULTS.open("a") as file:
                        file.write(json.dumps(row) + "\n")
                    print(report([row]).splitlines()[-1], flush=True)
    return 0


def race(name: str, race: Race, shape: Shape) -> list[Row]:
    """One row per form and pass."""
    import torch

    torch.manual_seed(0)
    tensors = race.draw(shape)
    slope = torch.randn_like(tensors["v"])
    inputs: Arrays = {n: jnp.from_dlpack(x) for n, x in tensors.items()}
    exact = {n: x.astype(jnp.float32) for n, x in inputs.items()}
    rows = []
    for backward in (False, True):
        theirs = _torch_call(race, tensors, slope if backward else None)
        theirs()  # fla tunes itself
        out_theirs = [jnp.from_dlpack(x.contiguous()).astype(jnp.float32) for x in theirs()]
        want = _jax_call(race, "xla", exact, jnp.from_dlpack(slope).astype(jnp.float32) if backward else None)[0]()
        for form in FORMS:
            try:
                ours, held = _jax_call(race, form, inputs, jnp.from_dlpack(slope) if backward else None)
            except Unsupported as reason:
                print(f"{name} {shape} {form}: {reason}", file=sys.stderr)
                continue
            times = turns(Side(ours, jax.block_until_ready), Side(theirs, lambda _: torch.cuda.synchronize()))
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            theirs()
            best = race.seconds(shape, backward, FLOPS, BYTES)
            rows.append(
                {
                    "op": name,
                    "shape": list(shape),
                    "pass": "forward+backward" if backward else "forward",
                    "form": form,
                    **{f"{side}_{stat}_ms": value for side, pair in times.items() for stat, value in pair.items()},
                    "ratio": round(times["fla"]["median"] / times["ours"]["median"], 3),
                    "roofline": round(1e3 * best / times["ours"]["median"], 3),
                    "error": worst(ours(), want),
                    "fla_error": worst(out_theirs, want),
                    "bytes": held,
                    "fla_bytes": torch.cuda.max_memory_allocated() - before,
                    "device": jax.devices()[0].device_kind,
                    "jax": jax.__version__,
                    **{m: importlib.metadata.version(m) for m in ("torch", "triton", "fla-core")},
                    "commit": commit(),
                }
            )
    return rows


class Side(NamedTuple):
    """One library's call, and how to wait for what it returned."""

    call: Callable[[], Any]
    wait: Callable[[Any], Any]

    def burst(self) -> float:
        """Seconds per call of several that are waited for once."""
        begin = time.perf_counter()
        for _ in range(BURST - 1):
            self.call()
        self.wait(self.call())
        return (time.perf_counter() - begin) / BURST


def turns(ours: Side, theirs: Side) -> dict[str, dict[str, float]]:
    """Milliseconds per call, least and median over the rounds, after one round that does not count."""
    rounds = [(ours.burst(), theirs.burst()) for _ in range(ROUNDS + 1)][1:]
    return {
        name: {"min": round(1e3 * min(x), 4), "median": round(1e3 * statistics.median(x), 4)}
        for name, x in zip(("ours", "fla"), zip(*rounds, strict=True), strict=True)
    }


def _jax_call(race: Race, form: str, inputs: Arrays, slope: jax.Array | None) -> tuple[Callable[[], list], int]:
    """A compiled call that gives the output, with a slope the gradients too; and the bytes it holds meanwhile."""

    def forward(inputs: Arrays) -> jax.Array:
        return race.ours(inputs, form)

    def both(inputs: Arrays, slope: jax.Array) -> tuple[jax.Array, Arrays]:
        out, pull = jax.vjp(forward, inputs)
        return out, pull(slope)[0]

    arguments = (inputs,) if slope is None else (inputs, slope)
    compiled = jax.jit(forward if slope is None else both).lower(*arguments).compile()
    held = compiled.memory_analysis()
    return lambda: jax.tree.leaves(compiled(*arguments)), held.temp_size_in_bytes if held else 0


def _torch_call(race: Race, tensors: dict[str, Any], slope: Any) -> Callable[[], list]:
    """The same of fla; gradients in the order in which JAX gives them, by name."""
    import torch

    if slope is None:
        with torch.no_grad():
            return lambda: [race.theirs(tensors)]
    leaves = {name: x.detach().clone().requires_grad_() for name, x in tensors.items()}

    def call() -> list:
        out = race.theirs(leaves)
        gradients = torch.autograd.grad(out, list(leaves.values()), slope)
        by_name = dict(zip(leaves, gradients, strict=True))
        return [out.detach(), *(by_name[name] for name in sorted(by_name))]

    return call


def worst(got: Sequence[jax.Array], want: Sequence[jax.Array]) -> float:
    """The largest error of any array, relative to its largest entry."""
    pairs = zip(got, want, strict=True)
    return max(float(jnp.abs(g.astype(jnp.float32) - w).max() / jnp.abs(w).max()) for g, w in pairs)


def crossover() -> None:
    """Milliseconds of BASED's forms and of cuDNN's causal attention, forward, over 32768 tokens of 16 heads."""
    for length in (512, 1024, 2048, 4096, 8192, 16_384):
        keys = jax.random.split(jax.random.key(0), 3)
        q, k, v = (jax.random.normal(key, (32_768 // length, length, 16, 64), jnp.bfloat16) for key in keys)
        attend = jax.jit(partial(jax.nn.dot_product_attention, is_causal=True, implementation="cudnn"))
        calls: dict[str, Callable[[], Any]] = {"cudnn": partial(attend, q, k, v)}
        for form in FORMS:
            try:
                calls[form], _ = _jax_call(RACES["based"], form, {"q": q[..., :16], "k": k[..., :16], "v": v}, None)
            except Unsupported as reason:
                print(f"{form}: {reason}", file=sys.stderr)
        sides = {name: Side(call, jax.block_until_ready) for name, call in calls.items()}
        rounds = [{name: side.burst() for name, side in sides.items()} for _ in range(ROUNDS + 1)][1:]
        medians = {name: 1e3 * statistics.median(seconds[name] for seconds in rounds) for name in sides}
        print(f"{length:>6} tokens", "  ".join(f"{name} {ms:.3f} ms" for name, ms in medians.items()), flush=True)


def report(rows: list[Row]) -> str:
    """The newest row of each setting."""
    newest = {(r["op"], *r["shape"], r["pass"], r["form"], r["device"]): r for r in rows}
    lines = ["| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|"]
    for row in newest.values():
        cells = (
            row["op"],
            " ".join(map(str, row["shape"])),
            row["pass"],
            row["form"],
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
