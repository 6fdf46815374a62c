"""Compile the GPU kernels for an H100 without a device: registers, spills, shared memory, instructions.

    python -m benchmarks.static_gpu            compile every case; append a row per kernel to results/static_gpu.jsonl
    python -m benchmarks.static_gpu --report   the newest rows as a table

It needs jax with its CUDA plugin (no GPU), and `ptxas` and `nvdisasm` (in the package nvidia-cuda-nvdisasm) on the
PATH. A row is a fact about a program and says nothing about its speed; a spill, or more shared memory than a block
has, is a defect.
"""

import argparse
import functools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

RESULTS = Path(__file__).parent / "results" / "static_gpu.jsonl"
LENGTH, HEADS = 4096, 16
MAX_SHARED_BYTES = 227 << 10
"""That a block may have."""
H100_TARGET_CONFIG = """
platform_name: "CUDA"
device_description_str: "NVIDIA H100 80GB HBM3"
dnn_version_info { major: 9 minor: 19 }
runtime_version { major: 13 minor: 0 patch: 0 }
gpu_device_info {
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
  core_count: 132
  clock_rate_ghz: 1.98
  fpus_per_core: 128
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  shared_memory_per_core: 233472
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  device_memory_size: 84929347584
}
"""

type Row = dict[str, Any]


class GpuCase(NamedTuple):
    """Arguments of an op. Of the selective scan: channels, in all, and states of each."""

    op: str
    keys: int
    values: int
    decay: bool
    """A decay; for the neural memory, momentum."""
    docs: bool
    batch: int = 8
    per_channel: bool = False
    """The decay."""
    real: int = 0
    """Tokens of a landmark's block."""


GPU_KERNEL_CASES = [
    GpuCase("linear_attention", keys, values, decay, docs)
    for keys in (64, 128)
    for values in (64, 128)
    for decay, docs in ((False, False), (True, False), (False, True))
]
"""Documents with a decay are the kernels of a decay alone."""
GPU_KERNEL_CASES += [
    GpuCase("linear_attention", width, width, decay, False, batch=1) for width in (64, 128) for decay in (False, True)
]
"""A single row is cut into segments, here and below."""
GPU_KERNEL_CASES += [
    GpuCase("linear_attention", keys, values, True, docs, per_channel=True)
    for keys in (64, 128)
    for values in (64, 128)
    for docs in (False, True)
]
GPU_KERNEL_CASES += [GpuCase("taylor_attention", 16, 64, False, docs) for docs in (False, True)]
GPU_KERNEL_CASES += [GpuCase("taylor_attention_step", 16, 64, False, False)]
GPU_KERNEL_CASES += [
    GpuCase("delta_rule", keys, values, decay, False)
    for keys in (64, 128)
    for values in (64, 128)
    for decay in (False, True)
]
"""Documents are the kernels of a decay."""
GPU_KERNEL_CASES += [
    GpuCase("delta_rule", keys, values, True, docs, per_channel=True)
    for keys in (64, 128)
    for values in (64, 128)
    for docs in (False, True)
]
GPU_KERNEL_CASES += [
    GpuCase("landmark_attention", keys, values, False, True, real=real)
    for real in (15, 63)
    for keys in (64, 128)
    for values in (64, 128)
]
GPU_KERNEL_CASES += [
    GpuCase("neural_memory", width, width, momentum, True) for width in (64, 128) for momentum in (False, True)
]
GPU_KERNEL_CASES += [
    GpuCase("selective_scan", 2048, states, True, docs) for states in (1, 16) for docs in (False, True)
]
GPU_KERNEL_CASES += [
    GpuCase(op, width, width, True, False, batch=1, per_channel=per_channel)
    for op, per_channel in (("linear_attention", True), ("delta_rule", False), ("delta_rule", True))
    for width in (64, 128)
]
GPU_KERNEL_CASES += [GpuCase("delta_rule", *widths, True, False, batch=1) for widths in ((64, 128), (128, 64))]
GPU_KERNEL_CASES += [GpuCase("taylor_attention", 16, 64, False, docs, batch=1) for docs in (False, True)]
GPU_KERNEL_CASES += [GpuCase("selective_scan", 2048, 16, True, docs, batch=1) for docs in (False, True)]


