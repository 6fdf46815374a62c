"""Evaluation: exact weighted means over a split, overall and per group."""

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
    """The compiled sums of a batch, whole on every device; one compilation per length."""

    @partial(jax.jit, out_shardings=replicated)
    def sums(params: dict, statistics: dict, batch: Batch) -> GroupSums:
        at, targets, weights, _, group = select_labelled(task, split, batch)
        projection, _, _ = predict(graphdef, params, statistics, batch, at, None)
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
    *,
    seed: int,
    batches: int,
    batch_size: int,
    sharding: NamedSharding,
) -> dict[str, float]:
    """`loss`, `accuracy`, the task's own as `measure/<name>`, and `group/<name>` accuracies over the first `batches` of
    a split; sums are float64.
    """
    total = np.zeros((3, len(task.groups)))
    pending: list[GroupSums] = []
    for index in range(batches):
        batch = shard_batch(task.batch(seed, split, index, batch_size), sharding)
        pending.append(evaluator(params, statistics, batch))
    for sums in jax.device_get(pending):
        total += np.array(sums, np.float64)
    loss, correct, weight = total
    seen = {name: c / w for name, c, w in zip(task.groups, correct, weight, strict=True) if w > 0}
    return {
        "loss": float(loss.sum() / weight.sum()),
        "accuracy": float(correct.sum() / weight.sum()),
        **{f"measure/{name}": value for name, value in task.metrics(split, loss, weight).items()},
        **{f"group/{name}": float(value) for name, value in seen.items()},
    }
