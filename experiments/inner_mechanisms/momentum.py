"""Momentum: recall of pairs that are marked as relevant only after they were read.

Each of N pairs is followed by four cues, to keep or to ignore it, and one pair in eight is relevant. A memory without
momentum writes a pair when it reads the pair or not at all, and at a cue it can only forget a part of the whole memory.
With momentum a pair causes a small step at first, and its cues decide whether the step is repeated.
"""

from itertools import product
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float

from experiments.inner_mechanisms.memory_grid import LOG_CLOSED, MemoryGates, l2_normalize, run_memory, select_setting
from recallax.pallas_kernels.neural_memory import InnerOptimizer
from recallax.pallas_kernels.neural_memory.inner_optimizer import LinearNet

type MomentumKind = Literal["none", "cued"]

CUES, ROWS = 4, 32
SIZES = ((64, 16), (128, 16), (128, 32))
"""Number of pairs and width."""
RATES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.4, 0.8)
KEEPS = (1.0, 0.99, 0.98, 0.95, 0.9)
"""Keep gate at every pair."""
WIPES = (1.0, 0.98, 0.95, 0.9, 0.8, 0.5)
"""Keep gate at the first cue to ignore a pair."""
MOMENTA: tuple[MomentumKind, ...] = ("none", "cued")


def measure() -> list[dict]:
    """Measure each size, with and without momentum.

    Returns:
        Rows with the fraction of relevant keys whose output is nearest to their value.
    """
    rows = []
    for (pairs, width), momentum in product(SIZES, MOMENTA):
        settings, scores = recall_accuracy(pairs, width, momentum)
        index, accuracy = select_setting(scores, np.maximum)
        rate, keep, wipe = settings[index]
        setting = {"pairs": pairs, "width": width, "momentum": momentum, "lr": rate, "keep": keep, "wipe": wipe}
        rows.append({"mechanism": "momentum", **setting, "accuracy": round(accuracy, 4)})
    return rows


def pairs_and_cues(
    rng: np.random.Generator, rows: int, pairs: int, width: int
) -> tuple[Float[np.ndarray, "B N D"], Float[np.ndarray, "B N D"], Bool[np.ndarray, "B N"]]:
    """Draw pairs.

    Args:
        rng: Random generator.
        rows: Number of rows B.
        pairs: Pairs per row N.
        width: Width of keys and values D.

    Returns:
        Unit keys, unit values, and True for the relevant pairs, an eighth of each row's (rounded).
    """
    keys, values = l2_normalize(rng.normal(size=(2, rows, pairs, width)))
    return keys, values, rng.random((rows, pairs)).argsort(axis=1) < round(pairs / 8)


def expand_to_tokens(x: Float[np.ndarray, "B N D"]) -> Float[np.ndarray, "B T D"]:
    """Put each pair's vector at its own token and zeros at its cues."""
    rows, pairs, width = x.shape
    out = np.zeros((rows, pairs, 1 + CUES, width))
    out[:, :, 0] = x
    return out.reshape(rows, -1, width)


def recall_accuracy(
    pairs: int, width: int, momentum: MomentumKind, rows: int = ROWS, seed: int = 0
) -> tuple[list[tuple[float, float, float]], Float[np.ndarray, "B H"]]:
    """Measure every setting in one call of the op.

    Args:
        pairs: Pairs per row.
        width: Width of keys and values.
        momentum: "none", or "cued" for a momentum gate that is open at cues to keep and closed elsewhere.
        rows: Number of rows.
        seed: Seed of the data.

    Returns:
        The settings (learning rate, keep, wipe), and the fraction of relevant pairs that each recalls, per row.
    """
    keys, values, relevant = pairs_and_cues(np.random.default_rng(seed), rows, pairs, width)
    settings = list(product(RATES, KEEPS, WIPES))
    lr, keep, wipe = np.array(settings).T
    shape = (rows, pairs, 1 + CUES, len(settings))
    rates, log_momentum, log_keep = np.zeros(shape), np.full(shape, LOG_CLOSED), np.zeros(shape)
    rates[:, :, 0] = lr
    log_keep[:, :, 0] = np.log(keep)
    log_keep[:, :, 1] = np.where(relevant[..., None], 0.0, np.log(wipe))
    if momentum == "cued":
        log_momentum[:, :, 1:] = np.where(relevant, 0.0, LOG_CLOSED)[..., None, None]
    gates = MemoryGates(*(x.reshape(rows, -1, len(settings)) for x in (rates, log_momentum, log_keep)))
    inner_optimizer = InnerOptimizer(network=LinearNet(), gradient="token", momentum=momentum == "cued", chunk_size=32)
    k, v = expand_to_tokens(keys), expand_to_tokens(values)
    _, learned = run_memory(inner_optimizer, np.zeros_like(k), k, v, gates, {"w1": np.zeros((width, width))})
    queries = np.argsort(~relevant, axis=1, kind="stable")[:, : relevant[0].sum()]
    reads = np.einsum("bni,bhio->bhno", np.take_along_axis(keys, queries[..., None], axis=1), learned["w1"])
    nearest = (reads @ np.swapaxes(values, 1, 2)[:, None]).argmax(axis=-1)
    return settings, (nearest == queries[:, None]).mean(axis=-1)
