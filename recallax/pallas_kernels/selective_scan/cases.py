"""What the cases mean for the selective scan: five channels, and the decay's difficulty alone."""

from typing import Any

import numpy as np

from recallax.pallas_kernels.cases import Case


def inputs(case: Case, states: int | None) -> dict[str, Any]:
    """As of a Mamba-1 with `states` per channel; None: the bare element-wise recurrence."""
    rng = np.random.default_rng(12)
    shape = (2, case.length, 5)
    rate = np.abs(rng.normal(size=shape))
    if case.decay and "extreme" in case.decay:
        rate = rng.choice([0.0, 1e-4, 40.0, 1e4], size=shape)
    if states is None:
        return {"x": rng.normal(size=shape), "rate": -rate}
    b, c = rng.normal(size=(2, 2, case.length, states))
    return {"x": rng.normal(size=shape), "rate": rate, "a": -rng.uniform(0.1, 4, size=(5, states)), "b": b, "c": c}
