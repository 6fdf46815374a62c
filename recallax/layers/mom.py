"""Mixture of Memories: a router sends each token to k of E matrix memories, and the others stay as they are.

    s_t = softmax(x_t W_r),   g_t = the k largest of s_t, divided by their sum
    S_t^m = cell(S_{t-1}^m; k, v and gates from memory m's own weights)   for each chosen m
    o_t = sum_m g_t^m q_t S_t^m  +  q_t S_t^shared;   y_t = readout(o_t, x_t)

The query projection, the convolution and the cell's gate parameters serve all memories; a shared memory that sees every
token has weight 1. Convolution and decay run in memory time: over the tokens a memory was given, not over the row.
With one choice (k = 1) renormalised weights are constant, and the router learns from the balance loss alone.

State: that of the cell for each of the E memories and then the shared one, on an axis after the rows.
Source: Du et al. 2025 (MoM, arXiv 2502.13685 v4), section 3.2.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from recallax.config import ConfigError
from recallax.layers import load_balancing_loss
from recallax.layers.base import LayerInfo, MixerConfig, RecurrentMixer, State
from recallax.layers.dense import parameter
from recallax.layers.memory import MemoryConfig
from recallax.layers.memory_routing import (
    RoutingPlan,
    grouped_linear,
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
    """Mixture of Memories over any matrix memory."""

    memory: MemoryConfig
    num_memories: int = 4
    top_k: int = 2
    shared_memory: bool = True
    """One more memory that sees every token."""
    norm_topk_prob: bool = True
    """Divide the selected probabilities by their sum. False keeps them, which gives the router a gradient with top_k = 1."""
    load_balance_loss: Literal["switch", "per_sequence"] = "switch"
    load_balance_loss_weight: float = 1e-3
    """Coefficient of the balance loss, which enters the loss as `memory_balance` with this factor in it."""

    def __post_init__(self) -> None:
        if not 1 <= self.top_k <= self.num_memories:
            raise ConfigError(f"top_k is {self.top_k}; it must be from 1 to num_memories = {self.num_memories}")

    def build(self, d_model: int, layer: LayerInfo, *, precision: Precision, rngs: nnx.Rngs) -> "MoMMixer":
        return MoMMixer(self, d_model, layer, precision=precision, rngs=rngs)


class MemoryRouting(NamedTuple):
    """Which memories each token writes and reads, the shared one among them, and with what weight."""

    logits: Float[Array, "B T E"]
    indices: Int[Array, "B T S"]
    weights: Float[Array, "B T S"]


class MoMMixer(RecurrentMixer):
    """See the head of the file."""

    def __init__(self, config: MoM, d_model: int, layer: LayerInfo, *, precision: Precision, rngs: nnx.Rngs):
        self.num_routed_memories, self.top_k, self.shared_memory = (
            config.num_memories,
            config.top_k,
            config.shared_memory,
        )
        self.num_memories, self.num_slots = (
            self.num_routed_memories + self.shared_memory,
            self.top_k + self.shared_memory,
        )
        self.norm_topk_prob = config.norm_topk_prob
        self.load_balance_loss, self.load_balance_loss_weight = (
            config.load_balance_loss,
            config.load_balance_loss_weight,
        )
        kernel = 0.02 * jax.random.normal(rngs.params(), (d_model, self.num_routed_memories), precision.param)
        self.router = parameter(kernel, ("embed", None))
        self.query = config.memory.q_proj(d_model, precision=precision, rngs=rngs)
        keys = jax.random.split(rngs.params(), self.num_memories)

        def writer(key: Array) -> nnx.State:
            return nnx.split(config.memory.kv_proj(d_model, precision=precision, rngs=nnx.Rngs(key)))[1]

        one = nnx.eval_shape(lambda: config.memory.kv_proj(d_model, precision=precision, rngs=nnx.Rngs(0)))
        self.writers = nnx.merge(
            nnx.split(one)[0], jax.vmap(writer)(keys)
        )  # every parameter has a leading axis of memories
        self.cell = config.memory.cell(d_model, layer, precision=precision, rngs=rngs)
        self.readout = config.memory.output_proj(d_model, layer, precision=precision, rngs=rngs)

    def __call__(self, x: Float[Array, "B T D"], seq: SeqInfo) -> tuple[Float[Array, "B T D"], Aux]:
        routing = self.route(x)
        plan = plan_routing(routing.indices, jnp.asarray(seq.segment_ids), self.num_memories)
        positions = tokens_to_rows(jnp.asarray(seq.positions), plan)
        y, _ = self.cell.run(self._projections(x, plan), positions, plan.segment_ids, None)
        return self._output(y, x, routing, plan), self._aux(routing, seq)

    def init_state(self, batch: int, max_len: int) -> State:
        one = self.cell.init_state(batch)
        return jax.tree.map(lambda s: jnp.repeat(s[:, None], self.num_memories, axis=1), one)

    def prefill(self, x: Float[Array, "B T D"], seq: SeqInfo, state: State) -> tuple[Float[Array, "B T D"], State, Aux]:
        """Each memory's tokens as a row of their own, so that it can start from its state; T per memory at most."""
        routing = self.route(x)
        batch, length = x.shape[:2]
        docs = index_documents(jnp.asarray(seq.segment_ids))
        plan = plan_routing(routing.indices, jnp.asarray(seq.segment_ids), self.num_memories)
        real = plan.segment_ids > 0
        mine = (plan.memory_ids[:, None] == jnp.arange(self.num_memories)[None, :, None]) & real[:, None]
        count = jnp.sum(mine, axis=-1)
        first = jnp.cumsum(count, axis=1) - count
        rank = jnp.arange(length)[None, None]
        inside = rank < count[..., None]
        index = jnp.where(inside, first[..., None] + rank, 0).reshape(batch, -1)

        def rows(part: Array) -> Array:
            """[B M, T, ...]: the places of each memory, in their order."""
            taken = jnp.take_along_axis(part, index.reshape(*index.shape, *[1] * (part.ndim - 2)), axis=1)
            return taken.reshape(-1, length, *part.shape[2:])

        streams = {name: rows(part) for name, part in self._projections(x, plan).items()}
        segments = jnp.where(inside.reshape(-1, length), rows(plan.segment_ids), 0)
        # A memory whose first token here is of a later document starts empty; one that the last document has not
        # used yet ends empty.
        document = rows(tokens_to_rows(docs.index, plan)).reshape(batch, self.num_memories, length)
        last = jnp.max(jnp.where(docs.valid, docs.index, 0), axis=1)[:, None]
        used = count > 0
        old = _zero_unless(~used | (document[..., 0] == 0), reset_for_prefill(state, seq))
        flat = jax.tree.map(lambda s: s.reshape(-1, *s.shape[2:]), old)
        y, new = self.cell.run(streams, rows(tokens_to_rows(jnp.asarray(seq.positions), plan)), segments, flat)
        new = jax.tree.map(lambda s: s.reshape(batch, self.num_memories, *s.shape[1:]), new)
        final = jnp.take_along_axis(document, jnp.maximum(count - 1, 0)[..., None], axis=2)[..., 0]
        new = _zero_unless(jnp.where(used, final, 0) == last, new)

        place = plan.memory_ids * length + jnp.arange(plan.memory_ids.shape[1])[None]
        place -= jnp.take_along_axis(first, plan.memory_ids, axis=1)
        y = y.reshape(batch, self.num_memories * length, *y.shape[2:])
        y = jnp.take_along_axis(y, jnp.where(real, place, 0)[..., None, None], axis=1)
        return self._output(y, x, routing, plan), new, self._aux(routing, seq)

    def step(self, x: Float[Array, "B D"], info: StepInfo, state: State) -> tuple[Float[Array, "B D"], State]:
        """Touches the chosen memories only."""
        active = jnp.asarray(info.active)
        state = reset_for_step(state, info)
        routing = self.route(x[:, None])
        chosen, batch = routing.indices[:, 0], x.shape[0]
        plan = plan_routing(routing.indices, jnp.ones((batch, 1), jnp.int32), self.num_memories)
        streams = {
            name: rows_to_slots(part, plan, self.num_slots).reshape(batch * self.num_slots, -1)
            for name, part in self._projections(x[:, None], plan).items()
        }
        rows = jnp.arange(batch)[:, None]
        picked = jax.tree.map(lambda s: s[rows, chosen].reshape(-1, *s.shape[2:]), state)
        each = StepInfo(*(jnp.repeat(jnp.asarray(part), self.num_slots) for part in info))
        y, new = self.cell.step(streams, each, picked)
        new = jax.tree.map(lambda n: n.reshape(batch, -1, *n.shape[1:]), new)
        state = jax.tree.map(lambda s, n: s.at[rows, chosen].set(n), state, new)
        y = self._combine(y.reshape(batch, 1, self.num_slots, *y.shape[1:]), routing.weights)[:, 0]
        return jnp.where(active[:, None], self.readout(y, x), 0), state

    def route(self, x: Float[Array, "B T D"]) -> MemoryRouting:
        """In float32, whatever the compute dtype."""
        exact = jax.lax.Precision.HIGHEST
        logits = jnp.matmul(x.astype(jnp.float32), self.router[...].astype(jnp.float32), precision=exact)
        _, chosen = jax.lax.top_k(logits, self.top_k)
        picked = jax.nn.one_hot(
            chosen, self.num_routed_memories
        )  # a product with it has a gradient that scatters nothing
        weights = jnp.sum(picked * jax.nn.softmax(logits, axis=-1)[..., None, :], axis=-1)
        if self.norm_topk_prob:
            weights /= jnp.sum(weights, axis=-1, keepdims=True)
        if self.shared_memory:
            every = jnp.full_like(chosen[..., :1], self.num_routed_memories)
            chosen = jnp.concatenate([chosen, every], axis=-1)
            weights = jnp.concatenate([weights, jnp.ones_like(weights[..., :1])], axis=-1)
        return MemoryRouting(logits, chosen, weights)

    def _projections(self, x: Float[Array, "B T D"], plan: RoutingPlan) -> dict[str, Array]:
        """Raw queries, keys, values and gates of every place, in the rows' order."""
        queries = {name: tokens_to_rows(part, plan) for name, part in self.query(x).items()}
        written = self.writers(
            permute(x, plan), lambda linear, tokens: grouped_linear(linear, tokens, plan.group_sizes)
        )
        return queries | {name: unpermute(part, plan) for name, part in written.items()}

    def _output(
        self, y: Float[Array, "B P H V"], x: Float[Array, "B T D"], routing: MemoryRouting, plan: RoutingPlan
    ) -> Float[Array, "B T D"]:
        return self.readout(self._combine(rows_to_slots(y, plan, self.num_slots), routing.weights), x)

    def _combine(self, y: Float[Array, "B T S H V"], weights: Float[Array, "B T S"]) -> Float[Array, "B T H V"]:
        return jnp.sum(y.astype(jnp.float32) * weights[..., None, None], axis=2).astype(y.dtype)

    def _aux(self, routing: MemoryRouting, seq: SeqInfo) -> Aux:
        valid = jnp.asarray(seq.segment_ids) > 0
        loss = LOAD_BALANCE_LOSSES[self.load_balance_loss](routing.logits, routing.indices[..., : self.top_k], valid)
        return {"memory_balance": Mean(self.load_balance_loss_weight * loss, jnp.ones(()))}


def _zero_unless(keep: Array, state: State) -> State:
    """The state with the memories that are not kept [B, M] set to zero."""
    return jax.tree.map(lambda s: jnp.where(keep.reshape(*keep.shape, *[1] * (s.ndim - 2)), s, 0), state)
