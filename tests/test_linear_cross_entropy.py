"""Chunked cross-entropy against its definition in float64: values, all gradients, and memory use."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recallax.pallas_kernels.linear_cross_entropy import linear_cross_entropy, xla
from tests.test_ops import unchecked

pytestmark = pytest.mark.usefixtures("strict")

TOLERANCE = {"float32": 1e-5, "bfloat16": 0.02}


@dataclasses.dataclass(frozen=True)
class Case:
    rows: int = 50
    vocab: int = 37
    bias: bool = False
    soft_cap: float | None = None
    z_loss: float = 0.0
    dtype: str = "float32"


CASES = {
    "one row": Case(rows=1),
    "a chunk": Case(rows=16),
    "whole chunks": Case(rows=48),
    "a prime number of rows": Case(rows=53),
    "bias": Case(bias=True),
    "soft cap": Case(soft_cap=3.0),
    "z-loss": Case(z_loss=0.1),
    "everything": Case(rows=67, bias=True, soft_cap=2.0, z_loss=0.05),
    "everything in bfloat16": Case(rows=67, bias=True, soft_cap=2.0, z_loss=0.05, dtype="bfloat16"),
}


def draw(case: Case) -> tuple[dict[str, Any], np.ndarray]:
    """Inputs in float64, and targets; a third of the rows has weight 0 and an invalid target."""
    rng = np.random.default_rng(case.rows)
    inputs = {
        "hidden": rng.normal(size=(case.rows, 12)),
        "weight": rng.normal(size=(case.vocab, 12)),
        "loss_weights": rng.uniform(0.5, 2, size=case.rows),
    }
    targets = rng.integers(0, case.vocab, size=case.rows)
    ignored = np.arange(case.rows) % 3 == 1
    inputs["loss_weights"][ignored] = 0
    if case.bias:
        inputs["bias"] = rng.normal(size=case.vocab)
    return inputs, np.where(ignored, -100, targets)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_xla_agrees_with_reference_in_values_and_gradients(case, monkeypatch):
    monkeypatch.setattr(xla, "MIN_CHUNK_ROWS", 16)
    monkeypatch.setitem(xla.MAX_LOGITS, "cpu", 1)
    inputs, targets = draw(case)
    weighted = inputs["loss_weights"] > 0

    def run(implementation, targets, inputs):
        scores = linear_cross_entropy(
            **inputs, targets=targets, soft_cap=case.soft_cap, z_loss=case.z_loss, implementation=implementation
        )
        return 3 * scores.total, (jnp.where(weighted, scores.loss, 0), scores.correct & weighted)

    def results(implementation, inputs):
        target_ids = jnp.asarray(targets, jnp.int64 if jax.config.jax_enable_x64 else jnp.int32)
        return jax.value_and_grad(partial(run, implementation, target_ids), has_aux=True)(inputs)

    with jax.enable_x64(True):
        wide = {name: jnp.asarray(x, jnp.float64) for name, x in inputs.items()}
        expected = jax.tree.map(np.asarray, results("reference", wide))
    narrow = {n: jnp.asarray(x, case.dtype if n == "hidden" else jnp.float32) for n, x in inputs.items()}
    ((total, (loss, correct)), grads), ((total_, (loss_, correct_)), grads_) = results("xla", narrow), expected
    tolerance = TOLERANCE[case.dtype]
    np.testing.assert_allclose(total, total_, rtol=tolerance)
    np.testing.assert_allclose(loss, loss_, atol=tolerance * np.abs(loss_).max())
    if case.dtype == "float32":
        np.testing.assert_array_equal(correct, correct_)
    assert grads["hidden"].dtype == case.dtype and grads["weight"].dtype == jnp.float32
    for name, desired in grads_.items():
        actual = np.asarray(grads[name], np.float64)
        if name == "loss_weights":
            actual, desired = actual[weighted], desired[weighted]
        assert np.abs(actual - desired).max() <= tolerance * np.abs(desired).max(), name
    plain, _ = run("xla", jnp.asarray(targets, jnp.int32), narrow)  # the path without gradients
    np.testing.assert_allclose(plain, total, rtol=1e-6)


def test_tied_logits_do_not_count_as_correct():
    scores = linear_cross_entropy(jnp.zeros((2, 3)), jnp.zeros((5, 3)), jnp.zeros(2, jnp.int32), jnp.ones(2))
    assert not scores.correct.any()


def test_gradient_needs_less_than_a_twentieth_of_the_memory_of_the_logits():
    rows, vocab, width = 16384, 8192, 16
    shapes = ((rows, width), (vocab, width), (rows,), (rows,))
    kinds = (jnp.float32, jnp.float32, jnp.int32, jnp.float32)
    hidden, weight, targets, scale = (jax.ShapeDtypeStruct(s, k) for s, k in zip(shapes, kinds, strict=True))

    def total(hidden, weight, targets, scale):
        return linear_cross_entropy(hidden, weight, targets, scale).total

    memory = jax.jit(jax.grad(total, argnums=(0, 1))).lower(hidden, weight, targets, scale).compile().memory_analysis()
    assert memory is not None and memory.temp_size_in_bytes <= 0.05 * rows * vocab * 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": jnp.zeros((5, 4))}, "weight has shape"),
        ({"loss_weights": jnp.zeros(3)}, "loss_weights has shape"),
        ({"bias": jnp.zeros(4)}, "bias is not"),
        ({"soft_cap": 0.0}, "soft_cap is 0.0"),
    ],
)
def test_invalid_arguments_are_rejected(change, message):
    good = {
        "hidden": jnp.zeros((2, 3)),
        "weight": jnp.zeros((5, 3)),
        "targets": jnp.zeros(2, int),
        "loss_weights": jnp.ones(2),
    }
    with pytest.raises(ValueError, match=message):
        unchecked(linear_cross_entropy)(**(good | change))
