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
from recallax.train.mesh import place
from recallax.train.step import labelled, predict, score
from recallax.types import Batch


class Sums(NamedTuple):
    """Weighted sums over one batch, per group."""

    loss: Float[Array, " groups"]
    correct: Float[Array, " groups"]
    weight: Float[Array, " groups"]


type Evaluator = Callable[[dict, dict, Batch], Sums]


def make_evaluator(graph: nnx.GraphDef, task: Task, split: Split, whole: NamedSharding) -> Evaluator:
    """The compiled sums of a batch, whole on every device; one compilation per length."""

    @partial(jax.jit, out_shardings=whole)
    def sums(params: dict, statistics: dict, batch: Batch) -> Sums:
        at, targets, weights, _, group = labelled(task, split, batch)
        projection, _, _ = predict(graph, params, statistics, batch, at, None)
        scores = score(projection, targets, weights)
        loss, correct = weights * scores.loss, jnp.where(scores.right, weights, 0)
        per_group = [jnp.zeros(len(task.groups)).at[group.ravel()].add(x.ravel()) for x in (loss, correct, weights)]
        return Sums(*per_group)

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
    pending: list[Sums] = []
    for index in range(batches):
        batch = place(task.batch(seed, split, index, batch_size), sharding)
        pending.append(evaluator(params, statistics, batch))
    for sums in jax.device_get(pending):
        total += np.array(sums, np.float64)
    loss, correct, weight = total
    seen = {name: c / w for name, c, w in zip(task.groups, correct, weight, strict=True) if w > 0}
    return {
        "loss": float(loss.sum() / weight.sum()),
        "accuracy": float(correct.sum() / weight.sum()),
        **{f"measure/{name}": value for name, value in task.measures(split, loss, weight).items()},
        **{f"group/{name}": float(value) for name, value in seen.items()},
    }
