"""JRT's training objective: masked tokens in the prefix and the task's own targets after it.

Source: Arora et al. 2024 (Just Read Twice, arXiv 2407.05483), section 4.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Int

from recallax.config import ConfigError, require_at_least
from recallax.tasks.base import Split, batch_rng
from recallax.tasks.task_transform import TaskTransform
from recallax.types import Batch

MASKED_TOKEN_TERM = "masked_token"


@dataclass(frozen=True, kw_only=True)
class MaskedPrefix(TaskTransform):
    """Replace tokens of the prefix by a mask token and make them targets at their positions.

    Targets that the task has within the prefix get weight 0: a masked token is predicted at its own position, not at
    the one before. The masked tokens are a separate loss term, `masked_token`, a mean over masked tokens;
    `masked_prefix_loss_weights` returns its coefficient. Only train batches are masked. (The published code masks valid
    and test batches too.) So the accuracy on valid and test is that of the task on the whole context.
    """

    prefix_length: int | None = None
    """Length in tokens of the prefix of each document; None keeps the prefix that the task marks."""
    mlm_probability: float = 0.15
    """Probability that a prefix token is masked."""
    mask_token_id: int | None = None
    """Id that replaces a masked token; None adds an id to the vocabulary."""

    def __post_init__(self) -> None:
        if not 0 < self.mlm_probability < 1:
            raise ConfigError(f"MaskedPrefix.mlm_probability is {self.mlm_probability}; it must be above 0 and below 1")
        require_at_least(1, "MaskedPrefix.", "or None for the task's own", prefix_length=self.prefix_length)
        require_at_least(0, "MaskedPrefix.", "or None for a new id", mask_token_id=self.mask_token_id)

    @property
    def vocab_size(self) -> int:
        return max(self.task.vocab_size, self._mask_token_id + 1)

    @property
    def terms(self) -> tuple[str, ...]:
        return (*self.task.terms, MASKED_TOKEN_TERM)

    def max_targets(self, split: Split, length: int) -> int:
        task_targets = self.task.max_targets(split, length)
        if split != "train":
            return task_targets
        return min(length, task_targets + max(self.prefix_lengths(split, length)))

    def prefix_lengths(self, split: Split, length: int) -> tuple[int, ...]:
        return (
            self.task.prefix_lengths(split, length)
            if self.prefix_length is None
            else (min(self.prefix_length, length),)
        )

    def batch(self, seed: int, split: Split, index: int, size: int) -> Batch:
        batch = self.task.batch(seed, split, index, size)
        seq, real = batch.seq, np.asarray(batch.seq.segment_ids) > 0
        inside = real & (seq.prefix if self.prefix_length is None else np.asarray(seq.positions) < self.prefix_length)
        weights = np.where(inside, 0, batch.weights).astype(np.float32)
        whole = batch._replace(weights=weights, seq=seq._replace(prefix=inside))
        if split != "train":
            return whole
        masked = inside & (batch_rng(seed, split, index, "masked").random(inside.shape) < self.mlm_probability)
        return whole._replace(
            tokens=np.where(masked, self._mask_token_id, batch.tokens).astype(np.int32),
            targets=np.where(masked, batch.tokens, batch.targets).astype(np.int32),
            weights=np.where(masked, 1, weights).astype(np.float32),
            term=np.where(masked, len(self.task.terms), batch.term).astype(np.int32),
        )

    def solve(self, tokens: Int[np.ndarray, "B T"]) -> Int[np.ndarray, "B T"]:
        """Return the task's answers; rows of the test split have no masks."""
        return self.task.solve(tokens)

    @property
    def _mask_token_id(self) -> int:
        return self.task.vocab_size if self.mask_token_id is None else self.mask_token_id


def masked_prefix_loss_weights(
    normalization: Literal["paper", "code"], masked_weight: float = 0.25
) -> dict[str, float]:
    """Return the value of `Train.loss_weights` for a task whose own term is `next_token`.

    Args:
        normalization: "paper" for (L_next + w L_masked) / (1 + w), "code" for L_next + w L_masked, which is the paper's
            loss times 1 + w.
        masked_weight: Relative weight w of the masked tokens.

    Returns:
        The coefficient of each loss term.
    """
    total = 1 + masked_weight if normalization == "paper" else 1.0
    return {"next_token": 1 / total, MASKED_TOKEN_TERM: masked_weight / total}
