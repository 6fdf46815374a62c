"""What the cases mean for the exact linear memory: `log_decay` is how it forgets and, where extreme, its momentum."""

from typing import Any

import numpy as np

from recallax.pallas_kernels.cases import Case, draw
from recallax.pallas_kernels.neural_memory.inner import Memory
from recallax.pallas_kernels.neural_memory.learner import Learner


def inputs(case: Case) -> dict[str, Any]:
    """Tokens and initial weights, in float64: unit keys, rates up to .2 times `case.beta`."""
    drawn = draw(case)
    rng = np.random.default_rng(11)
    shape = (2, case.length, case.heads, 1)
    decay = np.broadcast_to(drawn.pop("log_decay", np.zeros(shape[:3])), shape[:3])[..., None]
    momentum = rng.permuted(decay, axis=1) if case.decay == "extreme" else np.log(rng.uniform(0.1, 0.9, size=shape))
    return drawn | {
        "k": drawn["k"] / np.linalg.norm(drawn["k"], axis=-1, keepdims=True),
        "lr": rng.uniform(0.01, 0.2 * case.beta, size=shape),
        "log_momentum": momentum,
        "log_keep": decay,
        "weight": rng.normal(size=(case.heads, case.width, case.values)) / np.sqrt(case.width),
    }


def memory(case: Case, learner: Learner) -> Memory:
    """[2, H, K, V]"""
    rng = np.random.default_rng(5)
    change, momentum = rng.normal(size=(2, 2, case.heads, case.width, case.values))
    return Memory({"w1": change}, {"w1": 0.3 * momentum} if learner.momentum else {})
