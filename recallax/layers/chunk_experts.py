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
logsumexp(l)^2. With `bias_update_rate` experts are chosen by softmax(l) + b, where b moves by the rate towards experts that
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

from recallax.config import ConfigError, require_at_least
from recallax.layers import load_balancing_loss
from recallax.layers.base import LayerInfo, MixerConfig, RecurrentMixer, Statistic
from recallax.layers.dense import parameter, residual_std
from recallax.layers.memory_routing import permute, plan_routing, unpermute_to_slots
from recallax.layers.state_reset import reset_for_prefill, reset_for_step
from recallax.pallas_kernels.chunking import index_documents, last_valid
from recallax.pallas_kernels.einsum_f32 import ragged_dot_f32
from recallax.pallas_kernels.grid import gather_tokens
from recallax.pallas_kernels.selective_scan import selective_scan
from recallax.types import DIAGNOSTIC_PREFIX, Aux, Mean, Precision, SeqInfo, StepInfo

type Route = Literal["first_token", "previous_chunk", "token"]
RESET_LOG_DECAY = -1e30
"""Log-decay after which nothing is left of a sum."""


@dataclass(frozen=True, kw_only=True)
class ChunkExperts(MixerConfig):
    """See the head of the file."""

    num_experts: int = 8
    top_k: int = 2
    intermediate_size: int = 1248
    """Inner width of each expert."""
    route: Route = "first_token"
    chunk_size: int = 64
    """Tokens of a document that are routed together; nothing for `token`."""
    norm_topk_prob: bool = True
    """Divide the selected probabilities by their sum. False keeps them, which gives the router a gradient with top_k = 1."""
    load_balance_loss_weight: float = 1e-2
    router_z_loss_weight: float = 1e-3
    bias_update_rate: float = 0.0
    """How far the bias of a choice moves per batch (DeepSeek-V3 has 1e-3); 0 is no bias."""

    def __post_init__(self) -> None:
        if not 1 <= self.top_k <= self.num_experts:
            raise ConfigError(f"top_k is {self.top_k}; it must be from 1 to experts = {self.num_experts}")
        require_at_least(1, intermediate_size=self.intermediate_size, chunk_size=self.chunk_size)
        require_at_least(0, load_balance_loss_weight=self.load_balance_loss_weight)
        require_at_least(0, router_z_loss_weight=self.router_z_loss_weight, bias_update_rate=self.bias_update_rate)

    def build(self, d_model: int, layer: LayerInfo, *, precision: Precision, rngs: nnx.Rngs) -> "ChunkExpertsMixer":
        return ChunkExpertsMixer(self, d_model, layer, precision=precision, rngs=rngs)


class ChunkExpertsState(NamedTuple):
    """See the head of the file; None where a route does not need it."""

    logits: Float[Array, "B E"] | None
    logits_sum: Float[Array, "B E 1"] | None


class ExpertRouting(NamedTuple):
    """Where each token goes."""

    logits: Float[Array, "B T E"]
    indices: Int[Array, "B T S"]
    weights: Float[Array, "B T S"]


