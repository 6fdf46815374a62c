"""Mixture of experts that is routed once per chunk: SwiGLU perceptrons of which every token passes k of E.

    l_t = x_s(t) W_r,   g_t = softmax over the k largest of l_t
    y_t = sum_e g_te W_out,e [ silu(W_gate,e x_t) * W_up,e x_t ]

    route            s(t), what chunk c of a document is routed by
    first token      its own first token, which the mixers before have told of all that came earlier
    previous chunk   the mean of l over chunk c - 1; learned logits in a document's first chunk
    token            each token by itself: the upper bound that chunks are compared with

Hydra routes by the mean over the chunk itself, which tells its first tokens of its last ones. Dispatch is exact: every
chosen expert is computed, whatever the load (`layers/dispatch.py`; XLA's CPU form multiplies by all experts).

Losses, with their coefficients in them: `expert_balance` (Switch, `layers/balance.py`), `expert_z`, the mean of
logsumexp(l)^2. With `bias_rate` experts are chosen by softmax(l) + b, where b moves by the rate towards experts that
got less than their share, once per training batch; weights know nothing of b. Diagnostics: the entropy of the mean of
softmax(l) over the batch (at most ln E) and the mean of its entropy, the deviation of the experts' shares of tokens,
and the share of chunks whose first choice is the chunk's before.

State: the logits that the unfinished chunk is routed by, and for `previous chunk` their sum over it; `token` has none.
Sources: Hydra (arXiv 2508.15099); Fedus et al. 2021 (arXiv 2101.03961), equation 4; z-loss: Zoph et al. 2022 (arXiv
2202.08906), equation 5; the bias: Wang et al. 2024 (arXiv 2408.15664), algorithm 1.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from recallax.config import ConfigError
from recallax.layers import balance
from recallax.layers.base import MixerConfig, RecurrentMixer, Site, Statistic
from recallax.layers.continuation import continued, started
from recallax.layers.dense import parameter, residual_std
from recallax.layers.dispatch import by_memory, dispatch, to_slots
from recallax.pallas_kernels.chunking import documents, last_valid
from recallax.pallas_kernels.grid import rows_at
from recallax.pallas_kernels.product import grouped_product
from recallax.pallas_kernels.selective_scan import selective_scan
from recallax.types import DIAGNOSTIC, Aux, Mean, Precision, SeqInfo, StepInfo

type Route = Literal["first token", "previous chunk", "token"]
FORGET = -1e30
"""Log-decay after which nothing is left of a sum."""


@dataclass(frozen=True, kw_only=True)
class ChunkExperts(MixerConfig):
    """See the head of the file."""

    experts: int = 8
    top_k: int = 2
    inner: int = 1248
    """Inner width of each expert."""
    route: Route = "first token"
    chunk: int = 64
    """Tokens of a document that are routed together; nothing for `token`."""
    weights: Literal["renormalised", "softmax"] = "renormalised"
    """`softmax` keeps the chosen probabilities as they are, which gives the router a gradient with top_k = 1."""
    balance_weight: float = 1e-2
    z_weight: float = 1e-3
    bias_rate: float = 0.0
    """How far the bias of a choice moves per batch (DeepSeek-V3 has 1e-3); 0 is no bias."""

    def __post_init__(self) -> None:
        if not 1 <= self.top_k <= self.experts:
            raise ConfigError(f"top_k is {self.top_k}; it must be from 1 to experts = {self.experts}")
        for name in ("inner", "chunk"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("balance_weight", "z_weight", "bias_rate"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 0")

    def build(self, d_model: int, site: Site, *, precision: Precision, rngs: nnx.Rngs) -> "ChunkExpertsMixer":
        return ChunkExpertsMixer(self, d_model, site, precision=precision, rngs=rngs)


class ChunkState(NamedTuple):
    """See the head of the file; None where a route does not need it."""

    logits: Float[Array, "B E"] | None
    total: Float[Array, "B E 1"] | None


class Routing(NamedTuple):
    """Where each token goes."""

    logits: Float[Array, "B T E"]
    chosen: Int[Array, "B T S"]
    weights: Float[Array, "B T S"]


class ChunkExpertsMixer(RecurrentMixer):
    """See the head of the file."""

    def __init__(self, config: ChunkExperts, d_model: int, site: Site, *, precision: Precision, rngs: nnx.Rngs):
        self.experts, self.top_k, self.chunk = config.experts, config.top_k, config.chunk
        self.by: Route = config.route
        self.renormalised = config.weights == "renormalised"
        self.balance_weight, self.z_weight, self.rate = config.balance_weight, config.z_weight, config.bias_rate
        self.dtype = precision.compute

        def drawn(std: float, *shape: int) -> Array:
            return std * jax.random.normal(rngs.params(), shape, precision.param)

        self.router = parameter(drawn(0.02, d_model, self.experts), ("embed", None))
        start = jnp.zeros(self.experts, precision.param)
        self.start = parameter(start, (None,), decay=False) if config.route == "previous chunk" else None
        up = drawn(0.02, self.experts, d_model, 2 * config.inner)
        out = drawn(1.0, self.experts, config.inner, d_model) * residual_std(site.depth)
        share = self.top_k / self.experts
        self.up = parameter(up, (None, "embed", "mlp"), active=share)
        self.out = parameter(out, (None, "mlp", "embed"), active=share)
        self.bias = Statistic(jnp.zeros(self.experts, jnp.float32)) if config.bias_rate else None

    def __call__(self, x: Float[Array, "B T D"], seq: SeqInfo) -> tuple[Float[Array, "B T D"], Aux]:
        logits, _ = self._in_force(x, seq, None)
        routing = self._chosen(logits)
        valid = jnp.asarray(seq.segments) > 0
        if self.bias is not None and seq.key is not None:
            self.bias[...] = self.bias[...] + self.rate * jnp.sign(self.top_k / self.experts - _usage(routing, valid))
        return self._experts(x, routing), self._aux(routing, seq, valid)

    def init_state(self, batch: int, max_len: int) -> ChunkState:
        if self.by == "token":
            return ChunkState(None, None)
        logits = jnp.zeros((batch, self.experts), jnp.float32)
        return ChunkState(logits, logits[..., None] if self.by == "previous chunk" else None)

    def prefill(
        self, x: Float[Array, "B T D"], seq: SeqInfo, state: ChunkState
    ) -> tuple[Float[Array, "B T D"], ChunkState, Aux]:
        logits, state = self._in_force(x, seq, continued(state, seq))
        routing = self._chosen(logits)
        return self._experts(x, routing), state, self._aux(routing, seq, jnp.asarray(seq.segments) > 0)

    def step(self, x: Float[Array, "B D"], info: StepInfo, state: ChunkState) -> tuple[Float[Array, "B D"], ChunkState]:
        active, position = jnp.asarray(info.active), jnp.asarray(info.position)[:, None]
        seq = SeqInfo(position, active.astype(jnp.int32)[:, None], jnp.zeros(position.shape, bool))
        logits, state = self._in_force(x[:, None], seq, started(state, info))
        y = self._experts(x[:, None], self._chosen(logits))[:, 0]
        return jnp.where(active[:, None], y, 0), state

    def _in_force(
        self, x: Float[Array, "B T D"], seq: SeqInfo, state: ChunkState | None
    ) -> tuple[Float[Array, "B T E"], ChunkState]:
        """The logits that each token is routed by, in float32 whatever the compute dtype."""
        exact = jax.lax.Precision.HIGHEST
        own = jnp.matmul(x.astype(jnp.float32), self.router[...].astype(jnp.float32), precision=exact)
        if self.by == "token":
            return own, ChunkState(None, None)
        positions, segments = jnp.asarray(seq.positions), jnp.asarray(seq.segments)
        place = positions % self.chunk
        begin = jnp.arange(x.shape[1])[None] - place  # a document's tokens follow one another
        before = None if state is None else state.logits
        if self.by == "first token":
            logits, total = _at(own, begin, before), None
        else:
            rate = jnp.where(place == 0, FORGET, 0.0)[..., None]
            sums, total = selective_scan(
                own,
                jnp.broadcast_to(rate, own.shape),
                state=None if state is None else state.total,
                segments=segments,
            )
            if state is not None and state.total is not None and before is not None:
                whole = (begin[:, :1] == 0) & (positions[:, :1] > 0)  # the sum is that of the chunk before
                before = jnp.where(whole, state.total[..., 0] / self.chunk, before)
            logits = _at(sums / self.chunk, begin - 1, before)
            assert self.start is not None
            start = jnp.broadcast_to(self.start[...].astype(jnp.float32), logits.shape)
            logits = jnp.where((positions < self.chunk)[..., None], start, logits)
        last = last_valid(documents(segments))
        newest = rows_at(logits, jnp.maximum(last, 0)[:, None])[:, 0]
        if state is not None and state.logits is not None:
            newest = jnp.where((last >= 0)[:, None], newest, state.logits)
        return logits, ChunkState(newest, total)

    def _chosen(self, logits: Float[Array, "B T E"]) -> Routing:
        probabilities = jax.nn.softmax(logits, axis=-1)
        ranking = logits
        if self.bias is not None:
            ranking = probabilities + jnp.broadcast_to(self.bias[...], logits.shape)
        _, chosen = jax.lax.top_k(ranking, self.top_k)
        picked = jax.nn.one_hot(chosen, self.experts)  # a product with it has a gradient that scatters nothing
        weights = jnp.sum(picked * probabilities[..., None, :], axis=-1)
        if self.renormalised:
            weights /= jnp.sum(weights, axis=-1, keepdims=True)
        return Routing(logits, chosen, weights)

    def _experts(self, x: Float[Array, "B T D"], routing: Routing) -> Float[Array, "B T D"]:
        plan = dispatch(routing.chosen, jnp.ones(x.shape[:2], jnp.int32), self.experts)
        tokens = by_memory(x.astype(self.dtype), plan)
        inner = grouped_product(tokens, self.up[...].astype(self.dtype), plan.sizes).astype(self.dtype)
        gate, up = jnp.split(inner, 2, axis=-1)
        y = grouped_product(jax.nn.silu(gate) * up, self.out[...].astype(self.dtype), plan.sizes)
        y = to_slots(y, plan, x.shape[0], self.top_k)
        return jnp.sum(y * routing.weights[..., None], axis=2).astype(self.dtype)

    def _aux(self, routing: Routing, seq: SeqInfo, valid: Bool[Array, "B T"]) -> Aux:
        count = jnp.sum(valid, dtype=jnp.float32)
        z = jnp.sum(jnp.where(valid, jax.nn.logsumexp(routing.logits, axis=-1) ** 2, 0))
        even = balance.switch(routing.logits, routing.chosen, valid)
        losses = {
            "expert_balance": Mean(self.balance_weight * even, jnp.ones(())),
            "expert_z": Mean(self.z_weight * z, count),
        }
        probabilities = jax.lax.stop_gradient(jax.nn.softmax(routing.logits, axis=-1))
        mean = jnp.sum(jnp.where(valid[..., None], probabilities, 0), axis=(0, 1)) / jnp.maximum(count, 1)
        entropy = jnp.sum(jnp.where(valid, _entropy(probabilities), 0))
        usage = _usage(routing, valid) / self.top_k
        begins = valid[:, 1:] & (jnp.asarray(seq.positions)[:, 1:] % (1 if self.by == "token" else self.chunk) == 0)
        begins &= jnp.asarray(seq.positions)[:, 1:] > 0
        first = routing.chosen[..., 0]
        same = jnp.sum(begins & (first[:, 1:] == first[:, :-1]), dtype=jnp.float32)
        diagnostics = {
            "expert_entropy": Mean(_entropy(mean), jnp.ones(())),
            "expert_token_entropy": Mean(entropy, count),
            "expert_usage_deviation": Mean(jnp.std(usage), jnp.ones(())),
            "expert_repeats": Mean(same, jnp.sum(begins, dtype=jnp.float32)),
        }
        return losses | {DIAGNOSTIC + name: mean for name, mean in diagnostics.items()}


def _at(
    logits: Float[Array, "B T E"], index: Int[Array, "B T"], before: Float[Array, "B E"] | None
) -> Float[Array, "B T E"]:
    """logits[b, index[b, t]]; `before` where the index lies before the row."""
    found = rows_at(logits, jnp.maximum(index, 0))
    return found if before is None else jnp.where((index < 0)[..., None], before[:, None], found)


def _usage(routing: Routing, valid: Bool[Array, "B T"]) -> Float[Array, " E"]:
    """Share of the tokens that choose each expert; the shares sum to k."""
    experts = routing.logits.shape[-1]
    hits = jnp.sum(jax.nn.one_hot(routing.chosen, experts), axis=2) * valid[..., None].astype(jnp.float32)
    return jnp.sum(hits, axis=(0, 1)) / jnp.maximum(jnp.sum(valid, dtype=jnp.float32), 1)


def _entropy(p: Float[Array, "... E"]) -> Float[Array, "..."]:
    """In nats."""
    return -jnp.sum(p * jnp.log(jnp.maximum(p, 1e-30)), axis=-1)
