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
from recallax.layers import balance
from recallax.layers.base import MixerConfig, RecurrentMixer, Site, State
from recallax.layers.continuation import continued, started
from recallax.layers.dense import parameter
from recallax.layers.dispatch import Dispatch, by_memory, dispatch, gathered, project, spread, to_rows
from recallax.layers.memory import MemoryConfig
from recallax.pallas_kernels.chunking import documents
from recallax.types import Aux, Mean, Precision, SeqInfo, StepInfo

BALANCE = {"switch": balance.switch, "per_sequence": balance.per_sequence}


@dataclass(frozen=True, kw_only=True)
class MoM(MixerConfig):
    """Mixture of Memories over any matrix memory."""

    memory: MemoryConfig
    num_memories: int = 4
    top_k: int = 2
    shared: bool = True
    """One more memory that sees every token."""
    weights: Literal["renormalised", "softmax"] = "renormalised"
    """`softmax` keeps the chosen probabilities as they are, which gives the router a gradient with top_k = 1."""
    balance: Literal["switch", "per_sequence"] = "switch"
    balance_weight: float = 1e-3
    """Coefficient of the balance loss, which enters the loss as `memory_balance` with this factor in it."""

    def __post_init__(self) -> None:
        if not 1 <= self.top_k <= self.num_memories:
            raise ConfigError(f"top_k is {self.top_k}; it must be from 1 to num_memories = {self.num_memories}")

    def build(self, d_model: int, site: Site, *, precision: Precision, rngs: nnx.Rngs) -> "MoMMixer":
        return MoMMixer(self, d_model, site, precision=precision, rngs=rngs)


class Routing(NamedTuple):
    """Which memories each token writes and reads, the shared one among them, and with what weight."""

    logits: Float[Array, "B T E"]
    chosen: Int[Array, "B T S"]
    weights: Float[Array, "B T S"]


