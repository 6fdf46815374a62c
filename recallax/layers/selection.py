"""Selectors: which tokens of the past sparse global attention reads besides its window.

    TokenScore     score_j = w.x_j                                          gradient: through the attention's logits
    AskedTokens    score_bj = (W_a x_b).(W_o x_j) / sqrt(R)                 the same; b: first token of a block
    KeyScore       score_j = f([k_j ; m_j / |m_j|]),  m_j = sum_{i<=j} q_i  gradient: of a ranking loss alone

A score of `TokenScore` and `KeyScore` depends on the token and what lies before it, so what leaves the best never comes
back; `QueryDependentSelector` chooses per block and needs every token at hand.

`KeyScore` is the key selection of HAX: f a ReLU perceptron of three layers on detached keys and queries, trained to put
keys in the order of how much later queries want them, by a pairwise logistic loss over 64 keys. Its sum of sigmoids
over all queries is here the mean over those from the key on, since a sum prefers early keys, and its keys are every
n-th instead of random ones, so that a loss is a function of the batch. HAX normalises over the sequence, which tells
the future; here the sum up to the token is normalised over its channels.

Sources: TokenScore and AskedTokens are proposals (Hydra, arXiv 2508.15099, leaves its controller open; asking by blocks
resembles DeepSeek's indexer, arXiv 2512.02556); HAX: arXiv 2507.00449, section 4, and its code.
"""

import abc
import itertools
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from recallax.config import Config, ConfigError, require_at_least
from recallax.layers.base import State
from recallax.layers.dense import Linear
from recallax.layers.norm import l2_normalize
from recallax.pallas_kernels.chunking import index_documents
from recallax.pallas_kernels.selective_scan import selective_scan
from recallax.types import Aux, Mean, Precision, SeqInfo


class SelectionScores(NamedTuple):
    """What `sparse_global_attention` chooses by."""

    key: Float[Array, "B T R"]
    query: Float[Array, "B T R"] | None


class Selector(nnx.Module, abc.ABC):
    """Scores of tokens, in float32."""

    score_dim: int
    """R."""
    query_dependent: bool
    """Whether scores depend on who asks."""
    bias_logits: bool
    """Whether log sigmoid(score) is added to the attention's logits."""

    def init_state(self, batch: int) -> State:
        """What the scores of later tokens need of earlier ones."""
        return ()

    @abc.abstractmethod
    def __call__(
        self,
        x: Float[Array, "B T D"],
        q: Float[Array, "B T H K"],
        k: Float[Array, "B T G K"],
        seq: SeqInfo,
        state: State,
    ) -> tuple[SelectionScores, State, Aux]:
        """Scores of T further tokens; queries and keys without positions."""


class SelectorConfig(Config, abc.ABC):
    """A config that is the constructor of its selector."""

    @abc.abstractmethod
    def build(self, d_model: int, query_dim: int, key_dim: int, *, precision: Precision, rngs: nnx.Rngs) -> Selector:
        """The module; `query_dim` and `key_dim` are the widths of all heads together."""


@dataclass(frozen=True, kw_only=True)
class TokenScore(SelectorConfig):
    """One score per token, linear in its input."""

    def build(self, d_model: int, query_dim: int, key_dim: int, *, precision: Precision, rngs: nnx.Rngs) -> Selector:
        return TokenScorer(d_model, precision=precision, rngs=rngs)


class TokenScorer(Selector):
    """See the head of the file."""

    offers, asks, weighed = 1, False, True

    def __init__(self, d_model: int, *, precision: Precision, rngs: nnx.Rngs):
        self.score = Linear(d_model, 1, precision=_float32_compute(precision), rngs=rngs, axes=("embed", None))

    def __call__(
        self,
        x: Float[Array, "B T D"],
        q: Float[Array, "B T H K"],
        k: Float[Array, "B T G K"],
        seq: SeqInfo,
        state: State,
    ) -> tuple[SelectionScores, State, Aux]:
        return SelectionScores(self.score(x), None), state, {}


@dataclass(frozen=True, kw_only=True)
class QueryDependentSelector(SelectorConfig):
    """A score per block and token."""

    score_dim: int = 64
    """R: width of what a block asks with and a token offers."""

    def __post_init__(self) -> None:
        if self.score_dim < 1:
            raise ConfigError(f"score_dim is {self.score_dim}; what blocks ask with must be at least 1 wide")

    def build(self, d_model: int, query_dim: int, key_dim: int, *, precision: Precision, rngs: nnx.Rngs) -> Selector:
        return QueryDependentScorer(d_model, self.score_dim, precision=precision, rngs=rngs)