def op_with_gradients(case: GpuCase) -> tuple[Callable[..., Any], list[Any]]:
    """The op with its gradients, and the shapes and dtypes of its arguments."""
    import jax
    import jax.numpy as jnp

    from recallax.pallas_kernels.delta_rule import delta_rule
    from recallax.pallas_kernels.landmark_attention import landmark_attention
    from recallax.pallas_kernels.linear_attention import linear_attention
    from recallax.pallas_kernels.selective_scan import selective_scan
    from recallax.pallas_kernels.taylor_attention import (
        TaylorState,
        num_features,
        taylor_attention,
        taylor_attention_step,
    )

    if case.op == "neural_memory":
        return _neural_memory_with_gradients(case)
    if case.op == "taylor_attention_step":
        one, width = (case.batch, HEADS), num_features(case.keys, "symmetric")

        def step(q, k, v, kv, z):
            active = jnp.ones(case.batch, bool)
            return taylor_attention_step(q, k, v, TaylorState(kv, z), active, implementation="mosaic_gpu")

        shapes = [((*one, w), jnp.bfloat16) for w in (case.keys, case.keys, case.values)]
        return step, [*shapes, ((*one, width, case.values), jnp.float32), ((*one, width), jnp.float32)]
    ops = {"linear_attention": linear_attention, "taylor_attention": taylor_attention, "delta_rule": delta_rule}
    ops |= {"selective_scan": selective_scan, "landmark_attention": landmark_attention}
    tokens: tuple[int, ...] = (case.batch, LENGTH, HEADS)
    inputs: dict[str, Any] = {
        name: ((*tokens, w), jnp.bfloat16) for name, w in zip("qkv", (case.keys, case.keys, case.values), strict=True)
    }
    if case.decay:
        inputs["log_decay"] = ((*tokens, case.keys) if case.per_channel else tokens, jnp.float32)
    inputs |= dict.fromkeys(("erase", "write") if case.op == "delta_rule" else (), (tokens, jnp.float32))
    if case.op == "selective_scan":
        inputs = {"x": ((*tokens[:2], case.keys), jnp.bfloat16), "rate": ((*tokens[:2], case.keys), jnp.float32)}
        if case.values > 1:
            inputs["a"] = ((case.keys, case.values), jnp.float32)
            inputs |= dict.fromkeys("bc", ((*tokens[:2], case.values), jnp.bfloat16))
    wheres = case.docs + (case.op == "landmark_attention")  # positions, then documents
    arguments = [*inputs.values(), *[(tokens[:2], jnp.int32)] * wheres]

    def run(*given):
        ids = given[-1] if case.docs else None
        op = functools.partial(ops[case.op], segment_ids=ids, implementation="mosaic_gpu")
        if case.op == "landmark_attention":
            op = functools.partial(op, block_size=case.real, positions=given[-2])
        out, pull = jax.vjp(lambda inputs: op(**inputs), dict(zip(inputs, given, strict=False)))
        return out, pull(out)

    return run, arguments


def _neural_memory_with_gradients(case: GpuCase) -> tuple[Callable[..., Any], list[Any]]:
    """Return `op_with_gradients` for the linear memory with a gradient per token."""
    import jax
    import jax.numpy as jnp

    from recallax.pallas_kernels.neural_memory import InnerOptimizer, MemoryInputs, OuterParams, neural_memory
    from recallax.pallas_kernels.neural_memory.inner_optimizer import LinearNet

    learner = InnerOptimizer(network=LinearNet(), gradient="token", momentum=case.decay)

    def op(weight, *tokens):
        gain, ids = jnp.ones((HEADS, case.keys)), jnp.ones((case.batch, LENGTH), jnp.int32)
        fixed = OuterParams({"w1": weight}, gain, gain)
        out, state = neural_memory(learner, MemoryInputs(*tokens), fixed, segment_ids=ids, implementation="mosaic_gpu")
        return out, state.fast_weights

    def run(*given):
        out, pull = jax.vjp(op, *given)
        return out, pull(out)

    tokens = (case.batch, LENGTH, HEADS)
    narrow, gate = ((*tokens, case.keys), jnp.bfloat16), ((*tokens, 1), jnp.float32)
    return run, [((HEADS, case.keys, case.keys), jnp.float32), *[narrow] * 3, *[gate] * 3]


