"""The GPU kernel of the selective scan equals the definition in Pallas' interpreter and lowers for an H100."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recallax.pallas_kernels import dispatch
from recallax.pallas_kernels.arg_specs import ArgSpec
from recallax.pallas_kernels.selective_scan import mosaic_gpu as mosaic_gpu_scan
from recallax.pallas_kernels.selective_scan import selective_scan
from recallax.pallas_kernels.selective_scan.arg_specs import inputs as scan_inputs
from tests import gpu_kernel_testing as gpu_testing

CASES = {
    "one token": ArgSpec(1),
    "below a chunk": ArgSpec(13),
    "exactly two chunks": ArgSpec(32),
    "odd": ArgSpec(67),
    "extreme decay": ArgSpec(37, decay="extreme"),
    "packed": ArgSpec(67, document_lengths=(1, 15, 1, 1, 20, 29)),
    "packed, padding": ArgSpec(37, document_lengths=(16, 1, 11), num_padding=9),
}


def check(case: ArgSpec, states: int | None, dtype: str, rate: float = 1.0) -> None:
    """Compare values, final state and every gradient; `rate` scales the decays."""
    inputs = scan_inputs(case, states)
    inputs["rate"] = rate * inputs["rate"]

    def op(**arguments):
        out, final = selective_scan(**arguments)
        return out[:, :, None], final  # `compare` expects an axis of heads

    state = np.random.default_rng(5).normal(size=(2, 5, states or 1))
    gpu_testing.compare_interpreted(op, case, inputs, state, dtype)


@gpu_testing.interpreted
@pytest.mark.parametrize("name", gpu_testing.mark_slow_cases(CASES, "packed, padding"))
def test_selective_scan(name):
    check(CASES[name], 3, "bfloat16")


@gpu_testing.interpreted
@pytest.mark.parametrize("documents", [pytest.param((), marks=pytest.mark.full), (20, 1, 25)], ids=["one", "three"])
def test_row_splits(documents, monkeypatch):
    """Rows of four chunks as four blocks; states decay slowly enough to pass from split to split."""
    monkeypatch.setattr(mosaic_gpu_scan, "MIN_TOKENS_PER_SPLIT", 16)
    check(gpu_testing.pad_to_length(ArgSpec(64, document_lengths=documents)), 3, "bfloat16", rate=0.02)


@gpu_testing.interpreted
@pytest.mark.full
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("states", [None, 16])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_selective_scan_with_other_states(case, states, dtype):
    check(case, states, dtype)


@gpu_testing.interpreted
@pytest.mark.full
def test_no_data_races(monkeypatch):
    """The row has more chunks than the pipeline holds at once."""
    inputs = {name: jnp.asarray(x, jnp.float32) for name, x in scan_inputs(ArgSpec(100), 3).items()}
    gpu_testing.assert_no_data_races(selective_scan, inputs, monkeypatch)


@pytest.mark.parametrize(("states", "docs"), [pytest.param(1, False, marks=pytest.mark.full), (16, True)])
def test_lowers_for_an_h100(states, docs):
    tokens = jax.ShapeDtypeStruct((2, 200, 128), jnp.bfloat16)
    a, mix = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((128, states), (2, 200, states)))
    ids = jax.ShapeDtypeStruct((2, 200), jnp.int32) if docs else None

    def op(x, a, b, ids):
        return selective_scan(x, x, a=a, b=b, c=b, segment_ids=ids, implementation="mosaic_gpu")

    arguments = (tokens, a, mix, ids)
    assert gpu_testing.count_kernels_with_gradients(op, 3, *arguments) == (1, 2)


def test_too_many_states_are_rejected_with_reason():
    inputs = {name: jnp.asarray(x, jnp.float32) for name, x in scan_inputs(ArgSpec(3), 40).items()}
    with dispatch.interpret_kernels(), pytest.raises(dispatch.Unsupported, match="N is 40"):
        selective_scan(**inputs, implementation="mosaic_gpu")
