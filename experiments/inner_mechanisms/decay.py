"""Forgetting, on a regression whose teacher changes every 48 tokens: none, at a constant rate, or all at the change."""

from itertools import product

import numpy as np

from experiments.inner_mechanisms.memory_grid import LOG_CLOSED, MemoryGates, l2_normalize, run_memory, select_setting
from recallax.pallas_kernels.neural_memory import InnerOptimizer
from recallax.pallas_kernels.neural_memory.inner_optimizer import LinearNet

WIDTH, REGIME_LENGTH, NUM_REGIMES, ROWS = 32, 48, 16, 8
RATES = (0.1, 0.2, 0.35, 0.5, 0.75, 1.0)
KEEPS = (0.9, 0.94, 0.96, 0.98, 0.99, 0.995)
NOISES = (0.0, 0.5)
LEARNER = InnerOptimizer(network=LinearNet(), gradient="token", momentum=False, chunk_size=16)


def measure() -> list[dict]:
    """A row per noise of the values and way of forgetting: the error of fresh queries against the current teacher.

    The share of the answers' squares that is missed; every way at its own best rate.
    """
    rows = []
    for noise in NOISES:
        errors = relative_errors(noise)
        for way, (settings, scores) in errors.items():
            index, error = select_setting(scores, np.minimum)
            rate, keep = settings[index]
            setting = {"noise": noise, "forgets": way, "lr": rate} | ({"keep": keep} if way == "constant" else {})
            rows.append({"mechanism": "decay", **setting, "error": round(error, 4)})
    return rows


def relative_errors(noise: float, seed: int = 0) -> dict[str, tuple[list[tuple[float, float]], np.ndarray]]:
    """Per way of forgetting its settings (rate, keep) and the error of each row and setting."""
    rng = np.random.default_rng(seed)
    shape = (ROWS, REGIME_LENGTH * NUM_REGIMES, WIDTH)
    q, k = l2_normalize(rng.normal(size=(2, *shape)))
    teachers = np.repeat(rng.normal(size=(ROWS, NUM_REGIMES, WIDTH, WIDTH)), REGIME_LENGTH, axis=1)
    answers, v = (np.einsum("bti,btio->bto", x, teachers) for x in (q, k))
    v = v + noise * rng.normal(size=shape)
    changes = np.arange(shape[1]) % REGIME_LENGTH == 0

    ways = {
        "never": [(rate, 1.0) for rate in RATES],
        "constant": list(product(RATES, KEEPS)),
        "at the change": [(rate, 0.0) for rate in RATES],
    }
    everything = [(way, *setting) for way, settings in ways.items() for setting in settings]
    logs = np.array([0.0 if way == "at the change" else np.log(keep) for way, _, keep in everything])
    flagged = np.array([way == "at the change" for way, *_ in everything])
    log_keep = np.where(flagged & changes[:, None], LOG_CLOSED, logs)
    lr = np.array([rate for _, rate, _ in everything])
    every = (ROWS, shape[1], len(everything))
    gates = MemoryGates(np.broadcast_to(lr, every), np.zeros(every), np.broadcast_to(log_keep, every))
    reads, _ = run_memory(LEARNER, q, k, v, gates, {"w1": np.zeros((WIDTH, WIDTH))})
    settled = slice(REGIME_LENGTH, None)  # the first regime follows nothing
    miss = np.square(reads - answers[:, :, None])[:, settled].sum(axis=(1, 3))
    errors = miss / np.square(answers[:, settled]).sum(axis=(1, 2))[:, None]
    return {
        way: (settings, errors[:, [i for i, (name, *_) in enumerate(everything) if name == way]])
        for way, settings in ways.items()
    }
