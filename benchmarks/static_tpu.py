"""Compile the TPU kernels without a device: instruction bundles, spills and VMEM. Nothing is timed.

    python -m benchmarks.static_tpu             compile all, and append rows to results/static_tpu.jsonl
    python -m benchmarks.static_tpu --check     compile the kernels, and fail where one has grown by more than a tenth
    python -m benchmarks.static_tpu --report    the newest rows as a table

It needs libtpu (the `tpu` extra, or `scripts/tpu-compiler`) and compiles ahead of time for a described device, in a
process of its own, since libtpu reads where to write its dumps once. What does not fit into VMEM does not compile. A
row says of each kernel how many bundles a grid step has (very long instruction words, one issued per cycle unless it
waits), the pipeline's own included, and what they hold per unit: spills are stores among them, so bundles count them.
Waiting for memory is not in it: it is a proxy to find regressions by and to compare variants of one kernel, not a time.
Of XLA's forms (`--form xla`, minutes) only the bytes of temporaries compare: the bodies of loops are counted once.
"""

import argparse
import functools
import importlib.metadata
import importlib.util
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies

from recallax.models.accounting import sub_jaxprs
from recallax.pallas_kernels.delta_rule import delta_rule
from recallax.pallas_kernels.landmark_attention import landmark_attention
from recallax.pallas_kernels.linear_attention import linear_attention
from recallax.pallas_kernels.mosaic_tpu import chunk_grid
from recallax.pallas_kernels.mosaic_tpu.chunk_grid import MAX_HEADS_PER_STEP
from recallax.pallas_kernels.neural_memory import InnerOptimizer, MemoryInputs, OuterParams, neural_memory
from recallax.pallas_kernels.neural_memory.inner_optimizer import LinearNet
from recallax.pallas_kernels.selective_scan import selective_scan
from recallax.pallas_kernels.taylor_attention import taylor_attention
from recallax.train.log import git_commit

RESULTS = Path(__file__).parent / "results" / "static_tpu.jsonl"
TARGETS = {"v5e": "v5e:2x2", "v6e": "v6e:2x2"}
IMPLEMENTATIONS = ("mosaic_tpu", "xla")
MAX_GROWTH = 1.1
"""Growth of the bundles per token that is no regression."""
UNITS = ("MXU", "XLU", "VALU", "VPOP", "EUP", "VLOAD", "FILL", "VSTORE", "SPILL", "SALU")
DUMPED_PASSES = "original|final_hlo"
"""Passes whose outcome the compiler writes down; all would be gigabytes."""
ROWS, LENGTH, HEADS = 8, 4096, 16

type Row = dict[str, Any]


@dataclass(frozen=True)
class TpuCase:
    """An op in one use: bfloat16 inputs and float32 ones by name, each with its axes behind rows and tokens."""

    op: Callable[..., Any]
    narrow: dict[str, tuple[int, ...]]
    wide: dict[str, tuple[int, ...]] = field(default_factory=dict)
    constant: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """Float32, with neither rows nor tokens."""

    def inputs(self) -> dict[str, jax.ShapeDtypeStruct]:
        tokens = (ROWS, LENGTH)
        narrow = {name: jax.ShapeDtypeStruct((*tokens, *axes), jnp.bfloat16) for name, axes in self.narrow.items()}
        wide = {name: (*tokens, *axes) for name, axes in self.wide.items()} | self.constant
        return narrow | {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in wide.items()}


def _qkv_shapes(keys: int, values: int) -> dict[str, tuple[int, ...]]:
    return {"v": (HEADS, values), "q": (HEADS, keys), "k": (HEADS, keys)}


def _call_landmark_attention(v: Any, q: Any, k: Any, implementation: str) -> tuple[Any, None]:
    positions = jnp.broadcast_to(jnp.arange(LENGTH)[None], (ROWS, LENGTH))
    return landmark_attention(q, k, v, block_size=63, positions=positions, implementation=implementation), None