class MoMMixer(RecurrentMixer):
    """See the head of the file."""

    def __init__(self, config: MoM, d_model: int, site: Site, *, precision: Precision, rngs: nnx.Rngs):
        self.experts, self.top_k, self.shared = config.num_memories, config.top_k, config.shared
        self.memories, self.slots = self.experts + self.shared, self.top_k + self.shared
        self.renormalised = config.weights == "renormalised"
        self.balance, self.balance_weight = config.balance, config.balance_weight
        kernel = 0.02 * jax.random.normal(rngs.params(), (d_model, self.experts), precision.param)
        self.router = parameter(kernel, ("embed", None))
        self.query = config.memory.query(d_model, precision=precision, rngs=rngs)
        keys = jax.random.split(rngs.params(), self.memories)

        def writer(key: Array) -> nnx.State:
            return nnx.split(config.memory.writer(d_model, precision=precision, rngs=nnx.Rngs(key)))[1]

        one = nnx.eval_shape(lambda: config.memory.writer(d_model, precision=precision, rngs=nnx.Rngs(0)))
        self.writers = nnx.merge(
            nnx.split(one)[0], jax.vmap(writer)(keys)
        )  # every parameter has a leading axis of memories
        self.cell = config.memory.cell(d_model, site, precision=precision, rngs=rngs)
        self.readout = config.memory.readout(d_model, site, precision=precision, rngs=rngs)

    def __call__(self, x: Float[Array, "B T D"], seq: SeqInfo) -> tuple[Float[Array, "B T D"], Aux]:
        routing = self.route(x)
        plan = dispatch(routing.chosen, jnp.asarray(seq.segments), self.memories)
        positions = spread(jnp.asarray(seq.positions), plan)
        y, _ = self.cell.run(self._streams(x, plan), positions, plan.segments, None)
        return self._read(y, x, routing, plan), self._aux(routing, seq)

    def init_state(self, batch: int, max_len: int) -> State:
        one = self.cell.init_state(batch)
        return jax.tree.map(lambda s: jnp.repeat(s[:, None], self.memories, axis=1), one)

    def prefill(self, x: Float[Array, "B T D"], seq: SeqInfo, state: State) -> tuple[Float[Array, "B T D"], State, Aux]:
        """Each memory's tokens as a row of their own, so that it can start from its state; T per memory at most."""
        routing = self.route(x)
        batch, length = x.shape[:2]
        docs = documents(jnp.asarray(seq.segments))
        plan = dispatch(routing.chosen, jnp.asarray(seq.segments), self.memories)
        real = plan.segments > 0
        mine = (plan.memory[:, None] == jnp.arange(self.memories)[None, :, None]) & real[:, None]
        count = jnp.sum(mine, axis=-1)
        first = jnp.cumsum(count, axis=1) - count
        rank = jnp.arange(length)[None, None]
        inside = rank < count[..., None]
        index = jnp.where(inside, first[..., None] + rank, 0).reshape(batch, -1)

        def rows(part: Array) -> Array:
            """[B M, T, ...]: the places of each memory, in their order."""
            taken = jnp.take_along_axis(part, index.reshape(*index.shape, *[1] * (part.ndim - 2)), axis=1)
            return taken.reshape(-1, length, *part.shape[2:])

        streams = {name: rows(part) for name, part in self._streams(x, plan).items()}
        segments = jnp.where(inside.reshape(-1, length), rows(plan.segments), 0)
        # A memory whose first token here is of a later document starts empty; one that the last document has not
        # used yet ends empty.
        document = rows(spread(docs.index, plan)).reshape(batch, self.memories, length)
        last = jnp.max(jnp.where(docs.valid, docs.index, 0), axis=1)[:, None]
        used = count > 0
        old = _where(~used | (document[..., 0] == 0), continued(state, seq))
        flat = jax.tree.map(lambda s: s.reshape(-1, *s.shape[2:]), old)
        y, new = self.cell.run(streams, rows(spread(jnp.asarray(seq.positions), plan)), segments, flat)
        new = jax.tree.map(lambda s: s.reshape(batch, self.memories, *s.shape[1:]), new)
        final = jnp.take_along_axis(document, jnp.maximum(count - 1, 0)[..., None], axis=2)[..., 0]
        new = _where(jnp.where(used, final, 0) == last, new)

        place = plan.memory * length + jnp.arange(plan.memory.shape[1])[None]
        place -= jnp.take_along_axis(first, plan.memory, axis=1)
        y = y.reshape(batch, self.memories * length, *y.shape[2:])
        y = jnp.take_along_axis(y, jnp.where(real, place, 0)[..., None, None], axis=1)
        return self._read(y, x, routing, plan), new, self._aux(routing, seq)

    def step(self, x: Float[Array, "B D"], info: StepInfo, state: State) -> tuple[Float[Array, "B D"], State]:
        """Touches the chosen memories only."""
        active = jnp.asarray(info.active)
        state = started(state, info)
        routing = self.route(x[:, None])
        chosen, batch = routing.chosen[:, 0], x.shape[0]
        plan = dispatch(routing.chosen, jnp.ones((batch, 1), jnp.int32), self.memories)
        streams = {
            name: gathered(part, plan, self.slots).reshape(batch * self.slots, -1)
            for name, part in self._streams(x[:, None], plan).items()
        }
        rows = jnp.arange(batch)[:, None]
        picked = jax.tree.map(lambda s: s[rows, chosen].reshape(-1, *s.shape[2:]), state)
        each = StepInfo(*(jnp.repeat(jnp.asarray(part), self.slots) for part in info))
        y, new = self.cell.step(streams, each, picked)
        new = jax.tree.map(lambda n: n.reshape(batch, -1, *n.shape[1:]), new)
        state = jax.tree.map(lambda s, n: s.at[rows, chosen].set(n), state, new)
        y = self._mix(y.reshape(batch, 1, self.slots, *y.shape[1:]), routing.weights)[:, 0]
        return jnp.where(active[:, None], self.readout(y, x), 0), state

    def route(self, x: Float[Array, "B T D"]) -> Routing:
        """In float32, whatever the compute dtype."""
        exact = jax.lax.Precision.HIGHEST
        logits = jnp.matmul(x.astype(jnp.float32), self.router[...].astype(jnp.float32), precision=exact)
        _, chosen = jax.lax.top_k(logits, self.top_k)
        picked = jax.nn.one_hot(chosen, self.experts)  # a product with it has a gradient that scatters nothing
        weights = jnp.sum(picked * jax.nn.softmax(logits, axis=-1)[..., None, :], axis=-1)
        if self.renormalised:
            weights /= jnp.sum(weights, axis=-1, keepdims=True)
        if self.shared:
            every = jnp.full_like(chosen[..., :1], self.experts)
            chosen = jnp.concatenate([chosen, every], axis=-1)
            weights = jnp.concatenate([weights, jnp.ones_like(weights[..., :1])], axis=-1)
        return Routing(logits, chosen, weights)

    def _streams(self, x: Float[Array, "B T D"], plan: Dispatch) -> dict[str, Array]:
        """Raw queries, keys, values and gates of every place, in the rows' order."""
        queries = {name: spread(part, plan) for name, part in self.query(x).items()}
        written = self.writers(by_memory(x, plan), lambda linear, tokens: project(linear, tokens, plan.sizes))
        return queries | {name: to_rows(part, plan) for name, part in written.items()}

    def _read(
        self, y: Float[Array, "B P H V"], x: Float[Array, "B T D"], routing: Routing, plan: Dispatch
    ) -> Float[Array, "B T D"]:
        return self.readout(self._mix(gathered(y, plan, self.slots), routing.weights), x)

    def _mix(self, y: Float[Array, "B T S H V"], weights: Float[Array, "B T S"]) -> Float[Array, "B T H V"]:
        return jnp.sum(y.astype(jnp.float32) * weights[..., None, None], axis=2).astype(y.dtype)

    def _aux(self, routing: Routing, seq: SeqInfo) -> Aux:
        valid = jnp.asarray(seq.segments) > 0
        loss = BALANCE[self.balance](routing.logits, routing.chosen[..., : self.top_k], valid)
        return {"memory_balance": Mean(self.balance_weight * loss, jnp.ones(()))}


def _where(keep: Array, state: State) -> State:
    """The state with the memories that are not kept [B, M] set to zero."""
    return jax.tree.map(lambda s: jnp.where(keep.reshape(*keep.shape, *[1] * (s.ndim - 2)), s, 0), state)
