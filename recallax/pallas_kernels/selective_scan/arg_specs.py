"""What the cases mean for the selective scan: five channels, and the decay's difficulty alone."""

from typing import Any

import numpy as np

from recallax.pallas_kernels.arg_specs import ArgSpec


def inputs(spec: ArgSpec, state_dim: int | None) -> dict[str, Any]:
    """As of a Mamba-1 with `state_dim` per channel; None: the bare element-wise recurrence."""
    rng = np.random.default_rng(12)
    shape = (2, spec.length, 5)
    rate = np.abs(rng.normal(size=shape))
    if spec.decay and "extreme" in spec.decay:
        rate = rng.choice([0.0, 1e-4, 40.0, 1e4], size=shape)
    if state_dim is None:
        return {"x": rng.normal(size=shape), "rate": -rate}
    b, c = rng.normal(size=(2, 2, spec.length, state_dim))
    return {"x": rng.normal(size=shape), "rate": rate, "a": -rng.uniform(0.1, 4, size=(5, state_dim)), "b": b, "c": c}