def _call_neural_memory(v: Any, q: Any, k: Any, weight: Any, **gates: Any) -> tuple[Any, Any]:
    learner = InnerOptimizer(network=LinearNet(), gradient="token")
    norm = jnp.ones((HEADS, q.shape[3]))
    form = gates.pop("implementation")
    return neural_memory(
        learner, MemoryInputs(q, k, v, **gates), OuterParams({"w1": weight}, norm, norm), implementation=form
    )


_SCALAR_DECAY, _CHANNEL_DECAY = {"log_decay": (HEADS,)}, {"log_decay": (HEADS, 128)}
_BETA_GATES = {"erase": (HEADS,), "write": (HEADS,)}
_GATES = {"lr": (HEADS, 1), "log_momentum": (HEADS, 1), "log_decay": (HEADS, 1)}
_NUM_CHANNELS, _STATE_DIM = HEADS * 128, 16
TPU_KERNEL_CASES: dict[str, TpuCase] = {
    "linear_attention": TpuCase(linear_attention, _qkv_shapes(128, 128)),
    "linear_attention, token decay": TpuCase(linear_attention, _qkv_shapes(128, 128), _SCALAR_DECAY),
    "linear_attention, token decay, narrow": TpuCase(linear_attention, _qkv_shapes(64, 64), _SCALAR_DECAY),
    "linear_attention, channel decay": TpuCase(linear_attention, _qkv_shapes(128, 128), _CHANNEL_DECAY),
    "delta_rule": TpuCase(delta_rule, _qkv_shapes(128, 128), _BETA_GATES),
    "delta_rule, token decay": TpuCase(delta_rule, _qkv_shapes(128, 128), _BETA_GATES | _SCALAR_DECAY),
    "delta_rule, channel decay": TpuCase(delta_rule, _qkv_shapes(128, 128), _BETA_GATES | _CHANNEL_DECAY),
    "landmark_attention": TpuCase(_call_landmark_attention, _qkv_shapes(128, 128)),
    "neural_memory": TpuCase(_call_neural_memory, _qkv_shapes(128, 128), _GATES, {"weight": (HEADS, 128, 128)}),
    "taylor_attention": TpuCase(taylor_attention, _qkv_shapes(16, 64)),
    "selective_scan": TpuCase(
        selective_scan,
        {"x": (_NUM_CHANNELS,), "b": (_STATE_DIM,), "c": (_STATE_DIM,)},
        {"rate": (_NUM_CHANNELS,)},
        {"a": (_NUM_CHANNELS, _STATE_DIM)},
    ),
}
"""The first input has the output's shape. A head of the scan is 128 channels."""


def find_libtpu() -> Path | None:
    """libtpu: the environment's own, or the one that `scripts/tpu-compiler` puts where jax does not see it."""
    found = importlib.util.find_spec("libtpu")
    folder = Path(found.origin).parent if found and found.origin else Path(sys.prefix) / "libtpu" / "libtpu"
    return file if (file := folder / "libtpu.so").exists() else None


def compile_kernels(
    names: Iterable[str],
    target: str,
    implementation: str,
    *,
    heads: int = MAX_HEADS_PER_STEP,
    whole_program: bool = False,
) -> Iterator[Row]:
    """Compile the kernels of cases, forward and backward, in a process of their own; a row for each case.

    heads: that a grid step takes side by side at most. whole: compile the programs around the kernels too, for the
    bytes of their temporaries. Raises RuntimeError with what the compiler says.
    """
    names, path = list(names), find_libtpu()
    assert path is not None, "libtpu is not installed"
    (libtpu,) = importlib.metadata.distributions(name="libtpu", path=[str(path.parents[1])])
    with tempfile.TemporaryDirectory() as folder:
        flags = (
            f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true --xla_jf_dump_llo_pass_label_regex={DUMPED_PASSES}"
        )
        asked = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
        asked |= {"LIBTPU_INIT_ARGS": flags, "TPU_LIBRARY_PATH": str(path)}
        request = json.dumps([names, target, implementation, heads, whole_program, folder])
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.static_tpu", "--child", request],
            env=os.environ | asked,
            capture_output=True,
            text=True,
        )
    found = [json.loads(line) for line in done.stdout.splitlines()]
    if done.returncode:
        raise RuntimeError(f"{names[len(found)]} does not compile for {target}: {done.stderr.strip()[-2000:]}")
    for name, kernels in zip(names, found, strict=True):
        yield {
            "case": name,
            "form": implementation,
            "target": target,
            "heads": heads,
            "shapes": {key: list(x.shape) for key, x in TPU_KERNEL_CASES[name].inputs().items()},
            "dtype": "bfloat16",
            **kernels,
            "versions": {"jax": jax.__version__, "libtpu": libtpu.version},
        }


