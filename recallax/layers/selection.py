"""Selectors, which score the tokens that sparse global attention reads in addition to its window.

    TokenScore               score_j = w.x_j                               gradient: from the attention's logits
    QueryDependentSelector   score_bj = (W_q x_b).(W_k x_j) / sqrt(R)      the same; x_b: first token of query block b
    KeyScore                 score_j = f([k_j ; m_j / |m_j|]),  m_j = sum_{i<=j} q_i      from a ranking loss only

A score of `TokenScore` or `KeyScore` depends only on the token and earlier ones, so a token that has left the top k
never returns to it. `QueryDependentSelector` scores tokens per block of queries and needs a cache of all tokens.

`KeyScore` is the key selection of HAX: f is a ReLU perceptron with three layers on detached keys and queries. A
pairwise logistic loss over 64 keys trains it to rank keys by the mean of sigmoid(q.k) over later queries. HAX takes the
sum over all queries, which prefers early keys; here it is the mean over the queries from the key on. HAX samples random
keys; here they are every n-th one, so that the loss is a function of the batch. HAX normalizes over the sequence, which
leaks future tokens; here the sum m_j is normalized over its channels.

Sources: TokenScore and QueryDependentSelector are our own, since Hydra (arXiv 2508.15099) does not specify its
controller; scores per block resemble DeepSeek's indexer (arXiv 2512.02556). HAX: arXiv 2507.00449, section 4, and code.
"""

import abc
import itertools
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from recallax.config import Config, require_at_least
from recallax.layers.base import State
from recallax.layers.dense import Linear
from recallax.layers.norm import l2_normalize
from recallax.pallas_kernels.chunking import index_documents
from recallax.pallas_kernels.selective_scan import selective_scan
from recallax.types import Aux, Mean, Precision, SeqInfo


class SelectorInputs(NamedTuple):
    """Tokens of an attention layer that a selector scores."""

    x: Float[Array, "B T D"]
    """Inputs of the layer."""
    q: Float[Array, "B T H K"]
    """Queries before the rotary embedding."""
    k: Float[Array, "B T G K"]
    """Keys before the rotary embedding."""
    seq: SeqInfo
    """Positions and documents of the tokens."""


class SelectionScores(NamedTuple):
    """Factors of the scores by which `sparse_global_attention` selects tokens, float32."""

    key: Float[Array, "B T R"]
    """Factor of the token that is scored; without `query` the score is its sum."""
    query: Float[Array, "B T R"] | None
    """Factor of the query block's first token; None: the score does not depend on the query."""


class Selector(nnx.Module, abc.ABC):
    """Base class of modules that score tokens, in float32."""

    score_dim: int
    """R: width of the factors of a score."""
    query_dependent: bool
    """True if scores depend on the block of queries."""
    bias_logits: bool
    """True if log sigmoid(score) is added to the attention's logits."""

    def init_state(self, batch: int) -> State:
        """Create the selector's state of `batch` rows; `()` unless a subclass overrides it."""
        return ()

    @abc.abstractmethod
    def __call__(self, inputs: SelectorInputs, state: State) -> tuple[SelectionScores, State, Aux]:
        """Score T further tokens.

        Args:
            inputs: The tokens.
            state: The selector's state.

        Returns:
            Scores, the new state, and auxiliary losses.
        """


class SelectorConfig(Config, abc.ABC):
    """A config that builds its selector."""

    @abc.abstractmethod
    def build(self, d_model: int, query_dim: int, key_dim: int, *, precision: Precision, rngs: nnx.Rngs) -> Selector:
        """Build the module.

        Args:
            d_model: Width of the model.
            query_dim: Width of the queries of all heads together.
            key_dim: Width of the keys of all heads together.
            precision: Dtypes of parameters and activations.
            rngs: Source of the initial parameters.

        Returns:
            The selector.
        """


@dataclass(frozen=True, kw_only=True)
class TokenScore(SelectorConfig):
    """One score per token, a linear function of its input."""

    def build(self, d_model: int, query_dim: int, key_dim: int, *, precision: Precision, rngs: nnx.Rngs) -> Selector:
        return TokenScorer(d_model, precision=precision, rngs=rngs)


class TokenScorer(Selector):
    """Scores score_j = w.x_j."""

    score_dim, query_dependent, bias_logits = 1, False, True

    def __init__(self, d_model: int, *, precision: Precision, rngs: nnx.Rngs):
        self.score = Linear(d_model, 1, precision=_float32_compute(precision), rngs=rngs, axes=("embed", None))

    def __call__(self, inputs: SelectorInputs, state: State) -> tuple[SelectionScores, State, Aux]:
        return SelectionScores(self.score(inputs.x), None), state, {}


@dataclass(frozen=True, kw_only=True)
class QueryDependentSelector(SelectorConfig):
    """One score per token and block of queries, a product of two projections."""

    score_dim: int = 64
    """R: width of the projections."""

    def __post_init__(self) -> None:
        require_at_least(1, score_dim=self.score_dim)

    def build(self, d_model: int, query_dim: int, key_dim: int, *, precision: Precision, rngs: nnx.Rngs) -> Selector:
        return QueryDependentScorer(d_model, self.score_dim, precision=precision, rngs=rngs)


