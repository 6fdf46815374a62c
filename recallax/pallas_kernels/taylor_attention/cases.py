"""What the cases mean for BASED's attention; decays do not apply."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from recallax.pallas_kernels.cases import Case, draw
from recallax.pallas_kernels.taylor_attention import FEATURES, Features, TaylorState


def inputs(case: Case) -> dict[str, Any]:
    """Queries, keys and values in float64."""
    return {name: x for name, x in draw(case).items() if name != "log_decay"}


def state(case: Case, features: Features) -> TaylorState:
    """A state that seven tokens could have left: random sums would make the denominator vanish somewhere."""
    past = np.random.default_rng(6).normal(size=(2, 7, case.heads, case.width)) * case.width**-0.25
    v = np.random.default_rng(7).normal(size=(2, 7, case.heads, case.values))
    with jax.enable_x64(True):
        phi = np.asarray(FEATURES[features](jnp.asarray(past)))
    sums: Any = (np.einsum("bthf,bthv->bhfv", phi, v), phi.sum(axis=1))
    return TaylorState(*sums)