def compile_in_child(
    names: Sequence[str], target: str, implementation: str, heads: int, whole_program: bool, folder: str
) -> None:
    """Compile, and print a line per case of what the compiler tells of it."""
    chunk_grid.MAX_HEADS_PER_STEP = heads
    devices = topologies.get_topology_desc(platform="tpu", topology_name=TARGETS[target]).devices[:1]
    mesh = jax.sharding.Mesh(np.array(devices), ("x",), axis_types=(jax.sharding.AxisType.Explicit,))
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

    def compile(function: Callable[..., Any], inputs: Any) -> Any:
        placed = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), inputs)
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return jax.jit(function).trace(placed).lower(lowering_platforms=("tpu",)).compile()

    for name in names:
        case = TPU_KERNEL_CASES[name]

        def both(inputs: tuple[dict[str, Any], Any], op: Callable[..., Any] = case.op) -> Any:
            out, pull = jax.vjp(lambda inputs: op(**inputs, implementation=implementation)[0], inputs[0])
            return out, pull(inputs[1])

        asked = case.inputs()
        inputs = (asked, next(iter(asked.values())))
        told: Row = {"kernels": {}}
        if implementation == "mosaic_tpu":
            with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
                calls = dict(_pallas_calls(jax.make_jaxpr(both)(inputs).jaxpr))
            shapes = {key: [x.aval for x in call.invars] for key, call in calls.items()}
            for file in Path(folder).iterdir():  # of the case before, whose kernels may have the same names
                file.unlink()
            compile(functools.partial(_run_kernels, calls), shapes)
            grids = {key: call.params["grid_mapping"].grid for key, call in calls.items()}
            told["kernels"] = dict(_kernel_statistics(Path(folder), grids))
        if whole_program:
            told["temporary_bytes"] = compile(both, inputs).memory_analysis().temp_size_in_bytes
        print(json.dumps(told), flush=True)


