"""The README: its commands run in their order with few steps, its links and make targets exist, and it is short.

`tests/test_docs.py` executes its Python blocks.
"""

import re
import shlex
from pathlib import Path

import pytest

from recallax.cli.main import main

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
SHORT = ["--train.steps", "4", "--train.log-every", "2", "--evaluate.batches", "1", "--evaluate.batch-size", "8"]
MAX_WORDS = 1000


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


@pytest.mark.usefixtures("unchecked")
def test_commands_run_in_order(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    lines = [shlex.split(line, comments=True) for block in blocks("sh") for line in block.splitlines()]
    commands = [words[1:] for words in lines if words and words[0] == "recallax"]
    assert [words[0] for words in commands] == ["show", "train", "eval", "generate", "report"]
    for words in commands:
        assert main(words + (SHORT if words[0] == "train" else [])) == 0, words
    assert (tmp_path / "runs/report.html").read_text().count("<svg") >= 2
    assert "accuracy" in capsys.readouterr().out


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\]\(([^)#]+)\)", README))))
def test_link_targets_exist(target):
    assert (ROOT / target).exists()


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"`?make ([a-z-]+)`?", README))
    assert targets >= {"setup", "demo", "docs", "test"}
    for target in targets:
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


def test_readme_is_short():
    assert len(README.split()) <= MAX_WORDS
