"""Momentum, where a pair turns out to matter only after it was read: N pairs, each followed by four cues.

Cues say keep or ignore, and one pair in eight matters. A memory without momentum writes a pair when it reads it or
never; its best answer to a cue is to forget (all of its memory a little, the pair with it). With momentum, a pair is a
small step at first, and cues decide whether that step is repeated.
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
"""Pairs and width."""
RATES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.4, 0.8)
KEEPS = (1.0, 0.99, 0.98, 0.95, 0.9)
"""At every pair."""
WIPES = (1.0, 0.98, 0.95, 0.9, 0.8, 0.5)
"""At the first cue to ignore a pair."""
MOMENTA: tuple[MomentumKind, ...] = ("none", "cued")


def measure() -> list[dict]:
    """A row per size and momentum: how often what a key that matters reads is nearer to its value than to others."""
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
    """Unit keys, unit values, and which pairs matter: an eighth of each row's, to the nearest whole number."""
    keys, values = l2_normalize(rng.normal(size=(2, rows, pairs, width)))
    return keys, values, rng.random((rows, pairs)).argsort(axis=1) < round(pairs / 8)


def expand_to_tokens(x: Float[np.ndarray, "B N D"]) -> Float[np.ndarray, "B T D"]:
    """Each pair's vector at its own token, zero at its cues."""
    rows, pairs, width = x.shape
    out = np.zeros((rows, pairs, 1 + CUES, width))
    out[:, :, 0] = x
    return out.reshape(rows, -1, width)


def recall_accuracy(
    pairs: int, width: int, momentum: MomentumKind, rows: int = ROWS, seed: int = 0
) -> tuple[list[tuple[float, float, float]], Float[np.ndarray, "B H"]]:
    """Settings (rate, keep, wipe), and the share of the pairs that matter that each recalls at the end of each row."""
    keys, values, matters = pairs_and_cues(np.random.default_rng(seed), rows, pairs, width)
    settings = list(product(RATES, KEEPS, WIPES))
    lr, keep, wipe = np.array(settings).T
    shape = (rows, pairs, 1 + CUES, len(settings))
    rates, log_momentum, log_keep = np.zeros(shape), np.full(shape, LOG_CLOSED), np.zeros(shape)
    rates[:, :, 0] = lr
    log_keep[:, :, 0] = np.log(keep)
    log_keep[:, :, 1] = np.where(matters[..., None], 0.0, np.log(wipe))
    if momentum == "cued":
        log_momentum[:, :, 1:] = np.where(matters, 0.0, LOG_CLOSED)[..., None, None]
    gates = MemoryGates(*(x.reshape(rows, -1, len(settings)) for x in (rates, log_momentum, log_keep)))
    learner = InnerOptimizer(network=LinearNet(), gradient="token", momentum=momentum == "cued", chunk_size=32)
    k, v = expand_to_tokens(keys), expand_to_tokens(values)
    _, learned = run_memory(learner, np.zeros_like(k), k, v, gates, {"w1": np.zeros((width, width))})
    asked = np.argsort(~matters, axis=1, kind="stable")[:, : matters[0].sum()]
    reads = np.einsum("bni,bhio->bhno", np.take_along_axis(keys, asked[..., None], axis=1), learned["w1"])
    nearest = (reads @ np.swapaxes(values, 1, 2)[:, None]).argmax(axis=-1)
    return settings, (nearest == asked[:, None]).mean(axis=-1)
