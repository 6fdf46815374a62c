"""Extension of the context of a trained run with the filters of LongMamba, without training (`recallax calibrate`).

The result is an ordinary run, which eval, generate and export accept: the same parameters with the same names,
LongMamba around the state-space models, and its thresholds among the statistics of the checkpoint.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Int

from recallax.config import ConfigError, fingerprint, require_at_least, to_json
from recallax.layers.base import Statistic
from recallax.models.lm import LM, LMConfig
from recallax.models.long_mamba_calibration import calibrate_step_filters, with_long_mamba
from recallax.models.parameter_paths import layer_paths, parameter_paths
from recallax.models.pattern import parse_pattern
from recallax.tasks.base import Split, Task
from recallax.train.checkpoint import Checkpoints
from recallax.train.loop import restore_run
from recallax.train.program import Program
from recallax.train.run_folder import RunFolder, RunFolderError
from recallax.train.step import TrainState

THRESHOLD_SUFFIX = ".filter.threshold"
"""End of the names of thresholds."""
MAX_BATCHES = 1000
"""Batches of a split that are searched for rows of the training length."""


class CalibrationOptions(NamedTuple):
    """Options of the calibration."""

    context_length: int
    """Context length of the calibrated model in tokens."""
    train_length: int | None = None
    """Length of the training rows in tokens; None: the longest train length of the task."""
    num_rows: int = 32
    """Rows from which thresholds are computed."""
    min_retention: float = 0.05
    """Share of its state that a channel must keep over the training length to be filtered (Mamba-2 in the paper)."""
    clip_quantile: float = 0.95
    """Quantile to which step sizes are clipped before that share is computed."""

    def validate(self) -> None:
        """Raise ConfigError for a number out of range."""
        require_at_least(1, context_length=self.context_length, num_rows=self.num_rows)
        for name, value in (("min_retention", self.min_retention), ("clip_quantile", self.clip_quantile)):
            if not 0 < value <= 1:
                raise ConfigError(f"{name} is {value}; it must be above 0 and at most 1")


def calibrate_run(folder: Path, options: CalibrationOptions, out: Path | None = None) -> tuple[Path, list[str]]:
    """Write a run with a longer context from the newest checkpoint of a run.

    Args:
        folder: Folder of the run.
        options: Options of the calibration.
        out: Folder of the new run; None for `long-<context>` in the folder of the run.

    Returns:
        The folder of the new run, and lines that describe the thresholds.

    Raises:
        RunFolderError: The run has no checkpoint, or the new folder has checkpoints.
        CheckpointError: No checkpoint can be restored.
        ConfigError: The model has no layer to filter, or the task has no row of the training length.
    """
    program, restored = restore_run(folder)
    long, state, report = calibrate(program, restored.state, options)
    out = out or folder / f"long-{options.context_length}"
    with (
        RunFolder(out, long.config) as opened,
        Checkpoints(opened.checkpoints, long.config.train.max_to_keep) as checkpoints,
    ):
        if steps := checkpoints.steps():
            raise RunFolderError(f"{out} has checkpoints of the steps {steps}; choose another --out")
        meta = {name: value for name, value in restored.metadata.items() if name != "environment"}
        meta |= {"config": to_json(long.config), "fingerprint": fingerprint(long.config)}
        checkpoints.save(restored.step, state, meta)
    return out, report


def calibrate(
    program: Program, state: TrainState, options: CalibrationOptions
) -> tuple[Program, TrainState, list[str]]:
    """Add LongMamba's filters to a model.

    Args:
        program: Program of the trained run.
        state: Its state.
        options: Options of the calibration.

    Returns:
        The program and the state of the model with filters, and lines that describe the thresholds.

    Raises:
        ConfigError: An option is out of range, the model has no layer to filter, or the task has no row of the
            training length.
    """
    options.validate()
    config = program.config
    length = max(config.task.lengths("train")) if options.train_length is None else options.train_length
    model_config = with_long_mamba(config.model, length, options.context_length)
    long = Program(replace(config, model=model_config), program.mesh)
    old, new = _flatten(state.statistics), _flatten(long.abstract_state.statistics)
    initial = {path: old.get(path, jnp.zeros(leaf.shape, leaf.dtype)) for path, leaf in new.items()}
    state = state._replace(statistics=unflatten_dict(initial))
    if options.context_length <= length:
        report = [f"context {options.context_length} is not above the {length} tokens trained on: no filters"]
        return long, state, report
    tokens, split = _calibration_rows(config.task, config.train.data_seed, length, options.num_rows)
    model = nnx.merge(long.graphdef, state.params, state.statistics)
    model = calibrate_step_filters(
        long.config.model,
        model,
        jnp.asarray(tokens),
        min_retention=options.min_retention,
        clip_quantile=options.clip_quantile,
    )
    statistics = nnx.to_pure_dict(nnx.state(model, Statistic))
    report = [
        f"thresholds from {len(tokens)} rows of {length} tokens of the {split} split",
        *_describe_thresholds(long.config.model, model, statistics),
    ]
    return long, state._replace(statistics=jax.tree.map(jnp.asarray, statistics)), report


def _describe_thresholds(config: LMConfig, model: LM, statistics: dict) -> list[str]:
    """Return a line for each filtered layer."""
    leaves, lines = _flatten(statistics), []
    layers = layer_paths(parse_pattern(config.pattern, list(config.blocks)))
    for name, place in parameter_paths(model, layers, (Statistic,)).items():
        if name.endswith(THRESHOLD_SUFFIX):
            values = np.asarray(leaves[place.path])[place.stack_index]
            layer = name.removesuffix(THRESHOLD_SUFFIX)
            lines.append(f"  {layer}: {int((values > 0).sum())} of {values.size} channels are filtered")
    return lines


def _flatten(tree: dict) -> dict[tuple, Any]:
    return flatten_dict(tree)


def _calibration_rows(task: Task, seed: int, length: int, count: int) -> tuple[Int[np.ndarray, "B L"], Split]:
    """Return rows of a length and their split: valid if it has such rows, else train."""
    splits: list[Split] = [split for split in ("valid", "train") if length in task.lengths(split)]
    if not splits:
        known = sorted({n for split in ("valid", "train") for n in task.lengths(split)})
        raise ConfigError(f"no row of the task has {length} tokens; train_length must be among {known}")
    rows: list[np.ndarray] = []
    for index in range(MAX_BATCHES):
        batch = task.batch(seed, splits[0], index, count)
        if batch.tokens.shape[1] != length:
            continue
        if not (np.asarray(batch.seq.segment_ids) == 1).all():
            raise ConfigError(f"rows of {length} tokens are padded or packed; they must be one document each")
        rows.append(np.asarray(batch.tokens))
        if sum(map(len, rows)) >= count:
            return np.concatenate(rows)[:count], splits[0]
    raise ConfigError(
        f"{MAX_BATCHES} batches of {splits[0]} have fewer than {count} rows of {length} tokens; lower num_rows"
    )
