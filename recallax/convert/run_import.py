"""Import of exported or published weights into a new run."""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from flax.traverse_util import flatten_dict, unflatten_dict

from recallax.config import ConfigError, from_json
from recallax.convert.key_map import apply_key_map, parameter_entry
from recallax.convert.layouts import layout_of
from recallax.convert.model_import import import_config, import_parameters
from recallax.convert.model_variables import model_variables
from recallax.convert.orbax_folder import read_orbax
from recallax.convert.run_weights import IMPORT_RECORD_FILE, ORBAX_FOLDER, RECALLAX_LAYOUT
from recallax.convert.safetensors_file import WeightDict, dtype_name
from recallax.convert.weights_error import WeightsError
from recallax.convert.weights_folder import CONFIG_FILE, read_json, read_weights
from recallax.models.parameter_paths import LeafPath, parameter_shapes, stack_parameters
from recallax.train.program import Program
from recallax.train.run_config import RunConfig
from recallax.train.run_folder import run_folder_name
from recallax.train.training_run import initialize_run


def import_run(source: Path, base_config: RunConfig, folder: Path | None = None) -> Path:
    """Create a run at step 0 from exported or published weights.

    Args:
        source: A folder that `export_run` wrote, or the folder of a published model.
        base_config: The run whose task, optimizer and schedule a published model gets. Recallax's own layout contains
            its run config, so this one is not used for it.
        folder: The new run's folder. None: a name in `runs`.

    Returns:
        The run's folder.

    Raises:
        ConfigError: If recallax does not support the model, or it does not fit the task.
        WeightsError: If the files are missing or malformed, or the weights do not fit the model.
        RunFolderError: If the folder already has checkpoints.
    """
    source_config, weights = _read_source(source)
    _check_num_layers(source_config, weights)
    layout = layout_of(source_config)
    is_native = layout == RECALLAX_LAYOUT
    if is_native:
        config = _native_run_config(source, source_config)
    else:
        config = replace(base_config, model=_with_path(source / CONFIG_FILE, lambda: import_config(source_config)))
    program = Program(config)  # before anything is written, because the model may not fit the task
    variables = _native_variables(config, weights) if is_native else import_parameters(source_config, weights)
    params, statistics = _stack_variables(program, variables)
    folder = folder or Path("runs") / run_folder_name(f"imported_{re.sub('[^A-Za-z0-9_]', '_', layout)}", config)
    dtypes = {key: dtype_name(array) for key, array in weights.items()}
    record = {"kind": layout, "config": source_config, "dtypes": dtypes}
    files = {IMPORT_RECORD_FILE: json.dumps(record, indent=1) + "\n"}
    initialize_run(folder, program, params, statistics, files=files)
    return folder


def _stack_variables(program: Program, variables: WeightDict) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the parameters and the statistics of a run from its variables by name."""
    config = program.config
    parts = [flatten_dict(part) for part in (program.abstract_state.params, program.abstract_state.statistics)]
    abstract: dict[LeafPath, Any] = parts[0] | parts[1]
    _, paths = model_variables(config.model, config.task.vocab_size)
    values = stack_parameters(variables, paths, abstract)
    params, statistics = (unflatten_dict({path: values[path] for path in part}) for part in parts)
    return params, statistics


def _read_source(source: Path) -> tuple[dict[str, Any], WeightDict]:
    """Read config.json and the weights of a folder with safetensors or orbax parameters."""
    if not (source / ORBAX_FOLDER).is_dir():
        return read_weights(source)
    return read_json(source / CONFIG_FILE), read_orbax(source / ORBAX_FOLDER)


def _check_num_layers(config: Mapping[str, Any], weights: WeightDict) -> None:
    """Reject a config with more layers than arrays, before a model of that size is built."""
    for name in ("num_hidden_layers", "n_layer"):
        if isinstance(num_layers := config.get(name), int) and num_layers > len(weights):
            raise WeightsError(f"config.json has {name} {num_layers}, but there are only {len(weights)} arrays")


def _with_path[T](path: Path, read: Callable[[], T]) -> T:
    """Return what a function reads from a config, and name the file in its errors."""
    try:
        return read()
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def _native_run_config(source: Path, config: Mapping[str, Any]) -> RunConfig:
    if not isinstance(run := config.get("run"), dict):
        raise WeightsError(f"{source / CONFIG_FILE} has no 'run', which recallax's layout needs; export it again")
    if unknown := sorted(config.keys() - {"model_type", "run"}):
        raise WeightsError(
            f"{source / CONFIG_FILE} has the field {unknown[0]!r}, which recallax's layout lacks; remove it"
        )
    return _with_path(source / CONFIG_FILE, lambda: from_json(run, RunConfig))


def _native_variables(config: RunConfig, weights: WeightDict) -> WeightDict:
    """Return the variables by name, after the checks of any layout; the key map is the identity."""
    shapes = parameter_shapes(*model_variables(config.model, config.task.vocab_size))
    return apply_key_map([parameter_entry(name, name) for name in shapes], weights, shapes)
