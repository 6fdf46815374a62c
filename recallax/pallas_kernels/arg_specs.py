"""Named test cases for which every implementation of every op is compared with its definition.

The `arg_specs.py` of each op builds the op's inputs from them: float64 arrays of two rows from fixed seeds.
"""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int


@dataclass(frozen=True)
class ArgSpec:
    """Sizes and numerical difficulty of a test case."""

    length: int
    head_k_dim: int = 8
    head_v_dim: int = 8
    num_heads: int = 2
    key_correlation: float = 0.0
    """Variance fraction of each key that all tokens share."""
    decay: str | None = None
    """None, "constant" (per head), "token", "channel", "extreme" (per token) or "extreme channel".

    The extreme ones mix tokens that decay nothing with tokens that decay everything.
    """
    max_beta: float = 1.0
    """Upper bound of the erase and write strengths of the delta rule."""
    document_lengths: tuple[int, ...] = ()
    """Lengths of the documents in the first row; the second row is one document."""
    num_padding: int = 0
    """Padding tokens at the end of the first row."""


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
    """Draw queries, keys, values and, if the case has one, the log-decay.

    Args:
        spec: The test case.
        num_k_heads: Heads of keys and values; None: `spec.num_heads`.

    Returns:
        Arrays by argument name.
    """
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


def random_grouped_inputs(spec: ArgSpec) -> dict[str, Any]:
    """Draw queries, and keys and values of one head, in float64."""
    return {name: x for name, x in random_inputs(spec, num_k_heads=1).items() if name != "log_decay"}


def continued_positions(spec: ArgSpec, num_seen: int) -> np.ndarray:
    """Return the positions within documents; the first document of each row continues at `num_seen`.

    Args:
        spec: The test case, with its documents.
        num_seen: Tokens of the first document before the row.

    Returns:
        Positions [2, T]; 0 at padding.
    """
    positions = np.tile(np.arange(spec.length, dtype=np.int32), (2, 1)) + num_seen
    if spec.document_lengths:
        rows = [np.arange(n) + (num_seen if i == 0 else 0) for i, n in enumerate(spec.document_lengths)]
        positions[0] = np.concatenate([*rows, np.zeros(spec.num_padding)])
    return positions


def segment_ids(spec: ArgSpec) -> Int[Array, "B T"]:
    """Return the document ids of both rows; 0 is padding."""
    ids = np.ones((2, spec.length), np.int32)
    if spec.document_lengths:
        lengths = [*spec.document_lengths, spec.num_padding]
        # Not monotonic on purpose: ids need not be ordered.
        document = [3 * i + 1 if i % 2 else 50 - i for i in range(len(spec.document_lengths))] + [0]
        ids[0] = np.repeat(document, lengths)
    return jnp.asarray(ids)