def _pallas_calls(jaxpr: Any) -> Iterator[tuple[str, Any]]:
    """The kernels in a program, by name."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "pallas_call":
            yield str(equation.params["name"]), equation
        for inner in sub_jaxprs(equation.params):
            yield from _pallas_calls(inner)


def _run_kernels(calls: dict[str, Any], inputs: dict[str, Any]) -> dict[str, Any]:
    """The kernels without the program around them."""

    def run(name: str, call: Any) -> Any:
        return jax.named_call(lambda *x: call.primitive.bind(*x, **call.params), name=name)(*inputs[name])

    return {name: run(name, call) for name, call in calls.items()}


def _kernel_statistics(folder: Path, grids: dict[str, Sequence[int]]) -> Iterator[tuple[str, Row]]:
    """Return the statistics of each kernel from the files of libtpu."""
    for name, grid in grids.items():
        (usage,) = folder.glob(f"*{name}*-final_hlo-static-per-bundle-utilization.txt")
        (source,) = folder.glob(f"*{name}*-original.txt")
        lines = [line.split() for line in usage.read_text().splitlines()]
        counts = np.array([[int(x) for x in line] for line in lines if len(line) == len(UNITS) and line[0].isdigit()])
        bundles = counts[1:]  # the first line is the capacity
        steps = int(np.prod(grid))
        units = dict(zip(UNITS, map(int, bundles.sum(axis=0)), strict=True))
        sizes = re.findall(r"space=vmem, size = (0x[0-9a-f]+)", source.read_text())
        yield (
            name,
            {
                "grid": list(grid),
                "bundles": len(bundles),
                "bundles_per_128": round(len(bundles) * steps * 128 / (ROWS * HEADS * LENGTH), 1),
                "vmem_bytes": sum(int(size, 16) for size in sizes),
                **units,
            },
        )


def read_rows() -> list[Row]:
    lines = RESULTS.read_text().splitlines() if RESULTS.exists() else []
    return [json.loads(line) for line in lines]


def latest_rows(recorded: Sequence[Row]) -> dict[tuple[str, str, str, int], Row]:
    """The last row of each case, target, form and number of heads side by side."""
    return {row_key(row): row for row in recorded}


def row_key(row: Row) -> tuple[str, str, str, int]:
    return row["case"], row["target"], row["form"], row["heads"]


def regressions(row: Row, baseline: Row | None) -> list[str]:
    """The kernels that have grown since, in words."""
    grown = []
    for name, kernel in row["kernels"].items():
        old = (baseline or {"kernels": {}})["kernels"].get(name)
        if old and kernel["bundles_per_128"] > MAX_GROWTH * old["bundles_per_128"]:
            change = f"{old['bundles_per_128']} -> {kernel['bundles_per_128']} bundles per 128 tokens of a head"
            grown.append(f"{row['case']}, {row['target']}, {name}: {change}")
    return grown


def report(recorded: Sequence[Row]) -> None:
    print("| case | target | heads | kernel | bundles per 128 tokens | MXU | XLU | VALU | spills | VMEM kB |")
    print("|---|---|--:|---|--:|--:|--:|--:|--:|--:|")
    found = latest_rows(recorded)
    for (case, target, form, heads), row in found.items():
        for name, kernel in row["kernels"].items():
            units = " | ".join(str(kernel[unit]) for unit in ("MXU", "XLU", "VALU", "SPILL"))
            size = kernel["vmem_bytes"] // 1024
            print(f"| {case} | {target} | {heads} | {name} | {kernel['bundles_per_128']} | {units} | {size} |")
        if form == "xla" and (ours := found.get((case, target, "mosaic_tpu", heads))):
            held = [f"{r['temporary_bytes'] / 2**20:.0f} MB" for r in (ours, row)]
            print(f"| {case} | {target} | | temporaries {held[0]}, of the XLA form {held[1]} | | | | | | |")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line.

    Args:
        argv: Arguments; those of the process by default.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare with the newest rows instead of appending")
    parser.add_argument("--report", action="store_true", help="print the newest rows, compile nothing")
    parser.add_argument("--case", choices=TPU_KERNEL_CASES, nargs="+", default=list(TPU_KERNEL_CASES))
    parser.add_argument("--target", choices=TARGETS, nargs="+", default=list(TARGETS))
    parser.add_argument("--form", choices=IMPLEMENTATIONS, nargs="+", default=IMPLEMENTATIONS[:1])
    parser.add_argument(
        "--heads", type=int, nargs="+", default=[MAX_HEADS_PER_STEP], help="that a grid step takes at most"
    )
    parser.add_argument("--child", help=argparse.SUPPRESS)
    asked = parser.parse_args(argv)
    if asked.child:
        return compile_in_child(*json.loads(asked.child))
    recorded = read_rows()
    if asked.report:
        return report(recorded)
    if find_libtpu() is None:
        sys.exit("libtpu is not installed: pip install 'recallax[tpu]', or scripts/tpu-compiler .venv constraints.txt")
    grown: list[str] = []
    at = git_commit()  # before the rows that are appended make it a changed one
    for target, form, heads in itertools.product(asked.target, asked.form, asked.heads):
        for row in compile_kernels(asked.case, target, form, heads=heads, whole_program=not asked.check):
            counts = {name: (kernel["bundles_per_128"], kernel["SPILL"]) for name, kernel in row["kernels"].items()}
            print(target, form, heads, row["case"], counts)
            grown += regressions(row, latest_rows(recorded).get(row_key(row)))
            if not asked.check:
                with RESULTS.open("a") as file:
                    file.write(json.dumps(row | {"commit": at}) + "\n")
    if grown:
        print("\n".join(grown), file=sys.stderr)
    sys.exit(bool(asked.check and grown))


if __name__ == "__main__":
    main()
