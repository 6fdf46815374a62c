"""Reading and writing of safetensors files, with a full check of the header.

A file consists of eight bytes that give the length of a JSON header, the header, and the bytes of the tensors. Files
may come from anywhere, so the whole header is checked before any tensor is read: its length, valid JSON without
repeated keys, supported dtypes, shapes that agree with the byte offsets, and tensors that fill the rest of the file
without gaps or overlaps. Source: the format's description in the README of safetensors 0.8.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from recallax.convert.weights_error import WeightsError

LENGTH_BYTES = 8
"""Bytes of the little-endian header length at the start of a file."""
MAX_HEADER_BYTES = 100_000_000
"""The limit of the safetensors library."""
MAX_NDIM = 16
"""Far above the weights of any model; numpy 1 supports 32 axes."""
MAX_ARRAY_BYTES = 2**63
"""Exclusive limit on the bytes of an array, also with its empty axes counted as 1: numpy's index type is int64."""
DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
"""Supported dtypes of weights, by their names in the format."""
MAX_AXES_LENGTH = 80
"""Characters of a shape in an error message."""

type WeightDict = dict[str, np.ndarray]


class TensorSpan(NamedTuple):
    """The header entry of one tensor."""

    dtype: np.dtype
    shape: tuple[int, ...]
    start: int
    """First byte, counted from the end of the header."""
    stop: int
    """Byte after the last one."""


def read_safetensors(path: Path) -> WeightDict:
    """Read every array of a safetensors file.

    Args:
        path: The file.

    Returns:
        Arrays by key. They are views of the memory-mapped file, so their bytes are read when they are used.

    Raises:
        WeightsError: If the file cannot be read or violates the format.
    """
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(LENGTH_BYTES), "little")
            if size < LENGTH_BYTES or length > min(size - LENGTH_BYTES, MAX_HEADER_BYTES):
                raise ValueError(f"it has {size} bytes and states a header of {length} bytes")
            spans = _check_header(parse_json_object(file.read(length)), size - LENGTH_BYTES - length)
        start = LENGTH_BYTES + length
        data = np.memmap(path, np.uint8, mode="r") if size > start else np.zeros(start, np.uint8)
    except OSError as error:
        raise WeightsError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise WeightsError(f"{path} is not a valid safetensors file: {error}; download it again") from error
    return {
        key: data[start + span.start : start + span.stop].view(span.dtype).reshape(span.shape)
        for key, span in spans.items()
    }


def write_safetensors(path: Path, weights: Mapping[str, np.ndarray]) -> None:
    """Write a safetensors file. Needs the optional dependencies `recallax[export]`.

    Args:
        path: The file.
        weights: Arrays by key.

    Raises:
        OSError: If the file cannot be written.
        WeightsError: If the safetensors library is not installed.
    """
    try:
        from safetensors import SafetensorError
        from safetensors.numpy import save_file
    except ImportError as error:
        raise WeightsError('writing safetensors needs an extra: pip install "recallax[export]"') from error
    arrays = {key: np.asarray(array, order="C") for key, array in weights.items()}
    try:
        save_file(arrays, path, metadata={"format": "pt"})  # transformers requires this entry
    except SafetensorError as error:  # the library raises it, and not OSError, for a full disk
        raise OSError(str(error)) from error


def dtype_name(array: np.ndarray) -> str:
    """Return the safetensors name of an array's dtype.

    Args:
        array: An array with a dtype of `DTYPES`.

    Returns:
        The key of `DTYPES`.
    """
    return next(name for name, dtype in DTYPES.items() if dtype == array.dtype)


def parse_json_object(text: bytes) -> dict[str, Any]:
    """Parse a JSON text that must be an object without repeated keys.

    Args:
        text: UTF-8 encoded JSON.

    Returns:
        The object.

    Raises:
        ValueError: If the text is not such an object; the message has the form of a clause.
    """
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
    result = dict(pairs)
    if len(result) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} is repeated")
    return result


def _check_header(header: Mapping[str, Any], data_bytes: int) -> dict[str, TensorSpan]:
    """Return the tensors by key. Raises ValueError if the header violates the format."""
    metadata = header.get("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("its __metadata__ does not map names to text")
    spans = {key: _check_tensor_entry(key, entry) for key, entry in header.items() if key != "__metadata__"}
    end = 0
    for key, span in sorted(spans.items(), key=lambda item: item[1][2:]):
        if span.start != end:
            problem = "overlaps another tensor" if span.start < end else "leaves a gap"
            raise ValueError(f"{key!r} starts at byte {span.start} instead of {end}, which {problem}")
        end = span.stop
    if end != data_bytes:
        raise ValueError(f"its tensors end at byte {end} of {data_bytes}")
    return spans


def _check_tensor_entry(key: str, entry: Any) -> TensorSpan:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{key!r} does not have exactly the fields dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"{key!r} has dtype {dtype!r}; weights must be one of {', '.join(DTYPES)}")
    for numbers in (shape, offsets):
        if not isinstance(numbers, list) or not all(type(n) is int and n >= 0 for n in numbers):
            raise ValueError(f"{key!r} has the shape {shape} and the offsets {offsets}; both must be lists of sizes")
    if len(shape) > MAX_NDIM:
        raise ValueError(f"{key!r} has {len(shape)} axes; weights have at most {MAX_NDIM}")
    if len(offsets) != 2 or offsets[1] - offsets[0] != math.prod(shape) * DTYPES[dtype].itemsize:
        raise ValueError(f"{key!r} has the offsets {offsets}, which are not the number of bytes of {dtype} {shape}")
    if math.prod(n or 1 for n in shape) * DTYPES[dtype].itemsize >= MAX_ARRAY_BYTES:
        raise ValueError(f"{key!r} has the axes {str(shape)[:MAX_AXES_LENGTH]}, larger than any array")
    return TensorSpan(DTYPES[dtype], tuple(shape), offsets[0], offsets[1])
