"""Memory of the compiled ops grows at most linearly in time; nothing is executed.

The ops are compiled without most optimisations, which change the bytes per token but not their growth.
`benchmarks/op_speed.py` records the bytes of the optimised ops.
"""

import pytest

from benchmarks.messages import OpMessage
from benchmarks.op_benchmarks import OP_BENCHMARKS, STANDALONE_OPS, temporary_and_output_bytes

pytestmark = pytest.mark.usefixtures("strict")


@pytest.mark.parametrize("op", STANDALONE_OPS)
def test_memory_is_linear_in_time_and_a_small_multiple_of_the_inputs(op):
    """Forward and backward pass, whose memory includes that of the forward pass."""
    calls = [OpMessage(op=op, batch=1, length=length, heads=1, keys=8, values=16, threads=1) for length in (2048, 4096)]
    short, long = (temporary_and_output_bytes(OP_BENCHMARKS[op], call, backward=True) for call in calls)
    assert long <= 2.1 * short
    assert long <= 7 * sum(x.nbytes for x in OP_BENCHMARKS[op].inputs(calls[1]).values())
