"""How the next token is chosen from logits: the likeliest, or drawn from a tempered and cut distribution.

Draws are keyed by row and position, never by the batch: the same row under the same key gets the same tokens whatever
stands beside it, wherever it stands, and however its generation is divided into calls.
"""

import abc
import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, PRNGKeyArray

from recallax.config import Config, ConfigError


class Sampling(Config, abc.ABC):
    """A rule that turns logits into token ids."""

    @abc.abstractmethod
    def sample(self, logits: Float[Array, "B V"], keys: Key[Array, " B"]) -> Int[Array, " B"]:
        """One id per row; `keys` is one key per row."""


@dataclass(frozen=True, kw_only=True)
class Greedy(Sampling):
    """The likeliest token, the lowest id of equals."""

    def sample(self, logits: Float[Array, "B V"], keys: Key[Array, " B"]) -> Int[Array, " B"]:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)


@dataclass(frozen=True, kw_only=True)
class MultinomialSampling(Sampling):
    """A draw from softmax(logits / temperature), cut to the `top_k` likeliest ids and then, of what is left, to the
    fewest likeliest ids whose probabilities reach `top_p` together.

    Of equal logits the lower id counts as the likelier, so exactly min(top_k, V) ids pass the first cut. The second is
    the nucleus of Holtzman et al. 2020 (arXiv 1904.09751), section 3.1; it always keeps one id.
    """

    temperature: float = 1.0
    top_k: int | None = None
    """Ids that may be drawn; None is all."""
    top_p: float | None = None
    """Probability that the ids which may be drawn have together, at least; None is all."""

    def __post_init__(self) -> None:
        if not 0 < self.temperature < math.inf:
            raise ConfigError(
                f"temperature is {self.temperature}; it must be above 0 and finite (the likeliest token is Greedy)"
            )
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError(f"top_k is {self.top_k}; it must be at least 1, or None for all ids")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p is {self.top_p}; it must be above 0 and at most 1, or None for all ids")

    def sample(self, logits: Float[Array, "B V"], keys: Key[Array, " B"]) -> Int[Array, " B"]:
        scores = logits.astype(jnp.float32) / self.temperature
        if self.top_k is None and self.top_p is None:
            return jax.vmap(jax.random.categorical)(keys, scores).astype(jnp.int32)
        size = scores.shape[-1]
        best, ids = jax.lax.top_k(scores, min(self.top_k or size, size))
        if self.top_p is not None:
            best = jnp.where(_nucleus_mask(best, self.top_p), best, -jnp.inf)
        drawn = jax.vmap(jax.random.categorical)(keys, best)
        return jnp.take_along_axis(ids, drawn[:, None], axis=1)[:, 0].astype(jnp.int32)


def row_keys(key: PRNGKeyArray, rows: Int[Array, " B"], positions: Int[Array, " B"]) -> Key[Array, " B"]:
    """The key of each row's token at that position of its document."""
    return jax.vmap(lambda row, position: jax.random.fold_in(jax.random.fold_in(key, row), position))(rows, positions)


def _nucleus_mask(descending: Float[Array, "B V"], top_p: float) -> Bool[Array, "B V"]:
    """Ids before which less than `top_p` is reached; the first always."""
    share = jax.nn.softmax(descending, axis=-1)
    before = jnp.cumsum(share, axis=-1) - share
    return (before < top_p) | (jnp.arange(descending.shape[-1])[None] == 0)
