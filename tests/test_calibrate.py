"""`recallax calibrate`: runs with a longer context."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.traverse_util import flatten_dict

from recallax.cli.main import main
from recallax.config import ConfigError
from recallax.layers import Attention, DiagonalSSM, Identity, LongMamba, NoChannelMixer, Parallel, SwiGLU
from recallax.layers.base import Statistic
from recallax.models import Block, LMConfig
from recallax.models.long_mamba_calibration import calibrate_step_filters, with_long_mamba
from recallax.tasks import InductionHeads
from recallax.train.calibration import CalibrationOptions, calibrate
from recallax.train.loop import evaluate_run, restore_run, train
from recallax.train.program import Program
from recallax.train.run_config import Evaluate, RunConfig, Train

pytestmark = pytest.mark.xdist_group("calibrate")  # one process: the tests share runs

LENGTH = 12
SSM = DiagonalSSM(max_timescale=200.0)
MODEL = LMConfig(
    d_model=8,
    pattern="m*2 w",
    blocks={
        "m": Block(mixer=SSM, channel=NoChannelMixer()),
        "w": Block(mixer=Parallel(ssm=SSM, experts=SwiGLU(intermediate_size=4)), channel=NoChannelMixer()),
        "a": Block(mixer=Attention(), channel=Identity()),
    },
)
CONFIG = RunConfig(
    task=InductionHeads(num_symbols=6, length=LENGTH, test_lengths=(LENGTH, 4 * LENGTH)),
    model=MODEL,
    train=Train(steps=2, batch_size=8),
    evaluate=Evaluate(batches=2, batch_size=8),
)
OPTIONS = ["--num-rows", "8", "--min-retention", "1e-6"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    jax.config.update("jax_disable_most_optimizations", True)
    folder = tmp_path_factory.mktemp("run") / "run"
    train(CONFIG, folder, name="run")
    yield folder
    jax.config.update("jax_disable_most_optimizations", False)


def leaves(tree: Any) -> dict[tuple, Any]:
    return flatten_dict(tree)


def test_calibrated_run_equals_the_run_with_filters(run: Path, capsys: pytest.CaptureFixture[str]):
    out = run / f"long-{4 * LENGTH}"
    assert main(["calibrate", str(run), "--context-length", str(4 * LENGTH), *OPTIONS]) == 0
    output = capsys.readouterr().out
    assert f"run: {out}" in output and "from 8 rows of 12 tokens of the valid split" in output
    counts = [
        [int(word) for word in line.split() if word.isdecimal()] for line in output.splitlines() if "layers" in line
    ]
    names = [line.split(":")[0].strip() for line in output.splitlines() if "layers" in line]
    assert names == ["layers.0.mixer", "layers.1.mixer", "layers.2.mixer.paths.ssm"]
    filtered = [np.sum(np.asarray(leaf) > 0, axis=-1) for leaf in leaves(restore_run(out)[1].state.statistics).values()]
    assert [count for count, _ in counts] == np.concatenate([np.ravel(x) for x in filtered]).tolist()
    assert all(of == 8 for _, of in counts)
    (_, old), (long, new) = restore_run(run), restore_run(out)
    assert old.step == new.step == 2
    jax.tree.map(np.testing.assert_array_equal, old.state.params, new.state.params)
    tokens = jnp.asarray(CONFIG.task.batch(0, "valid", 0, 8).tokens)
    model = with_long_mamba(MODEL, LENGTH, 4 * LENGTH)
    built = nnx.merge(long.graphdef, new.state.params, long.init_state().statistics)
    expected = leaves(
        nnx.to_pure_dict(nnx.state(calibrate_step_filters(model, built, tokens, min_retention=1e-6), Statistic))
    )
    filters = leaves(new.state.statistics)
    assert filters.keys() == expected.keys() and len(filters) == 2 and all(np.any(leaf) for leaf in filters.values())
    jax.tree.map(np.testing.assert_array_equal, filters, expected)
    plain, longer = (evaluate_run(folder, "test") for folder in (run, out))
    assert plain.keys() == longer.keys() and plain["loss"] != longer["loss"]
    again = main(["calibrate", str(run), "--context-length", str(4 * LENGTH), *OPTIONS])
    assert again == 2 and "has checkpoints of the steps [2]; choose another --out" in capsys.readouterr().err


@pytest.mark.full
def test_calibrated_run_can_generate(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "long"
    assert main(["calibrate", str(run), "--context-length", str(4 * LENGTH), *OPTIONS, "--out", str(out)]) == 0
    assert main(["generate", str(out), "--task-rows", "2"]) == 0
    assert "of 2 correct" in capsys.readouterr().out


def test_calibration_at_the_training_length_has_no_effect(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "same"
    assert main(["calibrate", str(run), "--context-length", str(LENGTH), "--out", str(out)]) == 0
    assert "not above the 12 tokens trained on: no filters" in capsys.readouterr().out
    assert evaluate_run(out, "test") == evaluate_run(run, "test")


def test_every_state_space_model_is_wrapped_once():
    longer = with_long_mamba(with_long_mamba(MODEL, 12, 48), 12, 96)
    assert longer.blocks["m"].mixer == LongMamba(mixer=SSM, training_length=12, context_length=96)
    (inside,) = [part for part in vars(longer.blocks["w"].mixer).values() if isinstance(part, LongMamba)]
    assert inside == longer.blocks["m"].mixer and longer.blocks["a"] == MODEL.blocks["a"]


def test_uncalibratable_models_are_rejected(run: Path, capsys: pytest.CaptureFixture[str]):
    for options, part in (
        (["--context-length", "0"], "context_length is 0; it must be at least 1"),
        (["--context-length", "48", "--min-retention", "1.5"], "min_retention is 1.5"),
        (
            ["--context-length", "48", "--train-length", "7"],
            "no row of the task has 7 tokens; train_length must be among [12, 48]",
        ),
    ):
        assert main(["calibrate", str(run), *options, "--out", str(run.parent / "wrong")]) == 2
        assert part in capsys.readouterr().err
    assert not (run.parent / "wrong").exists()
    with pytest.raises(ConfigError, match=r"none of the layers \['a'\] has step sizes"):
        with_long_mamba(replace(MODEL, pattern="a"), 12, 48)


def test_train_rows_are_used_if_valid_has_none_of_that_length(run: Path):
    _, restored = restore_run(run)
    other = Program(replace(CONFIG, task=InductionHeads(num_symbols=6, length=LENGTH, test_lengths=(20,))))
    *_, output = calibrate(other, restored.state, CalibrationOptions(context_length=48, num_rows=4))
    assert output[0] == "thresholds from 4 rows of 12 tokens of the train split"
