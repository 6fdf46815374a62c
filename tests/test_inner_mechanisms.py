"""Thresholds of `experiments/inner_mechanisms`: forgetting, momentum, depth and stale gradients."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from experiments.inner_mechanisms import decay, depth, momentum
from experiments.inner_mechanisms.memory_grid import select_setting

ROWS = [json.loads(x) for x in (Path(decay.__file__).parent / "results.jsonl").read_text().splitlines()]


def test_forgetting_at_a_change_reduces_the_error():
    errors = {
        method: select_setting(errors, np.minimum)[1] for method, (_, errors) in decay.relative_errors(0.0).items()
    }
    assert errors["at the change"] < 0.75 * errors["never"]
    assert errors["at the change"] < errors["constant"] < errors["never"]


def test_momentum_recalls_pairs_marked_relevant_later():
    accuracies = {
        kind: select_setting(momentum.recall_accuracy(64, 16, kind, rows=8)[1], np.maximum)[1]
        for kind in momentum.MOMENTA
    }
    assert accuracies["cued"] > accuracies["none"] + 0.3


def test_deep_memory_beats_linear_one_and_stale_gradients_cost_accuracy():
    linear = depth.best_rate(depth.MEMORIES["linear"], rows=4)["error"]
    errors = [depth.best_rate(replace(depth.DEEP, chunk_size=chunk), rows=4)["error"] for chunk in (8, 64)]
    assert linear > 0.9 and errors[0] < 0.6
    assert errors[1] > 1.2 * errors[0]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_learned_gates_use_momentum(seed):
    without, with_ = (row for row in ROWS if row["mechanism"] == "learned momentum" and row["seed"] == seed)
    assert (without["momentum"], with_["momentum"]) == (False, True)
    assert with_["error"] < 0.5 * without["error"]
    assert with_["gates"]["momentum"][1] > 0.9 > 0.1 > with_["gates"]["momentum"][2]


def test_recorded_error_is_monotone_in_the_chunk():
    errors = [row["error"] for row in ROWS if row["mechanism"] == "staleness"]
    assert len(errors) == len(depth.CHUNKS) and errors == sorted(errors)
