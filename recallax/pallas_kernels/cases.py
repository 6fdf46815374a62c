"""Named sizes and difficulties, on which every form of every op is compared with its definition.

Each op's own `cases.py` says what inputs they mean for it. Numbers are float64, from fixed seeds, for two rows.
"""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int


@dataclass(frozen=True)
class Case:
    """Sizes and how hard the numbers are."""

    length: int
    width: int = 8
    values: int = 8
    heads: int = 2
    correlation: float = 0.0
    """Share of every key that is the same for all tokens."""
    decay: str | None = None
    """"constant" per head, "token", "channel"; "extreme" (per channel): mixtures of none and of total forgetting."""
    beta: float = 1.0
    """Largest strength of erasing and writing."""
    documents: tuple[int, ...] = ()
    """Lengths of the documents in the first row; the second row is one document."""
    padded: int = 0


CASES = {
    "one token": Case(1),
    "below a chunk": Case(13),
    "exactly two chunks": Case(32),
    "odd": Case(67, width=4, values=6),
    "wide values": Case(40, width=3, values=16, heads=1),
    "correlated .5": Case(67, correlation=0.5),
    "correlated .99": Case(67, correlation=0.99),
    "constant decay": Case(67, decay="constant"),
    "token decay": Case(67, decay="token"),
    "extreme decay": Case(67, decay="extreme"),
    "channel decay": Case(67, decay="channel", values=6),
    "extreme channel decay": Case(67, decay="extreme channel"),
    "negative eigenvalues": Case(67, beta=2.0),
    "correlated .9, negative eigenvalues, channel decay": Case(67, correlation=0.9, beta=2.0, decay="channel"),
    "packed": Case(67, documents=(1, 15, 1, 1, 20, 29)),
    "packed, decay, padding": Case(67, decay="token", documents=(16, 1, 33), padded=17),
    "packed, channel decay, padding": Case(67, decay="channel", documents=(16, 1, 33), padded=17),
}


def draw(case: Case, groups: int | None = None) -> dict[str, Any]:
    """Queries, keys, values, and the decay if the case has one; keys and values of `groups` heads."""
    rng = np.random.default_rng(hash(case.length) + case.width)
    shape = (2, case.length, case.heads, case.width)
    kv = (2, case.length, groups or case.heads)
    k = rng.normal(size=(*kv, case.width))
    shared = rng.normal(size=case.width)
    k = np.sqrt(1 - case.correlation) * k + np.sqrt(case.correlation) * shared
    inputs = {"q": rng.normal(size=shape), "k": k, "v": rng.normal(size=(*kv, case.values))}
    gates = {
        "constant": -np.abs(rng.normal(size=(case.heads,))),
        "token": -np.abs(rng.normal(size=shape[:3])),
        "extreme": -rng.choice([0.0, 1e-4, 40.0], size=shape[:3], p=[0.5, 0.3, 0.2]),
        "channel": -np.abs(rng.normal(size=shape)),
        "extreme channel": -rng.choice([0.0, 1e-4, 40.0, 1e4], size=shape, p=[0.5, 0.3, 0.1, 0.1]),
    }
    return inputs | ({"log_decay": gates[case.decay]} if case.decay else {})


def segments(case: Case) -> Int[Array, "B T"]:
    """Document ids of both rows."""
    ids = np.ones((2, case.length), np.int32)
    if case.documents:
        lengths = [*case.documents, case.padded]
        # ids need not be ordered: every other document has a larger one
        names = [3 * i + 1 if i % 2 else 50 - i for i in range(len(case.documents))] + [0]
        ids[0] = np.repeat(names, lengths)
    return jnp.asarray(ids)
