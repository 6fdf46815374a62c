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

from recallax.config import ConfigError, fingerprint, from_json, nearest, to_json
from recallax.layers.base import Statistic
from recallax.models import accounting
from recallax.models.importing import (
    LAYOUTS,
    WeightsError,
    export_config,
    export_weights,
    import_config,
    import_parameters,
    layout_of,
)
from recallax.models.importing.key_map import convert, one
from recallax.models.pattern import parse
from recallax.models.placement import Path as LeafPath
from recallax.models.placement import Place, layer_places, parameter_places, parameter_shapes, stacked, unstacked
from recallax.train.checkpoint import Checkpoints
from recallax.train.program import Program
from recallax.train.run import RunConfig
from recallax.train.run_folder import RunFolder, RunFolderError, folder_name, read_config, write_atomic
from recallax.train.weights_folder import (
    DTYPES,
    LARGEST_FILE,
    Weights,
    dtype_name,
    read_folder,
    read_json,
    write_folder,
    write_weights,
)

OWN = "recallax"
"""The `model_type` of our own layout."""
IMPORTED = "imported.json"
"""In the folder of an imported run: the config.json it came with, and the dtype of every key."""
ORBAX = "parameters"
"""The folder of an orbax export that orbax itself reads."""

type Form = Literal["safetensors", "orbax"]
type Dtype = Literal["float32", "bfloat16", "float16"]


class Trained(NamedTuple):
    """What a run has learned."""

    config: RunConfig
    step: int
    variables: Weights
    """Parameters and statistics by name, layers by their absolute number."""


def read_state(folder: Path) -> tuple[RunConfig, nnx.GraphDef, int, dict, dict]:
    """A run's config, the graph of its model, and step, parameters and statistics of its newest checkpoint.

    Raises RunFolderError, CheckpointError or ConfigError if there is none.
    """
    config = from_json(read_config(folder), RunConfig)
    program = Program(config)
    with Checkpoints(folder / "checkpoints", keep=None) as checkpoints:
        restored = checkpoints.restore(program.abstract)
    if restored is None:
        raise RunFolderError(f"{folder} has no checkpoint yet; train it first")
    return config, program.graph, restored.step, restored.state.params, restored.state.statistics


def read_run(folder: Path) -> Trained:
    """What the newest checkpoint of a run holds. Raises as `read_state`."""
    config, _, step, params, statistics = read_state(folder)
    leaves = flatten_dict(params) | flatten_dict(statistics)
    return Trained(config, step, unstacked(leaves, _places(config)))


def export_run(
    folder: Path,
    form: Form,
    out: Path,
    *,
    layout: str | None = None,
    dtype: Dtype | None = None,
    shard_gb: float | None = None,
) -> str:
    """Write a run's newest checkpoint to the new folder `out`; returns the layout it has there.

    layout: one of `LAYOUTS`, or `recallax`; None is the layout that the run was imported from, else the first that has
    this model. dtype: None is that of the import, else float32. shard_gb: 10^9 bytes of weights that one file of
    safetensors holds at most; None is what transformers takes.
    """
    if form == "orbax" and layout not in (None, OWN):
        raise ConfigError(f"--layout {layout} is a layout of safetensors; orbax holds recallax's own")
    if shard_gb is not None and (form == "orbax" or not 0 < shard_gb < math.inf):
        raise ConfigError(f"--shard-gb is {shard_gb:g} with {form}; a file of safetensors has a finite size above 0")
    trained, came = read_run(folder), _came(folder)
    kind, config, weights = _laid_out(trained, OWN if form == "orbax" else layout, came)
    kept = came.get("dtypes", {}) if dtype is None and came.get("kind") == kind else {}
    weights = {key: _cast(key, array, kept.get(key, dtype)) for key, array in weights.items()}

    def fill(temporary: Path) -> None:
        if form == "safetensors":
            write_weights(temporary, config, weights, LARGEST_FILE if shard_gb is None else int(shard_gb * 1e9))
        else:
            write_atomic(temporary / "config.json", json.dumps(config, indent=2, sort_keys=True) + "\n")
            _write_orbax(temporary / ORBAX, weights)

    write_folder(out, fill)
    return kind


