"""What a compiled op holds besides its inputs grows no faster than time; nothing is run.

Compiled as the other tests are, without most optimisations: they change the bytes per token, not how these grow.
`benchmarks/op_speed.py` records the bytes of the optimised ops.
"""

import pytest

from benchmarks.messages import OpMessage
from benchmarks.op_benchmarks import OP_BENCHMARKS, STANDALONE_OPS, temporary_and_output_bytes

pytestmark = pytest.mark.usefixtures("strict")


@pytest.mark.parametrize("op", STANDALONE_OPS)
def test_twice_the_tokens_hold_at_most_twice_the_memory_and_little_more_than_the_inputs(op):
    """Forward with backward, which holds all that forward alone does: states between chunks, not what is within."""
    calls = [OpMessage(op=op, batch=1, length=length, heads=1, keys=8, values=16, threads=1) for length in (2048, 4096)]
    short, long = (temporary_and_output_bytes(OP_BENCHMARKS[op], call, backward=True) for call in calls)
    assert long <= 2.1 * short
    assert long <= 7 * sum(x.nbytes for x in OP_BENCHMARKS[op].inputs(calls[1]).values())
