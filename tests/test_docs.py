"""The pages of docs/: they build, every command, subpackage and op has one, and the examples were run."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from recallax.__main__ import COMMANDS

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs").rglob("*.md"))
API = ROOT / "docs" / "api"
DIRECTIVE = re.compile(r"^::: ([\w.]+)$", re.MULTILINE)
"""A module whose docstrings mkdocstrings inserts."""


def test_the_site_builds_without_a_warning(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    quiet = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=quiet)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")
    assert (tmp_path / "commands" / "train.html").is_file()
    signature = (tmp_path / "api" / "ops" / "linear_attention.html").read_text()
    assert 'id="recallax.pallas_kernels.linear_attention.linear_attention"' in signature
    assert 'class="doc doc-object-name doc-class-name">Based<' in (tmp_path / "api" / "layers.html").read_text()


def documented() -> dict[str, str]:
    """Every module in the API reference, with its page; without the pages that the site leaves out."""
    excluded = yaml.safe_load((ROOT / "mkdocs.yml").read_text()).get("exclude_docs", "").split()
    pages = {str(page.relative_to(ROOT / "docs")): page.read_text() for page in PAGES if page.is_relative_to(API)}
    return {
        module: f"docs/{page}"
        for page, text in pages.items()
        if page not in excluded
        for module in DIRECTIVE.findall(text)
    }


def exists(module: str) -> bool:
    path = ROOT.joinpath(*module.split("."))
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def test_the_api_reference_names_modules_that_exist():
    unknown = [f"{page} names {module}" for module, page in documented().items() if not exists(module)]
    assert not unknown, "there is no such module: " + "; ".join(unknown)


@pytest.mark.parametrize("parent", ["recallax", "recallax.pallas_kernels"])
def test_every_subpackage_and_op_has_a_page_in_the_api_reference(parent: str):
    """Configs are listed by `recallax list`; a package counts as documented if one of its modules is."""
    folders = [path.parent for path in ROOT.joinpath(*parent.split(".")).glob("*/__init__.py")]
    names = {f"{parent}.{folder.name}" for folder in folders} - {"recallax.configs"}
    missing = {name for name in names if not any(f"{module}.".startswith(f"{name}.") for module in documented())}
    assert not missing, f"no page in docs/api, or it is still in exclude_docs of mkdocs.yml: {sorted(missing)}"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_a_page_with_an_example_that_was_run(command):
    text = (ROOT / "docs" / "commands" / f"{command}.md").read_text()
    blocks = re.findall(r"```console\n(.*?)```", text, re.DOTALL)
    shown = [re.split(r"\n", block, maxsplit=1) for block in blocks]
    assert any(first.startswith(f"$ recallax {command}") and rest.strip() for first, rest in shown)


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_no_example_failed_or_waits_to_be_run(page):
    for block in re.findall(r"```console\n(.*?)```", page.read_text(), re.DOTALL):
        assert not re.search(r"Traceback|(?<![\w.~:/*])/\w+/\w|\$ .*\n\$ ", block), block
