"""Evaluation: exact weighted means over a split, in total and per group."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding
from jaxtyping import Array, Float

from recallax.tasks.base import Split, Task
from recallax.train.mesh import shard_batch
from recallax.train.step import predict, score, select_labelled
from recallax.types import Batch


class GroupSums(NamedTuple):
    """Weighted sums over one batch, per group."""

    loss: Float[Array, " groups"]
    correct: Float[Array, " groups"]
    weight: Float[Array, " groups"]


type Evaluator = Callable[[dict, dict, Batch], GroupSums]


def make_evaluator(graphdef: nnx.GraphDef, task: Task, split: Split, replicated: NamedSharding) -> Evaluator:
    """Return the compiled function that sums loss and correctness over a batch.

    Args:
        graphdef: The model without its variables.
        task: The task.
        split: The split that batches come from.
        replicated: Sharding of the result.

    Returns:
        A function of parameters, statistics and a batch, which compiles once per row length.
    """

    @partial(jax.jit, out_shardings=replicated)
    def sums(params: dict, statistics: dict, batch: Batch) -> GroupSums:
        indices, targets, weights, _, group = select_labelled(task, split, batch)
        projection, _, _ = predict(graphdef, params, statistics, batch, indices, None)
        scores = score(projection, targets, weights)
        loss, correct = weights * scores.loss, jnp.where(scores.correct, weights, 0)
        per_group = [jnp.zeros(len(task.groups)).at[group.ravel()].add(x.ravel()) for x in (loss, correct, weights)]
        return GroupSums(*per_group)

    return sums


def evaluate(
    evaluator: Evaluator,
    params: dict,
    statistics: dict,
    task: Task,
    split: Split,
    make_batch: Callable[[int], Batch],
    *,
    batches: int,
    sharding: NamedSharding,
) -> dict[str, float]:
    """Compute metrics over the first batches of a split, summed in float64.

    Args:
        evaluator: Function of `make_evaluator` for this task and split.
        params: Parameters of the model.
        statistics: Statistics of the model.
        task: The task.
        split: The split.
        make_batch: Function that returns batch number i of the split.
        batches: Number of batches.
        sharding: Sharding of the rows.

    Returns:
        `loss` (nats per target), `accuracy`, the metrics of the task as `measure/<name>`, and the accuracy of each
        group that occurs as `group/<name>`.
    """
    total = np.zeros((3, len(task.groups)))
    pending: list[GroupSums] = []
    for index in range(batches):
        batch = shard_batch(make_batch(index), sharding)
        pending.append(evaluator(params, statistics, batch))
    for sums in jax.device_get(pending):
        total += np.array(sums, np.float64)
    loss, correct, weight = total
    groups = {name: c / w for name, c, w in zip(task.groups, correct, weight, strict=True) if w > 0}
    return {
        "loss": float(loss.sum() / weight.sum()),
        "accuracy": float(correct.sum() / weight.sum()),
        **{f"measure/{name}": value for name, value in task.metrics(split, loss, weight).items()},
        **{f"group/{name}": float(value) for name, value in groups.items()},
    }
