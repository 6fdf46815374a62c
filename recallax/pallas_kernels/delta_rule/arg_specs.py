"""What the cases mean for the delta rule; the state is linear attention's."""

from typing import Any

import numpy as np

from recallax.pallas_kernels.arg_specs import ArgSpec, random_inputs


def inputs(spec: ArgSpec, erase: str = "token") -> dict[str, Any]:
    """Unit keys of one head for two value heads, strengths up to `case.beta` (its upper half where that is 2)."""
    drawn = random_inputs(spec)
    rng = np.random.default_rng(11)
    shape = (2, spec.length, spec.num_heads, spec.head_k_dim)
    q, k = (drawn[name][:, :, :1] for name in ("q", "k"))
    k = k / np.linalg.norm(k, axis=-1, keepdims=True)
    low = spec.max_beta - 1
    strength = rng.uniform(low, spec.max_beta, size=shape if erase == "channel" else shape[:3])
    return drawn | {"q": q, "k": k, "erase": strength, "write": rng.uniform(low, spec.max_beta, size=shape[:3])}
