"""The README's commands and code do what it says, at a few steps instead of thousands."""

import re
import shlex
from pathlib import Path

import pytest

from recallax.__main__ import main

README = (Path(__file__).parent.parent / "README.md").read_text()
SHORT = ["--train.steps", "4", "--train.log-every", "2", "--evaluate.batches", "1", "--evaluate.batch-size", "8"]


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


@pytest.mark.usefixtures("unchecked")
def test_the_commands_run_in_the_order_they_stand(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    lines = [shlex.split(line, comments=True) for block in blocks("sh") for line in block.splitlines()]
    commands = [words[1:] for words in lines if words and words[0] == "recallax"]
    wanted = {"list", "show", "train", "eval", "generate", "export", "import", "report", "doctor"}
    assert {words[0] for words in commands} == wanted
    for words in commands:
        assert main(words + (SHORT if words[0] == "train" else [])) == 0, words
    assert (tmp_path / "runs/report.html").read_text().count("<svg") >= 2
    assert "accuracy" in capsys.readouterr().out


def test_the_code_runs():
    runnable = [code for code in blocks("python") if "shortened" not in code]
    assert len(runnable) == 6
    for code in runnable:
        exec(compile(code, "README.md", "exec"), {})


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\]\(([^)#]+)\)", README))))
def test_links_lead_somewhere(target):
    assert (Path(__file__).parent.parent / target).exists()


def test_its_make_targets_exist():
    makefile = (Path(__file__).parent.parent / "Makefile").read_text()
    named = set(re.findall(r"make ([a-z-]+(?:-oldest)?)", README))
    assert named >= {"demo", "test", "setup"}
    for target in named:
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target
