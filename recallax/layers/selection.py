"""Selectors: which tokens of the past sparse global attention reads besides its window.

    TokenScore     score_j = w.x_j                                          gradient: through the attention's logits
    AskedTokens    score_bj = (W_a x_b).(W_o x_j) / sqrt(R)                 the same; b: first token of a block
    KeyScore       score_j = f([k_j ; m_j / |m_j|]),  m_j = sum_{i<=j} q_i  gradient: of a ranking loss alone

A score of `TokenScore` and `KeyScore` depends on the token and what lies before it, so what leaves the best never comes
back; `AskedTokens` chooses per block and needs every token at hand.

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

from recallax.config import Config, ConfigError
from recallax.layers.base import State
from recallax.layers.dense import Linear
from recallax.layers.norm import unit
from recallax.pallas_kernels.chunking import documents
from recallax.pallas_kernels.selective_scan import selective_scan
from recallax.types import Aux, Mean, Precision, SeqInfo


class Wanted(NamedTuple):
    """What `sparse_global_attention` chooses by."""

    offer: Float[Array, "B T R"]
    ask: Float[Array, "B T R"] | None


class Selector(nnx.Module, abc.ABC):
    """Scores of tokens, in float32."""

    offers: int
    """R."""
    asks: bool
    """Whether scores depend on who asks."""
    weighed: bool
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
    ) -> tuple[Wanted, State, Aux]:
        """Scores of T further tokens; queries and keys without positions."""


class SelectorConfig(Config, abc.ABC):
    """A config that is the constructor of its selector."""

    @abc.abstractmethod
    def build(self, d_model: int, queries: int, keys: int, *, precision: Precision, rngs: nnx.Rngs) -> Selector:
        """The module; `queries` and `keys` are the widths of all heads together."""


@dataclass(frozen=True, kw_only=True)
class TokenScore(SelectorConfig):
    """One score per token, linear in its input."""

    def build(self, d_model: int, queries: int, keys: int, *, precision: Precision, rngs: nnx.Rngs) -> Selector:
        return TokenScorer(d_model, precision=precision, rngs=rngs)


class TokenScorer(Selector):
    """See the head of the file."""

    offers, asks, weighed = 1, False, True

    def __init__(self, d_model: int, *, precision: Precision, rngs: nnx.Rngs):
        self.score = Linear(d_model, 1, precision=_exact(precision), rngs=rngs, axes=("embed", None))

    def __call__(
        self,
        x: Float[Array, "B T D"],
        q: Float[Array, "B T H K"],
        k: Float[Array, "B T G K"],
        seq: SeqInfo,
        state: State,
    ) -> tuple[Wanted, State, Aux]:
        return Wanted(self.score(x), None), state, {}


@dataclass(frozen=True, kw_only=True)
class AskedTokens(SelectorConfig):
    """A score per block and token."""

    width: int = 64
    """R: width of what a block asks with and a token offers."""

    def __post_init__(self) -> None:
        if self.width < 1:
            raise ConfigError(f"width is {self.width}; what blocks ask with must be at least 1 wide")

    def build(self, d_model: int, queries: int, keys: int, *, precision: Precision, rngs: nnx.Rngs) -> Selector:
        return Asker(d_model, self.width, precision=precision, rngs=rngs)


class Asker(Selector):
    """See the head of the file."""

    asks, weighed = True, True

    def __init__(self, d_model: int, width: int, *, precision: Precision, rngs: nnx.Rngs):
        self.offers = width
        self.offer, self.ask = (
            Linear(d_model, width, precision=_exact(precision), rngs=rngs, axes=("embed", None)) for _ in range(2)
        )

    def __call__(
        self,
        x: Float[Array, "B T D"],
        q: Float[Array, "B T H K"],
        k: Float[Array, "B T G K"],
        seq: SeqInfo,
        state: State,
    ) -> tuple[Wanted, State, Aux]:
        return Wanted(self.offer(x), self.ask(x) * self.offers**-0.5), state, {}


@dataclass(frozen=True, kw_only=True)
class KeyScore(SelectorConfig):
    """The key selection of HAX."""

    hidden: int = 64
    """Width of the perceptron's two inner layers."""
    sampled: int = 64
    """Keys that the ranking loss puts in order."""
    weight: float = 0.1
    """Coefficient of the ranking loss, which enters the loss as `key_ranking` with this factor in it."""

    def __post_init__(self) -> None:
        for name in ("hidden", "sampled"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 1")

    def build(self, d_model: int, queries: int, keys: int, *, precision: Precision, rngs: nnx.Rngs) -> Selector:
        return KeyScorer(self, queries, keys, precision=precision, rngs=rngs)


class KeyScorer(Selector):
    """See the head of the file. State: the sum of queries, one float32 per channel."""

    offers, asks, weighed = 1, False, False

    def __init__(self, config: KeyScore, queries: int, keys: int, *, precision: Precision, rngs: nnx.Rngs):
        self.queries, self.sampled, self.weight = queries, config.sampled, config.weight
        widths = (queries + keys, config.hidden, config.hidden, 1)
        self.layers = nnx.List(
            Linear(a, b, precision=_exact(precision), rngs=rngs, std=a**-0.5, bias=True, axes=(None, None))
            for a, b in itertools.pairwise(widths)
        )

    def init_state(self, batch: int) -> State:
        return jnp.zeros((batch, self.queries, 1), jnp.float32)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        q: Float[Array, "B T H K"],
        k: Float[Array, "B T G K"],
        seq: SeqInfo,
        state: State,
    ) -> tuple[Wanted, State, Aux]:
        q, k = (jax.lax.stop_gradient(part.astype(jnp.float32)) for part in (q, k))
        flat_q, flat_k = (part.reshape(*part.shape[:2], -1) for part in (q, k))
        total, state = selective_scan(flat_q, jnp.zeros_like(flat_q), state=state, segments=jnp.asarray(seq.segments))
        h = jnp.concatenate([flat_k, unit(total)], axis=-1)
        for layer in self.layers[:-1]:
            h = jax.nn.relu(layer(h))
        score = self.layers[-1](h)
        loss = ranking(score[..., 0], q, k, seq, self.sampled)
        return Wanted(score, None), state, {"key_ranking": Mean(self.weight * loss.total, loss.weight)}


def ranking(
    score: Float[Array, "B T"], q: Float[Array, "B T H K"], k: Float[Array, "B T G K"], seq: SeqInfo, sampled: int
) -> Mean:
    """How badly scores order keys: over pairs of one document's keys, -log sigmoid(better score - worse score).

    A key is as good as the mean of sigmoid(q.k / sqrt(K)) over heads and the queries from it to its document's end.
    """
    docs, length = documents(jnp.asarray(seq.segments)), q.shape[1]
    at = jnp.arange(0, length, -(-length // sampled))
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


def _exact(precision: Precision) -> Precision:
    """Scores are float32: rounding would choose other tokens."""
    return precision._replace(compute=jnp.float32)
