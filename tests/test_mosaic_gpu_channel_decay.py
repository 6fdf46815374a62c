"""GPU kernels with decays per channel equal the definitions in Pallas' interpreter and lower for an H100."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recallax.pallas_kernels.arg_specs import ArgSpec, random_inputs
from recallax.pallas_kernels.delta_rule import delta_rule
from recallax.pallas_kernels.delta_rule.arg_specs import inputs as delta_inputs
from recallax.pallas_kernels.linear_attention import arg_specs as linear_cases
from recallax.pallas_kernels.linear_attention import linear_attention
from recallax.pallas_kernels.mosaic_gpu import sequence_splits
from tests import gpu_kernel_testing as gpu_testing

CASES = {
    "one token": ArgSpec(1, 64, 64, num_heads=1, decay="channel"),
    "below a chunk": ArgSpec(13, 128, 64, num_heads=1, decay="channel"),
    "exactly two chunks": ArgSpec(128, 64, 64, num_heads=1, decay="channel"),
    "odd": ArgSpec(67, 64, 64, num_heads=1, decay="channel"),
    "extreme decay": ArgSpec(67, 64, 64, num_heads=1, decay="extreme channel"),
    "packed": ArgSpec(67, 64, 128, num_heads=1, decay="channel", document_lengths=(1, 15, 1, 1, 20, 29)),
    "packed, padding": ArgSpec(
        67, 64, 64, num_heads=1, decay="extreme channel", document_lengths=(16, 1, 33), num_padding=17
    ),
}


def check(case: ArgSpec, heads: int = 1, rate: float = 1.0) -> None:
    """Compare values, final state and gradients; `heads` value heads share a query head, `rate` scales the decays."""
    inputs = random_inputs(case)
    inputs["log_decay"] = rate * inputs["log_decay"]
    rng = np.random.default_rng(3)
    count = heads * case.num_heads
    if heads > 1:
        inputs["v"] = rng.normal(size=(2, case.length, count, case.head_v_dim))
        inputs["log_decay"] = -np.abs(rng.normal(size=(2, case.length, count, case.head_k_dim)))
    state = linear_cases.state(dataclasses.replace(case, num_heads=count))
    gpu_testing.compare_interpreted(linear_attention, case, inputs, state)


@gpu_testing.interpreted
@pytest.mark.parametrize("name", gpu_testing.mark_slow_cases(CASES, "packed, padding"))
def test_decay_per_channel(name):
    check(CASES[name])


@gpu_testing.interpreted
def test_slow_decay_across_chunks():
    check(CASES["odd"], rate=0.02)


@gpu_testing.interpreted
@pytest.mark.parametrize("documents", [pytest.param((), marks=pytest.mark.full), (110, 1, 170, 5)], ids=["one", "four"])
def test_row_splits(documents, monkeypatch):
    """Rows of six chunks as three blocks; states decay slowly enough to pass from split to split."""
    monkeypatch.setattr(sequence_splits, "MIN_CHUNKS_PER_SPLIT", 2)
    case = ArgSpec(380, 64, 64, num_heads=1, decay="channel", document_lengths=documents)
    check(gpu_testing.pad_to_length(case), rate=0.005)


@gpu_testing.interpreted
@pytest.mark.full
def test_shared_query_heads():
    check(ArgSpec(67, 64, 64, num_heads=2, decay="channel"), heads=2)


@gpu_testing.interpreted
@pytest.mark.full
@gpu_testing.each_width
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_decay_per_channel_at_every_width(case, width, values):
    check(dataclasses.replace(case, head_k_dim=width, head_v_dim=values))


DELTA_CASES = {
    "one token": ArgSpec(1, 64, 64, num_heads=1, decay="channel"),
    "odd": ArgSpec(67, 128, 128, num_heads=1, decay="channel"),
    "shared keys": ArgSpec(67, 64, 64, decay="channel"),
    "exactly two chunks, correlated .9, negative eigenvalues": ArgSpec(
        128, 64, 64, num_heads=1, decay="channel", key_correlation=0.9, max_beta=2.0
    ),
    "packed, decay per token": ArgSpec(67, 64, 128, num_heads=1, decay="token", document_lengths=(1, 15, 1, 1, 20, 29)),
    "packed, padding": ArgSpec(
        67, 64, 64, num_heads=1, decay="extreme channel", document_lengths=(16, 1, 33), num_padding=17
    ),
    "one chunk, packed, padding": ArgSpec(
        50, 64, 64, num_heads=1, decay="extreme channel", document_lengths=(16, 1, 20), num_padding=13
    ),
    "no decay": ArgSpec(13, 64, 64, num_heads=1),
}


def check_delta(case: ArgSpec, erase: str, rate: float = 1.0) -> None:
    """Compare values, final state and every gradient; `rate` scales the decays."""
    inputs = delta_inputs(case, erase)
    if case.decay:
        inputs["log_decay"] = rate * inputs["log_decay"]
    gpu_testing.compare_interpreted(delta_rule, case, inputs, linear_cases.state(case))


@gpu_testing.interpreted
@pytest.mark.parametrize("name", gpu_testing.mark_slow_cases(DELTA_CASES, "one chunk, packed, padding"))
def test_delta_rule(name):
    check_delta(DELTA_CASES[name], "channel")


@gpu_testing.interpreted
@pytest.mark.full
@pytest.mark.parametrize("documents", [(), (60, 1, 70, 5)], ids=["one", "four"])
def test_delta_rule_row_splits(documents, monkeypatch):
    monkeypatch.setattr(sequence_splits, "MIN_CHUNKS_PER_SPLIT", 1)
    case = ArgSpec(230, 64, 128, num_heads=1, decay="channel", key_correlation=0.9, document_lengths=documents)
    check_delta(gpu_testing.pad_to_length(case), "channel", rate=0.02)


@gpu_testing.interpreted
@pytest.mark.full
@pytest.mark.parametrize(("width", "values"), [(64, 128), (128, 64)])
@pytest.mark.parametrize("case", DELTA_CASES.values(), ids=DELTA_CASES)
def test_delta_rule_at_other_widths(case, width, values):
    erase = "token" if case.decay and "channel" in case.decay else "channel"
    check_delta(dataclasses.replace(case, head_k_dim=width, head_v_dim=values), erase)


@gpu_testing.interpreted
@pytest.mark.full
@pytest.mark.parametrize("op", [linear_attention, delta_rule])
def test_no_data_races(op, monkeypatch):
    """The row has more chunks than the pipeline holds at once."""
    case = ArgSpec(300, 64, 128, num_heads=1, decay="channel")
    arrays = delta_inputs(case) if op is delta_rule else random_inputs(case)
    gpu_testing.assert_no_data_races(op, gpu_testing.first_row_in_bfloat16(arrays), monkeypatch)


@pytest.mark.parametrize(("width", "docs"), [pytest.param(64, False, marks=pytest.mark.full), (128, True)])
def test_lowers_for_an_h100(width, docs):
    tokens = jax.ShapeDtypeStruct((2, 200, 2, width), jnp.bfloat16)
    gate = jax.ShapeDtypeStruct(tokens.shape, jnp.float32)
    ids = jax.ShapeDtypeStruct((2, 200), jnp.int32) if docs else None

    def op(q, k, v, gate, ids):
        return linear_attention(q, k, v, log_decay=gate, segment_ids=ids, implementation="mosaic_gpu")

    def delta(q, k, v, gate, ids):
        strengths = {"erase": gate, "write": gate[..., 0]}
        return delta_rule(q, k, v, **strengths, log_decay=gate, segment_ids=ids, implementation="mosaic_gpu")

    arguments = (tokens, tokens, tokens, gate, ids)
    assert gpu_testing.count_kernels_with_gradients(op, 4, *arguments) == (2, 4)
    assert gpu_testing.count_kernels(delta, *arguments) == 3
