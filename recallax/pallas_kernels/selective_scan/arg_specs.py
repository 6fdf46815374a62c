"""Inputs of the selective scan for the named test cases: five channels; only "extreme" decays make a difference."""

from typing import Any

import numpy as np

from recallax.pallas_kernels.arg_specs import ArgSpec


def inputs(spec: ArgSpec, state_dim: int | None) -> dict[str, Any]:
    """All arguments but the state, in float64.

    Args:
        spec: The test case.
        state_dim: States per channel of Mamba-1; None: the recurrence without a, b and c.
    """
    rng = np.random.default_rng(12)
    shape = (2, spec.length, 5)
    rate = np.abs(rng.normal(size=shape))
    if spec.decay and "extreme" in spec.decay:
        rate = rng.choice([0.0, 1e-4, 40.0, 1e4], size=shape)
    if state_dim is None:
        return {"x": rng.normal(size=shape), "rate": -rate}
    b, c = rng.normal(size=(2, 2, spec.length, state_dim))
    return {"x": rng.normal(size=shape), "rate": rate, "a": -rng.uniform(0.1, 4, size=(5, state_dim)), "b": b, "c": c}
