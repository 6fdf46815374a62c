"""One optimizer step as one compiled function, closed over the task's terms and their coefficients.

The loss is a sum over named terms of coefficient times a weighted mean over the whole batch, whatever the number of
microbatches and devices. A step with a non-finite loss, gradient or update changes nothing but its counters.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray

from recallax.config import ConfigError, suggest_name
from recallax.layers.base import Statistic
from recallax.models.lm_head import LogitProjection
from recallax.pallas_kernels.linear_cross_entropy import LinearCrossEntropyOutput, linear_cross_entropy
from recallax.tasks.base import Split, Task
from recallax.train.curriculum.parameter_masks import ParameterMask
from recallax.train.run_config import RunConfig
from recallax.types import DIAGNOSTIC_PREFIX, Batch, Mean

MAX_NONFINITE_STREAK = 10
"""Non-finite steps in a row after which the state freezes; the loop then stops the run."""


class TrainState(NamedTuple):
    """Everything that a checkpoint holds."""

    step: Int[Array, ""]
    """Optimizer steps taken or skipped, which is also the position in the data."""
    params: dict
    statistics: dict
    """Variables that are not trained by gradient."""
    optimizer: optax.OptState
    key: PRNGKeyArray
    """Dropout and masks of step i draw from `fold_in(key, i)`."""
    skipped: Int[Array, ""]
    streak: Int[Array, ""]
    """Skipped steps in a row."""


class StepMetrics(NamedTuple):
    """What a step tells about itself."""

    loss: Float[Array, ""]
    terms: dict[str, Mean]
    accuracy: Mean
    gradient_norm: Float[Array, ""]
    finite: Array
    """Per leaf, in `jax.tree` order, whether gradient and update are; then the loss, then the gradient's norm."""


class LabelledTokens(NamedTuple):
    """The positions of a batch that carry weight, N per row."""

    indices: Int[Array, "B N"] | None
    targets: Int[Array, "B N"]
    weights: Float[Array, "B N"]
    term: Int[Array, "B N"]
    group: Int[Array, "B N"]


def select_labelled(task: Task, split: Split, batch: Batch) -> LabelledTokens:
    """Pick the labelled positions where a row has few of them, so that logits are computed only there."""
    length = batch.tokens.shape[1]
    most = task.max_targets(split, length)
    fields = [jnp.asarray(x) for x in (batch.targets, batch.weights, batch.term, batch.group)]
    if most >= length:
        return LabelledTokens(None, *fields)
    _, at = jax.lax.top_k((fields[1] > 0).astype(jnp.int32), most)  # ties keep their order
    return LabelledTokens(at, *(jnp.take_along_axis(x, at, axis=1) for x in fields))


def predict(
    graphdef: nnx.GraphDef,
    params: dict,
    statistics: dict,
    batch: Batch,
    indices: Array | None,
    key: PRNGKeyArray | None,
) -> tuple[LogitProjection, dict[str, Mean], dict]:
    """The readout at the asked positions, auxiliary means, and the statistics after this batch."""
    model = nnx.merge(graphdef, params, statistics)
    projection, aux = model.project(batch.tokens, batch.seq._replace(key=key), indices)
    return projection, aux, nnx.to_pure_dict(nnx.state(model, Statistic))


def score(
    projection: LogitProjection, targets: Int[Array, "B N"], scale: Float[Array, "B N"], z_loss: float = 0.0
) -> LinearCrossEntropyOutput:
    """Loss and correctness, [B, N] each, and their sum under the weights `scale`; logits are never held whole."""
    features, weight, bias, soft_cap = projection
    total, loss, right = linear_cross_entropy(
        features.reshape(-1, features.shape[-1]),
        weight,
        targets.reshape(-1),
        scale.reshape(-1),
        bias=bias,
        soft_cap=soft_cap,
        z_loss=z_loss,
    )
    return LinearCrossEntropyOutput(total, loss.reshape(targets.shape), right.reshape(targets.shape))


