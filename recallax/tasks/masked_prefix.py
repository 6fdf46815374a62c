"""JRT's training objective: masked tokens in the prefix, the task's own labels behind it.

Source: Arora et al. 2024 (Just Read Twice, arXiv 2407.05483), section 4.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Int

from recallax.config import ConfigError
from recallax.tasks.base import Split, stream
from recallax.tasks.transform import Transform
from recallax.types import Batch

TERM = "masked_token"


@dataclass(frozen=True, kw_only=True)
class MaskedPrefix(Transform):
    """Tokens of the prefix are replaced by a mask and become targets at their own places.

    Labels that the task has within the prefix are dropped: the last prefix token predicts itself and not the next one.
    The masked tokens are a loss term of their own, `masked_token`, a mean over masked tokens; `loss_weights` has the
    coefficients. Only train batches are masked (the published code masks valid and test too): there, accuracy is that
    of the task on the whole context.
    """

    prefix: int | None = None
    """Tokens that each document begins with; None keeps the prefix that the task marks."""
    rate: float = 0.15
    """Probability that a prefix token is masked."""
    mask_id: int | None = None
    """The token that stands for a masked one; None adds an id to the vocabulary."""

    def __post_init__(self) -> None:
        if not 0 < self.rate < 1:
            raise ConfigError(f"MaskedPrefix.rate is {self.rate}; it must lie between 0 and 1")
        if self.prefix is not None and self.prefix < 1:
            raise ConfigError(
                f"MaskedPrefix.prefix is {self.prefix}; it must be at least 1, or None for the task's own"
            )
        if self.mask_id is not None and self.mask_id < 0:
            raise ConfigError(f"MaskedPrefix.mask_id is {self.mask_id}; it must be at least 0, or None for a new id")

    @property
    def vocab_size(self) -> int:
        return max(self.task.vocab_size, self._mask + 1)

    @property
    def terms(self) -> tuple[str, ...]:
        return (*self.task.terms, TERM)

    def max_targets(self, split: Split, length: int) -> int:
        own = self.task.max_targets(split, length)
        return own if split != "train" else min(length, own + max(self.prefixes(split, length)))

    def prefixes(self, split: Split, length: int) -> tuple[int, ...]:
        return self.task.prefixes(split, length) if self.prefix is None else (min(self.prefix, length),)

    def batch(self, seed: int, split: Split, index: int, size: int) -> Batch:
        batch = self.task.batch(seed, split, index, size)
        seq, real = batch.seq, np.asarray(batch.seq.segments) > 0
        inside = real & (seq.prefix if self.prefix is None else np.asarray(seq.positions) < self.prefix)
        weights = np.where(inside, 0, batch.weights).astype(np.float32)
        whole = batch._replace(weights=weights, seq=seq._replace(prefix=inside))
        if split != "train":
            return whole
        masked = inside & (stream(seed, split, index, "masked").random(inside.shape) < self.rate)
        return whole._replace(
            tokens=np.where(masked, self._mask, batch.tokens).astype(np.int32),
            targets=np.where(masked, batch.tokens, batch.targets).astype(np.int32),
            weights=np.where(masked, 1, weights).astype(np.float32),
            term=np.where(masked, len(self.task.terms), batch.term).astype(np.int32),
        )

    def solve(self, tokens: Int[np.ndarray, "B T"]) -> Int[np.ndarray, "B T"]:
        """The task's own answers: what is not a train row has no masks."""
        return self.task.solve(tokens)

    @property
    def _mask(self) -> int:
        return self.task.vocab_size if self.mask_id is None else self.mask_id


def loss_weights(normalisation: Literal["paper", "code"], masked: float = 0.25) -> dict[str, float]:
    """`Train.loss_weights` of the objective, for a task whose own term is `next_token`.

    paper: (L_next + w L_masked) / (1 + w). code: L_next + w L_masked, which clips and learns as the paper's would at
    1 + w times the rate.
    """
    total = 1 + masked if normalisation == "paper" else 1.0
    return {"next_token": 1 / total, TERM: masked / total}
