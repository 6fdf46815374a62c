"""Mixture of Memories (MoM): a router selects k of E matrix memories for each token; the others keep their state.

    s_t = softmax(x_t W_r),   g_t = the k largest of s_t, divided by their sum
    S_t^m = cell(S_{t-1}^m; k, v and gates from memory m's own weights)   for each selected m
    o_t = sum_m g_t^m q_t S_t^m  +  q_t S_t^shared;   y_t = output_proj(o_t, x_t)

All memories share the query projection, the convolution and the parameters of the cell's gates. An optional shared
memory processes every token with weight 1. Convolution and decay of a memory run over the tokens that are routed to it.
With one memory per token (k = 1) renormalised weights are constant, and only the load-balancing loss trains the router.

State: the cell's state for each of the E memories and the shared one, on an axis after the batch axis.
Source: Du et al. 2025 (MoM, arXiv 2502.13685 v4), section 3.2.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from recallax.config import ConfigError
from recallax.layers import load_balancing_loss
from recallax.layers.base import LayerInfo, MixerConfig, RecurrentMixer, State
from recallax.layers.dense import parameter
from recallax.layers.memory import MemoryConfig
from recallax.layers.memory_routing import (
    RoutingPlan,
    grouped_linear,
    memory_rows,
    permute,
    plan_routing,
    rows_to_slots,
    tokens_to_rows,
    unpermute,
)
from recallax.layers.state_reset import reset_for_prefill, reset_for_step
from recallax.pallas_kernels.chunking import index_documents
from recallax.types import Aux, Mean, Precision, SeqInfo, StepInfo

LOAD_BALANCE_LOSSES = {"switch": load_balancing_loss.switch_loss, "per_sequence": load_balancing_loss.per_sequence_loss}


@dataclass(frozen=True, kw_only=True)
class MoM(MixerConfig):
    """Router over several memories of any kind (Mixture of Memories)."""

    memory: MemoryConfig
    """Config of each memory."""
    num_memories: int = 4
    """E: memories that the router selects from."""
    top_k: int = 2
    """k: memories of each token."""
    shared_memory: bool = True
    """Add a memory that processes every token."""
    norm_topk_prob: bool = True
    """Divide the selected probabilities by their sum; with top_k = 1 the output then has no gradient to the router."""
    load_balance_loss: Literal["switch", "per_sequence"] = "switch"
    """Definition of the load-balancing loss (`recallax.layers.load_balancing_loss`)."""
    load_balance_loss_weight: float = 1e-3
    """Coefficient of the load-balancing loss; it is included in the loss term `memory_balance`."""

    def __post_init__(self) -> None:
        if not 1 <= self.top_k <= self.num_memories:
            raise ConfigError(f"top_k is {self.top_k}; it must be from 1 to num_memories = {self.num_memories}")

    def build(self, d_model: int, layer: LayerInfo, *, precision: Precision, rngs: nnx.Rngs) -> "MoMMixer":
        return MoMMixer(self, d_model, layer, precision=precision, rngs=rngs)


class MemoryRouting(NamedTuple):
    """Memories that each token writes and reads, including the shared one."""

    logits: Float[Array, "B T E"]
    """Router logits, float32."""
    indices: Int[Array, "B T S"]
    """Selected memories; the shared one is last and has index E."""
    weights: Float[Array, "B T S"]
    """Weights of the memories' outputs, float32."""


