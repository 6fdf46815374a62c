"""What the cases mean for the delta rule; the state is linear attention's."""

from typing import Any

import numpy as np

from recallax.pallas_kernels.cases import Case, draw


def inputs(case: Case, erase: str = "token") -> dict[str, Any]:
    """Unit keys of one head for two value heads, strengths up to `case.beta` (its upper half where that is 2)."""
    drawn = draw(case)
    rng = np.random.default_rng(11)
    shape = (2, case.length, case.heads, case.width)
    q, k = (drawn[name][:, :, :1] for name in ("q", "k"))
    k = k / np.linalg.norm(k, axis=-1, keepdims=True)
    low = case.beta - 1
    strength = rng.uniform(low, case.beta, size=shape if erase == "channel" else shape[:3])
    return drawn | {"q": q, "k": k, "erase": strength, "write": rng.uniform(low, case.beta, size=shape[:3])}
