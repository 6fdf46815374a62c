"""Inputs of the delta rule for the named test cases; states are those of linear attention."""

from typing import Any

import numpy as np

from recallax.pallas_kernels.arg_specs import ArgSpec, random_inputs


def inputs(spec: ArgSpec, erase: str = "token") -> dict[str, Any]:
    """All arguments but the state, in float64: unit keys of one head for two value heads.

    Args:
        spec: The test case; the strengths are uniform in [max_beta - 1, max_beta].
        erase: "token" or "channel": granularity of the erase strength.
    """
    arrays = random_inputs(spec)
    rng = np.random.default_rng(11)
    shape = (2, spec.length, spec.num_heads, spec.head_k_dim)
    q, k = (arrays[name][:, :, :1] for name in ("q", "k"))
    k = k / np.linalg.norm(k, axis=-1, keepdims=True)
    low = spec.max_beta - 1
    strength = rng.uniform(low, spec.max_beta, size=shape if erase == "channel" else shape[:3])
    return arrays | {"q": q, "k": k, "erase": strength, "write": rng.uniform(low, spec.max_beta, size=shape[:3])}
