"""Which implementation runs: by name or not at all, else the first that the device and the arguments allow."""

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
    platform,
    use_interpreter,
)


def declines(reason: str):
    def form(*arguments: Any):
        raise Unsupported(reason)

    return form


def traced_for(name: str, kind: str):
    """A context in which functions are traced for a device that is not there."""
    device = AbstractDevice(device_kind=kind, num_cores=None, platform=name)
    return jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), (AxisType.Explicit,), abstract_device=device))


FORMS = {"reference": lambda x: "reference", "xla": lambda x: "xla", "mosaic_gpu": declines("x is odd")}


def test_named_implementation_runs_or_raises_reason():
    assert call_implementation("op", FORMS, "reference", 1) == "reference"
    with pytest.raises(Unsupported, match="op cannot run: mosaic_gpu: x is odd"):
        call_implementation("op", FORMS, "mosaic_gpu", 1)
    with pytest.raises(ValueError, match="did you mean 'xla'"):
        call_implementation("op", FORMS, "xlaa", 1)


def test_a_kernel_is_tried_first_on_its_device_and_only_once_proven(monkeypatch):
    assert candidate_implementations("op", FORMS) == ["xla"]
    with traced_for("gpu", "NVIDIA H100 80GB HBM3"):
        assert platform() == "gpu" and candidate_implementations("op", FORMS) == ["xla"]
        monkeypatch.setattr(dispatch, "VERIFIED", frozenset({("op", "mosaic_gpu")}))
        assert candidate_implementations("op", FORMS) == ["mosaic_gpu", "xla"]
        assert call_implementation("op", FORMS, None, 1) == "xla"  # declined, so the next one
        with pytest.raises(Unsupported, match="mosaic_gpu: x is odd; xla: x is even"):
            call_implementation("op", FORMS | {"xla": declines("x is even")}, None, 1)
    with traced_for("tpu", "TPU v6 lite"):
        assert platform() == "tpu" and candidate_implementations("op", FORMS) == ["xla"]


def test_a_kernel_needs_its_device_or_the_interpreter():
    with pytest.raises(Unsupported, match="for a GPU and this is a CPU"):
        use_interpreter("gpu")
    with interpret_kernels():
        assert use_interpreter("gpu") and use_interpreter("tpu")
    with traced_for("gpu", "NVIDIA H100 80GB HBM3"):
        assert not use_interpreter("gpu")


def test_doctor_lists_versions_extras_and_the_implementations_of_each_op(capsys):
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert jax.__version__ in out and "pip install 'recallax[" in out
    lines = {line.split()[0]: line for line in out.splitlines() if line}
    assert set(machine.op_implementations()) <= lines.keys() and all(
        "xla" in lines[op] for op in machine.op_implementations()
    )
    with traced_for("gpu", "NVIDIA H100 80GB HBM3"):
        assert "no recorded run" in machine.describe_implementations("op", FORMS)[1]
    assert machine.describe_implementations("op", FORMS) == (
        "xla",
        "mosaic_gpu (needs a GPU), reference (the definition)",
    )


def test_doctor_lists_every_extra_and_its_packages():
    extras = machine.extra_packages()
    assert {"cuda13", "tpu", "sweep", "export", "dev"} <= extras.keys()
    assert "pytest" in extras["dev"] and "submitit" in extras["sweep"]
