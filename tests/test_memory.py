"""What a compiled op holds besides its inputs grows no faster than time; nothing is run.

Compiled as the other tests are, without most optimisations: they change the bytes per token, not how these grow.
`benchmarks/op_speed.py` records the bytes of the optimised ops.
"""

import pytest

from benchmarks.jobs import OpCall
from benchmarks.op_cases import ALONE, CASES, held_bytes

pytestmark = pytest.mark.usefixtures("strict")


@pytest.mark.parametrize("op", ALONE)
def test_twice_the_tokens_hold_at_most_twice_the_memory_and_little_more_than_the_inputs(op):
    """Forward with backward, which holds all that forward alone does: states between chunks, not what is within."""
    calls = [OpCall(op=op, batch=1, length=length, heads=1, keys=8, values=16, threads=1) for length in (2048, 4096)]
    short, long = (held_bytes(CASES[op], call, backward=True) for call in calls)
    assert long <= 2.1 * short
    assert long <= 7 * sum(x.nbytes for x in CASES[op].inputs(calls[1]).values())
