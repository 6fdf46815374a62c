"""What the cases mean for landmark attention: one head of keys and values, behind a row that goes on at a position."""

from typing import Any

import numpy as np

from recallax.pallas_kernels.arg_specs import ArgSpec
from recallax.pallas_kernels.landmark_attention.landmark_blocks import LandmarkCache
from recallax.pallas_kernels.window_attention.arg_specs import inputs, positions

__all__ = ["inputs", "positions", "random_cache"]


def random_cache(spec: ArgSpec, num_seen: int, block_size: int) -> LandmarkCache:
    """Blocks for `num_seen` tokens of which the row's first document goes on, in float64."""
    rng = np.random.default_rng(8)

    def drawn(*shape: int) -> Any:
        return rng.normal(size=(2, *shape))

    count = num_seen // (block_size + 1)
    return LandmarkCache(
        drawn(count, 1, spec.head_k_dim),
        drawn(count, block_size, 1, spec.head_k_dim),
        drawn(count, block_size, 1, spec.head_v_dim),
        drawn(block_size, 1, spec.head_k_dim),
        drawn(block_size, 1, spec.head_v_dim),
    )
