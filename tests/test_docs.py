"""The pages of docs/: they build, every command has one, and what they show was run."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from recallax.__main__ import COMMANDS

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs").rglob("*.md"))


def test_the_site_builds_without_a_warning(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    quiet = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=quiet)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")
    assert (tmp_path / "commands" / "train.html").is_file()


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
