"""What the compiler for TPUs makes of the kernels: instruction bundles, spills, VMEM. No TPU is needed, none is timed.

    python -m benchmarks.static_tpu             compile all, and append rows to results/static_tpu.jsonl
    python -m benchmarks.static_tpu --check     compile all, and fail where a kernel has grown by more than a tenth
    python -m benchmarks.static_tpu --report    the newest rows as a table

It needs libtpu (the `tpu` extra) and compiles ahead of time for a described device, each case in a process of its own,
since libtpu reads where to write its dumps once. A row says of each kernel how many bundles a grid step has (very long
instruction words, one issued per cycle unless it waits), the pipeline's own included, and what they hold per unit.
Waiting for memory is not in it: it is a proxy to find regressions by and to compare variants of one kernel, not a time.
Of XLA's forms (`--form xla`, minutes) only the bytes of temporaries compare: the bodies of loops are counted once.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies

from recallax.models.accounting import programs_inside
from recallax.pallas_kernels.delta_rule import delta_rule
from recallax.pallas_kernels.landmark_attention import landmark_attention
from recallax.pallas_kernels.linear_attention import linear_attention
from recallax.pallas_kernels.neural_memory import Fixed, Learner, Tokens, neural_memory
from recallax.pallas_kernels.neural_memory.learner import LinearNet
from recallax.pallas_kernels.selective_scan import selective_scan
from recallax.pallas_kernels.taylor_attention import taylor_attention
from recallax.train.log import commit

RESULTS = Path(__file__).parent / "results" / "static_tpu.jsonl"
TARGETS = {"v5e": "v5e:2x2", "v6e": "v6e:2x2"}
FORMS = ("mosaic_tpu", "xla")
ALLOWED = 1.1
"""Growth of the bundles per token that is no regression."""
UNITS = ("MXU", "XLU", "VALU", "VPOP", "EUP", "VLOAD", "FILL", "VSTORE", "SPILL", "SALU")
ROWS, LENGTH, HEADS = 8, 4096, 16

type Row = dict[str, Any]


@dataclass(frozen=True)
class Case:
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


def _heads(keys: int, values: int) -> dict[str, tuple[int, ...]]:
    return {"v": (HEADS, values), "q": (HEADS, keys), "k": (HEADS, keys)}


def _landmark(v: Any, q: Any, k: Any, implementation: str) -> tuple[Any, None]:
    positions = jnp.broadcast_to(jnp.arange(LENGTH)[None], (ROWS, LENGTH))
    return landmark_attention(q, k, v, real=63, positions=positions, implementation=implementation), None


def _memory(v: Any, q: Any, k: Any, weight: Any, **gates: Any) -> tuple[Any, Any]:
    learner = Learner(network=LinearNet(), gradient="token")
    norm = jnp.ones((HEADS, q.shape[3]))
    form = gates.pop("implementation")
    return neural_memory(learner, Tokens(q, k, v, **gates), Fixed({"w1": weight}, norm, norm), implementation=form)


_TOKEN, _CHANNEL = {"log_decay": (HEADS,)}, {"log_decay": (HEADS, 128)}
_STRENGTHS = {"erase": (HEADS,), "write": (HEADS,)}
_GATES = {"lr": (HEADS, 1), "log_momentum": (HEADS, 1), "log_keep": (HEADS, 1)}
_CHANNELS, _STATES = HEADS * 128, 16
CASES: dict[str, Case] = {
    "linear_attention": Case(linear_attention, _heads(128, 128)),
    "linear_attention, token decay": Case(linear_attention, _heads(128, 128), _TOKEN),
    "linear_attention, token decay, narrow": Case(linear_attention, _heads(64, 64), _TOKEN),
    "linear_attention, channel decay": Case(linear_attention, _heads(128, 128), _CHANNEL),
    "delta_rule": Case(delta_rule, _heads(128, 128), _STRENGTHS),
    "delta_rule, token decay": Case(delta_rule, _heads(128, 128), _STRENGTHS | _TOKEN),
    "delta_rule, channel decay": Case(delta_rule, _heads(128, 128), _STRENGTHS | _CHANNEL),
    "landmark_attention": Case(_landmark, _heads(128, 128)),
    "neural_memory": Case(_memory, _heads(128, 128), _GATES, {"weight": (HEADS, 128, 128)}),
    "taylor_attention": Case(taylor_attention, _heads(16, 64)),
    "selective_scan": Case(
        selective_scan,
        {"x": (_CHANNELS,), "b": (_STATES,), "c": (_STATES,)},
        {"rate": (_CHANNELS,)},
        {"a": (_CHANNELS, _STATES)},
    ),
}
"""The first input has the output's shape. A head of the scan is 128 channels."""


def available() -> bool:
    """Whether libtpu is there."""
    return importlib.util.find_spec("libtpu") is not None


def compiled(name: str, target: str, form: str) -> Row:
    """Compile a case forward and backward in a process of its own. Raises RuntimeError with what the compiler says."""
    with tempfile.TemporaryDirectory() as folder:
        flags = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
        asked = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
        command = [sys.executable, "-m", "benchmarks.static_tpu", "--child", name, target, form]
        done = subprocess.run(
            command, env=os.environ | asked | {"LIBTPU_INIT_ARGS": flags}, capture_output=True, text=True, timeout=600
        )
        if done.returncode:
            raise RuntimeError(f"{name} does not compile for {target}: {done.stderr.strip()[-2000:]}")
        child = json.loads(done.stdout.splitlines()[-1])
        kernels = {} if form == "xla" else dict(_kernels(Path(folder), child.pop("steps")))
    sizes = {"shapes": {key: list(x.shape) for key, x in CASES[name].inputs().items()}}
    versions = {package: importlib.metadata.version(package) for package in ("jax", "libtpu")}
    row = {"case": name, "form": form, "target": target, **sizes, "dtype": "bfloat16", "kernels": kernels}
    return row | child | {"versions": versions}


