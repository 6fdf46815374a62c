"""Weights as one orbax checkpoint of named arrays, without an optimizer state."""

from pathlib import Path

import jax
import numpy as np

from recallax.convert.safetensors_file import WeightDict
from recallax.convert.weights_error import WeightsError

MAX_MESSAGE_LENGTH = 300
"""Characters of orbax's error that are quoted; some of its messages contain whole trees."""


def write_orbax(path: Path, weights: WeightDict) -> None:
    """Write an orbax checkpoint.

    Args:
        path: The new folder of the checkpoint.
        weights: Arrays by name.
    """
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path.absolute(), {key: jax.numpy.asarray(array) for key, array in weights.items()})


def read_orbax(path: Path) -> WeightDict:
    """Read an orbax checkpoint.

    Args:
        path: The folder of the checkpoint.

    Returns:
        Arrays by name.

    Raises:
        WeightsError: If the checkpoint cannot be read.
    """
    import orbax.checkpoint as ocp

    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            metadata = checkpointer.metadata(path.absolute()).item_metadata.tree
            abstract = {
                key: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device) for key, leaf in metadata.items()
            }
            restored = checkpointer.restore(path.absolute(), abstract)
    except Exception as error:  # orbax and tensorstore raise nearly every type
        message = " ".join(str(error).split())[:MAX_MESSAGE_LENGTH]
        raise WeightsError(f"{path} is not a valid orbax checkpoint: {type(error).__name__}: {message}") from error
    return {key: np.asarray(array) for key, array in restored.items()}
