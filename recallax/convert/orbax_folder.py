"""Weights as one orbax checkpoint of named arrays, without an optimizer state, and a file of checksums beside it.

The format does not detect damaged arrays, so their checksums are verified. Checkpoints without the file, which older
versions wrote, are read as they are.
"""

import json
import os
import stat
from pathlib import Path

import jax
import numpy as np

from recallax.convert.safetensors_file import (
    DTYPES,
    MAX_HEADER_BYTES,
    WeightDict,
    check_checksums,
    checksums_of,
)
from recallax.convert.weights_error import WeightsError
from recallax.external_file import parse_json_object, read_regular_file

CHECKSUM_FILE = "checksums.json"
"""The file with the checksum of each array by name, in the folder of the checkpoint's folder."""
MAX_MESSAGE_LENGTH = 300
"""Characters of orbax's error that are quoted; some of its messages contain whole trees."""


def write_orbax(path: Path, weights: WeightDict) -> None:
    """Write an orbax checkpoint and its checksums.

    Args:
        path: The new folder of the checkpoint.
        weights: Arrays by name.

    Raises:
        OSError: If a file cannot be written.
    """
    import orbax.checkpoint as ocp

    arrays = {key: jax.numpy.asarray(array) for key, array in weights.items()}
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path.absolute(), arrays)
    checksums = checksums_of({key: np.asarray(array) for key, array in arrays.items()})
    path.with_name(CHECKSUM_FILE).write_text(json.dumps(checksums, indent=1) + "\n", encoding="utf-8")


def read_orbax(path: Path) -> WeightDict:
    """Read an orbax checkpoint.

    Args:
        path: The folder of the checkpoint.

    Returns:
        Arrays by name.

    Raises:
        WeightsError: If the checkpoint cannot be read, has arrays that are no weights, or contradicts its checksums.
    """
    import orbax.checkpoint as ocp

    _reject_special_files(path)
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            metadata = checkpointer.metadata(path.absolute()).item_metadata.tree
            for key, leaf in metadata.items():
                if leaf.dtype not in DTYPES.values():
                    raise ValueError(f"{key!r} has dtype {leaf.dtype}; weights must be one of {', '.join(DTYPES)}")
            abstract = {
                key: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device) for key, leaf in metadata.items()
            }
            restored = checkpointer.restore(path.absolute(), abstract)
        weights = {key: np.asarray(array) for key, array in restored.items()}
        if (checksums := path.with_name(CHECKSUM_FILE)).exists():
            check_checksums(weights, parse_json_object(read_regular_file(checksums, MAX_HEADER_BYTES)))
    except Exception as error:  # orbax and tensorstore raise nearly every type
        message = " ".join(str(error).split())[:MAX_MESSAGE_LENGTH]
        raise WeightsError(f"{path} is not a valid orbax checkpoint: {type(error).__name__}: {message}") from error
    return weights


def _reject_special_files(path: Path) -> None:
    """Reject pipes and devices, from which a library would read without an end."""
    for folder, _, names in os.walk(path):
        for name in names:
            file = Path(folder, name)
            if file.exists() and not stat.S_ISREG(file.stat().st_mode):
                raise WeightsError(f"{file} is not a regular file; an orbax checkpoint has no others: remove it")