class MoMMixer(RecurrentMixer):
    """Router, several memories with a shared cell, and a weighted sum of their outputs."""

    def __init__(self, config: MoM, d_model: int, layer: LayerInfo, *, precision: Precision, rngs: nnx.Rngs):
        self.top_k, self.shared_memory, self.num_routed_memories = (
            config.top_k,
            config.shared_memory,
            config.num_memories,
        )
        self.num_memories = self.num_routed_memories + self.shared_memory
        self.num_slots = self.top_k + self.shared_memory
        self.norm_topk_prob = config.norm_topk_prob
        self.load_balance_loss = config.load_balance_loss
        self.load_balance_loss_weight = config.load_balance_loss_weight
        kernel = 0.02 * jax.random.normal(rngs.params(), (d_model, self.num_routed_memories), precision.param)
        self.router = parameter(kernel, ("embed", None))
        self.query = config.memory.q_proj(d_model, precision=precision, rngs=rngs)
        keys = jax.random.split(rngs.params(), self.num_memories)

        def init_kv_proj(key: Array) -> nnx.State:
            return nnx.split(config.memory.kv_proj(d_model, precision=precision, rngs=nnx.Rngs(key)))[1]

        single = nnx.eval_shape(lambda: config.memory.kv_proj(d_model, precision=precision, rngs=nnx.Rngs(0)))
        # Every parameter of `writers` has a leading axis of memories.
        self.writers = nnx.merge(nnx.split(single)[0], jax.vmap(init_kv_proj)(keys))
        self.cell = config.memory.cell(d_model, layer, precision=precision, rngs=rngs)
        self.readout = config.memory.output_proj(d_model, layer, precision=precision, rngs=rngs)

    def __call__(self, x: Float[Array, "B T D"], seq: SeqInfo) -> tuple[Float[Array, "B T D"], Aux]:
        routing = self.route(x)
        plan = plan_routing(routing.indices, jnp.asarray(seq.segment_ids), self.num_memories)
        positions = tokens_to_rows(jnp.asarray(seq.positions), plan)
        y, _ = self.cell.run(self._projections(x, plan), positions, plan.segment_ids, None)
        return self._output(y, x, routing, plan), self._aux(routing, seq)

    def init_state(self, batch: int, max_len: int) -> State:
        single = self.cell.init_state(batch)
        return jax.tree.map(lambda s: jnp.repeat(s[:, None], self.num_memories, axis=1), single)

    def prefill(self, x: Float[Array, "B T D"], seq: SeqInfo, state: State) -> tuple[Float[Array, "B T D"], State, Aux]:
        """Process further tokens, with the entries of each memory in rows of their own that continue its state."""
        routing = self.route(x)
        batch, length = x.shape[:2]
        docs = index_documents(jnp.asarray(seq.segment_ids))
        plan = plan_routing(routing.indices, jnp.asarray(seq.segment_ids), self.num_memories)
        rows = memory_rows(plan, self.num_memories, length)
        projections = {name: rows.split(part) for name, part in self._projections(x, plan).items()}
        segment_ids = jnp.where(rows.mask.reshape(-1, length), rows.split(plan.segment_ids), 0)
        positions = rows.split(tokens_to_rows(jnp.asarray(seq.positions), plan))

        # A memory starts empty if its first token here belongs to a later document than the state, and it ends empty
        # if it has no token of the last document.
        document = rows.split(tokens_to_rows(docs.index, plan)).reshape(batch, self.num_memories, length)
        last = jnp.max(jnp.where(docs.valid, docs.index, 0), axis=1)[:, None]
        used = rows.count > 0
        old = _zero_unless(~used | (document[..., 0] == 0), reset_for_prefill(state, seq))
        flat = jax.tree.map(lambda s: s.reshape(-1, *s.shape[2:]), old)
        y, new = self.cell.run(projections, positions, segment_ids, flat)
        new = jax.tree.map(lambda s: s.reshape(batch, self.num_memories, *s.shape[1:]), new)
        final = jnp.take_along_axis(document, jnp.maximum(rows.count - 1, 0)[..., None], axis=2)[..., 0]
        new = _zero_unless(jnp.where(used, final, 0) == last, new)
        return self._output(rows.merge(y), x, routing, plan), new, self._aux(routing, seq)

    def step(self, x: Float[Array, "B D"], info: StepInfo, state: State) -> tuple[Float[Array, "B D"], State]:
        """Process one token per row; reads and writes the states of the selected memories only."""
        active = jnp.asarray(info.active)
        state = reset_for_step(state, info)
        routing = self.route(x[:, None])
        indices, batch = routing.indices[:, 0], x.shape[0]
        plan = plan_routing(routing.indices, jnp.ones((batch, 1), jnp.int32), self.num_memories)
        projections = {
            name: rows_to_slots(part, plan, self.num_slots).reshape(batch * self.num_slots, -1)
            for name, part in self._projections(x[:, None], plan).items()
        }
        rows = jnp.arange(batch)[:, None]
        selected = jax.tree.map(lambda s: s[rows, indices].reshape(-1, *s.shape[2:]), state)
        slot_info = StepInfo(*(jnp.repeat(jnp.asarray(part), self.num_slots) for part in info))
        y, new = self.cell.step(projections, slot_info, selected)
        new = jax.tree.map(lambda n: n.reshape(batch, -1, *n.shape[1:]), new)
        state = jax.tree.map(lambda s, n: s.at[rows, indices].set(n), state, new)
        y = self._combine(y.reshape(batch, 1, self.num_slots, *y.shape[1:]), routing.weights)[:, 0]
        return jnp.where(active[:, None], self.readout(y, x), 0), state

    def route(self, x: Float[Array, "B T D"]) -> MemoryRouting:
        """Select memories, in float32 for any compute dtype.

        Args:
            x: Inputs.

        Returns:
            Selected memories and their weights.
        """
        exact = jax.lax.Precision.HIGHEST
        logits = jnp.matmul(x.astype(jnp.float32), self.router[...].astype(jnp.float32), precision=exact)
        _, indices = jax.lax.top_k(logits, self.top_k)
        one_hot = jax.nn.one_hot(indices, self.num_routed_memories)  # unlike a gather, its gradient has no scatter
        weights = jnp.sum(one_hot * jax.nn.softmax(logits, axis=-1)[..., None, :], axis=-1)
        if self.norm_topk_prob:
            weights /= jnp.sum(weights, axis=-1, keepdims=True)
        if self.shared_memory:
            shared = jnp.full_like(indices[..., :1], self.num_routed_memories)
            indices = jnp.concatenate([indices, shared], axis=-1)
            weights = jnp.concatenate([weights, jnp.ones_like(weights[..., :1])], axis=-1)
        return MemoryRouting(logits, indices, weights)

    def _projections(self, x: Float[Array, "B T D"], plan: RoutingPlan) -> dict[str, Array]:
        """Project queries, keys, values and gates of all entries, in the order of the rows."""
        queries = {name: tokens_to_rows(part, plan) for name, part in self.query(x).items()}
        per_memory = self.writers(
            permute(x, plan), lambda linear, tokens: grouped_linear(linear, tokens, plan.group_sizes)
        )
        return queries | {name: unpermute(part, plan) for name, part in per_memory.items()}

    def _output(
        self, y: Float[Array, "B P H V"], x: Float[Array, "B T D"], routing: MemoryRouting, plan: RoutingPlan
    ) -> Float[Array, "B T D"]:
        return self.readout(self._combine(rows_to_slots(y, plan, self.num_slots), routing.weights), x)

    def _combine(self, y: Float[Array, "B T S H V"], weights: Float[Array, "B T S"]) -> Float[Array, "B T H V"]:
        return jnp.sum(y.astype(jnp.float32) * weights[..., None, None], axis=2).astype(y.dtype)

    def _aux(self, routing: MemoryRouting, seq: SeqInfo) -> Aux:
        valid = jnp.asarray(seq.segment_ids) > 0
        tokens = load_balancing_loss.RoutedTokens(routing.logits, routing.indices[..., : self.top_k], valid)
        loss = LOAD_BALANCE_LOSSES[self.load_balance_loss](tokens)
        return {"memory_balance": Mean(self.load_balance_loss_weight * loss, jnp.ones(()))}


def _zero_unless(keep: Bool[Array, "B M"], state: State) -> State:
    """Set the states of memories to zero that are not kept."""
    return jax.tree.map(lambda s: jnp.where(keep.reshape(*keep.shape, *[1] * (s.ndim - 2)), s, 0), state)
