"""Checked-in experiments: the rows belong to configs of today, and the reports reproduce the tables."""

import importlib
import json
import re
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments.key_retrieval import variants
from experiments.migrate_results import FOLDER, questions, recorded_configs
from experiments.results import best_row, read_rows
from recallax.config import fingerprint
from recallax.train.loop import restore_run


def test_readme_lists_every_experiment_and_each_has_its_files() -> None:
    listed = re.findall(r"\((\w+)/README\.md\)", (FOLDER / "README.md").read_text())
    assert sorted(set(listed)) == questions()
    for question in questions():
        folder = FOLDER / question
        assert (folder / "results.jsonl").exists() and (folder / "table.md").exists(), question
        assert f"python -m experiments.{question}.report" in (folder / "README.md").read_text()
        command = f"recallax sweep experiments/{question}/sweep.py"
        if not (folder / "sweep.py").exists():
            command = f"python -m experiments.{question}.measure"
        assert command in (folder / "README.md").read_text(), question


@pytest.mark.parametrize("question", questions())
def test_checked_in_rows_have_fingerprints_of_current_configs(question: str) -> None:
    """If a fingerprint changes, a sweep measures every cell again and run folders are rejected."""
    configs = {fingerprint(config) for config in recorded_configs(question)}
    for file in (FOLDER / question).glob("*.jsonl"):
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        assert {row["config"] for row in rows if "config" in row} <= configs
        assert configs == set() or any("config" in row for row in rows)


@pytest.mark.parametrize("question", questions())
def test_report_reproduces_the_checked_in_table(question: str) -> None:
    report = importlib.import_module(f"experiments.{question}.report")
    assert report.table(read_rows(FOLDER / question)) + "\n" == (FOLDER / question / "table.md").read_text()


def test_best_row_is_the_most_accurate_one_with_the_labels() -> None:
    accuracies = {("a", "grid"): 0.1, ("a", "seeds"): 0.9, ("b", "grid"): 0.5}
    rows = [{"mixer": m, "stage": s, "valid": {"accuracy": x}} for (m, s), x in accuracies.items()]
    assert best_row(rows, "grid") is rows[2]
    assert best_row(rows, "grid", mixer="a") is rows[0]
    with pytest.raises(ValueError, match=r"no row of stage 'grid' has {'mixer': 'c'}"):
        best_row(rows, "grid", mixer="c")


@pytest.mark.full
def test_key_retrieval_trains_the_second_run_from_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(variants.STEPS, "window", (2, 1))
    slices = ((16, 1),)
    task = replace(variants.LONG_TASK, train_slices=slices, test_slices=slices, queries_per_fact=1)
    monkeypatch.setattr(variants, "LONG_TASK", task)
    row = variants.train_variant("window", 1e-30, tmp_path)  # a learning rate that keeps the parameters
    assert {"stage 1", "stage 2", "config", "skipped"} <= row.keys() and 0 <= row["stage 2"]["accuracy"] <= 1
    (_, first), (_, second) = (restore_run(tmp_path / f"stage_{number}") for number in (1, 2))
    assert (first.step, second.step) == (2, 1)
    jax.tree.map(np.testing.assert_array_equal, first.state.params, second.state.params)
