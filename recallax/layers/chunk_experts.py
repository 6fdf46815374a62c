"""Mixture of experts with routing per chunk: each token is processed by k of E SwiGLU perceptrons.

    l_t = x_s(t) W_r,   g_t = softmax over the k largest of l_t
    y_t = sum_e g_te W_out,e [ silu(W_gate,e x_t) * W_up,e x_t ]

    route            s(t), the token whose router logits chunk c of a document uses
    first_token      the first token of the chunk; earlier mixers have given it information on all earlier tokens
    previous_chunk   the mean of l over chunk c - 1; learned logits in the first chunk of a document
    token            t itself: routing per token, an upper bound for routing per chunk

Hydra routes by the mean over the chunk itself, which leaks future tokens to the first ones. Dispatch is exact for any
load: all selected experts are computed (`recallax.layers.memory_routing`; on CPU, XLA multiplies by all experts).

Losses with their coefficients: `expert_balance`, the switch loss of `recallax.layers.load_balancing_loss`, and
`expert_z`, the mean of logsumexp(l)^2. With `bias_update_rate`, experts are selected by softmax(l) + b. After each
training batch b is increased by the rate for experts with less than their share of tokens, and decreased for the
others; the weights g do not depend on b. Diagnostics: the entropy of the mean over the batch of softmax(l) (at most
ln E), the mean of its entropy, the standard deviation of the experts' shares of tokens, and the fraction of chunks
whose first expert is that of the previous chunk.

State: the router logits of the unfinished chunk, and for `previous_chunk` the sum of its tokens' logits; `token` has no
state.
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
"""Log-decay that sets a running sum to 0."""
TINY = 1e-30
"""Lower bound of the argument of a logarithm."""


@dataclass(frozen=True, kw_only=True)
class ChunkExperts(MixerConfig):
    """Mixture of SwiGLU experts with routing per chunk (Hydra)."""

    num_experts: int = 8
    """E: number of experts."""
    top_k: int = 2
    """k: experts of each token."""
    intermediate_size: int = 1248
    """Hidden width of each expert."""
    route: Route = "first_token"
    """Source of a token's router logits."""
    chunk_size: int = 64
    """Tokens of a document that are routed together; not used by route "token"."""
    norm_topk_prob: bool = True
    """Divide the selected probabilities by their sum; with top_k = 1 the output then has no gradient to the router."""
    load_balance_loss_weight: float = 1e-2
    """Coefficient of the load-balancing loss."""
    router_z_loss_weight: float = 1e-3
    """Coefficient of the router's z-loss."""
    bias_update_rate: float = 0.0
    """Change of the selection bias per batch (DeepSeek-V3: 1e-3); 0: no bias."""

    def __post_init__(self) -> None:
        if not 1 <= self.top_k <= self.num_experts:
            raise ConfigError(f"top_k is {self.top_k}; it must be from 1 to num_experts = {self.num_experts}")
        require_at_least(1, intermediate_size=self.intermediate_size, chunk_size=self.chunk_size)
        require_at_least(
            0,
            load_balance_loss_weight=self.load_balance_loss_weight,
            router_z_loss_weight=self.router_z_loss_weight,
            bias_update_rate=self.bias_update_rate,
        )

    def build(self, d_model: int, layer: LayerInfo, *, precision: Precision, rngs: nnx.Rngs) -> "ChunkExpertsMixer":
        return ChunkExpertsMixer(self, d_model, layer, precision=precision, rngs=rngs)


class ChunkExpertsState(NamedTuple):
    """State of `ChunkExperts`, float32."""

    logits: Float[Array, "B E"] | None
    """Router logits of the unfinished chunk; None for route "token"."""
    logits_sum: Float[Array, "B E 1"] | None
    """Sum of the logits of the unfinished chunk's tokens; None except for route "previous_chunk"."""


class ExpertRouting(NamedTuple):
    """Experts of each token."""

    logits: Float[Array, "B T E"]
    """Router logits that the token uses, float32."""
    indices: Int[Array, "B T S"]
    """Selected experts, the one with the largest score first."""
    weights: Float[Array, "B T S"]
    """Weights of the experts' outputs, float32."""


