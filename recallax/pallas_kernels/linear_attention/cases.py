"""What the cases mean for linear attention."""

from typing import Any

import numpy as np

from recallax.pallas_kernels.cases import Case, draw


def inputs(case: Case) -> dict[str, Any]:
    """All arguments but the state, in float64."""
    return draw(case)


def state(case: Case) -> np.ndarray:
    """[2, H, K, V]"""
    return np.random.default_rng(5).normal(size=(2, case.heads, case.width, case.values))
