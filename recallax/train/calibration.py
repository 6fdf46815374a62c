"""`recallax calibrate`: a trained run made to read a longer context, by LongMamba's filters and without training.

What comes out is a run like any other, so that eval, generate and export take it as it is: the same parameters under
the same names, LongMamba around the state-space models, and its thresholds among the statistics of the checkpoint.
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
"""How the names of thresholds end."""
MAX_BATCHES = 1000
"""Batches of a split that are looked through for rows of the training length."""


class CalibrationOptions(NamedTuple):
    """What thresholds are found from."""

    context_length: int
    """Tokens that the model is to read."""
    train_length: int | None = None
    """Tokens of the rows that it was trained on; None is the longest train length of its task."""
    num_rows: int = 32
    min_retention: float = 0.05
    """Share of its state that a channel must keep over the training length to be filtered (Mamba-2's in the paper)."""
    clip_quantile: float = 0.95
    """Quantile at which steps are cut before that is decided."""

    def validate(self) -> None:
        """Raises ConfigError for numbers that mean nothing."""
        require_at_least(1, context_length=self.context_length, num_rows=self.num_rows)
        for name, value in (("min_retention", self.min_retention), ("clip_quantile", self.clip_quantile)):
            if not 0 < value <= 1:
                raise ConfigError(f"{name} is {value}; it must be above 0 and at most 1")


def calibrate_run(folder: Path, options: CalibrationOptions, out: Path | None = None) -> tuple[Path, list[str]]:
    """Make a run for `wanted.context` tokens out of a run's newest checkpoint: its folder, and what was found.

    out: the new run's folder; `long-<context>` in the run's by default. Raises what restoring raises, RunFolderError
    where the folder is taken, ConfigError where there is nothing to filter or no row to find thresholds from.
    """
    program, restored = restore_run(folder)
    long, state, told = calibrate(program, restored.state, options)
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
    return out, told


def calibrate(
    program: Program, state: TrainState, options: CalibrationOptions
) -> tuple[Program, TrainState, list[str]]:
    """The program and state of the model with filters, and a line for each array of thresholds."""
    options.validate()
    config = program.config
    length = max(config.task.lengths("train")) if options.train_length is None else options.train_length
    long = Program(replace(config, model=with_long_mamba(config.model, length, options.context_length)))
    old, new = _flatten(state.statistics), _flatten(long.abstract_state.statistics)
    started = {path: old.get(path, jnp.zeros(leaf.shape, leaf.dtype)) for path, leaf in new.items()}
    state = state._replace(statistics=unflatten_dict(started))
    if options.context_length <= length:
        return (
            long,
            state,
            [f"context {options.context_length} is not above the {length} tokens trained on: no filters"],
        )
    tokens, split = _calibration_rows(config.task, config.train.data_seed, length, options.num_rows)
    model = nnx.merge(long.graphdef, state.params, state.statistics)
    model = calibrate_step_filters(
        long.config.model,
        model,
        jnp.asarray(tokens),
        min_retention=options.min_retention,
        clip_quantile=options.clip_quantile,
    )
    found = nnx.to_pure_dict(nnx.state(model, Statistic))
    told = [f"thresholds from {len(tokens)} rows of {length} tokens of the {split} split"]
    leaves, layers = (
        _flatten(found),
        layer_paths(parse_pattern(long.config.model.pattern, list(long.config.model.blocks))),
    )
    for name, place in parameter_paths(model, layers, (Statistic,)).items():
        if name.endswith(THRESHOLD_SUFFIX):
            values = np.asarray(leaves[place.path])[place.stack_index]
            where = name.removesuffix(THRESHOLD_SUFFIX)
            told.append(f"  {where}: {int((values > 0).sum())} of {values.size} channels are filtered")
    return long, state._replace(statistics=jax.tree.map(jnp.asarray, found)), told


def _flatten(tree: dict) -> dict[tuple, Any]:
    return flatten_dict(tree)


def _calibration_rows(task: Task, seed: int, length: int, count: int) -> tuple[Int[np.ndarray, "B L"], Split]:
    """Rows of that length: of valid where it has any, else of train, whose tokens serve as well."""
    splits: list[Split] = [split for split in ("valid", "train") if length in task.lengths(split)]
    if not splits:
        known = sorted({n for split in ("valid", "train") for n in task.lengths(split)})
        raise ConfigError(f"no row of the task has {length} tokens; train_length must be among {known}")
    found: list[np.ndarray] = []
    for index in range(MAX_BATCHES):
        batch = task.batch(seed, splits[0], index, count)
        if batch.tokens.shape[1] != length:
            continue
        if not (np.asarray(batch.seq.segment_ids) == 1).all():
            raise ConfigError(f"rows of {length} tokens are padded or packed; they must be one document each")
        found.append(np.asarray(batch.tokens))
        if sum(map(len, found)) >= count:
            return np.concatenate(found)[:count], splits[0]
    raise ConfigError(f"{MAX_BATCHES} batches of {splits[0]} have no {count} rows of {length} tokens; lower num_rows")
