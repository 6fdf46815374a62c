"""The documentation: it builds, its Python blocks run, and every command, subpackage and op has a page."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from recallax import schema_1
from recallax.cli.main import COMMANDS

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs").rglob("*.md"))
API = ROOT / "docs" / "api"
DIRECTIVE = re.compile(r"^::: ([\w.]+)$", re.MULTILINE)
"""A module whose docstrings mkdocstrings inserts."""
PYTHON_BLOCK = re.compile(r"^(<!-- not executed:[^\n]*-->\n\n?)?```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
"""A Python block, after an HTML comment that excludes it from execution, with the reason."""
RUN_BLOCKS = """
import json, sys, traceback
errors = {}
for page, blocks in json.load(open(sys.argv[1])).items():
    namespace = {"__name__": "__main__"}
    for block in blocks:
        try:
            exec(compile(block, page, "exec"), namespace)
        except Exception:
            errors[page] = traceback.format_exc() + block
            break
json.dump(errors, open(sys.argv[2], "w"))
"""
"""A program that executes the blocks of each page in order, in one namespace per page."""


def python_blocks(page: Path) -> list[str]:
    """Return the code of the page's Python blocks that are executed."""
    return [code for skipped, code in PYTHON_BLOCK.findall(page.read_text()) if not skipped]


PAGES_WITH_CODE = [page for page in [ROOT / "README.md", *PAGES] if python_blocks(page)]


@pytest.fixture(scope="module")
def block_errors(tmp_path_factory) -> dict[str, str]:
    """Execute the Python blocks of all pages in one child process, in an empty folder.

    The child keeps config classes that the pages define out of this process.

    Returns:
        The traceback of the first block that failed, by page.
    """
    folder = tmp_path_factory.mktemp("doc_blocks")
    blocks = {str(page.relative_to(ROOT)): python_blocks(page) for page in PAGES_WITH_CODE}
    (folder / "blocks.json").write_text(json.dumps(blocks))
    command = [sys.executable, "-c", RUN_BLOCKS, "blocks.json", "errors.json"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "RECALLAX_CACHE": str(folder / "cache")}
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return json.loads((folder / "errors.json").read_text())


@pytest.mark.xdist_group("doc_blocks")
@pytest.mark.parametrize("page", [str(page.relative_to(ROOT)) for page in PAGES_WITH_CODE])
def test_python_blocks_run(page: str, block_errors: dict[str, str]):
    assert page not in block_errors, block_errors[page]


def test_site_builds_without_warnings(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert (result.returncode, result.stdout + result.stderr) == (0, "")
    assert (tmp_path / "commands" / "train.html").is_file()
    signature = (tmp_path / "api" / "ops" / "linear_attention.html").read_text()
    assert 'id="recallax.pallas_kernels.linear_attention.linear_attention"' in signature
    assert 'class="doc doc-object-name doc-class-name">Based<' in (tmp_path / "api" / "layers.html").read_text()


def documented_modules() -> dict[str, str]:
    """Return the page of every module in the API reference. Pages in `exclude_docs` do not count."""
    excluded = yaml.safe_load((ROOT / "mkdocs.yml").read_text()).get("exclude_docs", "").split()
    pages = {str(page.relative_to(ROOT / "docs")): page.read_text() for page in PAGES if page.is_relative_to(API)}
    return {
        module: f"docs/{page}"
        for page, text in pages.items()
        if page not in excluded
        for module in DIRECTIVE.findall(text)
    }


def module_exists(module: str) -> bool:
    path = ROOT.joinpath(*module.split("."))
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def test_api_pages_name_existing_modules():
    unknown = [f"{page} names {module}" for module, page in documented_modules().items() if not module_exists(module)]
    assert not unknown, "there is no such module: " + "; ".join(unknown)


@pytest.mark.parametrize("parent", ["recallax", "recallax.pallas_kernels"])
def test_every_subpackage_and_op_has_an_api_page(parent: str):
    """A package counts as documented if one of its modules is. `recallax list` documents the configs."""
    folders = [path.parent for path in ROOT.joinpath(*parent.split(".")).glob("*/__init__.py")]
    shared = {"recallax.configs", "recallax.pallas_kernels.mosaic_gpu", "recallax.pallas_kernels.mosaic_tpu"}
    names = {f"{parent}.{folder.name}" for folder in folders} - shared
    modules = documented_modules()
    missing = {name for name in names if not any(f"{module}.".startswith(f"{name}.") for module in modules)}
    assert not missing, f"no page in docs/api, or the page is in exclude_docs of mkdocs.yml: {sorted(missing)}"


def test_every_page_is_in_the_navigation():
    config = (ROOT / "mkdocs.yml").read_text()
    navigation = config.split("\nnav:\n")[1]
    excluded = yaml.safe_load(config).get("exclude_docs", "").split()
    pages = {str(page.relative_to(ROOT / "docs")) for page in PAGES} - set(excluded)
    assert not {page for page in pages if not re.search(rf"\s{re.escape(page)}$", navigation, re.MULTILINE)}


def test_glossary_lists_the_renamed_fields():
    text = (ROOT / "docs" / "glossary.md").read_text()
    rows = [f"| `{old}` | `{new}` |" for old, new in schema_1.CLASSES.items()]
    for name, fields in schema_1.FIELDS.items():
        rows.append(f"| `{name}` | " + ", ".join(f"`{old}` → `{new}`" for old, new in fields.items()) + " |")
    for (name, field), values in schema_1.VALUES.items():
        rows.append(f"| `{name}.{field}` | " + ", ".join(f"`{a!r}` → `{b!r}`" for a, b in values.items()) + " |")
    assert not [row for row in rows if row not in text]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_a_page_with_recorded_output(command: str):
    text = (ROOT / "docs" / "commands" / f"{command}.md").read_text()
    blocks = re.findall(r"```console\n(.*?)```", text, re.DOTALL)
    recorded = [re.split(r"\n", block, maxsplit=1) for block in blocks]
    assert any(first.startswith(f"$ recallax {command}") and rest.strip() for first, rest in recorded)


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_recorded_output_has_no_traceback_or_local_path(page: Path):
    for block in re.findall(r"```console\n(.*?)```", page.read_text(), re.DOTALL):
        assert not re.search(r"Traceback|(?<![\w.~:/*])/\w+/\w|\$ .*\n\$ ", block), block
