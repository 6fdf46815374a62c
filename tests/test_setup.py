"""Setup of the environment: the search for Python, the pinned versions, and the TPU compiler."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CONSTRAINTS = ["constraints.txt", "constraints-jax-0.11.2.txt"]


def stub(path: Path, script: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def python_stub(path: Path, version: str, kind: str = "cpython", venv: str = "venv") -> None:
    """Write an executable that reports to the search that it is this version of Python."""
    major, minor, _ = version.split(".")
    stub(path, f"echo {major} {minor} {version} {kind} {venv} {path}")


def shim_stub(path: Path) -> None:
    """Write a pyenv shim of a version that is not active, which fails."""
    stub(path, f'echo "pyenv: {path.name}: command not found" >&2; exit 127')


def find_python(home: Path, *folders: Path, **env: str) -> subprocess.CompletedProcess[str]:
    path = ":".join(str(folder) for folder in folders)
    return subprocess.run(
        ["/bin/sh", str(ROOT / "scripts" / "find-python")],
        env={"HOME": str(home), "PATH": path, **env},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=30,
    )


def test_failing_shim_is_skipped_for_a_later_working_python(tmp_path: Path):
    shims, folder = tmp_path / "shims", tmp_path / "bin"
    shim_stub(shims / "python3.12")
    python_stub(shims / "python3", "3.11.7")
    python_stub(folder / "python3.12", "3.12.4")
    result = find_python(tmp_path, shims, folder)
    assert (result.returncode, result.stdout, result.stderr) == (0, f"{folder / 'python3.12'}\n", "")


def test_oldest_suitable_python_is_selected_and_paths_may_contain_spaces(tmp_path: Path):
    folder = tmp_path / "my programs"
    python_stub(folder / "python3.14", "3.14.0")
    python_stub(folder / "python3.13", "3.13.1")
    assert find_python(tmp_path, folder).stdout == f"{folder / 'python3.13'}\n"
    python_stub(folder / "python", "3.12.0")
    assert find_python(tmp_path, folder).stdout == f"{folder / 'python'}\n"


@pytest.mark.parametrize("has_pyenv_root", [True, False], ids=["PYENV_ROOT", "home"])
def test_pyenv_versions_are_searched_if_shims_fail(tmp_path: Path, has_pyenv_root: bool):
    root = tmp_path / "elsewhere" if has_pyenv_root else tmp_path / ".pyenv"
    shim_stub(tmp_path / "shims" / "python3.12")
    python_stub(root / "versions" / "3.9.18" / "bin" / "python", "3.9.18")
    inner = root / "versions" / "3.12.1" / "bin" / "python"
    python_stub(inner, "3.12.1")
    env = {"PYENV_ROOT": str(root)} if has_pyenv_root else {}
    assert find_python(tmp_path, tmp_path / "shims", **env).stdout == f"{inner}\n"


def test_uv_is_tried_last_and_replaces_ensurepip(tmp_path: Path):
    folder, managed = tmp_path / "bin", tmp_path / "managed" / "python3.12"
    python_stub(managed, "3.12.5", venv="no-venv")
    stub(folder / "uv", f'for last; do :; done; [ "$last" = 3.12 ] && echo {managed}')
    assert find_python(tmp_path, folder).stdout == f"{managed}\n"
    without_uv = find_python(tmp_path, folder, UV="")
    assert without_uv.returncode == 1 and "uv: is not installed, or turned off" in without_uv.stderr


def test_error_lists_tried_pythons_and_remedy(tmp_path: Path):
    folder = tmp_path / "bin"
    shim_stub(folder / "python3.12")
    python_stub(folder / "python3.13", "3.13.2", venv="no-venv")
    python_stub(folder / "python3.14", "3.14.0", kind="free-threaded")
    python_stub(folder / "python3", "3.11.7")
    stub(folder / "python", "echo Hello")
    result = find_python(tmp_path, folder)
    assert result.returncode == 1 and result.stdout == ""
    for line in (
        "error: no Python >= 3.12 that can make .venv. Tried:",
        f"  {folder / 'python3.12'}: does not run (pyenv: python3.12: command not found)",
        f"  {folder / 'python3.13'}: is 3.13.2, but cannot make a venv (no ensurepip: install python3.13-venv)",
        f"  {folder / 'python3.14'}: is 3.14.0, but free-threaded: the wheels are for released CPython",
        f"  {folder / 'python3'}: is 3.11.7, too old",
        f"  {folder / 'python'}: is not a Python (Hello)",
        "  uv: is not installed, or turned off",
        "  pyenv install 3.12",
    ):
        assert line in result.stderr.splitlines()


def test_explicit_python_is_the_only_candidate(tmp_path: Path):
    python_stub(tmp_path / "bin" / "python3.12", "3.12.4")
    old = tmp_path / "old"
    python_stub(old, "3.10.0")
    result = find_python(tmp_path, tmp_path / "bin", PYTHON=str(old))
    assert result.returncode == 1 and f"  {old}: is 3.10.0, too old" in result.stderr.splitlines()


def test_probe_reports_base_interpreter_of_venv(tmp_path: Path):
    result = find_python(
        tmp_path, PYTHON=sys.executable, UV=sys.executable
    )  # with uv, ensurepip may be missing, as on Debian
    assert result.returncode == 0, result.stderr
    assert os.path.samefile(result.stdout.strip(), sys.executable)
    assert not Path(result.stdout.strip()).is_relative_to(sys.prefix) or sys.prefix == sys.base_prefix


def pins(name: str) -> dict[str, str]:
    lines = [line for line in (ROOT / name).read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.]+", line) for line in lines), "exact pins and nothing else"
    return {str(canonicalize_name(pin)): version for pin, version in (line.split("==") for line in lines)}


@pytest.mark.parametrize("name", CONSTRAINTS)
def test_pins_satisfy_the_version_ranges_of_direct_dependencies(name: str):
    pinned = pins(name)
    for text in [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["dev"], "pip", "setuptools>=77"]:
        requirement = Requirement(text)
        assert requirement.specifier.contains(pinned[canonicalize_name(requirement.name)]), text
    assert pinned["jaxlib"] == pinned["jax"]


def test_oldest_tested_jax_is_the_lower_bound_of_the_dependency():
    assert f"jax>={pins('constraints-jax-0.11.2.txt')['jax']}" in PROJECT["dependencies"]
    assert "OLDEST_JAX := 0.11.2\n" in (ROOT / "Makefile").read_text()


def test_preferred_python_is_the_oldest_supported_one():
    preferred = (ROOT / ".python-version").read_text().strip()
    assert PROJECT["requires-python"] == f">={preferred}"
    assert f"oldest={preferred.removeprefix('3.')} " in (ROOT / "scripts" / "find-python").read_text()


def test_xdist_group_runs_in_one_process(tmp_path):
    """With some versions of pytest, pytest-xdist ignores groups silently, and programs are compiled twice."""
    module = "import os, pytest\npytestmark = pytest.mark.xdist_group('one')\n"
    module += "@pytest.mark.parametrize('i', range(8))\n"
    module += "def test_it(i):\n    open(f'{os.path.dirname(__file__)}/{os.getpid()}.ran', 'a').close()\n"
    (tmp_path / "test_many.py").write_text(module)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-n",
        "2",
        "--dist",
        "loadgroup",
        "-p",
        "no:cacheprovider",
        str(tmp_path),
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(list(tmp_path.glob("*.ran"))) == 1


TARGET = 'while [ "$1" != --target ]; do shift; done'
"""Shell code after which $2 is the folder into which pip installs."""


def tpu_compiler(folder: Path, system: str, machine: str, pip: str) -> subprocess.CompletedProcess[str]:
    """Run `scripts/tpu-compiler` with a stub of pip that executes `pip`, on a machine that reports this platform."""
    stub(folder / "bin" / "uname", f'[ "$1" = -s ] && echo {system} || echo {machine}')
    stub(folder / "venv" / "bin" / "python", pip)
    return subprocess.run(
        ["/bin/sh", str(ROOT / "scripts" / "tpu-compiler"), str(folder / "venv"), str(ROOT / CONSTRAINTS[0])],
        env={"PATH": f"{folder / 'bin'}:/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=30,
    )


@pytest.mark.parametrize("machine", [("Darwin", "arm64"), ("Linux", "aarch64"), ("Linux", "x86_64")])
def test_missing_tpu_compiler_prints_a_warning(machine, tmp_path: Path):
    done = tpu_compiler(tmp_path, *machine, pip=f'{TARGET}\nmkdir -p "$2"; exit 1')  # as without a network
    assert done.returncode == 0 and "NO KERNEL IS COMPILED FOR A TPU" in done.stderr
    assert os.listdir(tmp_path / "venv") == ["bin"]


def test_tpu_compiler_is_reinstalled_only_for_another_pin(tmp_path: Path):
    old = tmp_path / "venv" / "libtpu" / "libtpu-0.0.1.dist-info"
    old.mkdir(parents=True)
    install = f"""
{TARGET}
echo once >>{tmp_path}/installs
mkdir -p "$2/libtpu-${{3#libtpu==}}.dist-info"
"""
    for _ in range(2):
        assert tpu_compiler(tmp_path, "Linux", "x86_64", install).returncode == 0
    pin = re.search(r"^libtpu==(.*)$", (ROOT / CONSTRAINTS[0]).read_text(), re.MULTILINE)
    assert pin is not None
    assert os.listdir(old.parent) == [f"libtpu-{pin[1]}.dist-info"]
    assert (tmp_path / "installs").read_text() == "once\n"
