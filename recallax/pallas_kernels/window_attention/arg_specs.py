"""Inputs of window attention for the named test cases: one key/value head, for rows that continue a document."""

from typing import Any

import numpy as np

from recallax.pallas_kernels.arg_specs import ArgSpec, continued_positions, random_grouped_inputs


def inputs(spec: ArgSpec) -> dict[str, Any]:
    """Queries, keys and values in float64; H query heads share one key/value head."""
    return random_grouped_inputs(spec)


def positions(spec: ArgSpec, num_seen: int) -> np.ndarray:
    """Positions within documents; the first document of each row continues at `num_seen`."""
    return continued_positions(spec, num_seen)
