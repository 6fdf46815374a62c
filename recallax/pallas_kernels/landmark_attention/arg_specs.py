"""Inputs of landmark attention for the named test cases: one key/value head, for rows that continue a document."""

from typing import Any

import numpy as np

from recallax.pallas_kernels.arg_specs import ArgSpec, continued_positions, random_grouped_inputs
from recallax.pallas_kernels.landmark_attention.landmark_blocks import LandmarkCache


def inputs(spec: ArgSpec) -> dict[str, Any]:
    """Queries, keys and values in float64; H query heads share one key/value head."""
    return random_grouped_inputs(spec)


def positions(spec: ArgSpec, num_seen: int) -> np.ndarray:
    """Positions within documents; the first document of each row continues at `num_seen`."""
    return continued_positions(spec, num_seen)


def random_cache(spec: ArgSpec, num_seen: int, block_size: int) -> LandmarkCache:
    """Random cache in float64 of a document that continues in the row.

    Args:
        spec: The test case.
        num_seen: Tokens before the row.
        block_size: Tokens of a block besides its landmark.
    """
    rng = np.random.default_rng(8)

    def draw(*shape: int) -> Any:
        return rng.normal(size=(2, *shape))

    count = num_seen // (block_size + 1)
    return LandmarkCache(
        draw(count, 1, spec.head_k_dim),
        draw(count, block_size, 1, spec.head_k_dim),
        draw(count, block_size, 1, spec.head_v_dim),
        draw(block_size, 1, spec.head_k_dim),
        draw(block_size, 1, spec.head_v_dim),
    )
