"""The GPU kernels of landmark attention equal the definition in Pallas' interpreter and lower for an H100."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recallax.pallas_kernels import dispatch
from recallax.pallas_kernels.arg_specs import ArgSpec, random_inputs
from recallax.pallas_kernels.landmark_attention import arg_specs, init_landmark_cache, landmark_attention
from tests import gpu_kernel_testing as gpu_testing
from tests import test_ops

CASES = {
    "one token": ArgSpec(1, 64, 64),
    "below a block": ArgSpec(13, 128, 64),
    "exactly two tiles": ArgSpec(128, 64, 64),
    "odd": ArgSpec(195, 128, 128),
    "packed": ArgSpec(67, 64, 128, document_lengths=(1, 15, 1, 1, 20, 29)),
    "packed, padding": ArgSpec(230, 64, 64, document_lengths=(70, 1, 140, 1), num_padding=18),
}
"""Cases with two query heads, which share one head of keys and values."""


@pytest.fixture(autouse=True)
def tight_tolerance(monkeypatch):
    """Lower the tolerance: the inputs are bfloat16 numbers for the definition too, so only the kernels round."""
    monkeypatch.setitem(test_ops.TOLERANCE, "bfloat16", 0.01)


def check(case: ArgSpec, block_size: int, scale: float | None = None, groups: int = 1) -> None:
    """Compare values and every gradient."""
    inputs = {
        name: np.asarray(jnp.asarray(x, jnp.bfloat16), np.float64) for name, x in random_inputs(case, groups).items()
    }
    positions = jnp.asarray(arg_specs.positions(case, 0), jnp.int32)

    def op(*, state, **arguments):
        return landmark_attention(**arguments, block_size=block_size, positions=positions, scale=scale), state

    gpu_testing.compare_interpreted(op, case, inputs, ())


@gpu_testing.interpreted
@pytest.mark.parametrize("name", gpu_testing.mark_slow_cases(CASES, "packed, padding"))
def test_landmark_attention(name):
    check(CASES[name], 63)


@gpu_testing.interpreted
@pytest.mark.parametrize("block_size", [15, *(pytest.param(n, marks=pytest.mark.full) for n in (1, 20, 31, 50))])
def test_several_blocks_per_tile_and_peaked_softmax(block_size):
    """Some slots of the blocks are empty."""
    check(ArgSpec(150, 128, 64, document_lengths=(90, 1, 40), num_padding=19), block_size, scale=1.0)


@gpu_testing.interpreted
@pytest.mark.full
@pytest.mark.parametrize("block_size", [15, 63])
@gpu_testing.each_width
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_landmark_attention_at_every_width(case, width, values, block_size):
    check(dataclasses.replace(case, head_k_dim=width, head_v_dim=values, num_heads=4), block_size, groups=2)


@gpu_testing.interpreted
@pytest.mark.parametrize("block_size", [63, pytest.param(15, marks=pytest.mark.full)])
def test_no_data_races(block_size, monkeypatch):
    """The row has more tiles than the ring has slots."""
    case = ArgSpec(450, 64, 64)
    op = functools.partial(landmark_attention, block_size=block_size, positions=jnp.arange(case.length)[None])
    gpu_testing.assert_no_data_races(op, gpu_testing.first_row_in_bfloat16(random_inputs(case, 1)), monkeypatch)


@pytest.mark.parametrize(
    ("width", "block_size", "docs"),
    [
        (128, 63, True),
        pytest.param(64, 15, True, marks=pytest.mark.full),
        pytest.param(64, 63, False, marks=pytest.mark.full),
        pytest.param(128, 40, False, marks=pytest.mark.full),
    ],
)
def test_lowers_for_an_h100(width, block_size, docs):
    queries, keys = (jax.ShapeDtypeStruct((2, 200, heads, width), jnp.bfloat16) for heads in (4, 2))
    positions = jax.ShapeDtypeStruct((2, 200), jnp.int32)

    def op(q, k, v, positions, ids):
        return landmark_attention(
            q, k, v, block_size=block_size, positions=positions, segment_ids=ids, implementation="mosaic_gpu"
        )

    arguments = (queries, keys, keys, positions, positions if docs else None)
    # Backward: dQ, and dK and dV of own blocks and of past ones.
    assert gpu_testing.count_kernels_with_gradients(op, 3, *arguments) == (1, 4)


@pytest.mark.parametrize(
    ("change", "block_size", "reason"),
    [
        ({}, 64, "a block has 64 tokens; with its landmark it must fit in a tile of 64 keys"),
        ({"v": jnp.zeros((1, 4, 1, 32), jnp.bfloat16)}, 63, "V is 32"),
        ({"k": jnp.zeros((1, 4, 1, 64))}, 63, "k is float32"),
    ],
)
def test_unsupported_arguments_are_rejected_with_reason(change, block_size, reason):
    inputs: dict[str, Any] = {name: jnp.zeros((1, 4, 1, 64), jnp.bfloat16) for name in "qkv"} | change
    options: dict[str, Any] = {"positions": jnp.arange(4)[None], "implementation": "mosaic_gpu"}
    with dispatch.interpret_kernels():
        with pytest.raises(dispatch.Unsupported, match=reason):
            landmark_attention(**inputs, block_size=block_size, **options)
        with pytest.raises(dispatch.Unsupported, match="blocks from before the row are given"):
            cache = init_landmark_cache(1, 128, 63, 1, 64, jnp.bfloat16)
            landmark_attention(**inputs | {"v": inputs["q"], "k": inputs["q"]}, block_size=63, cache=cache, **options)
    with pytest.raises(dispatch.Unsupported, match="it is for a GPU and this is a CPU"):
        landmark_attention(**inputs, block_size=block_size, **options)