def compile_to_ptx(case: GpuCase, folder: Path) -> Iterator[tuple[str, Path]]:
    """Names of the case's kernels and where they were left as PTX."""
    import jax
    import numpy as np
    from jax.experimental import topologies

    topology = topologies.get_topology_desc(platform="cuda", target_config=H100_TARGET_CONFIG, topology="1x1x1")
    function, arguments = op_with_gradients(case)
    for old in folder.iterdir():
        old.unlink()
    axis = (jax.sharding.AxisType.Explicit,)
    mesh = jax.sharding.Mesh(np.array(topology.devices[:1]), ("x",), axis_types=axis)
    placed = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    shapes = [jax.ShapeDtypeStruct(shape, dtype, sharding=placed) for shape, dtype in arguments]
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        jax.jit(function).trace(*shapes).lower(lowering_platforms=("cuda",)).compile()
    for path in sorted(folder.glob("*.ptx"), key=lambda path: path.stat().st_mtime_ns):
        yield path.stem.rsplit("_", 1)[0], path


def kernel_statistics(ptx: Path) -> Row:
    """Return the statistics of a kernel from ptxas and the disassembler."""
    cubin = ptx.with_suffix(".cubin")
    command = ["ptxas", "-arch=sm_90a", "-O3", "-v", str(ptx), "-o", str(cubin)]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    code = subprocess.run(["nvdisasm", "-c", str(cubin)], check=True, capture_output=True, text=True).stdout
    resources = ptx.with_suffix(".resources.txt").read_text()

    def number(pattern: str, text: str) -> int:
        found = re.search(pattern, text)
        if found is None:
            raise ValueError(f"no {pattern!r} in what was said of {ptx.name}:\n{text}")
        return int(found.group(1))

    return {
        "registers": number(r"Used (\d+) registers", said),
        "spill_store_bytes": number(r"(\d+) bytes spill stores", said),
        "spill_load_bytes": number(r"(\d+) bytes spill loads", said),
        "serialized_products": "wgmma.mma_async instructions are serialized" in said,
        "shared_bytes": number(r"smem_scratch_bytes=(\d+)", resources),
        "HGMMA": code.count("HGMMA"),
        "UTMALDG": code.count("UTMALDG"),
        "UTMASTG": code.count("UTMASTG"),
        "instructions": len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/", code, re.MULTILINE)),
    }


def measure(op: str | None, batch: int | None) -> Iterator[Row]:
    import jax

    from recallax.train.log import git_commit

    at = git_commit()  # before the first row makes it dirty
    with tempfile.TemporaryDirectory() as name:
        os.environ["MOSAIC_GPU_DUMP_TO"] = name
        for case in (case for case in GPU_KERNEL_CASES if op in (None, case.op) and batch in (None, case.batch)):
            for kernel, path in compile_to_ptx(case, Path(name)):
                yield {
                    "kind": "static",
                    "target": "sm_90a",
                    **case._asdict(),
                    "kernel": kernel,
                    **kernel_statistics(path),
                    "versions": {"jax": jax.__version__},
                    "commit": at,
                }


def report() -> None:
    rows = [json.loads(line) for line in RESULTS.read_text().splitlines()]
    columns = ("op", "batch", "keys", "values", "decay", "per_channel", "docs", "real", "kernel")
    columns += ("registers", "spill_store_bytes", "shared_bytes")
    columns += ("HGMMA", "UTMALDG")
    newest = {tuple(row.get(name, False) for name in columns[:9]): row for row in rows}
    print("| " + " | ".join(columns) + " |\n|" + "---|" * len(columns))
    for row in newest.values():
        print("| " + " | ".join(str(row.get(name)) for name in columns) + " |")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line.

    Args:
        argv: Arguments; those of the process by default.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", help="the cases of one op alone")
    parser.add_argument("--batch", type=int, help="the cases of so many rows alone")
    parser.add_argument("--report", action="store_true", help="print the newest rows")
    chosen = parser.parse_args(argv)
    if chosen.report:
        return report()
    os.environ |= {"JAX_PLATFORMS": "cpu", "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1"}
    defects = 0
    for row in measure(chosen.op, chosen.batch):
        print(json.dumps(row), flush=True)
        defects += row["spill_store_bytes"] > 0 or row["shared_bytes"] > MAX_SHARED_BYTES or row["serialized_products"]
        with RESULTS.open("a") as file:
            file.write(json.dumps(row) + "\n")
    sys.exit(f"{defects} kernels spill, ask for too much shared memory, or wait for each product" if defects else 0)


if __name__ == "__main__":
    main()
