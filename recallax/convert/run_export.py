"""Export of a run's newest checkpoint.

A safetensors export contains config.json and weights in another project's layout if one can represent the model, and
otherwise in recallax's own: the run's config, and every parameter by its path with the absolute number of its layer. An
orbax export has the names of recallax's layout and no optimizer state. `import_run` reads both.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from recallax.atomic_files import write_atomic
from recallax.config import ConfigError, suggest_name, to_json
from recallax.convert.layouts import LAYOUTS
from recallax.convert.model_export import export_config, export_weights
from recallax.convert.model_import import import_config
from recallax.convert.orbax_folder import write_orbax
from recallax.convert.run_weights import (
    ORBAX_FOLDER,
    RECALLAX_LAYOUT,
    RunWeights,
    read_import_record,
    read_run_weights,
)
from recallax.convert.safetensors_file import DTYPES, WeightDict
from recallax.convert.weights_folder import CONFIG_FILE, MAX_SHARD_BYTES, write_folder_atomic, write_weights

BYTES_PER_GB = 1e9

type ExportFormat = Literal["safetensors", "orbax"]
type ExportDtype = Literal["float32", "bfloat16", "float16"]


class ConvertedRun(NamedTuple):
    """A run in one layout."""

    layout: str
    config: dict[str, Any]
    """The content of config.json."""
    weights: WeightDict


def export_run(
    folder: Path,
    file_format: ExportFormat,
    out: Path,
    *,
    layout: str | None = None,
    dtype: ExportDtype | None = None,
    shard_gb: float | None = None,
) -> str:
    """Write a run's newest checkpoint to a new folder.

    Args:
        folder: The run's folder.
        file_format: The format of the files.
        out: The new folder.
        layout: A key of `LAYOUTS`, or `recallax`. None: the layout that the run was imported from, otherwise the first
            one that can represent the model.
        dtype: The dtype of the weights. None: the dtypes of the import, otherwise float32.
        shard_gb: Largest size of a safetensors file in 10^9 bytes. None: the default of transformers.

    Returns:
        The name of the layout.

    Raises:
        ConfigError: If the options conflict, the layout cannot represent the model, or a weight exceeds the dtype.
        WeightsError: If the folder exists or cannot be written.
        RunFolderError: If the run has no checkpoint.
        CheckpointError: If the checkpoint cannot be read.
    """
    if file_format == "orbax" and layout not in (None, RECALLAX_LAYOUT):
        raise ConfigError(f"--layout {layout} is not supported by orbax, which has only recallax's own layout")
    if shard_gb is not None and (file_format == "orbax" or not 0 < shard_gb < math.inf):
        raise ConfigError(
            f"--shard-gb is {shard_gb:g} with {file_format}; it needs safetensors and a finite size above 0"
        )
    run, import_record = read_run_weights(folder), read_import_record(folder)
    converted = _convert(run, RECALLAX_LAYOUT if file_format == "orbax" else layout, import_record)
    same_layout = import_record.get("kind") == converted.layout
    dtypes = import_record.get("dtypes", {}) if dtype is None and same_layout else {}
    weights = {key: _cast(key, array, dtypes.get(key, dtype)) for key, array in converted.weights.items()}
    max_shard_bytes = MAX_SHARD_BYTES if shard_gb is None else int(shard_gb * BYTES_PER_GB)

    def write_files(temporary: Path) -> None:
        if file_format == "safetensors":
            write_weights(temporary, converted.config, weights, max_shard_bytes)
        else:
            write_atomic(temporary / CONFIG_FILE, json.dumps(converted.config, indent=2, sort_keys=True) + "\n")
            write_orbax(temporary / ORBAX_FOLDER, weights)

    write_folder_atomic(out, write_files)
    return converted.layout


def _convert(run: RunWeights, layout: str | None, import_record: Mapping[str, Any]) -> ConvertedRun:
    """Convert a run to the named layout, or to the first suitable one."""
    if layout is not None and layout not in (*LAYOUTS, RECALLAX_LAYOUT):
        raise ConfigError(f"there is no layout {layout!r}{suggest_name(layout, [*LAYOUTS, RECALLAX_LAYOUT])}")
    if (original := _convert_to_source(run, layout, import_record)) is not None:
        return original
    for name in [layout] if layout else LAYOUTS:
        if name == RECALLAX_LAYOUT:
            break
        try:
            config = export_config(name, run.config.model, run.config.task.vocab_size)
        except ConfigError:
            if layout:
                raise
            continue
        return ConvertedRun(name, config, export_weights(config, run.variables))
    config = {"model_type": RECALLAX_LAYOUT, "run": to_json(run.config)}
    return ConvertedRun(RECALLAX_LAYOUT, config, run.variables)


def _convert_to_source(run: RunWeights, layout: str | None, import_record: Mapping[str, Any]) -> ConvertedRun | None:
    """Convert an imported run back to its source, with the original config.json; None if that does not apply."""
    source = import_record.get("kind")
    if source not in LAYOUTS or layout not in (None, source):
        return None
    config = import_record["config"]
    try:
        if import_config(config) != run.config.model:
            return None
    except ConfigError:  # an older version has imported a field that recallax does not support
        return None
    weights = export_weights(config, run.variables)
    # The duplicate of a tied head is written only if the source had one.
    return ConvertedRun(source, config, {key: x for key, x in weights.items() if key in import_record["dtypes"]})


def _cast(key: str, array: np.ndarray, dtype: str | None) -> np.ndarray:
    """Cast to a dtype that is named by safetensors or numpy. None: no cast."""
    if dtype is None:
        return array
    target = DTYPES[dtype] if dtype in DTYPES else {"bfloat16": DTYPES["BF16"]}.get(dtype) or np.dtype(dtype)
    cast = array.astype(target)
    if not np.isfinite(cast).all() and np.isfinite(array).all():
        raise ConfigError(f"{key} reaches {np.abs(array).max():.3g}, which {target} cannot hold; use another --dtype")
    return cast