def child(name: str, target: str, form: str) -> None:
    """Compile, and print what the compiled program tells of itself."""
    case = CASES[name]

    def both(inputs: dict[str, Any], slope: Any) -> Any:
        out, pull = jax.vjp(lambda inputs: case.op(**inputs, implementation=form)[0], inputs)
        return out, pull(slope)

    devices = topologies.get_topology_desc(platform="tpu", topology_name=TARGETS[target]).devices[:1]
    mesh = jax.sharding.Mesh(np.array(devices), ("x",), axis_types=(jax.sharding.AxisType.Explicit,))
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    inputs = case.inputs()
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        placed = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), (inputs, next(iter(inputs.values())))
        )
        traced = jax.jit(both).trace(*placed)
        memory = traced.lower(lowering_platforms=("tpu",)).compile().memory_analysis()
    assert memory is not None
    steps = {str(name): list(grid) for name, grid in _grids(traced.jaxpr.jaxpr)}
    print(json.dumps({"temporary_bytes": memory.temp_size_in_bytes, "steps": steps}))


def _grids(jaxpr: Any) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and grids of the kernels in a program."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "pallas_call":
            yield equation.params["name"], equation.params["grid_mapping"].grid
        for inner in programs_inside(equation.params):
            yield from _grids(inner)


def _kernels(folder: Path, grids: dict[str, Sequence[int]]) -> Iterator[tuple[str, Row]]:
    """What libtpu wrote of each kernel."""
    for name, grid in grids.items():
        (usage,) = folder.glob(f"*{name}*-final_hlo-static-per-bundle-utilization.txt")
        (source,) = folder.glob(f"*{name}*-02-original.txt")
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


def rows() -> list[Row]:
    lines = RESULTS.read_text().splitlines() if RESULTS.exists() else []
    return [json.loads(line) for line in lines]


def newest(recorded: Sequence[Row]) -> dict[tuple[str, str, str], Row]:
    """The last row of each case, target and form."""
    return {(row["case"], row["target"], row["form"]): row for row in recorded}


def regressions(row: Row, before: Row | None) -> list[str]:
    """The kernels that have grown since, in words."""
    grown = []
    for name, kernel in row["kernels"].items():
        old = (before or {"kernels": {}})["kernels"].get(name)
        if old and kernel["bundles_per_128"] > ALLOWED * old["bundles_per_128"]:
            change = f"{old['bundles_per_128']} -> {kernel['bundles_per_128']} bundles per 128 tokens of a head"
            grown.append(f"{row['case']}, {row['target']}, {name}: {change}")
    return grown


def report(recorded: Sequence[Row]) -> None:
    print("| case | target | kernel | bundles per 128 tokens | MXU | XLU | VALU | spills | VMEM kB |")
    print("|---|---|---|--:|--:|--:|--:|--:|--:|")
    found = newest(recorded)
    for (case, target, form), row in found.items():
        for name, kernel in row["kernels"].items():
            units = " | ".join(str(kernel[unit]) for unit in ("MXU", "XLU", "VALU", "SPILL"))
            size = kernel["vmem_bytes"] // 1024
            print(f"| {case} | {target} | {name} | {kernel['bundles_per_128']} | {units} | {size} |")
        if form == "xla" and (ours := found.get((case, target, "mosaic_tpu"))):
            held = [f"{r['temporary_bytes'] / 2**20:.0f} MB" for r in (ours, row)]
            print(f"| {case} | {target} | temporaries {held[0]}, of the XLA form {held[1]} | | | | | | |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare with the newest rows instead of appending")
    parser.add_argument("--report", action="store_true", help="print the newest rows, compile nothing")
    parser.add_argument("--case", choices=CASES, nargs="+", default=list(CASES))
    parser.add_argument("--target", choices=TARGETS, nargs="+", default=list(TARGETS))
    parser.add_argument("--form", choices=FORMS, nargs="+", default=FORMS[:1])
    parser.add_argument("--child", nargs=3, metavar=("CASE", "TARGET", "FORM"), help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.child:
        return child(*asked.child)
    recorded = rows()
    if asked.report:
        return report(recorded)
    if not available():
        sys.exit("libtpu is not installed: pip install 'recallax[tpu]'")
    grown: list[str] = []
    at = commit()  # before the rows that are appended make it a changed one
    for case in asked.case:
        for target in asked.target:
            for form in asked.form:
                row = compiled(case, target, form)
                print(
                    {name: kernel["bundles_per_128"] for name, kernel in row["kernels"].items()} or form, case, target
                )
                grown += regressions(row, newest(recorded).get((case, target, form)))
                if not asked.check:
                    with RESULTS.open("a") as file:
                        file.write(json.dumps(row | {"commit": at}) + "\n")
    if grown:
        print("\n".join(grown), file=sys.stderr)
    sys.exit(bool(asked.check and grown))


if __name__ == "__main__":
    main()
