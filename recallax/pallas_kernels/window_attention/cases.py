"""What the cases mean for attention: one head of keys and values, behind a row that goes on at a position."""

from typing import Any

import numpy as np

from recallax.pallas_kernels.cases import Case, draw


def inputs(case: Case) -> dict[str, Any]:
    """Queries, keys and values in float64; H query heads share one."""
    return {name: x for name, x in draw(case, groups=1).items() if name != "log_decay"}


def positions(case: Case, seen: int) -> np.ndarray:
    """Positions within documents; the first document of each row goes on at `seen`."""
    positions = np.tile(np.arange(case.length, dtype=np.int32), (2, 1)) + seen
    if case.documents:
        rows = [np.arange(n) + (seen if i == 0 else 0) for i, n in enumerate(case.documents)]
        positions[0] = np.concatenate([*rows, np.zeros(case.padded)])
    return positions
