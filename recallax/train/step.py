"""One optimizer step as one compiled function.

The loss is a sum over named terms of coefficient times a weighted mean over the whole batch, independent of the number
of microbatches and devices. A step with a non-finite loss, gradient or update changes nothing but its counters.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

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
from recallax.train.phases import Phase
from recallax.types import DIAGNOSTIC_PREFIX, Batch, Mean

MAX_NONFINITE_STREAK = 10
"""Non-finite steps in a row after which the state freezes; the loop then stops the run."""
MIN_WEIGHT = 1e-9
"""Lower bound of the total weight of a term, so that a term without targets has a mean of 0 and not NaN."""


class TrainState(NamedTuple):
    """The training state; checkpoints store all of it."""

    step: Int[Array, ""]
    """Optimizer steps taken or skipped, which is also the position in the data."""
    params: dict
    statistics: dict
    """Variables that are not trained by gradient."""
    optimizer: optax.OptState
    key: PRNGKeyArray
    """Dropout and masks of step i draw from `fold_in(key, i)`."""
    skipped: Int[Array, ""]
    """Steps that were skipped because they were not finite."""
    streak: Int[Array, ""]
    """Skipped steps in a row."""


class StepMetrics(NamedTuple):
    """The metrics of one step."""

    loss: Float[Array, ""]
    terms: dict[str, Mean]
    """Total and weight of every loss term and diagnostic, by name."""
    accuracy: Mean
    gradient_norm: Float[Array, ""]
    """Global norm before clipping."""
    finite: Array
    """Per leaf, in `jax.tree` order, whether gradient and update are finite; then the loss, then the gradient norm."""


type StepFn = Callable[[TrainState, Batch, Any], tuple[TrainState, StepMetrics]]
"""A step: the state, a batch, and the step at which the phase started (an int32 scalar)."""


class LabelledTokens(NamedTuple):
    """The positions of a batch that carry weight, N per row."""

    indices: Int[Array, "B N"] | None
    """Positions in the row; None for all positions."""
    targets: Int[Array, "B N"]
    weights: Float[Array, "B N"]
    term: Int[Array, "B N"]
    """Index into the loss terms of the task."""
    group: Int[Array, "B N"]
    """Index into the groups of the task."""


def select_labelled(task: Task, split: Split, batch: Batch) -> LabelledTokens:
    """Select the positions with targets, so that logits are computed only there.

    Args:
        task: The task, which bounds the number of targets per row.
        split: The split that the batch comes from.
        batch: The batch.

    Returns:
        The labelled positions; all positions if a row may have targets everywhere.
    """
    length = batch.tokens.shape[1]
    max_targets = task.max_targets(split, length)
    fields = [jnp.asarray(x) for x in (batch.targets, batch.weights, batch.term, batch.group)]
    if max_targets >= length:
        return LabelledTokens(None, *fields)
    _, indices = jax.lax.top_k((fields[1] > 0).astype(jnp.int32), max_targets)  # ties keep their order
    return LabelledTokens(indices, *(jnp.take_along_axis(x, indices, axis=1) for x in fields))


def predict(
    graphdef: nnx.GraphDef,
    params: dict,
    statistics: dict,
    batch: Batch,
    indices: Array | None,
    key: PRNGKeyArray | None,
) -> tuple[LogitProjection, dict[str, Mean], dict]:
    """Apply the model up to its last matrix product.

    Args:
        graphdef: The model without its variables.
        params: Its parameters.
        statistics: Its statistics.
        batch: The batch.
        indices: Positions of the logits, [B, N]; None for all.
        key: Key for dropout and masks; None in evaluation.

    Returns:
        The operands of the last product, auxiliary means by name, and the statistics after this batch.
    """
    model = nnx.merge(graphdef, params, statistics)
    projection, aux = model.logit_projection(batch.tokens, batch.seq._replace(key=key), indices)
    return projection, aux, nnx.to_pure_dict(nnx.state(model, Statistic))


def score(
    projection: LogitProjection, targets: Int[Array, "B N"], scale: Float[Array, "B N"], z_loss: float = 0.0
) -> LinearCrossEntropyOutput:
    """Compute the cross-entropy without materializing the logits.

    Args:
        projection: Operands of the last product.
        targets: Target token ids.
        scale: Weight of each position in the sum.
        z_loss: Coefficient of logsumexp(logits)^2.

    Returns:
        The weighted sum, and the loss and correctness of each position.
    """
    features, weight, bias, soft_cap = projection
    total, loss, correct = linear_cross_entropy(
        features.reshape(-1, features.shape[-1]),
        weight,
        targets.reshape(-1),
        scale.reshape(-1),
        bias=bias,
        soft_cap=soft_cap,
        z_loss=z_loss,
    )
    return LinearCrossEntropyOutput(total, loss.reshape(targets.shape), correct.reshape(targets.shape))


def make_step(phase: Phase, graphdef: nnx.GraphDef, optimizer: optax.GradientTransformation) -> StepFn:
    """Return the step function of a phase, to be compiled with its state donated.

    Args:
        phase: Task, loss weights and trained parameters.
        graphdef: The model without its variables.
        optimizer: The optimizer of the phase.

    Returns:
        A function of state, batch and the step at which the phase started.
    """
    value_and_grad = jax.value_and_grad(_make_objective(phase, graphdef), has_aux=True)

    def step(state: TrainState, batch: Batch, phase_start: Int[Array, ""]) -> tuple[TrainState, StepMetrics]:
        params = phase.set_parameters(state.params, state.step - phase_start)
        loss, outputs, grads = _batch_gradient(phase, value_and_grad, state._replace(params=params), batch)
        updates, moments = optimizer.update(grads, state.optimizer, params)
        updated: Any = optax.apply_updates(params, updates)
        new_params = phase.restore_frozen(updated, params)
        norm = optax.tree.norm(grads)
        finite = _finite_flags(grads, new_params, loss, norm)
        after = _accept_or_skip(state, new_params, outputs.statistics, moments, finite)
        return after, StepMetrics(loss, outputs.terms, outputs.accuracy, norm, finite)

    return step


class _BatchOutputs(NamedTuple):
    """Results of a forward pass besides the loss."""

    terms: dict[str, Mean]
    accuracy: Mean
    statistics: dict


def _make_objective(phase: Phase, graphdef: nnx.GraphDef) -> Callable[..., tuple[Array, _BatchOutputs]]:
    """Return the loss of a microbatch, given the total weight of each term over the whole batch."""
    config, task = phase.config, phase.config.task
    coefficients = config.train.loss_weights

    def objective(params: dict, statistics: dict, batch: Batch, key: PRNGKeyArray, totals: dict[str, Array]):
        indices, targets, weights, term, _ = select_labelled(task, "train", batch)
        projection, aux, statistics = predict(graphdef, phase.stop_gradients(params), statistics, batch, indices, key)
        for name in coefficients.keys() - totals.keys() - aux.keys():
            raise ConfigError(f"train.loss_weights has the unknown term {name!r}{suggest_name(name, [*totals, *aux])}")
        per_term = jnp.stack([coefficients.get(name, 1.0) / totals[name] for name in task.terms])
        scores = score(projection, targets, weights * per_term[term], config.train.z_loss)
        loss = weights * scores.loss
        means = {name: Mean(jnp.sum(jnp.where(term == i, loss, 0)), totals[name]) for i, name in enumerate(task.terms)}
        # A module's mean is taken per microbatch: its weight may depend on the parameters.
        num_microbatches = config.train.gradient_accumulation_steps
        extra = {n: mean.total / jnp.maximum(mean.weight, MIN_WEIGHT) / num_microbatches for n, mean in aux.items()}
        losses = {name: mean for name, mean in extra.items() if not name.startswith(DIAGNOSTIC_PREFIX)}
        total = scores.total + sum(coefficients.get(name, 1.0) * mean for name, mean in losses.items())
        means |= {name: Mean(mean, jnp.ones(())) for name, mean in extra.items()}
        correct = jnp.sum(jnp.where(scores.correct, weights, 0))
        return total, _BatchOutputs(means, Mean(correct, jnp.sum(weights)), statistics)

    return objective


def _batch_gradient(
    phase: Phase, value_and_grad: Callable[..., Any], state: TrainState, batch: Batch
) -> tuple[Array, _BatchOutputs, dict]:
    """Loss, outputs and gradient of the whole batch, computed one microbatch at a time."""
    totals = {
        name: jnp.maximum(jnp.sum(jnp.where(batch.term == i, batch.weights, 0)), MIN_WEIGHT)
        for i, name in enumerate(phase.config.task.terms)
    }
    key = jax.random.fold_in(state.key, state.step)
    num_microbatches = phase.config.train.gradient_accumulation_steps
    if num_microbatches == 1:
        (loss, outputs), grads = value_and_grad(state.params, state.statistics, batch, key, totals)
        return loss, outputs, grads

    def body(carry, microbatch):
        statistics, sums = carry
        index, batch = microbatch
        out, grads = value_and_grad(state.params, statistics, batch, jax.random.fold_in(key, index), totals)
        loss, (means, accuracy, statistics) = out
        new = (loss, {name: mean.total for name, mean in means.items()}, accuracy, grads)
        return (statistics, jax.tree.map(jnp.add, sums, new)), {name: mean.weight for name, mean in means.items()}

    # Row i goes to microbatch i % num_microbatches, so that every device has an equal share of each.
    split = jax.tree.map(lambda x: jnp.moveaxis(x.reshape(-1, num_microbatches, *x.shape[1:]), 1, 0), batch)
    first = jax.tree.map(lambda x: x[0], split)
    shapes = jax.eval_shape(lambda: value_and_grad(state.params, state.statistics, first, key, totals))
    (loss, (means, accuracy, _)), grads = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    zeros = (loss, {name: mean.total for name, mean in means.items()}, accuracy, grads)
    (statistics, sums), weights = jax.lax.scan(body, (state.statistics, zeros), (jnp.arange(num_microbatches), split))
    loss, terms, accuracy, grads = sums
    outputs = _BatchOutputs({n: Mean(t, weights[n][0]) for n, t in terms.items()}, accuracy, statistics)
    return loss, outputs, grads


def _finite_flags(grads: dict, params: dict, loss: Array, norm: Array) -> Array:
    """The value of `StepMetrics.finite`."""
    pairs = zip(jax.tree.leaves(grads), jax.tree.leaves(params), strict=True)
    leaves = [jnp.isfinite(grad).all() & jnp.isfinite(leaf).all() for grad, leaf in pairs]
    return jnp.stack([*leaves, jnp.isfinite(loss), jnp.isfinite(norm)])


def _accept_or_skip(
    state: TrainState, params: dict, statistics: dict, moments: optax.OptState, finite: Array
) -> TrainState:
    """The next state: with the new values if all of them are finite, else with the old ones."""
    accept = finite.all() & (state.streak < MAX_NONFINITE_STREAK)
    # Selected, never multiplied: zero times NaN is NaN.
    new, old = (params, statistics, moments), (state.params, state.statistics, state.optimizer)
    params, statistics, moments = jax.tree.map(lambda a, b: jnp.where(accept, a, b), new, old)
    return TrainState(
        step=state.step + 1,
        params=params,
        statistics=statistics,
        optimizer=moments,
        key=state.key,
        skipped=state.skipped + ~accept,
        streak=jnp.where(accept, 0, state.streak + 1),
    )
