"""The device mesh, with a data and an fsdp axis, and the shardings of batches and states.

Rows of a batch are sharded over both axes. Parameters and their optimizer state are sharded over fsdp along the largest
of their named logical axes that divides evenly, and replicated otherwise. XLA's partitioner adds the communication.
"""

import math
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from recallax.config import ConfigError
from recallax.train.run_config import RunConfig
from recallax.train.step import TrainState
from recallax.types import Batch


def make_mesh(config: RunConfig) -> Mesh:
    """Return the device mesh of a run.

    Args:
        config: Config of the run.

    Returns:
        A mesh with the axes "data" and "fsdp".

    Raises:
        ConfigError: The mesh does not fit the devices, or batches do not divide over it.
    """
    train, available = config.train, jax.device_count()
    data = train.data_parallel or available // train.fsdp
    used = data * train.fsdp
    if not 1 <= used <= available or (jax.process_count() > 1 and used != available):
        raise ConfigError(
            f"train.data_parallel {train.data_parallel} x train.fsdp {train.fsdp} does not fit {available} devices; "
            f"data_parallel = 0 uses all devices that fsdp leaves, and a run of several processes must use all devices"
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
    return _mesh_of(data, train.fsdp)


def make_reader_mesh(config: RunConfig) -> Mesh:
    """Return a device mesh to evaluate or export a run, which need not have been trained on these devices.

    Args:
        config: Config of the run.

    Returns:
        The mesh of the run if it fits. Otherwise a mesh of as many local devices as can share a batch of an evaluation,
        with an fsdp axis that divides that of the run.

    Raises:
        ConfigError: The mesh does not fit the devices of several processes.
    """
    try:
        return make_mesh(config)
    except ConfigError:
        if jax.process_count() > 1:
            raise
    rows, available = config.evaluate.batch_size, jax.device_count()
    used = max(count for count in range(1, available + 1) if rows % count == 0)
    fsdp = math.gcd(used, config.train.fsdp)
    return _mesh_of(used // fsdp, fsdp)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Return the sharding of batches: rows over all devices."""
    return NamedSharding(mesh, P(("data", "fsdp")))


def shard_batch(batch: Batch, sharding: NamedSharding) -> Batch:
    """Move a batch to the devices.

    Args:
        batch: The whole batch as numpy arrays, equal in all processes.
        sharding: Sharding of its rows.

    Returns:
        The batch; each process has transferred its own rows.
    """
    if jax.process_count() == 1:
        return jax.device_put(batch, sharding)
    return jax.tree.map(lambda x: jax.make_array_from_callback(x.shape, sharding, lambda i: x[i]), batch)


def parameter_sharding(mesh: Mesh, axes: tuple[str | None, ...], shape: tuple[int, ...]) -> NamedSharding:
    """Return the sharding of a parameter.

    Args:
        mesh: The mesh.
        axes: Logical names of its last axes; None for an axis that is never sharded.
        shape: Its shape, which may have additional leading axes of stacked layers.

    Returns:
        A sharding over fsdp, or a replicated one if no named axis divides evenly.
    """
    parts, stacked = mesh.shape["fsdp"], len(shape) - len(axes)
    named = [stacked + i for i, name in enumerate(axes) if name is not None and shape[stacked + i] % parts == 0]
    spec: list[str | None] = [None] * len(shape)
    if named and parts > 1:
        spec[max(named, key=lambda i: shape[i])] = "fsdp"
    return NamedSharding(mesh, P(*spec))


def state_shardings(mesh: Mesh, state: TrainState, axes: dict, optimizer: optax.GradientTransformation) -> TrainState:
    """Return the shardings of a training state.

    Args:
        mesh: The mesh.
        state: The abstract state.
        axes: Logical axis names of every parameter, as `optimizer.logical_axes` returns them.
        optimizer: The optimizer.

    Returns:
        A state of shardings. Everything that does not have the shape of a parameter is replicated.
    """
    replicated: Any = NamedSharding(mesh, P())
    params = jax.tree.map(lambda names, leaf: parameter_sharding(mesh, names, leaf.shape), axes, state.params)
    moments = optax.tree_map_params(
        optimizer, lambda _, sharding: sharding, state.optimizer, params, transform_non_params=lambda _: replicated
    )
    rest = jax.tree.map(lambda _: replicated, state._replace(params=(), optimizer=()))
    return rest._replace(params=params, optimizer=moments)


def _mesh_of(data: int, fsdp: int) -> Mesh:
    """Return the mesh of the first `data * fsdp` devices."""
    devices = np.array(jax.devices()[: data * fsdp]).reshape(data, fsdp)
    return Mesh(devices, ("data", "fsdp"), axis_types=(AxisType.Auto, AxisType.Auto))
