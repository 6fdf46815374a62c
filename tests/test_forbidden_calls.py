"""Calls that the package must not have, because they would run code or open ports for others."""

import ast
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

PACKAGE = Path(__file__).parent.parent / "recallax"


def calls(*names: str) -> Callable[[ast.AST], bool]:
    return lambda node: isinstance(node, ast.Call) and ast.unparse(node.func) in names


def imports(*modules: str) -> Callable[[ast.AST], bool]:
    def found(node: ast.AST) -> bool:
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            names += [node.module or "", *(alias.name for alias in node.names)]
        return any(part in modules for name in names for part in name.split("."))

    return found


def passes(**arguments: Any) -> Callable[[ast.AST], bool]:
    """Return a rule for calls that pass one of the named arguments with any value but that of `arguments`."""
    return lambda node: (
        isinstance(node, ast.keyword)
        and (node.arg in arguments and ast.unparse(node.value) != repr(arguments[node.arg]))
    )


def contains(text: str) -> Callable[[ast.AST], bool]:
    return lambda node: isinstance(node, ast.Constant) and isinstance(node.value, str) and text in node.value


RULES = [
    pytest.param(
        "import pickle",
        imports("pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"),
        marks=pytest.mark.fault("S1"),
    ),
    pytest.param("torch.load(x)", calls("torch.load"), marks=pytest.mark.fault("S1")),
    pytest.param("np.load(x, allow_pickle=True)", passes(allow_pickle=False), marks=pytest.mark.fault("S1")),
    pytest.param("update('jax_compilation_cache_dir')", contains("compilation_cache"), marks=pytest.mark.fault("S2")),
    pytest.param("import serialize_executable", imports("serialize_executable"), marks=pytest.mark.fault("S2")),
    pytest.param("eval(x)", calls("eval", "exec", "compile", "__import__"), marks=pytest.mark.fault("S6")),
    pytest.param("load(trust_remote_code=True)", passes(trust_remote_code=False), marks=pytest.mark.fault("S7")),
    pytest.param("jax.profiler.start_server(1)", calls("jax.profiler.start_server"), marks=pytest.mark.fault("S11")),
    pytest.param("serve('0.0.0.0')", contains("0.0.0.0"), marks=pytest.mark.fault("S11")),
    pytest.param("subprocess.run(x, shell=True)", passes(shell=False), marks=pytest.mark.fault("S12")),
    pytest.param("os.system(x)", calls("os.system", "os.popen"), marks=pytest.mark.fault("S12")),
    pytest.param("tempfile.mktemp()", calls("tempfile.mktemp", "mktemp"), marks=pytest.mark.fault("S15")),
]
"""Examples of calls, and the rules that find them."""


def violations(text: str, rule: Callable[[ast.AST], bool]) -> Iterator[int]:
    return (getattr(node, "lineno", 0) for node in ast.walk(ast.parse(text)) if rule(node) and hasattr(node, "lineno"))


@pytest.mark.parametrize(("example", "rule"), RULES)
def test_the_package_has_no_forbidden_call(example: str, rule: Callable[[ast.AST], bool]) -> None:
    assert list(violations(example, rule)) == [1], "the rule does not find its example"
    for path in sorted(PACKAGE.rglob("*.py")):
        lines = list(violations(path.read_text(), rule))
        assert not lines, f"{path.relative_to(PACKAGE)}: lines {lines} have a call like `{example}`"
