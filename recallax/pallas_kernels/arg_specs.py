"""Named sizes and difficulties, on which every form of every op is compared with its definition.

Each op's own `cases.py` says what inputs they mean for it. Numbers are float64, from fixed seeds, for two rows.
"""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int


@dataclass(frozen=True)
class ArgSpec:
    """Sizes and how hard the numbers are."""

    length: int
    head_k_dim: int = 8
    head_v_dim: int = 8
    num_heads: int = 2
    key_correlation: float = 0.0
    """Share of every key that is the same for all tokens."""
    decay: str | None = None
    """"constant" per head, "token", "channel"; "extreme" (per channel): mixtures of none and of total forgetting."""
    max_beta: float = 1.0
    """Largest strength of erasing and writing."""
    document_lengths: tuple[int, ...] = ()
    """Lengths of the documents in the first row; the second row is one document."""
    num_padding: int = 0


ARG_SPECS = {
    "one token": ArgSpec(1),
    "below a chunk": ArgSpec(13),
    "exactly two chunks": ArgSpec(32),
    "odd": ArgSpec(67, head_k_dim=4, head_v_dim=6),
    "wide values": ArgSpec(40, head_k_dim=3, head_v_dim=16, num_heads=1),
    "correlated .5": ArgSpec(67, key_correlation=0.5),
    "correlated .99": ArgSpec(67, key_correlation=0.99),
    "constant decay": ArgSpec(67, decay="constant"),
    "token decay": ArgSpec(67, decay="token"),
    "extreme decay": ArgSpec(67, decay="extreme"),
    "channel decay": ArgSpec(67, decay="channel", head_v_dim=6),
    "extreme channel decay": ArgSpec(67, decay="extreme channel"),
    "negative eigenvalues": ArgSpec(67, max_beta=2.0),
    "correlated .9, negative eigenvalues, channel decay": ArgSpec(
        67, key_correlation=0.9, max_beta=2.0, decay="channel"
    ),
    "packed": ArgSpec(67, document_lengths=(1, 15, 1, 1, 20, 29)),
    "packed, decay, padding": ArgSpec(67, decay="token", document_lengths=(16, 1, 33), num_padding=17),
    "packed, channel decay, padding": ArgSpec(67, decay="channel", document_lengths=(16, 1, 33), num_padding=17),
}


def random_inputs(spec: ArgSpec, num_k_heads: int | None = None) -> dict[str, Any]:
    """Queries, keys, values, and the decay if the case has one; keys and values of `num_k_heads` heads."""
    rng = np.random.default_rng(hash(spec.length) + spec.head_k_dim)
    shape = (2, spec.length, spec.num_heads, spec.head_k_dim)
    kv = (2, spec.length, num_k_heads or spec.num_heads)
    k = rng.normal(size=(*kv, spec.head_k_dim))
    shared = rng.normal(size=spec.head_k_dim)
    k = np.sqrt(1 - spec.key_correlation) * k + np.sqrt(spec.key_correlation) * shared
    inputs = {"q": rng.normal(size=shape), "k": k, "v": rng.normal(size=(*kv, spec.head_v_dim))}
    gates = {
        "constant": -np.abs(rng.normal(size=(spec.num_heads,))),
        "token": -np.abs(rng.normal(size=shape[:3])),
        "extreme": -rng.choice([0.0, 1e-4, 40.0], size=shape[:3], p=[0.5, 0.3, 0.2]),
        "channel": -np.abs(rng.normal(size=shape)),
        "extreme channel": -rng.choice([0.0, 1e-4, 40.0, 1e4], size=shape, p=[0.5, 0.3, 0.1, 0.1]),
    }
    return inputs | ({"log_decay": gates[spec.decay]} if spec.decay else {})


def segment_ids(spec: ArgSpec) -> Int[Array, "B T"]:
    """Document ids of both rows."""
    ids = np.ones((2, spec.length), np.int32)
    if spec.document_lengths:
        lengths = [*spec.document_lengths, spec.num_padding]
        # ids need not be ordered: every other document has a larger one
        names = [3 * i + 1 if i % 2 else 50 - i for i in range(len(spec.document_lengths))] + [0]
        ids[0] = np.repeat(names, lengths)
    return jnp.asarray(ids)
