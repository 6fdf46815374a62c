"""Selection of an op's implementation by name, or by the device and the arguments; structure of the op packages."""

import ast
from pathlib import Path
from typing import Any

import jax
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from recallax.cli import machine
from recallax.cli.main import main
from recallax.pallas_kernels import dispatch
from recallax.pallas_kernels.dispatch import (
    Unsupported,
    call_implementation,
    candidate_implementations,
    interpret_kernels,
    interpreting,
    platform,
    require_platform,
)


def unsupported(reason: str):
    """Return an implementation that supports no arguments."""

    def implementation(*arguments: Any):
        raise Unsupported(reason)

    return implementation


def traced_for(name: str, kind: str):
    """Context in which functions are traced for a device that need not be present."""
    device = AbstractDevice(device_kind=kind, num_cores=None, platform=name)
    return jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), (AxisType.Explicit,), abstract_device=device))


IMPLEMENTATIONS = {"reference": lambda x: "reference", "xla": lambda x: "xla", "mosaic_gpu": unsupported("x is odd")}


def test_named_implementation_runs_or_raises_reason():
    assert call_implementation("op", IMPLEMENTATIONS, "reference", 1) == "reference"
    with pytest.raises(Unsupported, match="op cannot run: mosaic_gpu: x is odd"):
        call_implementation("op", IMPLEMENTATIONS, "mosaic_gpu", 1)
    with pytest.raises(ValueError, match="did you mean 'xla'"):
        call_implementation("op", IMPLEMENTATIONS, "xlaa", 1)


def test_verified_kernel_is_the_first_candidate_on_its_device(monkeypatch):
    assert candidate_implementations("op", IMPLEMENTATIONS) == ["xla"]
    with traced_for("gpu", "NVIDIA H100 80GB HBM3"):
        assert platform() == "gpu" and candidate_implementations("op", IMPLEMENTATIONS) == ["xla"]
        monkeypatch.setattr(dispatch, "VERIFIED", frozenset({("op", "mosaic_gpu")}))
        assert candidate_implementations("op", IMPLEMENTATIONS) == ["mosaic_gpu", "xla"]
        assert call_implementation("op", IMPLEMENTATIONS, None, 1) == "xla"  # the kernel does not support the argument
        with pytest.raises(Unsupported, match="mosaic_gpu: x is odd; xla: x is even"):
            call_implementation("op", IMPLEMENTATIONS | {"xla": unsupported("x is even")}, None, 1)
    with traced_for("tpu", "TPU v6 lite"):
        assert platform() == "tpu" and candidate_implementations("op", IMPLEMENTATIONS) == ["xla"]


def test_kernel_requires_its_device_or_the_interpreter():
    with pytest.raises(Unsupported, match="for a GPU and this is a CPU"):
        require_platform("gpu")
    with interpret_kernels():
        assert interpreting()
        require_platform("gpu")
        require_platform("tpu")
    with traced_for("gpu", "NVIDIA H100 80GB HBM3"):
        require_platform("gpu")
        assert not interpreting()


def imported_modules(path: Path) -> set[str]:
    """Return the modules that a file imports, with `from package import name` as both package and package.name."""
    modules = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            modules |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return modules


def test_ops_import_no_submodules_of_other_ops():
    root = Path(dispatch.__file__).parent
    ops = {path.parent.name for path in root.glob("*/reference.py")}
    submodules = {
        f"recallax.pallas_kernels.{op}.{path.stem}": op
        for op in ops
        for path in (root / op).iterdir()
        if path.is_dir() or path.stem != "__init__"
    }
    violations = [
        f"{path.relative_to(root)} imports {name}"
        for op in ops
        for path in (root / op).rglob("*.py")
        for name in imported_modules(path)
        for submodule, owner in submodules.items()
        if owner != op and (name == submodule or name.startswith(f"{submodule}."))
    ]
    assert not violations


def test_doctor_lists_versions_extras_and_the_implementations_of_each_op(capsys):
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert jax.__version__ in out and "pip install 'recallax[" in out
    lines = {line.split()[0]: line for line in out.splitlines() if line}
    assert set(machine.op_implementations()) <= lines.keys() and all(
        "xla" in lines[op] for op in machine.op_implementations()
    )
    with traced_for("gpu", "NVIDIA H100 80GB HBM3"):
        assert "no recorded run" in machine.describe_implementations("op", IMPLEMENTATIONS)[1]
    assert machine.describe_implementations("op", IMPLEMENTATIONS) == (
        "xla",
        "mosaic_gpu (needs a GPU), reference (the definition)",
    )


def test_doctor_lists_every_extra_and_its_packages():
    extras = machine.extra_packages()
    assert {"cuda13", "tpu", "sweep", "export", "dev"} <= extras.keys()
    assert "pytest" in extras["dev"] and "submitit" in extras["sweep"]
