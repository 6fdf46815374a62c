"""What the cases mean for attention: one head of keys and values, behind a row that goes on at a position."""

from typing import Any

import numpy as np

from recallax.pallas_kernels.arg_specs import ArgSpec, random_inputs


def inputs(spec: ArgSpec) -> dict[str, Any]:
    """Queries, keys and values in float64; H query heads share one."""
    return {name: x for name, x in random_inputs(spec, num_k_heads=1).items() if name != "log_decay"}


def positions(spec: ArgSpec, num_seen: int) -> np.ndarray:
    """Positions within documents; the first document of each row goes on at `num_seen`."""
    positions = np.tile(np.arange(spec.length, dtype=np.int32), (2, 1)) + num_seen
    if spec.document_lengths:
        rows = [np.arange(n) + (num_seen if i == 0 else 0) for i, n in enumerate(spec.document_lengths)]
        positions[0] = np.concatenate([*rows, np.zeros(spec.num_padding)])
    return positions