def make_step(
    config: RunConfig,
    graphdef: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    mask: ParameterMask | None = None,
) -> Callable[..., tuple[TrainState, StepMetrics]]:
    """The step function of a state and a batch, to be compiled with its state donated.

    part: what trains in a stage of a curriculum; the step at which the stage began is then a third argument.
    """
    task, parts = config.task, config.train.gradient_accumulation_steps

    def objective(params: dict, statistics: dict, batch: Batch, key: PRNGKeyArray, totals: dict[str, Array]):
        params = params if mask is None else mask.stop_frozen_gradients(params)
        at, targets, weights, term, _ = select_labelled(task, "train", batch)
        projection, aux, statistics = predict(graphdef, params, statistics, batch, at, key)
        coefficients = config.train.loss_weights
        for name in coefficients.keys() - totals.keys() - aux.keys():
            raise ConfigError(f"train.loss_weights names the term {name!r}{suggest_name(name, [*totals, *aux])}")
        per_term = jnp.stack([coefficients.get(name, 1.0) / totals[name] for name in task.terms])
        scores = score(projection, targets, weights * per_term[term], config.train.z_loss)
        loss = weights * scores.loss
        means = {name: Mean(jnp.sum(jnp.where(term == i, loss, 0)), totals[name]) for i, name in enumerate(task.terms)}
        # A module's mean is taken per microbatch: its weight may depend on the parameters.
        extra = {name: mean.total / jnp.maximum(mean.weight, 1e-9) / parts for name, mean in aux.items()}
        losses = {name: mean for name, mean in extra.items() if not name.startswith(DIAGNOSTIC_PREFIX)}
        scalar = scores.total + sum(coefficients.get(name, 1.0) * mean for name, mean in losses.items())
        means |= {name: Mean(mean, jnp.ones(())) for name, mean in extra.items()}
        correct = jnp.sum(jnp.where(scores.correct, weights, 0))
        return scalar, (means, Mean(correct, jnp.sum(weights)), statistics)

    def gradient(state: TrainState, batch: Batch):
        """Gradient and report of the whole batch, microbatch by microbatch."""
        totals = {
            name: jnp.maximum(jnp.sum(jnp.where(batch.term == i, batch.weights, 0)), 1e-9)
            for i, name in enumerate(task.terms)
        }
        key = jax.random.fold_in(state.key, state.step)
        grad = jax.value_and_grad(objective, has_aux=True)
        if parts == 1:
            (loss, (means, accuracy, statistics)), grads = grad(state.params, state.statistics, batch, key, totals)
            return loss, means, accuracy, statistics, grads

        def body(carry, part):
            statistics, sums = carry
            index, batch = part
            out, grads = grad(state.params, statistics, batch, jax.random.fold_in(key, index), totals)
            loss, (means, accuracy, statistics) = out
            new = (loss, {name: mean.total for name, mean in means.items()}, accuracy, grads)
            return (statistics, jax.tree.map(jnp.add, sums, new)), {name: mean.weight for name, mean in means.items()}

        # Rows are dealt out in turn, so that every device keeps an equal share of each microbatch.
        split = jax.tree.map(lambda x: jnp.moveaxis(x.reshape(-1, parts, *x.shape[1:]), 1, 0), batch)
        first = jax.tree.map(lambda x: x[0], split)
        shapes = jax.eval_shape(lambda: grad(state.params, state.statistics, first, key, totals))
        (loss, (means, accuracy, _)), grads = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        zeros = (loss, {name: mean.total for name, mean in means.items()}, accuracy, grads)
        (statistics, sums), weights = jax.lax.scan(body, (state.statistics, zeros), (jnp.arange(parts), split))
        loss, terms, accuracy, grads = sums
        return loss, {n: Mean(t, weights[n][0]) for n, t in terms.items()}, accuracy, statistics, grads

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, StepMetrics]:
        return taken(state, state.params, batch)

    def staged(state: TrainState, batch: Batch, begin: Int[Array, ""]) -> tuple[TrainState, StepMetrics]:
        assert mask is not None
        return taken(state, mask.apply_ramps(state.params, state.step - begin), batch)

    def taken(state: TrainState, held: dict, batch: Batch) -> tuple[TrainState, StepMetrics]:
        """The state after a step that is taken from the parameters `held`."""
        loss, terms, accuracy, statistics, grads = gradient(state._replace(params=held), batch)
        updates, moments = optimizer.update(grads, state.optimizer, held)
        params = optax.apply_updates(held, updates)
        params = params if mask is None else mask.select(params, held)
        norm = optax.tree.norm(grads)
        pairs = zip(jax.tree.leaves(grads), jax.tree.leaves(params), strict=True)
        leaves = [jnp.isfinite(grad).all() & jnp.isfinite(leaf).all() for grad, leaf in pairs]
        finite = jnp.stack([*leaves, jnp.isfinite(loss), jnp.isfinite(norm)])
        accept = finite.all() & (state.streak < MAX_NONFINITE_STREAK)
        # Selected, never multiplied: zero times NaN is NaN.
        new, old = (params, statistics, moments), (state.params, state.statistics, state.optimizer)
        params, statistics, moments = jax.tree.map(lambda a, b: jnp.where(accept, a, b), new, old)
        after = TrainState(
            step=state.step + 1,
            params=params,
            statistics=statistics,
            optimizer=moments,
            key=state.key,
            skipped=state.skipped + ~accept,
            streak=jnp.where(accept, 0, state.streak + 1),
        )
        return after, StepMetrics(loss, terms, accuracy, norm, finite)

    return step if mask is None else staged
