"""Reading and writing of safetensors files, with a full check of the header.

A file consists of eight bytes that give the length of a JSON header, the header, and the bytes of the tensors. Files
may come from anywhere, so the whole header is checked before any tensor is read: its length, valid JSON without
repeated keys, supported dtypes, shapes that agree with the byte offsets, and tensors that fill the rest of the file
without gaps or overlaps. Source: the format's description in the README of safetensors 0.8.

The format has no checksums. Files that recallax writes have one for each tensor in their metadata, which is verified
when the file is read. Files without checksums, those of other programs and of older versions, are read as they are.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from recallax.convert.weights_error import WeightsError
from recallax.external_file import open_regular_file, parse_json_object, short_repr

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
OTHER_DTYPE_BITS = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("U16", "I16"), 16),
    **dict.fromkeys(("U32", "I32"), 32),
    **dict.fromkeys(("U64", "I64", "C64"), 64),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}
"""Bits per element of the format's other dtypes, which recallax does not import."""
DTYPE_BITS = {name: 8 * dtype.itemsize for name, dtype in DTYPES.items()} | OTHER_DTYPE_BITS
CHECKSUM_KEY = "recallax.sha256"
"""Entry of the metadata: a JSON object with the checksum of each tensor by key."""

type WeightDict = dict[str, np.ndarray]


class TensorSpan(NamedTuple):
    """The header entry of one tensor."""

    dtype: str
    """Its name in the format."""
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
        WeightsError: If the file cannot be read, violates the format, has a tensor of a dtype that weights do not have,
            or contradicts its checksums.
    """
    try:
        with open_regular_file(path) as file:
            size = file.seek(0, 2)
            file.seek(0)
            length = int.from_bytes(file.read(LENGTH_BYTES), "little")
            if size < LENGTH_BYTES or length > min(size - LENGTH_BYTES, MAX_HEADER_BYTES):
                raise ValueError(f"it has {size} bytes and states a header of {length} bytes")
            header = parse_json_object(file.read(length))
            spans = _check_header(header, size - LENGTH_BYTES - length)
            start = LENGTH_BYTES + length
            data = np.memmap(file, np.uint8, mode="r") if size > start else np.zeros(start, np.uint8)
        _check_dtypes(path, header)
        weights = {
            key: data[start + span.start : start + span.stop].view(DTYPES[span.dtype]).reshape(span.shape)
            for key, span in spans.items()
        }
        if checksums := header.get("__metadata__", {}).get(CHECKSUM_KEY):
            check_checksums(weights, parse_json_object(checksums.encode()))
    except OSError as error:
        raise WeightsError(f"{path} cannot be read: {error.strerror}; give a regular file that is readable") from error
    except ValueError as error:
        if isinstance(error, WeightsError):
            raise
        raise WeightsError(f"{path} is not a valid safetensors file: {error}; download it again") from error
    return weights


def write_safetensors(path: Path, weights: Mapping[str, np.ndarray]) -> None:
    """Write a safetensors file with checksums. Needs the optional dependencies `recallax[export]`.

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
        # transformers requires the entry "format".
        save_file(arrays, path, metadata={"format": "pt", CHECKSUM_KEY: json.dumps(checksums_of(arrays))})
    except SafetensorError as error:  # the library raises it, and not OSError, for a full disk
        raise OSError(str(error)) from error
    _sort_metadata(path)


def checksums_of(weights: Mapping[str, np.ndarray]) -> dict[str, str]:
    """Compute the checksum of each array: the SHA-256 of its dtype, its shape and its bytes.

    Args:
        weights: Arrays by key, with dtypes of `DTYPES`.

    Returns:
        Hexadecimal checksums by key, in alphabetical order.
    """
    return {key: _checksum(weights[key]) for key in sorted(weights)}


def check_checksums(weights: Mapping[str, np.ndarray], checksums: Mapping[str, Any]) -> None:
    """Verify that arrays are those for which checksums were computed.

    Args:
        weights: Arrays by key.
        checksums: What `checksums_of` returned.

    Raises:
        ValueError: If an array is missing, has no checksum or another one; the message has the form of a clause.
    """
    if different := sorted(weights.keys() ^ checksums.keys()):
        raise ValueError(f"its tensors and its checksums do not agree on {short_repr(different[0])}")
    for key, array in weights.items():
        if _checksum(array) != checksums[key]:
            raise ValueError(f"the tensor {short_repr(key)} does not have the checksum that was written with it")


def dtype_name(array: np.ndarray) -> str:
    """Return the safetensors name of an array's dtype.

    Args:
        array: An array with a dtype of `DTYPES`.

    Returns:
        The key of `DTYPES`.
    """
    return next(name for name, dtype in DTYPES.items() if dtype == array.dtype)


def _checksum(array: np.ndarray) -> str:
    data = np.ascontiguousarray(array)
    digest = hashlib.sha256(f"{dtype_name(data)} {list(array.shape)}\n".encode())
    digest.update(data.view(np.uint8) if data.ndim else data.tobytes())
    return digest.hexdigest()


def _sort_metadata(path: Path) -> None:
    """Sort the entries of the metadata, which the library writes in random order: equal weights give equal files."""
    with open(path, "r+b") as file:
        length = int.from_bytes(file.read(LENGTH_BYTES), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(length)
        if len(text) != length:
            raise OSError(f"the header of {path} has {length} bytes, but {len(text)} with sorted metadata")
        file.seek(LENGTH_BYTES)
        file.write(text)


def _check_dtypes(path: Path, header: Mapping[str, Any]) -> None:
    for key, entry in header.items():
        if key != "__metadata__" and entry["dtype"] not in DTYPES:
            raise WeightsError(
                f"{path} is valid, but its tensor {short_repr(key)} has dtype {entry['dtype']!r}; recallax imports "
                f"{', '.join(DTYPES)}: convert the tensor, or remove it if it is not a weight"
            )


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
            raise ValueError(f"{short_repr(key)} starts at byte {span.start} instead of {end}, which {problem}")
        end = span.stop
    if end != data_bytes:
        raise ValueError(f"its tensors end at byte {end} of {data_bytes}")
    return spans


def _check_tensor_entry(key: str, entry: Any) -> TensorSpan:
    name = short_repr(key)
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{name} does not have exactly the fields dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise ValueError(f"{name} has dtype {short_repr(dtype)}, which the format does not have")
    for numbers in (shape, offsets):
        if not isinstance(numbers, list) or not all(type(n) is int and n >= 0 for n in numbers):
            raise ValueError(
                f"{name} has the shape {short_repr(shape)} and the offsets {short_repr(offsets)}; both must be lists "
                "of sizes"
            )
    if len(shape) > MAX_NDIM:
        raise ValueError(f"{name} has {len(shape)} axes; weights have at most {MAX_NDIM}")
    bits = DTYPE_BITS[dtype]
    if len(offsets) != 2 or 8 * (offsets[1] - offsets[0]) != math.prod(shape) * bits:
        raise ValueError(
            f"{name} has the offsets {short_repr(offsets)}, which are not the number of bytes of {dtype} "
            f"{short_repr(shape)}"
        )
    if math.prod(n or 1 for n in shape) * bits >= 8 * MAX_ARRAY_BYTES:
        raise ValueError(f"{name} has the axes {short_repr(shape)}, larger than any array")
    return TensorSpan(dtype, tuple(shape), offsets[0], offsets[1])