class ChunkExpertsMixer(RecurrentMixer):
    """See the head of the file."""

    def __init__(self, config: ChunkExperts, d_model: int, layer: LayerInfo, *, precision: Precision, rngs: nnx.Rngs):
        self.num_experts, self.top_k, self.chunk_size = config.num_experts, config.top_k, config.chunk_size
        self.route: Route = config.route
        self.norm_topk_prob = config.norm_topk_prob
        self.load_balance_loss_weight, self.router_z_loss_weight, self.bias_update_rate = (
            config.load_balance_loss_weight,
            config.router_z_loss_weight,
            config.bias_update_rate,
        )
        self.dtype = precision.compute

        def drawn(std: float, *shape: int) -> Array:
            return std * jax.random.normal(rngs.params(), shape, precision.param)

        self.router = parameter(drawn(0.02, d_model, self.num_experts), ("embed", None))
        start = jnp.zeros(self.num_experts, precision.param)
        self.start = parameter(start, (None,), weight_decay=False) if config.route == "previous_chunk" else None
        up = drawn(0.02, self.num_experts, d_model, 2 * config.intermediate_size)
        out = drawn(1.0, self.num_experts, config.intermediate_size, d_model) * residual_std(layer.num_layers)
        share = self.top_k / self.num_experts
        self.up = parameter(up, (None, "embed", "mlp"), active_fraction=share)
        self.out = parameter(out, (None, "mlp", "embed"), active_fraction=share)
        self.bias = Statistic(jnp.zeros(self.num_experts, jnp.float32)) if config.bias_update_rate else None

    def __call__(self, x: Float[Array, "B T D"], seq: SeqInfo) -> tuple[Float[Array, "B T D"], Aux]:
        logits, _ = self._routing_logits(x, seq, None)
        routing = self._select_experts(logits)
        valid = jnp.asarray(seq.segment_ids) > 0
        if self.bias is not None and seq.key is not None:
            self.bias[...] = self.bias[...] + self.bias_update_rate * jnp.sign(
                self.top_k / self.num_experts - _expert_usage(routing, valid)
            )
        return self._apply_experts(x, routing), self._aux(routing, seq, valid)

    def init_state(self, batch: int, max_len: int) -> ChunkExpertsState:
        if self.route == "token":
            return ChunkExpertsState(None, None)
        logits = jnp.zeros((batch, self.num_experts), jnp.float32)
        return ChunkExpertsState(logits, logits[..., None] if self.route == "previous_chunk" else None)

    def prefill(
        self, x: Float[Array, "B T D"], seq: SeqInfo, state: ChunkExpertsState
    ) -> tuple[Float[Array, "B T D"], ChunkExpertsState, Aux]:
        logits, state = self._routing_logits(x, seq, reset_for_prefill(state, seq))
        routing = self._select_experts(logits)
        return self._apply_experts(x, routing), state, self._aux(routing, seq, jnp.asarray(seq.segment_ids) > 0)

    def step(
        self, x: Float[Array, "B D"], info: StepInfo, state: ChunkExpertsState
    ) -> tuple[Float[Array, "B D"], ChunkExpertsState]:
        active, position = jnp.asarray(info.active), jnp.asarray(info.position)[:, None]
        seq = SeqInfo(position, active.astype(jnp.int32)[:, None], jnp.zeros(position.shape, bool))
        logits, state = self._routing_logits(x[:, None], seq, reset_for_step(state, info))
        y = self._apply_experts(x[:, None], self._select_experts(logits))[:, 0]
        return jnp.where(active[:, None], y, 0), state

    def _routing_logits(
        self, x: Float[Array, "B T D"], seq: SeqInfo, state: ChunkExpertsState | None
    ) -> tuple[Float[Array, "B T E"], ChunkExpertsState]:
        """The logits that each token is routed by, in float32 whatever the compute dtype."""
        exact = jax.lax.Precision.HIGHEST
        own = jnp.matmul(x.astype(jnp.float32), self.router[...].astype(jnp.float32), precision=exact)
        if self.route == "token":
            return own, ChunkExpertsState(None, None)
        positions, segments = jnp.asarray(seq.positions), jnp.asarray(seq.segment_ids)
        place = positions % self.chunk_size
        begin = jnp.arange(x.shape[1])[None] - place  # a document's tokens follow one another
        before = None if state is None else state.logits
        if self.route == "first_token":
            logits, total = _gather_logits(own, begin, before), None
        else:
            rate = jnp.where(place == 0, RESET_LOG_DECAY, 0.0)[..., None]
            sums, total = selective_scan(
                own,
                jnp.broadcast_to(rate, own.shape),
                state=None if state is None else state.logits_sum,
                segment_ids=segments,
            )
            if state is not None and state.logits_sum is not None and before is not None:
                whole = (begin[:, :1] == 0) & (positions[:, :1] > 0)  # the sum is that of the chunk before
                before = jnp.where(whole, state.logits_sum[..., 0] / self.chunk_size, before)
            logits = _gather_logits(sums / self.chunk_size, begin - 1, before)
            assert self.start is not None
            start = jnp.broadcast_to(self.start[...].astype(jnp.float32), logits.shape)
            logits = jnp.where((positions < self.chunk_size)[..., None], start, logits)
        last = last_valid(index_documents(segments))
        newest = gather_tokens(logits, jnp.maximum(last, 0)[:, None])[:, 0]
        if state is not None and state.logits is not None:
            newest = jnp.where((last >= 0)[:, None], newest, state.logits)
        return logits, ChunkExpertsState(newest, total)

    def _select_experts(self, logits: Float[Array, "B T E"]) -> ExpertRouting:
        probabilities = jax.nn.softmax(logits, axis=-1)
        ranking = logits
        if self.bias is not None:
            ranking = probabilities + jnp.broadcast_to(self.bias[...], logits.shape)
        _, chosen = jax.lax.top_k(ranking, self.top_k)
        picked = jax.nn.one_hot(chosen, self.num_experts)  # a product with it has a gradient that scatters nothing
        weights = jnp.sum(picked * probabilities[..., None, :], axis=-1)
        if self.norm_topk_prob:
            weights /= jnp.sum(weights, axis=-1, keepdims=True)
        return ExpertRouting(logits, chosen, weights)

    def _apply_experts(self, x: Float[Array, "B T D"], routing: ExpertRouting) -> Float[Array, "B T D"]:
        plan = plan_routing(routing.indices, jnp.ones(x.shape[:2], jnp.int32), self.num_experts)
        tokens = permute(x.astype(self.dtype), plan)
        inner = ragged_dot_f32(tokens, self.up[...].astype(self.dtype), plan.group_sizes).astype(self.dtype)
        gate, up = jnp.split(inner, 2, axis=-1)
        y = ragged_dot_f32(jax.nn.silu(gate) * up, self.out[...].astype(self.dtype), plan.group_sizes)
        y = unpermute_to_slots(y, plan, x.shape[0], self.top_k)
        return jnp.sum(y * routing.weights[..., None], axis=2).astype(self.dtype)

    def _aux(self, routing: ExpertRouting, seq: SeqInfo, valid: Bool[Array, "B T"]) -> Aux:
        count = jnp.sum(valid, dtype=jnp.float32)
        z = jnp.sum(jnp.where(valid, jax.nn.logsumexp(routing.logits, axis=-1) ** 2, 0))
        even = load_balancing_loss.switch_loss(routing.logits, routing.indices, valid)
        losses = {
            "expert_balance": Mean(self.load_balance_loss_weight * even, jnp.ones(())),
            "expert_z": Mean(self.router_z_loss_weight * z, count),
        }
        probabilities = jax.lax.stop_gradient(jax.nn.softmax(routing.logits, axis=-1))
        mean = jnp.sum(jnp.where(valid[..., None], probabilities, 0), axis=(0, 1)) / jnp.maximum(count, 1)
        entropy = jnp.sum(jnp.where(valid, _entropy(probabilities), 0))
        usage = _expert_usage(routing, valid) / self.top_k
        begins = valid[:, 1:] & (
            jnp.asarray(seq.positions)[:, 1:] % (1 if self.route == "token" else self.chunk_size) == 0
        )
        begins &= jnp.asarray(seq.positions)[:, 1:] > 0
        first = routing.indices[..., 0]
        same = jnp.sum(begins & (first[:, 1:] == first[:, :-1]), dtype=jnp.float32)
        diagnostics = {
            "expert_entropy": Mean(_entropy(mean), jnp.ones(())),
            "expert_token_entropy": Mean(entropy, count),
            "expert_usage_deviation": Mean(jnp.std(usage), jnp.ones(())),
            "expert_repeats": Mean(same, jnp.sum(begins, dtype=jnp.float32)),
        }
        return losses | {DIAGNOSTIC_PREFIX + name: mean for name, mean in diagnostics.items()}


def _gather_logits(
    logits: Float[Array, "B T E"], index: Int[Array, "B T"], before: Float[Array, "B E"] | None
) -> Float[Array, "B T E"]:
    """logits[b, index[b, t]]; `before` where the index lies before the row."""
    found = gather_tokens(logits, jnp.maximum(index, 0))
    return found if before is None else jnp.where((index < 0)[..., None], before[:, None], found)


def _expert_usage(routing: ExpertRouting, valid: Bool[Array, "B T"]) -> Float[Array, " E"]:
    """Share of the tokens that choose each expert; the shares sum to k."""
    experts = routing.logits.shape[-1]
    hits = jnp.sum(jax.nn.one_hot(routing.indices, experts), axis=2) * valid[..., None].astype(jnp.float32)
    return jnp.sum(hits, axis=(0, 1)) / jnp.maximum(jnp.sum(valid, dtype=jnp.float32), 1)


def _entropy(p: Float[Array, "... E"]) -> Float[Array, "..."]:
    """In nats."""
    return -jnp.sum(p * jnp.log(jnp.maximum(p, 1e-30)), axis=-1)
