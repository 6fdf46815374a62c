"""Examples in the docstrings of the package: each one runs and prints what it says."""

import doctest
import importlib
from pathlib import Path

import pytest

import recallax

PACKAGE = Path(recallax.__file__).parent
MODULES = sorted(
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")
    for path in PACKAGE.rglob("*.py")
    if ">>> " in path.read_text(encoding="utf-8")
)


@pytest.mark.parametrize("name", MODULES)
def test_examples_of_docstrings(name):
    result = doctest.testmod(importlib.import_module(name))
    assert result.attempted > 0 and result.failed == 0


def test_ops_and_patterns_have_examples():
    modules = ("pallas_kernels.delta_rule", "pallas_kernels.linear_attention", "models.pattern", "models.accounting")
    assert {f"recallax.{name}" for name in modules} <= set(MODULES)