def import_run(source: Path, base: RunConfig, folder: Path | None = None) -> Path:
    """Make a run of exported weights, at step 0, and return its folder.

    source: a folder as `export_run` writes it, or one of a published model. base: the run whose task, optimizer and
    schedule a published model gets; recallax's own layout brings its own. Raises WeightsError or ConfigError naming
    what does not fit, RunFolderError where the folder is taken.
    """
    config, weights = _read(source)
    _refuse_more_layers(config, weights)
    kind = layout_of(config)
    run = _own_config(source, config) if kind == OWN else replace(base, model=import_config(config))
    program = Program(run)  # before anything is written: it may not fit the task
    named = _own(run, weights) if kind == OWN else import_parameters(config, weights)
    abstract: dict[LeafPath, Any] = flatten_dict(program.abstract.params) | flatten_dict(program.abstract.statistics)
    values = stacked(named, _places(run), abstract)
    parts = (program.abstract.params, program.abstract.statistics)
    state = program.beginning(*(unflatten_dict({path: values[path] for path in flatten_dict(part)}) for part in parts))
    folder = folder or Path("runs") / folder_name(f"imported_{re.sub('[^A-Za-z0-9_]', '_', kind)}", run)
    with RunFolder(folder, run) as opened, Checkpoints(opened.checkpoints, run.train.keep) as checkpoints:
        if steps := checkpoints.steps():
            raise RunFolderError(f"{folder} has checkpoints of the steps {steps}; choose another --run")
        meta = {"config": to_json(run), "fingerprint": fingerprint(run)}
        came = {"kind": kind, "config": config, "dtypes": {key: dtype_name(x) for key, x in weights.items()}}
        write_atomic(opened.path / IMPORTED, json.dumps(came, indent=1) + "\n")
        checkpoints.save(0, state, meta)
    return folder


def _laid_out(trained: Trained, layout: str | None, came: Mapping[str, Any]) -> tuple[str, dict[str, Any], Weights]:
    """The layout, and config.json and weights in it."""
    run, variables = trained.config, trained.variables
    if layout is not None and layout not in (*LAYOUTS, OWN):
        raise ConfigError(f"there is no layout {layout!r}{nearest(layout, [*LAYOUTS, OWN])}")
    if came.get("kind") in LAYOUTS and layout in (None, came["kind"]) and import_config(came["config"]) == run.model:
        weights = export_weights(came["config"], variables)
        # A copy of a tied readout is written only if there was one.
        return came["kind"], came["config"], {key: x for key, x in weights.items() if key in came["dtypes"]}
    for kind in [layout] if layout else LAYOUTS:
        if kind == OWN:
            break
        try:
            config = export_config(kind, run.model, run.task.vocab_size)
        except ConfigError:
            if layout:
                raise
            continue
        return kind, config, export_weights(config, variables)
    return OWN, {"model_type": OWN, "run": to_json(run)}, variables


def _places(run: RunConfig) -> dict[str, Place]:
    """Where every parameter and statistic of the model is."""
    model = accounting.abstract_model(run.model, run.task.vocab_size)
    layers = layer_places(parse(run.model.pattern, list(run.model.blocks)))
    return parameter_places(model, layers, (nnx.Param, Statistic))


def _came(folder: Path) -> dict[str, Any]:
    return read_json(folder / IMPORTED) if (folder / IMPORTED).exists() else {}


def _cast(key: str, array: np.ndarray, dtype: str | None) -> np.ndarray:
    """In the dtype that is named as the format or as numpy names it; None leaves it."""
    if dtype is None:
        return array
    wanted = DTYPES[dtype] if dtype in DTYPES else {"bfloat16": DTYPES["BF16"]}.get(dtype) or np.dtype(dtype)
    made = array.astype(wanted)
    if not np.isfinite(made).all() and np.isfinite(array).all():
        raise ConfigError(f"{key} reaches {np.abs(array).max():.3g}, more than {wanted} holds; use another --dtype")
    return made


def _read(source: Path) -> tuple[dict[str, Any], Weights]:
    """config.json and weights of a folder of safetensors, or of one with orbax parameters."""
    if not (source / ORBAX).is_dir():
        return read_folder(source)
    return read_json(source / "config.json"), _read_orbax(source / ORBAX)


def _refuse_more_layers(config: Mapping[str, Any], weights: Weights) -> None:
    """A config that claims layers without weights would be built before anything is found missing."""
    for name in ("num_hidden_layers", "n_layer"):
        if isinstance(layers := config.get(name), int) and layers > len(weights):
            raise WeightsError(f"config.json has {name} {layers}, and there are {len(weights)} arrays in all")


def _own_config(source: Path, config: Mapping[str, Any]) -> RunConfig:
    if not isinstance(run := config.get("run"), dict):
        raise WeightsError(f"{source / 'config.json'} has no 'run', which recallax's layout needs; export it anew")
    return from_json(run, RunConfig)


def _own(run: RunConfig, weights: Weights) -> Weights:
    """The variables by name, checked as those of any layout: the key map of our own is the identity."""
    shapes = parameter_shapes(accounting.abstract_model(run.model, run.task.vocab_size), _places(run))
    return convert([one(name, name) for name in shapes], weights, shapes)


def _write_orbax(path: Path, weights: Weights) -> None:
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path.absolute(), {key: jax.numpy.asarray(array) for key, array in weights.items()})


def _read_orbax(path: Path) -> Weights:
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
