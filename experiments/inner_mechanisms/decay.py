"""Forgetting: regression on a teacher that changes every 48 tokens, with no, constant or complete forgetting."""

from itertools import product

import numpy as np

from experiments.inner_mechanisms.memory_grid import LOG_CLOSED, MemoryGates, l2_normalize, run_memory, select_setting
from recallax.pallas_kernels.neural_memory import InnerOptimizer
from recallax.pallas_kernels.neural_memory.inner_optimizer import LinearNet

WIDTH, REGIME_LENGTH, NUM_REGIMES, ROWS = 32, 48, 16, 8
RATES = (0.1, 0.2, 0.35, 0.5, 0.75, 1.0)
KEEPS = (0.9, 0.94, 0.96, 0.98, 0.99, 0.995)
NOISES = (0.0, 0.5)
INNER_OPTIMIZER = InnerOptimizer(network=LinearNet(), gradient="token", momentum=False, chunk_size=16)


def measure() -> list[dict]:
    """Measure each noise level and forgetting method at the method's best setting.

    Returns:
        Rows with the squared error of new queries against the current teacher, relative to the square of the answers.
    """
    rows = []
    for noise in NOISES:
        for method, (settings, scores) in relative_errors(noise).items():
            index, error = select_setting(scores, np.minimum)
            rate, keep = settings[index]
            setting = {"noise": noise, "forgets": method, "lr": rate} | ({"keep": keep} if method == "constant" else {})
            rows.append({"mechanism": "decay", **setting, "error": round(error, 4)})
    return rows


def relative_errors(noise: float, seed: int = 0) -> dict[str, tuple[list[tuple[float, float]], np.ndarray]]:
    """Measure every setting of every forgetting method in one call of the op.

    Args:
        noise: Standard deviation of the noise on the values.
        seed: Seed of the data.

    Returns:
        By method, its settings (learning rate, keep) and the relative squared errors [rows, settings].
    """
    rng = np.random.default_rng(seed)
    shape = (ROWS, REGIME_LENGTH * NUM_REGIMES, WIDTH)
    q, k = l2_normalize(rng.normal(size=(2, *shape)))
    teachers = np.repeat(rng.normal(size=(ROWS, NUM_REGIMES, WIDTH, WIDTH)), REGIME_LENGTH, axis=1)
    answers, v = (np.einsum("bti,btio->bto", x, teachers) for x in (q, k))
    v = v + noise * rng.normal(size=shape)
    changes = np.arange(shape[1]) % REGIME_LENGTH == 0

    methods = {
        "never": [(rate, 1.0) for rate in RATES],
        "constant": list(product(RATES, KEEPS)),
        "at the change": [(rate, 0.0) for rate in RATES],
    }
    heads = [(method, *setting) for method, settings in methods.items() for setting in settings]
    constant_log_keep = np.array([0.0 if method == "at the change" else np.log(keep) for method, _, keep in heads])
    forgets_at_change = np.array([method == "at the change" for method, *_ in heads])
    log_keep = np.where(forgets_at_change & changes[:, None], LOG_CLOSED, constant_log_keep)
    lr = np.array([rate for _, rate, _ in heads])
    gate_shape = (ROWS, shape[1], len(heads))
    gates = MemoryGates(np.broadcast_to(lr, gate_shape), np.zeros(gate_shape), np.broadcast_to(log_keep, gate_shape))
    reads, _ = run_memory(INNER_OPTIMIZER, q, k, v, gates, {"w1": np.zeros((WIDTH, WIDTH))})
    measured = slice(REGIME_LENGTH, None)  # without the first teacher, before which there is nothing to forget
    error = np.square(reads - answers[:, :, None])[:, measured].sum(axis=(1, 3))
    relative = error / np.square(answers[:, measured]).sum(axis=(1, 2))[:, None]
    return {
        method: (settings, relative[:, [i for i, (name, *_) in enumerate(heads) if name == method]])
        for method, settings in methods.items()
    }
