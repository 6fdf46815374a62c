"""Folders of weights: a config.json and safetensors, as the hubs keep them. Read with suspicion, written atomically.

A safetensors file is eight bytes of length, a JSON header of that length, and the bytes of the tensors. Files come from
anywhere, so all that a header says is checked before a byte of a tensor is looked at: its length, that it is JSON
without repeated keys, that types and shapes say as many bytes as the offsets, that tensors lie one behind the other
without overlap or hole, and end where the file ends. Shards must lie in the folder. Nothing is ever unpickled.
Source: the format's description in the README of safetensors 0.8.
"""

import json
import math
import os
import re
import secrets
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from recallax.convert.model_conversion import WeightsError

MAX_HEADER_BYTES = 100_000_000
"""Bytes; the limit of the safetensors library."""
MAX_NDIM = 16
DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
"""What weights may be, by the format's names."""
SINGLE_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
MAX_SHARD_BYTES = 50_000_000_000
"""Bytes of weights in one file; the default of transformers 5.23."""
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")

type WeightDict = dict[str, np.ndarray]


def read_weights(folder: Path) -> tuple[dict[str, Any], WeightDict]:
    """config.json and all weights by key; the arrays are views of the mapped files, read when they are used.

    Raises WeightsError naming the file and what is wrong with it.
    """
    _reject_pickles(folder)
    if not folder.is_dir():
        raise WeightsError(f"{folder} is not a folder; give the one that holds config.json and *.safetensors")
    return read_json(folder / "config.json"), _read_all_weights(folder)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises WeightsError where there is none."""
    try:
        data = _parse_json_object(path.read_bytes())
    except OSError as error:
        raise WeightsError(f"{path} cannot be read: {error.strerror}; weights need it beside them") from error
    except ValueError as error:
        raise WeightsError(f"{path} is not what it should be: {error}") from error
    return data


def read_safetensors(path: Path) -> WeightDict:
    """Every array of a file by key. Raises WeightsError for a file that does not keep to the format."""
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
                raise ValueError(f"it has {size} bytes and says that its header has {length}")
            entries = _check_header(_parse_json_object(file.read(length)), size - 8 - length)
        start = 8 + length
        whole = np.memmap(path, np.uint8, mode="r") if size > start else np.zeros(start, np.uint8)
    except OSError as error:
        raise WeightsError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise WeightsError(f"{path} is not a sound safetensors file: {error}; get it anew") from error
    return {
        key: whole[start + first : start + last].view(dtype).reshape(shape)
        for key, (dtype, shape, first, last) in entries.items()
    }


def write_folder_atomic(folder: Path, write_files: Callable[[Path], None]) -> None:
    """Make a folder with what `write_files` puts into it, all or nothing: it is filled under another name and then renamed.

    Raises WeightsError where something is there already or nothing can be written, and what `write_files` raises; then nothing
    is left.
    """
    folder = Path(os.path.abspath(folder))
    if folder.exists() or folder.is_symlink():
        raise WeightsError(f"{folder} is there already; move it away, or choose another --out")
    temporary = folder.with_name(f".{folder.name}.{secrets.token_hex(8)}.tmp")
    try:
        temporary.mkdir(parents=True)
        write_files(temporary)
        for path in temporary.rglob("*"):
            if path.is_file():
                _fsync(path)
        temporary.rename(folder)
        _fsync(folder.parent)
    except OSError as error:
        raise WeightsError(f"{folder} cannot be written: {error}; choose another --out, or make space") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_weights(
    folder: Path, config: Mapping[str, Any], weights: Mapping[str, np.ndarray], max_shard_bytes: int = MAX_SHARD_BYTES
) -> None:
    """Put config.json and weights into a folder, as transformers writes them. Needs the extra `export`.

    Weights of more than `max_shard_bytes` bytes go into several files with an index; an array is never cut, so that a file of
    one array may be larger.
    """
    _write_json(folder / "config.json", config)
    shards = _split_into_shards(weights, max_shard_bytes)
    if len(shards) == 1:
        write_safetensors(folder / SINGLE_FILE, weights)
        return
    where: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        write_safetensors(folder / name, shard)
        where |= dict.fromkeys(shard, name)
    total = sum(array.nbytes for array in weights.values())
    _write_json(folder / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": where})


def write_safetensors(path: Path, weights: Mapping[str, np.ndarray]) -> None:
    """Write one file. Needs the extra `export`. Raises OSError where it cannot be written."""
    try:
        from safetensors import SafetensorError
        from safetensors.numpy import save_file
    except ImportError as error:
        raise WeightsError('writing safetensors needs an extra: pip install "recallax[export]"') from error
    arrays = {key: np.asarray(array, order="C") for key, array in weights.items()}
    # transformers loads only what says that it was written in the order of PyTorch
    try:
        save_file(arrays, path, metadata={"format": "pt"})
    except SafetensorError as error:  # a full disk is one, and no OSError
        raise OSError(str(error)) from error


def dtype_name(array: np.ndarray) -> str:
    """The format's name of a dtype that weights may have."""
    return next(name for name, dtype in DTYPES.items() if dtype == array.dtype)


