"""Rules that select the next token from logits.

Samples are keyed by row and position, never by the batch: a row gets the same tokens under the same key whatever the
other rows are, wherever it is in the batch, and however its generation is divided into calls.
"""

import abc
import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, PRNGKeyArray

from recallax.config import Config, ConfigError, require_at_least


class Sampling(Config, abc.ABC):
    """A rule that turns logits into token ids."""

    @abc.abstractmethod
    def sample(self, logits: Float[Array, "B V"], keys: Key[Array, " B"]) -> Int[Array, " B"]:
        """Select one token per row.

        Args:
            logits: Logits of the next token.
            keys: One random key per row.

        Returns:
            Token ids, int32.
        """


@dataclass(frozen=True, kw_only=True)
class Greedy(Sampling):
    """The most likely token; of equal logits, the lowest id."""

    def sample(self, logits: Float[Array, "B V"], keys: Key[Array, " B"]) -> Int[Array, " B"]:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)


@dataclass(frozen=True, kw_only=True)
class MultinomialSampling(Sampling):
    """A sample from softmax(logits / temperature), restricted by `top_k` and then by `top_p`.

    The largest logit is subtracted before the division, so that no temperature overflows. A temperature below the
    smallest normal float32, which an accelerator rounds to 0, selects the most likely id.

    `top_k` keeps the most likely ids; of equal logits the lower id counts as more likely, so exactly min(top_k, V) ids
    remain. `top_p` keeps the smallest set of the most likely remaining ids whose probabilities sum to at least `top_p`,
    and never fewer than one id: the nucleus of Holtzman et al. 2020 (arXiv 1904.09751), section 3.1.
    """

    temperature: float = 1.0
    """Divisor of the logits."""
    top_k: int | None = None
    """Largest number of ids that can be sampled. None: all."""
    top_p: float | None = None
    """Smallest total probability of the ids that can be sampled. None: all ids."""

    def __post_init__(self) -> None:
        if not 0 < self.temperature < math.inf:
            raise ConfigError(
                f"temperature is {self.temperature}; it must be above 0 and finite (Greedy is the limit at 0)"
            )
        require_at_least(1, "", "or None for all ids", top_k=self.top_k)
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p is {self.top_p}; it must be above 0 and at most 1, or None for all ids")

    def sample(self, logits: Float[Array, "B V"], keys: Key[Array, " B"]) -> Int[Array, " B"]:
        if self.temperature < jnp.finfo(jnp.float32).tiny:
            return Greedy().sample(logits, keys)
        logits = logits.astype(jnp.float32)
        scores = (logits - logits.max(axis=-1, keepdims=True)) / self.temperature
        if self.top_k is None and self.top_p is None:
            return jax.vmap(jax.random.categorical)(keys, scores).astype(jnp.int32)
        size = scores.shape[-1]
        best, ids = jax.lax.top_k(scores, min(self.top_k or size, size))
        if self.top_p is not None:
            best = jnp.where(_nucleus_mask(best, self.top_p), best, -jnp.inf)
        sampled = jax.vmap(jax.random.categorical)(keys, best)
        return jnp.take_along_axis(ids, sampled[:, None], axis=1)[:, 0].astype(jnp.int32)


def row_keys(key: PRNGKeyArray, rows: Int[Array, " B"], positions: Int[Array, " B"]) -> Key[Array, " B"]:
    """Return the random key of each row's next token.

    Args:
        key: The key of all samples.
        rows: Ids of the rows.
        positions: Positions in their documents.

    Returns:
        One key per row.
    """
    return jax.vmap(lambda row, position: jax.random.fold_in(jax.random.fold_in(key, row), position))(rows, positions)


def _nucleus_mask(descending: Float[Array, "B V"], top_p: float) -> Bool[Array, "B V"]:
    """Return True for ids before which the total probability is below `top_p`, and for the first id."""
    probabilities = jax.nn.softmax(descending, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    return (before < top_p) | (jnp.arange(descending.shape[-1])[None] == 0)
