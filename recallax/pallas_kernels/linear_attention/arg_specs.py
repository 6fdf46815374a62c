"""Inputs of linear attention for the named test cases."""

from typing import Any

import numpy as np

from recallax.pallas_kernels.arg_specs import ArgSpec, random_inputs


def inputs(spec: ArgSpec) -> dict[str, Any]:
    """All arguments but the state, in float64."""
    return random_inputs(spec)


def state(spec: ArgSpec) -> np.ndarray:
    """Random state [2, H, K, V] in float64."""
    return np.random.default_rng(5).normal(size=(2, spec.num_heads, spec.head_k_dim, spec.head_v_dim))
