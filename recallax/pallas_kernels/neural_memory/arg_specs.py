"""Inputs of the linear memory with gradients per token for the named test cases.

The decay of the case is that of the weights and, if it is extreme, also that of the momentum.
"""

from typing import Any

import numpy as np

from recallax.pallas_kernels.arg_specs import ArgSpec, random_inputs
from recallax.pallas_kernels.neural_memory.inner_optimizer import InnerOptimizer
from recallax.pallas_kernels.neural_memory.update_coefficients import FastWeights


def inputs(spec: ArgSpec) -> dict[str, Any]:
    """Tokens and initial weights in float64: unit keys, learning rates up to 0.2 times `max_beta`."""
    arrays = random_inputs(spec)
    rng = np.random.default_rng(11)
    shape = (2, spec.length, spec.num_heads, 1)
    decay = np.broadcast_to(arrays.pop("log_decay", np.zeros(shape[:3])), shape[:3])[..., None]
    momentum = rng.permuted(decay, axis=1) if spec.decay == "extreme" else np.log(rng.uniform(0.1, 0.9, size=shape))
    return arrays | {
        "k": arrays["k"] / np.linalg.norm(arrays["k"], axis=-1, keepdims=True),
        "lr": rng.uniform(0.01, 0.2 * spec.max_beta, size=shape),
        "log_momentum": momentum,
        "log_decay": decay,
        "weight": rng.normal(size=(spec.num_heads, spec.head_k_dim, spec.head_v_dim)) / np.sqrt(spec.head_k_dim),
    }


def random_fast_weights(spec: ArgSpec, inner_optimizer: InnerOptimizer) -> FastWeights:
    """Random fast weights [2, H, K, V] in float64."""
    rng = np.random.default_rng(5)
    delta, momentum = rng.normal(size=(2, 2, spec.num_heads, spec.head_k_dim, spec.head_v_dim))
    return FastWeights({"w1": delta}, {"w1": 0.3 * momentum} if inner_optimizer.momentum else {})
