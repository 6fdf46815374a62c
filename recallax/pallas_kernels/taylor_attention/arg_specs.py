"""Inputs of BASED's attention for the named test cases; decays do not apply."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from recallax.pallas_kernels.arg_specs import ArgSpec, random_inputs
from recallax.pallas_kernels.taylor_attention import FEATURE_MAPS, TaylorFeatures, TaylorState


def inputs(spec: ArgSpec) -> dict[str, Any]:
    """Queries, keys and values in float64."""
    return {name: x for name, x in random_inputs(spec).items() if name != "log_decay"}


def state(spec: ArgSpec, features: TaylorFeatures) -> TaylorState:
    """State after seven random tokens, in float64; with random sums the denominator could be 0."""
    past = np.random.default_rng(6).normal(size=(2, 7, spec.num_heads, spec.head_k_dim)) * spec.head_k_dim**-0.25
    v = np.random.default_rng(7).normal(size=(2, 7, spec.num_heads, spec.head_v_dim))
    with jax.enable_x64(True):
        phi = np.asarray(FEATURE_MAPS[features](jnp.asarray(past)))
    sums: Any = (np.einsum("bthf,bthv->bhfv", phi, v), phi.sum(axis=1))
    return TaylorState(*sums)
