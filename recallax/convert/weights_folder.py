"""Folders of a config.json and safetensors files, in the format of the Hugging Face hub.

Folders may come from anywhere. Shards must be in the folder itself, and pickled files are never read. Folders are
written atomically.
"""

import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from recallax.atomic_files import create_folder_atomic
from recallax.convert.safetensors_file import MAX_HEADER_BYTES, WeightDict, read_safetensors, write_safetensors
from recallax.convert.weights_error import WeightsError
from recallax.external_file import MAX_CONFIG_BYTES, parse_json_object, read_regular_file

CONFIG_FILE, SINGLE_FILE, INDEX_FILE = "config.json", "model.safetensors", "model.safetensors.index.json"
MAX_SHARD_BYTES = 50_000_000_000
"""Bytes of weights in one file; the default of transformers 5.23."""
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
"""Suffixes of files that may contain pickled code."""
SHARD_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*\.safetensors")
"""Accepted names of shards. Without separators and a leading dot, the file is in the folder on every system."""


def read_weights(folder: Path) -> tuple[dict[str, Any], WeightDict]:
    """Read the config and all weights of a folder.

    Args:
        folder: A folder with config.json and *.safetensors.

    Returns:
        The config, and arrays by key. The arrays are views of the memory-mapped files.

    Raises:
        WeightsError: If a file is missing, malformed or unsafe.
    """
    _reject_pickles(folder)
    if not folder.is_dir():
        raise WeightsError(f"{folder} is not a folder; give the one with config.json and *.safetensors")
    return read_json(folder / CONFIG_FILE), _read_all_weights(folder)


def read_json(path: Path, max_bytes: int = MAX_CONFIG_BYTES) -> dict[str, Any]:
    """Read a JSON file that contains an object.

    Args:
        path: The file.
        max_bytes: Largest size of the file.

    Returns:
        The object.

    Raises:
        WeightsError: If the file cannot be read or contains something else.
    """
    try:
        return parse_json_object(read_regular_file(path, max_bytes))
    except OSError as error:
        raise WeightsError(f"{path} cannot be read: {error.strerror}; it must be beside the weights") from error
    except ValueError as error:
        raise WeightsError(f"{path} is malformed: {error}; download or export it again") from error


def write_folder_atomic(folder: Path, write_files: Callable[[Path], None]) -> None:
    """Create a folder with all of its files or not at all.

    The files are written to a temporary folder, which is renamed at the end and removed on failure.

    Args:
        folder: The new folder.
        write_files: Writes the files into the folder that it is given. Its exceptions are passed on, except OSError.

    Raises:
        WeightsError: If the folder exists or cannot be written.
    """
    folder = Path(os.path.abspath(folder))
    if folder.exists() or folder.is_symlink():
        raise WeightsError(f"{folder} already exists; move it away, or choose another --out")
    try:
        create_folder_atomic(folder, write_files)
    except OSError as error:
        raise WeightsError(f"{folder} cannot be written: {error}; choose another --out, or free some space") from error


def write_weights(
    folder: Path, config: Mapping[str, Any], weights: Mapping[str, np.ndarray], max_shard_bytes: int = MAX_SHARD_BYTES
) -> None:
    """Write config.json and weights into a folder as transformers does. Needs `recallax[export]`.

    Args:
        folder: An existing folder.
        config: The content of config.json.
        weights: Arrays by key.
        max_shard_bytes: Larger weights are written to several files with an index. An array is never divided, so a
            file of one array may exceed this size.

    Raises:
        OSError: If a file cannot be written.
        WeightsError: If the safetensors library is not installed.
    """
    _write_json(folder / CONFIG_FILE, config)
    shards = _split_into_shards(weights, max_shard_bytes)
    if len(shards) == 1:
        write_safetensors(folder / SINGLE_FILE, weights)
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        write_safetensors(folder / name, shard)
        weight_map |= dict.fromkeys(shard, name)
    total = sum(array.nbytes for array in weights.values())
    _write_json(folder / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _split_into_shards(weights: Mapping[str, np.ndarray], max_shard_bytes: int) -> list[WeightDict]:
    """Divide the weights in order, before each array that would make a shard too large; at least one shard."""
    shards: list[WeightDict] = [{}]
    shard_bytes = 0
    for key, array in weights.items():
        if shards[-1] and shard_bytes + array.nbytes > max_shard_bytes:
            shards.append({})
            shard_bytes = 0
        shards[-1][key] = array
        shard_bytes += array.nbytes
    return shards


def _write_json(path: Path, data: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _reject_pickles(path: Path) -> None:
    if path.suffix in PICKLE_SUFFIXES:
        raise WeightsError(
            f"{path} may contain pickled code and is never read; convert it to safetensors elsewhere, with torch.load("
            "weights_only=True) and safetensors.torch.save_file"
        )


def _read_all_weights(folder: Path) -> WeightDict:
    if (folder / INDEX_FILE).exists():
        return _read_shards(folder)
    files = [folder / SINGLE_FILE] if (folder / SINGLE_FILE).exists() else sorted(folder.glob("*.safetensors"))
    if len(files) == 1:
        return read_safetensors(files[0])
    if files:
        raise WeightsError(f"{folder} has {len(files)} safetensors files and no {INDEX_FILE} that lists their keys")
    for path in sorted(folder.iterdir()):
        _reject_pickles(path)
    raise WeightsError(f"{folder} has no *.safetensors; give the folder with the weights")


def _read_shards(folder: Path) -> WeightDict:
    weight_map = read_json(folder / INDEX_FILE, MAX_HEADER_BYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise WeightsError(f"{folder / INDEX_FILE} has no weight_map from keys to file names; download it again")
    weights: WeightDict = {}
    for name in sorted(set(weight_map.values())):
        if not SHARD_NAME.fullmatch(name):
            _reject_pickles(Path(name))
            raise WeightsError(
                f"{folder / INDEX_FILE} names the shard {name!r}; it must be a *.safetensors in the folder"
            )
        shard = read_safetensors(folder / name)
        indexed = {key for key, file in weight_map.items() if file == name}
        if different := sorted(indexed ^ set(shard)):
            raise WeightsError(f"{folder / name} and {INDEX_FILE} do not agree on {different[:5]}; download both again")
        weights |= shard
    return weights