class QueryDependentScorer(Selector):
    """See the head of the file."""

    asks, weighed = True, True

    def __init__(self, d_model: int, score_dim: int, *, precision: Precision, rngs: nnx.Rngs):
        self.score_dim = score_dim
        self.offer, self.ask = (
            Linear(d_model, score_dim, precision=_float32_compute(precision), rngs=rngs, axes=("embed", None))
            for _ in range(2)
        )

    def __call__(
        self,
        x: Float[Array, "B T D"],
        q: Float[Array, "B T H K"],
        k: Float[Array, "B T G K"],
        seq: SeqInfo,
        state: State,
    ) -> tuple[SelectionScores, State, Aux]:
        return SelectionScores(self.offer(x), self.ask(x) * self.score_dim**-0.5), state, {}


@dataclass(frozen=True, kw_only=True)
class KeyScore(SelectorConfig):
    """The key selection of HAX."""

    hidden_size: int = 64
    """Width of the perceptron's two inner layers."""
    num_sampled_keys: int = 64
    """Keys that the ranking loss puts in order."""
    ranking_loss_weight: float = 0.1
    """Coefficient of the ranking loss, which enters the loss as `key_ranking` with this factor in it."""

    def __post_init__(self) -> None:
        require_at_least(1, hidden_size=self.hidden_size, num_sampled_keys=self.num_sampled_keys)

    def build(self, d_model: int, query_dim: int, key_dim: int, *, precision: Precision, rngs: nnx.Rngs) -> Selector:
        return KeyScorer(self, query_dim, key_dim, precision=precision, rngs=rngs)


class KeyScorer(Selector):
    """See the head of the file. State: the sum of queries, one float32 per channel."""

    offers, asks, weighed = 1, False, False

    def __init__(self, config: KeyScore, query_dim: int, key_dim: int, *, precision: Precision, rngs: nnx.Rngs):
        self.query_dim, self.num_sampled_keys, self.ranking_loss_weight = (
            query_dim,
            config.num_sampled_keys,
            config.ranking_loss_weight,
        )
        widths = (query_dim + key_dim, config.hidden_size, config.hidden_size, 1)
        self.layers = nnx.List(
            Linear(a, b, precision=_float32_compute(precision), rngs=rngs, std=a**-0.5, bias=True, axes=(None, None))
            for a, b in itertools.pairwise(widths)
        )

    def init_state(self, batch: int) -> State:
        return jnp.zeros((batch, self.query_dim, 1), jnp.float32)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        q: Float[Array, "B T H K"],
        k: Float[Array, "B T G K"],
        seq: SeqInfo,
        state: State,
    ) -> tuple[SelectionScores, State, Aux]:
        q, k = (jax.lax.stop_gradient(part.astype(jnp.float32)) for part in (q, k))
        flat_q, flat_k = (part.reshape(*part.shape[:2], -1) for part in (q, k))
        total, state = selective_scan(
            flat_q, jnp.zeros_like(flat_q), state=state, segment_ids=jnp.asarray(seq.segment_ids)
        )
        h = jnp.concatenate([flat_k, l2_normalize(total)], axis=-1)
        for layer in self.layers[:-1]:
            h = jax.nn.relu(layer(h))
        score = self.layers[-1](h)
        loss = ranking_loss(score[..., 0], q, k, seq, self.num_sampled_keys)
        return (
            SelectionScores(score, None),
            state,
            {"key_ranking": Mean(self.ranking_loss_weight * loss.total, loss.weight)},
        )


def ranking_loss(
    score: Float[Array, "B T"],
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T G K"],
    seq: SeqInfo,
    num_sampled_keys: int,
) -> Mean:
    """How badly scores order keys: over pairs of one document's keys, -log sigmoid(better score - worse score).

    A key is as good as the mean of sigmoid(q.k / sqrt(K)) over heads and the queries from it to its document's end.
    """
    docs, length = index_documents(jnp.asarray(seq.segment_ids)), q.shape[1]
    at = jnp.arange(0, length, -(-length // num_sampled_keys))
    groups, document = k.shape[2], jnp.where(docs.valid, docs.index, -1)
    k = jnp.repeat(k[:, at], q.shape[2] // groups, axis=2)
    wanted = jax.nn.sigmoid(jnp.einsum("bthk,bnhk->btnh", q, k) * q.shape[-1] ** -0.5).mean(axis=-1)
    reads = (document[:, :, None] == document[:, None, at]) & (jnp.arange(length)[:, None] >= at[None])[None]
    worth = jnp.sum(jnp.where(reads, wanted, 0), axis=1) / jnp.maximum(jnp.sum(reads, axis=1, dtype=jnp.float32), 1)
    mine = document[:, at]
    pairs = (mine[:, :, None] == mine[:, None]) & (mine >= 0)[:, :, None] & (worth[:, :, None] > worth[:, None])
    score = score[:, at]
    loss = jax.nn.softplus(score[:, None] - score[:, :, None])
    return Mean(jnp.sum(jnp.where(pairs, loss, 0)), jnp.sum(pairs, dtype=jnp.float32))


def _float32_compute(precision: Precision) -> Precision:
    """Scores are float32: rounding would choose other tokens."""
    return precision._replace(compute=jnp.float32)
