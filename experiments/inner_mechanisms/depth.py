"""Depth and stale gradients: a nonlinear teacher, v = |k A|, learned from 2048 unit keys.

An even function has no linear part, so a matrix memory learns nothing of it. The controls of a two-layer memory are the
same memory with a fixed first layer (only `w2` is trained), and fixed random features with a linear memory.
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
    """Measure each of `MEMORIES`, and the two-layer memory at each chunk size, at their best learning rates.

    Returns:
        Rows with the squared error of new queries, relative to the square of the answers, over the second half of the
        tokens.
    """
    rows = [
        {"mechanism": "depth", "memory": name, **best_rate(inner_optimizer)}
        for name, inner_optimizer in MEMORIES.items()
    ]
    for chunk in CHUNKS:
        inner_optimizer = InnerOptimizer(network=MLPNet(), momentum=False, chunk_size=chunk)
        rows.append({"mechanism": "staleness", "chunk": chunk, **best_rate(inner_optimizer)})
    return rows


def best_rate(inner_optimizer: InnerOptimizer, rows: int = ROWS) -> dict:
    """Measure a memory at the learning rate that is best on the first half of the rows.

    Args:
        inner_optimizer: The memory's inner optimizer.
        rows: Number of rows.

    Returns:
        The number of trainable floats, the learning rate, and the error on the second half of the rows.
    """
    index, error = select_setting(relative_errors(inner_optimizer, rows), np.minimum)
    floats = sum(i * o for i, o in inner_optimizer.trainable_shapes(WIDTH).values())
    return {"floats": floats, "lr": RATES[index], "error": round(error, 4)}


def relative_errors(inner_optimizer: InnerOptimizer, rows: int, seed: int = 0) -> np.ndarray:
    """Measure a memory at all learning rates in one call of the op.

    Args:
        inner_optimizer: The memory's inner optimizer.
        rows: Number of rows.
        seed: Seed of the data.

    Returns:
        Relative squared errors [rows, learning rates]; not finite for a memory that diverged.
    """
    rng = np.random.default_rng(seed)
    q, k = l2_normalize(rng.normal(size=(2, rows, LENGTH, WIDTH)))
    teacher = rng.normal(size=(rows, WIDTH, WIDTH))
    mean = np.sqrt(2 / np.pi)  # of |x| for a standard normal x; the answers have mean 0 and standard deviation 1
    answers, v = ((np.abs(x @ teacher) - mean) / np.sqrt(1 - mean**2) for x in (q, k))
    shapes = inner_optimizer.network.shapes(WIDTH)
    scale = 0.0 if len(shapes) == 1 else 1.0  # a matrix memory starts at zero
    weights = {name: scale * rng.normal(size=shape) / np.sqrt(shape[0]) for name, shape in shapes.items()}
    gate_shape = (rows, LENGTH, len(RATES))
    reads, _ = run_memory(
        inner_optimizer,
        q,
        k,
        v,
        MemoryGates(np.broadcast_to(RATES, gate_shape), np.zeros(gate_shape), np.zeros(gate_shape)),
        weights,
    )
    second_half = slice(LENGTH // 2, None)
    with np.errstate(over="ignore", invalid="ignore"):
        error = np.square(reads - answers[:, :, None])[:, second_half].sum(axis=(1, 3))
        return error / np.square(answers[:, second_half]).sum(axis=(1, 2))[:, None]
