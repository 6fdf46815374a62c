"""S5 from transpositions alone: the same 120 states, but every token exchanges two points."""

from dataclasses import dataclass

import numpy as np

from recallax.config import ConfigError
from recallax.tasks import StateTracking
from recallax.tasks.base import Split, batch_rng
from recallax.tasks.state_tracking import cayley_table, group_elements
from recallax.types import Batch


@dataclass(frozen=True, kw_only=True)
class TranspositionTracking(StateTracking):
    """As StateTracking, with tokens drawn from the transpositions; one reflection per token suffices."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.group not in ("S3", "S5"):
            raise ConfigError(f"Swaps.group is {self.group!r}; only S3 and S5 are made of transpositions")

    def batch(self, seed: int, split: Split, index: int, size: int) -> Batch:
        whole = super().batch(seed, split, index, size)
        permutations = group_elements(self.group)
        moved = (permutations != np.arange(permutations.shape[1])).sum(axis=1)
        swaps = np.flatnonzero(moved == 2).astype(np.int32)
        tokens = batch_rng(seed, split, index, "swaps").choice(swaps, size=np.shape(whole.tokens)).astype(np.int32)
        table, targets = cayley_table(self.group), tokens.copy()
        for t in range(1, tokens.shape[1]):
            targets[:, t] = table[targets[:, t - 1], tokens[:, t]]
        return whole._replace(tokens=tokens, targets=targets)
