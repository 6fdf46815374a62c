"""The GPU kernels of the delta rule equal the definition in Pallas' interpreter and lower for an H100."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recallax.pallas_kernels import dispatch
from recallax.pallas_kernels.arg_specs import ArgSpec
from recallax.pallas_kernels.delta_rule import delta_rule
from recallax.pallas_kernels.delta_rule.arg_specs import inputs as delta_inputs
from recallax.pallas_kernels.delta_rule.mosaic_gpu import delta_sequence_splits
from recallax.pallas_kernels.linear_attention import arg_specs as linear_cases
from recallax.pallas_kernels.mosaic_gpu import sequence_splits
from recallax.pallas_kernels.mosaic_gpu.triangular_inverse import chunk_inverses
from tests import gpu_kernel_testing as gpu_testing

CASES = {
    "one token": ArgSpec(1, 64, 64, num_heads=1, decay="token"),
    "below a chunk": ArgSpec(13, 128, 64, num_heads=1),
    "exactly two chunks": ArgSpec(128, 64, 64, num_heads=1, decay="constant"),
    "odd": ArgSpec(67, 128, 128, num_heads=1, decay="token"),
    "shared keys": ArgSpec(67, 64, 64),
    "correlated .99": ArgSpec(67, 64, 64, num_heads=1, key_correlation=0.99),
    "negative eigenvalues": ArgSpec(131, 64, 128, num_heads=1, key_correlation=0.9, max_beta=2.0),
    "extreme decay": ArgSpec(131, 64, 64, num_heads=1, decay="extreme"),
    "packed": ArgSpec(67, 64, 128, num_heads=1, document_lengths=(1, 15, 1, 1, 20, 29)),
    "packed, decay, padding": ArgSpec(
        67, 64, 64, num_heads=1, decay="token", document_lengths=(16, 1, 33), num_padding=17
    ),
}


def check(case: ArgSpec, rate: float = 1.0) -> None:
    """Compare values, final state and every gradient; `rate` scales the decays."""
    inputs = delta_inputs(case)
    if case.decay:
        inputs["log_decay"] = rate * inputs["log_decay"]
    gpu_testing.compare_interpreted(delta_rule, case, inputs, linear_cases.state(case))


@gpu_testing.interpreted
@pytest.mark.parametrize("name", gpu_testing.mark_slow_cases(CASES))
def test_delta_rule(name):
    check(CASES[name])


@gpu_testing.interpreted
def test_slow_decay_across_chunks():
    check(CASES["packed, decay, padding"], rate=0.02)


@gpu_testing.interpreted
@pytest.mark.parametrize("documents", [pytest.param((), marks=pytest.mark.full), (60, 1, 70, 5)], ids=["one", "four"])
def test_row_splits(documents, monkeypatch):
    """Rows of four chunks as four blocks; states decay slowly enough to pass from split to split."""
    monkeypatch.setattr(sequence_splits, "MIN_CHUNKS_PER_SPLIT", 1)
    case = ArgSpec(200, 64, 128, num_heads=1, decay="token", key_correlation=0.9, document_lengths=documents)
    check(gpu_testing.pad_to_length(case), rate=0.02)


def test_rows_are_not_split_without_benefit():
    assert delta_sequence_splits.choose_num_delta_splits(16, 512) == 8
    assert delta_sequence_splits.choose_num_delta_splits(40, 512) == 1 < sequence_splits.choose_num_splits(40, 512)


@gpu_testing.interpreted
@pytest.mark.full
@gpu_testing.each_width
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_delta_rule_at_every_width(case, width, values):
    check(dataclasses.replace(case, head_k_dim=width, head_v_dim=values))


@gpu_testing.interpreted
@pytest.mark.parametrize(("beta", "tolerance"), [(1.0, 1e-5), (2.0, 1e-3)])
def test_inverse_is_accurate_for_identical_keys(beta, tolerance):
    key = np.random.default_rng(0).normal(size=64)
    k = jnp.asarray(np.broadcast_to(key / np.linalg.norm(key), (1, 64, 1, 64)), jnp.bfloat16)
    with dispatch.interpret_kernels():
        actual = np.asarray(chunk_inverses(k, None, jnp.full((1, 1, 64), beta)), np.float64)[0, 0]
    k = np.asarray(k, np.float64)[0, :, 0]
    expected = np.linalg.inv(np.eye(64) + beta * np.tril(k @ k.T, -1))
    np.testing.assert_allclose(actual[:, :64] + actual[:, 64:], expected, atol=tolerance * np.abs(expected).max())


@gpu_testing.interpreted
@pytest.mark.full
def test_no_data_races(monkeypatch):
    """The row has more chunks than the pipeline holds at once."""
    case = ArgSpec(300, 64, 128, num_heads=1, decay="token")
    gpu_testing.assert_no_data_races(delta_rule, gpu_testing.first_row_in_bfloat16(delta_inputs(case)), monkeypatch)


@pytest.mark.parametrize(
    ("width", "decay", "docs"),
    [
        (128, True, True),
        *(pytest.param(64, decay, False, marks=pytest.mark.full) for decay in (False, True)),
        pytest.param(128, True, False, marks=pytest.mark.full),
    ],
)
def test_lowers_for_an_h100(width, decay, docs):
    tokens = jax.ShapeDtypeStruct((2, 200, 2, width), jnp.bfloat16)
    strength = jax.ShapeDtypeStruct((2, 200, 2), jnp.float32)
    gate = strength if decay else None
    ids = jax.ShapeDtypeStruct((2, 200), jnp.int32) if docs else None

    def op(q, k, v, strength, gate, ids):
        return delta_rule(
            q, k, v, erase=strength, write=strength, log_decay=gate, segment_ids=ids, implementation="mosaic_gpu"
        )

    arguments = (tokens, tokens, tokens, strength, gate, ids)
    assert gpu_testing.count_kernels_with_gradients(op, 5, *arguments) == (2, 4)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"v": jnp.zeros((1, 4, 1, 32), jnp.bfloat16)}, "V is 32"),
        ({"k": jnp.zeros((1, 4, 1, 64))}, "k is float32"),
    ],
)
def test_unsupported_arguments_are_rejected_with_reason(change, reason):
    tokens = {name: jnp.zeros((1, 4, 1, 64), jnp.bfloat16) for name in "qkv"}
    inputs = tokens | dict.fromkeys(("erase", "write"), jnp.zeros((1, 4, 1))) | change
    with dispatch.interpret_kernels(), pytest.raises(dispatch.Unsupported, match=reason):
        delta_rule(**inputs, implementation="mosaic_gpu")
