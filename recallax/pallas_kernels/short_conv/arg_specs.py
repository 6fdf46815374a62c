"""Inputs of the short convolution for the named test cases: six channels; decays and key widths do not apply."""

from typing import Any

import numpy as np

from recallax.pallas_kernels.arg_specs import ArgSpec


def inputs(spec: ArgSpec, conv_size: int) -> dict[str, Any]:
    """All arguments and the state, in float64."""
    rng = np.random.default_rng(2)
    return {
        "x": rng.normal(size=(2, spec.length, 6)),
        "weight": rng.normal(size=(conv_size, 6)),
        "bias": rng.normal(size=6),
        "state": rng.normal(size=(2, conv_size - 1, 6)),
    }
