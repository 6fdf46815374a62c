"""The newest checkpoint of a run, as other programs read it, and the way back into a run.

safetensors: config.json and weights in another project's layout where one has this model, else in recallax's own: the
config of the run, and every parameter by its path with the absolute number of its layer (`models.placement`). orbax:
the same names in one orbax checkpoint, without the optimizer. `import_run` reads both and gives the same bytes again.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

from recallax.config import ConfigError, fingerprint, from_json, suggest_name, to_json
from recallax.convert.key_map import apply_key_map, parameter_entry
from recallax.convert.model_conversion import (
    LAYOUTS,
    WeightsError,
    export_config,
    export_weights,
    import_config,
    import_parameters,
    layout_of,
)
from recallax.convert.safetensors_folder import (
    DTYPES,
    MAX_SHARD_BYTES,
    WeightDict,
    dtype_name,
    read_json,
    read_weights,
    write_folder_atomic,
    write_weights,
)
from recallax.layers.base import Statistic
from recallax.models import accounting
from recallax.models.parameter_paths import LeafPath as LeafPath
from recallax.models.parameter_paths import (
    ParameterPath,
    layer_paths,
    parameter_paths,
    parameter_shapes,
    stack_parameters,
    unstack_parameters,
)
from recallax.models.pattern import parse_pattern
from recallax.train.checkpoint import Checkpoints
from recallax.train.program import Program
from recallax.train.run_config import RunConfig
from recallax.train.run_folder import RunFolder, RunFolderError, read_config, run_folder_name, write_atomic

RECALLAX_LAYOUT = "recallax"
"""The `model_type` of our own layout."""
IMPORT_RECORD_FILE = "imported.json"
"""In the folder of an imported run: the config.json it came with, and the dtype of every key."""
ORBAX_FOLDER = "parameters"
"""The folder of an orbax export that orbax itself reads."""

type ExportFormat = Literal["safetensors", "orbax"]
type ExportDtype = Literal["float32", "bfloat16", "float16"]


class RunWeights(NamedTuple):
    """What a run has learned."""

    config: RunConfig
    step: int
    variables: WeightDict
    """Parameters and statistics by name, layers by their absolute number."""


def read_run_state(folder: Path) -> tuple[RunConfig, nnx.GraphDef, int, dict, dict]:
    """A run's config, the graph of its model, and step, parameters and statistics of its newest checkpoint.

    Raises RunFolderError, CheckpointError or ConfigError if there is none.
    """
    config = from_json(read_config(folder), RunConfig)
    program = Program(config)
    with Checkpoints(folder / "checkpoints", max_to_keep=None) as checkpoints:
        restored = checkpoints.restore(program.abstract_state)
    if restored is None:
        raise RunFolderError(f"{folder} has no checkpoint yet; train it first")
    return config, program.graphdef, restored.step, restored.state.params, restored.state.statistics


def read_run_weights(folder: Path) -> RunWeights:
    """What the newest checkpoint of a run holds. Raises as `read_run_state`."""
    config, _, step, params, statistics = read_run_state(folder)
    leaves = flatten_dict(params) | flatten_dict(statistics)
    return RunWeights(config, step, unstack_parameters(leaves, _variable_paths(config)))


def export_run(
    folder: Path,
    file_format: ExportFormat,
    out: Path,
    *,
    layout: str | None = None,
    dtype: ExportDtype | None = None,
    shard_gb: float | None = None,
) -> str:
    """Write a run's newest checkpoint to the new folder `out`; returns the layout it has there.

    layout: one of `LAYOUTS`, or `recallax`; None is the layout that the run was imported from, else the first that has
    this model. dtype: None is that of the import, else float32. shard_gb: 10^9 bytes of weights that one file of
    safetensors holds at most; None is what transformers takes.
    """
    if file_format == "orbax" and layout not in (None, RECALLAX_LAYOUT):
        raise ConfigError(f"--layout {layout} is a layout of safetensors; orbax holds recallax's own")
    if shard_gb is not None and (file_format == "orbax" or not 0 < shard_gb < math.inf):
        raise ConfigError(
            f"--shard-gb is {shard_gb:g} with {file_format}; a file of safetensors has a finite size above 0"
        )
    trained, came = read_run_weights(folder), _read_import_record(folder)
    kind, config, weights = _select_layout(trained, RECALLAX_LAYOUT if file_format == "orbax" else layout, came)
    kept = came.get("dtypes", {}) if dtype is None and came.get("kind") == kind else {}
    weights = {key: _cast(key, array, kept.get(key, dtype)) for key, array in weights.items()}

    def fill(temporary: Path) -> None:
        if file_format == "safetensors":
            write_weights(temporary, config, weights, MAX_SHARD_BYTES if shard_gb is None else int(shard_gb * 1e9))
        else:
            write_atomic(temporary / "config.json", json.dumps(config, indent=2, sort_keys=True) + "\n")
            _write_orbax(temporary / ORBAX_FOLDER, weights)

    write_folder_atomic(out, fill)
    return kind


def import_run(source: Path, base_config: RunConfig, folder: Path | None = None) -> Path:
    """Make a run of exported weights, at step 0, and return its folder.

    source: a folder as `export_run` writes it, or one of a published model. base: the run whose task, optimizer and
    schedule a published model gets; recallax's own layout brings its own. Raises WeightsError or ConfigError naming
    what does not fit, RunFolderError where the folder is taken.
    """
    config, weights = _read_source(source)
    _check_num_layers(config, weights)
    kind = layout_of(config)
    run = (
        _recallax_run_config(source, config)
        if kind == RECALLAX_LAYOUT
        else replace(base_config, model=import_config(config))
    )
    program = Program(run)  # before anything is written: it may not fit the task
    named = _recallax_variables(run, weights) if kind == RECALLAX_LAYOUT else import_parameters(config, weights)
    abstract: dict[LeafPath, Any] = flatten_dict(program.abstract_state.params) | flatten_dict(
        program.abstract_state.statistics
    )
    values = stack_parameters(named, _variable_paths(run), abstract)
    parts = (program.abstract_state.params, program.abstract_state.statistics)
    state = program.init_state_from(
        *(unflatten_dict({path: values[path] for path in flatten_dict(part)}) for part in parts)
    )
    folder = folder or Path("runs") / run_folder_name(f"imported_{re.sub('[^A-Za-z0-9_]', '_', kind)}", run)
    with RunFolder(folder, run) as opened, Checkpoints(opened.checkpoints, run.train.max_to_keep) as checkpoints:
        if steps := checkpoints.steps():
            raise RunFolderError(f"{folder} has checkpoints of the steps {steps}; choose another --run")
        meta = {"config": to_json(run), "fingerprint": fingerprint(run)}
        came = {"kind": kind, "config": config, "dtypes": {key: dtype_name(x) for key, x in weights.items()}}
        write_atomic(opened.path / IMPORT_RECORD_FILE, json.dumps(came, indent=1) + "\n")
        checkpoints.save(0, state, meta)
    return folder


def _select_layout(
    run_weights: RunWeights, layout: str | None, import_record: Mapping[str, Any]
) -> tuple[str, dict[str, Any], WeightDict]:
    """The layout, and config.json and weights in it."""
    run, variables = run_weights.config, run_weights.variables
    if layout is not None and layout not in (*LAYOUTS, RECALLAX_LAYOUT):
        raise ConfigError(f"there is no layout {layout!r}{suggest_name(layout, [*LAYOUTS, RECALLAX_LAYOUT])}")
    if (
        import_record.get("kind") in LAYOUTS
        and layout in (None, import_record["kind"])
        and import_config(import_record["config"]) == run.model
    ):
        weights = export_weights(import_record["config"], variables)
        # A copy of a tied readout is written only if there was one.
        return (
            import_record["kind"],
            import_record["config"],
            {key: x for key, x in weights.items() if key in import_record["dtypes"]},
        )
    for kind in [layout] if layout else LAYOUTS:
        if kind == RECALLAX_LAYOUT:
            break
        try:
            config = export_config(kind, run.model, run.task.vocab_size)
        except ConfigError:
            if layout:
                raise
            continue
        return kind, config, export_weights(config, variables)
    return RECALLAX_LAYOUT, {"model_type": RECALLAX_LAYOUT, "run": to_json(run)}, variables


def _variable_paths(run: RunConfig) -> dict[str, ParameterPath]:
    """Where every parameter and statistic of the model is."""
    model = accounting.abstract_model(run.model, run.task.vocab_size)
    layers = layer_paths(parse_pattern(run.model.pattern, list(run.model.blocks)))
    return parameter_paths(model, layers, (nnx.Param, Statistic))


def _read_import_record(folder: Path) -> dict[str, Any]:
    return read_json(folder / IMPORT_RECORD_FILE) if (folder / IMPORT_RECORD_FILE).exists() else {}


def _cast(key: str, array: np.ndarray, dtype: str | None) -> np.ndarray:
    """In the dtype that is named as the format or as numpy names it; None leaves it."""
    if dtype is None:
        return array
    wanted = DTYPES[dtype] if dtype in DTYPES else {"bfloat16": DTYPES["BF16"]}.get(dtype) or np.dtype(dtype)
    made = array.astype(wanted)
    if not np.isfinite(made).all() and np.isfinite(array).all():
        raise ConfigError(f"{key} reaches {np.abs(array).max():.3g}, more than {wanted} holds; use another --dtype")
    return made


def _read_source(source: Path) -> tuple[dict[str, Any], WeightDict]:
    """config.json and weights of a folder of safetensors, or of one with orbax parameters."""
    if not (source / ORBAX_FOLDER).is_dir():
        return read_weights(source)
    return read_json(source / "config.json"), _read_orbax(source / ORBAX_FOLDER)


def _check_num_layers(config: Mapping[str, Any], weights: WeightDict) -> None:
    """A config that claims layers without weights would be built before anything is found missing."""
    for name in ("num_hidden_layers", "n_layer"):
        if isinstance(layers := config.get(name), int) and layers > len(weights):
            raise WeightsError(f"config.json has {name} {layers}, and there are {len(weights)} arrays in all")


def _recallax_run_config(source: Path, config: Mapping[str, Any]) -> RunConfig:
    if not isinstance(run := config.get("run"), dict):
        raise WeightsError(f"{source / 'config.json'} has no 'run', which recallax's layout needs; export it anew")
    return from_json(run, RunConfig)


def _recallax_variables(run: RunConfig, weights: WeightDict) -> WeightDict:
    """The variables by name, checked as those of any layout: the key map of our own is the identity."""
    shapes = parameter_shapes(accounting.abstract_model(run.model, run.task.vocab_size), _variable_paths(run))
    return apply_key_map([parameter_entry(name, name) for name in shapes], weights, shapes)


def _write_orbax(path: Path, weights: WeightDict) -> None:
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path.absolute(), {key: jax.numpy.asarray(array) for key, array in weights.items()})


def _read_orbax(path: Path) -> WeightDict:
    import orbax.checkpoint as ocp

    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            described = checkpointer.metadata(path.absolute()).item_metadata.tree
            abstract = {
                key: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device) for key, leaf in described.items()
            }
            restored = checkpointer.restore(path.absolute(), abstract)
    except Exception as error:  # orbax and tensorstore raise nearly every type
        line = " ".join(str(error).split())[:300]
        raise WeightsError(f"{path} is not a sound orbax checkpoint: {type(error).__name__}: {line}") from error
    return {key: np.asarray(array) for key, array in restored.items()}
