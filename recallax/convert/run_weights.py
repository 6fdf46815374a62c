"""The newest checkpoint of a run as named arrays, independent of how its layers are stacked."""

from pathlib import Path
from typing import Any, NamedTuple

from flax import nnx
from flax.traverse_util import flatten_dict

from recallax.convert.model_variables import model_variables
from recallax.convert.safetensors_file import MAX_HEADER_BYTES, WeightDict
from recallax.convert.weights_folder import read_json
from recallax.models.parameter_paths import unstack_parameters
from recallax.train.loop import restore_run
from recallax.train.run_config import RunConfig

RECALLAX_LAYOUT = "recallax"
"""The name and the `model_type` of recallax's own layout."""
IMPORT_RECORD_FILE = "imported.json"
"""A file in the folder of an imported run with its source: layout, config.json, and the dtype of every key."""
ORBAX_FOLDER = "parameters"
"""The folder of the orbax checkpoint in an orbax export."""


class RunState(NamedTuple):
    """The newest checkpoint of a run, ready for `nnx.merge`."""

    config: RunConfig
    graphdef: nnx.GraphDef
    step: int
    params: dict[str, Any]
    statistics: dict[str, Any]


class RunWeights(NamedTuple):
    """The newest checkpoint of a run by name."""

    config: RunConfig
    step: int
    variables: WeightDict
    """Parameters and statistics by name, with absolute layer numbers."""


def read_run_state(folder: Path) -> RunState:
    """Read the newest checkpoint of a run as the states of its model.

    Args:
        folder: The run's folder.

    Returns:
        Config, graph definition, step, parameters and statistics.

    Raises:
        RunFolderError: If the folder is not a run, or has no checkpoint.
        CheckpointError: If the checkpoint cannot be read.
        ConfigError: If the run's config cannot be read.
    """
    program, restored = restore_run(folder)
    state = restored.state
    return RunState(program.config, program.graphdef, restored.step, state.params, state.statistics)


def read_run_weights(folder: Path) -> RunWeights:
    """Read the newest checkpoint of a run by name.

    Args:
        folder: The run's folder.

    Returns:
        Config, step, and variables by name.

    Raises:
        RunFolderError: If the folder is not a run, or has no checkpoint.
        CheckpointError: If the checkpoint cannot be read.
        ConfigError: If the run's config cannot be read.
    """
    run = read_run_state(folder)
    _, paths = model_variables(run.config.model, run.config.task.vocab_size)
    leaves = flatten_dict(run.params) | flatten_dict(run.statistics)
    return RunWeights(run.config, run.step, unstack_parameters(leaves, paths))


def read_import_record(folder: Path) -> dict[str, Any]:
    """Read the source of an imported run.

    Args:
        folder: The run's folder.

    Returns:
        The content of `IMPORT_RECORD_FILE`: `kind` (the layout), `config` and `dtypes`; empty if the run was trained.
    """
    path = folder / IMPORT_RECORD_FILE
    return read_json(path, MAX_HEADER_BYTES) if path.exists() else {}
