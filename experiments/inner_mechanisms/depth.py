"""Depth against its controls, and staleness: a nonlinear teacher, v = |k A|, learned from 2048 unit keys.

An even function has no linear part, so a matrix memory can do nothing. Controls: the first layer fixed at its start
(`w2` alone learns), and fixed random features with a linear memory behind them.
"""

import numpy as np

from experiments.inner_mechanisms.memory_grid import MemoryGates, l2_normalize, run_memory, select_setting
from recallax.pallas_kernels.neural_memory import InnerOptimizer
from recallax.pallas_kernels.neural_memory.inner_optimizer import LinearNet, MLPNet, RandomFeatureNet

WIDTH, LENGTH, ROWS = 16, 2048, 8
RATES = tuple(2.0**n for n in range(-13, 3))
CHUNKS = (1, 2, 4, 8, 16, 32, 64, 128)
DEEP = InnerOptimizer(network=MLPNet(), momentum=False, chunk_size=1)
MEMORIES = {
    "linear": InnerOptimizer(network=LinearNet(), gradient="token", momentum=False, chunk_size=16),
    "deep": DEEP,
    "last layer only": InnerOptimizer(network=MLPNet(), momentum=False, chunk_size=1, trainable_weights=("w2",)),
    "last layer only, as many floats": InnerOptimizer(
        network=MLPNet(expansion=8), momentum=False, chunk_size=1, trainable_weights=("w2",)
    ),
    "random features, as many floats": InnerOptimizer(
        network=RandomFeatureNet(expansion=8), momentum=False, chunk_size=1
    ),
    "random features, 4 times the floats": InnerOptimizer(
        network=RandomFeatureNet(expansion=32), momentum=False, chunk_size=1
    ),
}


def measure() -> list[dict]:
    """A row per memory of `MEMORIES`, and per chunk of the deep one, each at its best rate: the error of fresh queries.

    The share of the answers' squares that is missed, over the second half of the tokens.
    """
    rows = [{"mechanism": "depth", "memory": name, **best_rate(learner)} for name, learner in MEMORIES.items()]
    for chunk in CHUNKS:
        learner = InnerOptimizer(network=MLPNet(), momentum=False, chunk_size=chunk)
        rows.append({"mechanism": "staleness", "chunk": chunk, **best_rate(learner)})
    return rows


def best_rate(learner: InnerOptimizer, rows: int = ROWS) -> dict:
    """The rate that is best on the first half of the rows, the error on the second, and the floats of state."""
    index, error = select_setting(relative_errors(learner, rows), np.minimum)
    floats = sum(i * o for i, o in learner.trainable_shapes(WIDTH).values())
    return {"floats": floats, "lr": RATES[index], "error": round(error, 4)}


def relative_errors(learner: InnerOptimizer, rows: int, seed: int = 0) -> np.ndarray:
    """[rows, rates]; not finite where a memory diverged."""
    rng = np.random.default_rng(seed)
    q, k = l2_normalize(rng.normal(size=(2, rows, LENGTH, WIDTH)))
    teacher = rng.normal(size=(rows, WIDTH, WIDTH))
    mean = np.sqrt(2 / np.pi)  # of |x| for a normal x; the answers have mean 0 and deviation 1
    answers, v = ((np.abs(x @ teacher) - mean) / np.sqrt(1 - mean**2) for x in (q, k))
    shapes = learner.network.shapes(WIDTH)
    scale = 0.0 if len(shapes) == 1 else 1.0  # a memory of one matrix starts best from nothing
    weights = {name: scale * rng.normal(size=shape) / np.sqrt(shape[0]) for name, shape in shapes.items()}
    every = (rows, LENGTH, len(RATES))
    reads, _ = run_memory(
        learner, q, k, v, MemoryGates(np.broadcast_to(RATES, every), np.zeros(every), np.zeros(every)), weights
    )
    late = slice(LENGTH // 2, None)
    with np.errstate(over="ignore", invalid="ignore"):
        miss = np.square(reads - answers[:, :, None])[:, late].sum(axis=(1, 3))
        return miss / np.square(answers[:, late]).sum(axis=(1, 2))[:, None]
