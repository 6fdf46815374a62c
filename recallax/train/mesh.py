"""Devices: a mesh with a data and an fsdp axis, and where every array lies on it.

Rows of a batch are spread over both axes; parameters and their optimizer state are cut over fsdp along the largest of
their named logical axes that divides evenly, and are whole elsewhere. XLA's partitioner adds the communication.
"""

import jax
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from recallax.config import ConfigError
from recallax.train.run_config import RunConfig
from recallax.types import Batch


def make_mesh(config: RunConfig) -> Mesh:
    """The mesh that a config asks for. Raises ConfigError where devices or rows cannot be divided so."""
    train, available = config.train, jax.device_count()
    data = train.data_parallel or available // train.fsdp
    used = data * train.fsdp
    if not 1 <= used <= available or (jax.process_count() > 1 and used != available):
        raise ConfigError(
            f"train.data_parallel {train.data_parallel} x train.fsdp {train.fsdp} does not fit {available} devices; "
            f"data = 0 takes what fsdp leaves, and several processes use all devices"
        )
    rows = {
        "train.batch_size / train.gradient_accumulation_steps": train.batch_size // train.gradient_accumulation_steps,
        "evaluate.batch_size": config.evaluate.batch_size,
    }
    for name, count in rows.items():
        if count % used:
            raise ConfigError(
                f"{name} is {count} rows, which {used} devices cannot share; make it a multiple of {used}"
            )
    devices = np.array(jax.devices()[:used]).reshape(data, train.fsdp)
    return Mesh(devices, ("data", "fsdp"), axis_types=(AxisType.Auto, AxisType.Auto))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over all devices."""
    return NamedSharding(mesh, P(("data", "fsdp")))


def shard_batch(batch: Batch, sharding: NamedSharding) -> Batch:
    """A numpy batch on the devices; each process contributes its own rows of what all of them generate."""
    if jax.process_count() == 1:
        return jax.device_put(batch, sharding)
    return jax.tree.map(lambda x: jax.make_array_from_callback(x.shape, sharding, lambda i: x[i]), batch)


def parameter_sharding(mesh: Mesh, axes: tuple[str | None, ...], shape: tuple[int, ...]) -> NamedSharding:
    """Where a parameter lies: `axes` are its logical names; leading axes beyond them are stacked layers."""
    parts, stacked = mesh.shape["fsdp"], len(shape) - len(axes)
    named = [stacked + i for i, name in enumerate(axes) if name is not None and shape[stacked + i] % parts == 0]
    spec: list[str | None] = [None] * len(shape)
    if named and parts > 1:
        spec[max(named, key=lambda i: shape[i])] = "fsdp"
    return NamedSharding(mesh, P(*spec))


def state_shardings(mesh: Mesh, state, axes, optimizer: optax.GradientTransformation):
    """Shardings of a whole abstract train state; everything that is not shaped like a parameter is replicated."""
    whole = NamedSharding(mesh, P())
    params = jax.tree.map(lambda names, leaf: parameter_sharding(mesh, names, leaf.shape), axes, state.params)
    moments = optax.tree_map_params(
        optimizer, lambda _, sharding: sharding, state.optimizer, params, transform_non_params=lambda _: whole
    )
    rest = jax.tree.map(lambda _: whole, state._replace(params=(), optimizer=()))
    return rest._replace(params=params, optimizer=moments)