class ChunkExpertsMixer(RecurrentMixer):
    """Router, experts with exact dispatch, auxiliary losses and diagnostics."""

    def __init__(self, config: ChunkExperts, d_model: int, layer: LayerInfo, *, precision: Precision, rngs: nnx.Rngs):
        self.num_experts, self.top_k, self.chunk_size = config.num_experts, config.top_k, config.chunk_size
        self.route: Route = config.route
        self.norm_topk_prob = config.norm_topk_prob
        self.load_balance_loss_weight = config.load_balance_loss_weight
        self.router_z_loss_weight = config.router_z_loss_weight
        self.bias_update_rate = config.bias_update_rate
        self.dtype = precision.compute

        def normal(std: float, *shape: int) -> Array:
            return std * jax.random.normal(rngs.params(), shape, precision.param)

        self.router = parameter(normal(0.02, d_model, self.num_experts), ("embed", None))
        first_logits = jnp.zeros(self.num_experts, precision.param)
        self.start = parameter(first_logits, (None,), weight_decay=False) if config.route == "previous_chunk" else None
        up = normal(0.02, self.num_experts, d_model, 2 * config.intermediate_size)
        out = normal(1.0, self.num_experts, config.intermediate_size, d_model) * residual_std(layer.num_layers)
        share = self.top_k / self.num_experts
        self.up = parameter(up, (None, "embed", "mlp"), active_fraction=share)
        self.out = parameter(out, (None, "mlp", "embed"), active_fraction=share)
        self.bias = Statistic(jnp.zeros(self.num_experts, jnp.float32)) if config.bias_update_rate else None

    def __call__(self, x: Float[Array, "B T D"], seq: SeqInfo) -> tuple[Float[Array, "B T D"], Aux]:
        logits, _ = self._routing_logits(x, seq, None)
        routing = self._select_experts(logits)
        valid = jnp.asarray(seq.segment_ids) > 0
        if self.bias is not None and seq.key is not None:  # there is a key in training only
            below_share = jnp.sign(self.top_k / self.num_experts - _expert_usage(routing, valid))
            self.bias[...] = self.bias[...] + self.bias_update_rate * below_share
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
        """Compute the router logits that each token uses, in float32 for any compute dtype."""
        exact = jax.lax.Precision.HIGHEST
        own = jnp.matmul(x.astype(jnp.float32), self.router[...].astype(jnp.float32), precision=exact)
        if self.route == "token":
            return own, ChunkExpertsState(None, None)
        positions, segment_ids = jnp.asarray(seq.positions), jnp.asarray(seq.segment_ids)
        chunk_start = jnp.arange(x.shape[1])[None] - positions % self.chunk_size
        if self.route == "first_token":
            logits, sums = _gather_logits(own, chunk_start, None if state is None else state.logits), None
        else:
            logits, sums = self._previous_chunk_logits(own, chunk_start, positions, segment_ids, state)
        last = last_valid(index_documents(segment_ids))
        last_logits = gather_tokens(logits, jnp.maximum(last, 0)[:, None])[:, 0]
        if state is not None and state.logits is not None:
            last_logits = jnp.where((last >= 0)[:, None], last_logits, state.logits)
        return logits, ChunkExpertsState(last_logits, sums)

    def _previous_chunk_logits(
        self,
        own: Float[Array, "B T E"],
        chunk_start: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"],
        state: ChunkExpertsState | None,
    ) -> tuple[Float[Array, "B T E"], Float[Array, "B E 1"]]:
        """Compute the mean logits of each token's previous chunk, and the sum over the unfinished chunk."""
        log_decay = jnp.where(positions % self.chunk_size == 0, RESET_LOG_DECAY, 0.0)[..., None]
        sums, last_sum = selective_scan(
            own,
            jnp.broadcast_to(log_decay, own.shape),
            state=None if state is None else state.logits_sum,
            segment_ids=segment_ids,
        )
        before = None if state is None else state.logits
        if state is not None and state.logits_sum is not None and before is not None:
            # The row starts with a new chunk: the sum in the state is that of its previous chunk.
            starts_chunk = (chunk_start[:, :1] == 0) & (positions[:, :1] > 0)
            before = jnp.where(starts_chunk, state.logits_sum[..., 0] / self.chunk_size, before)
        logits = _gather_logits(sums / self.chunk_size, chunk_start - 1, before)
        assert self.start is not None
        first_logits = jnp.broadcast_to(self.start[...].astype(jnp.float32), logits.shape)
        return jnp.where((positions < self.chunk_size)[..., None], first_logits, logits), last_sum

    def _select_experts(self, logits: Float[Array, "B T E"]) -> ExpertRouting:
        probabilities = jax.nn.softmax(logits, axis=-1)
        scores = logits
        if self.bias is not None:
            scores = probabilities + jnp.broadcast_to(self.bias[...], logits.shape)
        _, indices = jax.lax.top_k(scores, self.top_k)
        one_hot = jax.nn.one_hot(indices, self.num_experts)  # unlike a gather, its gradient has no scatter
        weights = jnp.sum(one_hot * probabilities[..., None, :], axis=-1)
        if self.norm_topk_prob:
            weights /= jnp.sum(weights, axis=-1, keepdims=True)
        return ExpertRouting(logits, indices, weights)

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
        tokens = load_balancing_loss.RoutedTokens(routing.logits, routing.indices, valid)
        balance = load_balancing_loss.switch_loss(tokens)
        losses = {
            "expert_balance": Mean(self.load_balance_loss_weight * balance, jnp.ones(())),
            "expert_z": Mean(self.router_z_loss_weight * z, count),
        }
        probabilities = jax.lax.stop_gradient(jax.nn.softmax(routing.logits, axis=-1))
        mean = jnp.sum(jnp.where(valid[..., None], probabilities, 0), axis=(0, 1)) / jnp.maximum(count, 1)
        entropy = jnp.sum(jnp.where(valid, _entropy(probabilities), 0))
        usage = _expert_usage(routing, valid) / self.top_k
        later = jnp.asarray(seq.positions)[:, 1:]
        chunk_size = 1 if self.route == "token" else self.chunk_size
        starts_chunk = valid[:, 1:] & (later % chunk_size == 0) & (later > 0)  # of a document that has begun before
        first = routing.indices[..., 0]
        repeats = jnp.sum(starts_chunk & (first[:, 1:] == first[:, :-1]), dtype=jnp.float32)
        diagnostics = {
            "expert_entropy": Mean(_entropy(mean), jnp.ones(())),
            "expert_token_entropy": Mean(entropy, count),
            "expert_usage_deviation": Mean(jnp.std(usage), jnp.ones(())),
            "expert_repeats": Mean(repeats, jnp.sum(starts_chunk, dtype=jnp.float32)),
        }
        return losses | {DIAGNOSTIC_PREFIX + name: mean for name, mean in diagnostics.items()}


def _gather_logits(
    logits: Float[Array, "B T E"], index: Int[Array, "B T"], before: Float[Array, "B E"] | None
) -> Float[Array, "B T E"]:
    """Compute logits[b, index[b, t]], or `before[b]` where the index is negative."""
    gathered = gather_tokens(logits, jnp.maximum(index, 0))
    return gathered if before is None else jnp.where((index < 0)[..., None], before[:, None], gathered)


def _expert_usage(routing: ExpertRouting, valid: Bool[Array, "B T"]) -> Float[Array, " E"]:
    """Compute the fraction of tokens that select each expert; the fractions sum to k."""
    experts = routing.logits.shape[-1]
    selected = jnp.sum(jax.nn.one_hot(routing.indices, experts), axis=2) * valid[..., None].astype(jnp.float32)
    return jnp.sum(selected, axis=(0, 1)) / jnp.maximum(jnp.sum(valid, dtype=jnp.float32), 1)


def _entropy(p: Float[Array, "... E"]) -> Float[Array, "..."]:
    """Compute the entropy of the last axis in nats."""
    return -jnp.sum(p * jnp.log(jnp.maximum(p, TINY)), axis=-1)