class QueryDependentScorer(Selector):
    """Scores score_bj = (W_q x_b).(W_k x_j) / sqrt(R)."""

    query_dependent, bias_logits = True, True

    def __init__(self, d_model: int, score_dim: int, *, precision: Precision, rngs: nnx.Rngs):
        self.score_dim = score_dim
        self.offer, self.ask = (
            Linear(d_model, score_dim, precision=_float32_compute(precision), rngs=rngs, axes=("embed", None))
            for _ in range(2)
        )

    def __call__(self, inputs: SelectorInputs, state: State) -> tuple[SelectionScores, State, Aux]:
        return SelectionScores(self.offer(inputs.x), self.ask(inputs.x) * self.score_dim**-0.5), state, {}


@dataclass(frozen=True, kw_only=True)
class KeyScore(SelectorConfig):
    """One score per token from a perceptron on keys, trained by a ranking loss (HAX)."""

    hidden_size: int = 64
    """Width of the perceptron's two hidden layers."""
    num_sampled_keys: int = 64
    """Largest number of keys per row in the ranking loss."""
    ranking_loss_weight: float = 0.1
    """Coefficient of the ranking loss; it is included in the loss term `key_ranking`."""

    def __post_init__(self) -> None:
        require_at_least(1, hidden_size=self.hidden_size, num_sampled_keys=self.num_sampled_keys)

    def build(self, d_model: int, query_dim: int, key_dim: int, *, precision: Precision, rngs: nnx.Rngs) -> Selector:
        return KeyScorer(self, query_dim, key_dim, precision=precision, rngs=rngs)


class KeyScorer(Selector):
    """Perceptron on keys and the normalized running sum of queries; the state is that sum in float32."""

    score_dim, query_dependent, bias_logits = 1, False, False

    def __init__(self, config: KeyScore, query_dim: int, key_dim: int, *, precision: Precision, rngs: nnx.Rngs):
        self.query_dim, self.num_sampled_keys = query_dim, config.num_sampled_keys
        self.ranking_loss_weight = config.ranking_loss_weight
        widths = (query_dim + key_dim, config.hidden_size, config.hidden_size, 1)
        self.layers = nnx.List(
            Linear(a, b, precision=_float32_compute(precision), rngs=rngs, std=a**-0.5, bias=True, axes=(None, None))
            for a, b in itertools.pairwise(widths)
        )

    def init_state(self, batch: int) -> State:
        return jnp.zeros((batch, self.query_dim, 1), jnp.float32)

    def __call__(self, inputs: SelectorInputs, state: State) -> tuple[SelectionScores, State, Aux]:
        seq = inputs.seq
        q, k = (jax.lax.stop_gradient(part.astype(jnp.float32)) for part in (inputs.q, inputs.k))
        flat_q, flat_k = (part.reshape(*part.shape[:2], -1) for part in (q, k))
        query_sum, state = selective_scan(
            flat_q, jnp.zeros_like(flat_q), state=state, segment_ids=jnp.asarray(seq.segment_ids)
        )
        h = jnp.concatenate([flat_k, l2_normalize(query_sum)], axis=-1)
        for layer in self.layers[:-1]:
            h = jax.nn.relu(layer(h))
        score = self.layers[-1](h)
        loss = ranking_loss(score[..., 0], q, k, seq, self.num_sampled_keys)
        aux = {"key_ranking": Mean(self.ranking_loss_weight * loss.total, loss.weight)}
        return SelectionScores(score, None), state, aux


def ranking_loss(
    score: Float[Array, "B T"],
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T G K"],
    seq: SeqInfo,
    num_sampled_keys: int,
) -> Mean:
    """Compute the pairwise logistic ranking loss of scores.

    The target of a key is the mean of sigmoid(q.k / sqrt(K)) over heads and over the queries from the key to the end of
    its document. The loss of a pair of keys of one document is -log sigmoid(score of the better - score of the worse).

    Args:
        score: Scores of the keys.
        q: Queries before the rotary embedding.
        k: Keys before the rotary embedding.
        seq: Documents of the tokens.
        num_sampled_keys: Largest number of keys per row; every n-th key is used.

    Returns:
        The mean over pairs.
    """
    docs, length = index_documents(jnp.asarray(seq.segment_ids)), q.shape[1]
    sampled = jnp.arange(0, length, -(-length // num_sampled_keys))
    groups, document = k.shape[2], jnp.where(docs.valid, docs.index, -1)
    k = jnp.repeat(k[:, sampled], q.shape[2] // groups, axis=2)
    affinity = jax.nn.sigmoid(jnp.einsum("bthk,bnhk->btnh", q, k) * q.shape[-1] ** -0.5).mean(axis=-1)
    reads = document[:, :, None] == document[:, None, sampled]
    reads &= (jnp.arange(length)[:, None] >= sampled[None])[None]
    num_reads = jnp.sum(reads, axis=1, dtype=jnp.float32)
    target = jnp.sum(jnp.where(reads, affinity, 0), axis=1) / jnp.maximum(num_reads, 1)
    key_document = document[:, sampled]
    pairs = (key_document[:, :, None] == key_document[:, None]) & (key_document >= 0)[:, :, None]
    pairs &= target[:, :, None] > target[:, None]
    score = score[:, sampled]
    loss = jax.nn.softplus(score[:, None] - score[:, :, None])
    return Mean(jnp.sum(jnp.where(pairs, loss, 0)), jnp.sum(pairs, dtype=jnp.float32))


def _float32_compute(precision: Precision) -> Precision:
    """Set the compute dtype to float32, because rounded scores would select other tokens."""
    return precision._replace(compute=jnp.float32)