def _split_into_shards(weights: Mapping[str, np.ndarray], max_shard_bytes: int) -> list[WeightDict]:
    """The weights in order, cut before what would make a shard too large; at least one shard."""
    shards: list[WeightDict] = [{}]
    held = 0
    for key, array in weights.items():
        if shards[-1] and held + array.nbytes > max_shard_bytes:
            shards.append({})
            held = 0
        shards[-1][key] = array
        held += array.nbytes
    return shards


def _write_json(path: Path, data: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _reject_pickles(path: Path) -> None:
    if path.suffix in PICKLE_SUFFIXES:
        raise WeightsError(
            f"{path} may hold pickled code and is never read; convert it to safetensors elsewhere, with torch.load("
            "weights_only=True) and safetensors.torch.save_file"
        )


def _read_all_weights(folder: Path) -> WeightDict:
    if (folder / INDEX_FILE).exists():
        return _read_shards(folder)
    files = [folder / SINGLE_FILE] if (folder / SINGLE_FILE).exists() else sorted(folder.glob("*.safetensors"))
    if len(files) == 1:
        return read_safetensors(files[0])
    if files:
        raise WeightsError(f"{folder} has {len(files)} safetensors files and no {INDEX_FILE} that says how they belong")
    for path in sorted(folder.iterdir()):
        _reject_pickles(path)
    raise WeightsError(f"{folder} has no *.safetensors; give the folder that holds the weights")


def _read_shards(folder: Path) -> WeightDict:
    index = read_json(folder / INDEX_FILE)
    where = index.get("weight_map")
    if not isinstance(where, dict) or not all(isinstance(name, str) for name in where.values()):
        raise WeightsError(f"{folder / INDEX_FILE} has no weight_map from keys to file names; get it anew")
    found: WeightDict = {}
    for name in sorted(set(where.values())):
        # No separator and no leading dot: the file lies in the folder, whatever the system's idea of a path is.
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*\.safetensors", name):
            _reject_pickles(Path(name))
            raise WeightsError(
                f"{folder / INDEX_FILE} names the shard {name!r}; it must be a *.safetensors in the folder"
            )
        shard = read_safetensors(folder / name)
        named = {key for key, file in where.items() if file == name}
        if different := sorted(named ^ set(shard)):
            raise WeightsError(f"{folder / name} and {INDEX_FILE} do not agree on {different[:5]}; get both anew")
        found |= shard
    return found


def _parse_json_object(text: bytes) -> dict[str, Any]:
    """The object that a JSON text holds. Raises ValueError, also for a key that is there twice."""
    try:
        data = json.loads(text.decode("utf-8"), object_pairs_hook=_reject_duplicate_keys)
    except RecursionError as error:
        raise ValueError("its JSON is nested too deep") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"it is not JSON: {error}") from error
    if not isinstance(data, dict):
        raise ValueError("its JSON is not an object")
    return data


def _reject_duplicate_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(n for n in names if names.count(n) > 1)!r} is there twice")
    return found


type TensorSpan = tuple[np.dtype, tuple[int, ...], int, int]


def _check_header(header: Mapping[str, Any], size: int) -> dict[str, TensorSpan]:
    """Dtype, shape, first and last byte of every tensor. Raises ValueError for what does not keep to the format."""
    metadata = header.get("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("its __metadata__ is not text by name")
    spans = {key: _check_tensor_entry(key, entry) for key, entry in header.items() if key != "__metadata__"}
    end = 0
    for key, (_, _, first, last) in sorted(spans.items(), key=lambda item: item[1][2:]):
        if first != end:
            raise ValueError(f"{key!r} begins at byte {first}, where {end} is {'taken' if first < end else 'next'}")
        end = last
    if end != size:
        raise ValueError(f"its tensors end at byte {end} of {size}")
    return spans


def _check_tensor_entry(key: str, entry: Any) -> TensorSpan:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{key!r} is not described by dtype, shape and data_offsets alone")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"{key!r} has dtype {dtype!r}; weights must be one of {', '.join(DTYPES)}")
    for numbers in (shape, offsets):
        if not isinstance(numbers, list) or not all(type(n) is int and n >= 0 for n in numbers):
            raise ValueError(f"{key!r} has the shape {shape} at the offsets {offsets}, not lists of sizes")
    if len(shape) > MAX_NDIM:
        raise ValueError(f"{key!r} has {len(shape)} axes; weights have at most {MAX_NDIM}")
    if len(offsets) != 2 or offsets[1] - offsets[0] != math.prod(shape) * DTYPES[dtype].itemsize:
        raise ValueError(f"{key!r} has the offsets {offsets}, which are not as many bytes as {dtype} {shape}")
    if math.prod(n or 1 for n in shape) * DTYPES[dtype].itemsize >= 2**63:
        raise ValueError(f"{key!r} has the axes {str(shape)[:80]}, longer than any array's even where one is 0")
    return DTYPES[dtype], tuple(shape), offsets[0], offsets[1]


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
