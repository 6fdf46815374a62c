"""State tracking on symmetric groups in which every token is a transposition."""

from dataclasses import dataclass

import numpy as np

from recallax.config import ConfigError
from recallax.tasks import StateTracking
from recallax.tasks.base import Split, batch_rng
from recallax.tasks.state_tracking import cayley_table, group_elements
from recallax.types import Batch


@dataclass(frozen=True, kw_only=True)
class TranspositionTracking(StateTracking):
    """StateTracking whose tokens are transpositions, so that one reflection per token is sufficient."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.group not in ("S3", "S5"):
            raise ConfigError(
                f"TranspositionTracking.group is {self.group!r}; it must be S3 or S5, which transpositions generate"
            )

    def batch(self, seed: int, split: Split, index: int, size: int) -> Batch:
        batch = super().batch(seed, split, index, size)
        permutations = group_elements(self.group)
        num_moved = (permutations != np.arange(permutations.shape[1])).sum(axis=1)
        transpositions = np.flatnonzero(num_moved == 2).astype(np.int32)
        tokens = (
            batch_rng(seed, split, index, "swaps").choice(transpositions, size=np.shape(batch.tokens)).astype(np.int32)
        )
        table, targets = cayley_table(self.group), tokens.copy()
        for t in range(1, tokens.shape[1]):
            targets[:, t] = table[targets[:, t - 1], tokens[:, t]]
        return batch._replace(tokens=tokens, targets=targets)
