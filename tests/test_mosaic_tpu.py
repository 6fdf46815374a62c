"""The kernels for TPUs, interpreted on any machine, against the definitions in float64; and lowered for a TPU."""

import numpy as np
import pytest

from recallax.pallas_kernels.dispatch import interpreted
from recallax.pallas_kernels.linear_attention import linear_attention
from recallax.pallas_kernels.linear_attention import mosaic_tpu as linear_tpu
from tests.test_ops import CASES, Case, compare, draw, segments

pytestmark = pytest.mark.usefixtures("strict")


@pytest.fixture(autouse=True)
def short_chunks(monkeypatch):
    monkeypatch.setattr(linear_tpu, "CHUNK", 16)


@pytest.fixture(autouse=True)
def interpreter():
    with interpreted():
        yield


LINEAR = {name: case for name, case in CASES.items() if "channel" not in (case.decay or "")}


@pytest.mark.parametrize("case", LINEAR.values(), ids=LINEAR)
@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.full)])
def test_linear_attention(case, dtype):
    state = np.random.default_rng(5).normal(size=(2, case.heads, case.width, case.values))

    def op(inputs, state, form):
        return linear_attention(**inputs, state=state, segments=segments(case), implementation=form)

    compare(op, case, draw(case), state, dtype, "mosaic_tpu")
