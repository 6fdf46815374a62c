"""What the cases mean for landmark attention: one head of keys and values, behind a row that goes on at a position."""

from typing import Any

import numpy as np

from recallax.pallas_kernels.cases import Case
from recallax.pallas_kernels.landmark_attention.blocks import LandmarkCache
from recallax.pallas_kernels.window_attention.cases import inputs, positions

__all__ = ["inputs", "past", "positions"]


def past(case: Case, seen: int, real: int) -> LandmarkCache:
    """Blocks for `seen` tokens of which the row's first document goes on, in float64."""
    rng = np.random.default_rng(8)

    def drawn(*shape: int) -> Any:
        return rng.normal(size=(2, *shape))

    count = seen // (real + 1)
    return LandmarkCache(
        drawn(count, 1, case.width),
        drawn(count, real, 1, case.width),
        drawn(count, real, 1, case.values),
        drawn(real, 1, case.width),
        drawn(real, 1, case.values),
    )
