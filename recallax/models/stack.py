"""A stack of blocks that mirrors a parsed pattern: every `*n` is one scan over stacked parameters.

The states of repeated layers are a tuple, so that a step of one token writes each of them where it lies. Only reading
many tokens stacks them, since its program should not grow with the layers.

Layer i draws its parameters from `fold_in(key, i)` and its dropout from `fold_in(seq.key, i)` with i its absolute
number, so how a pattern is spelled changes neither.
"""

from collections.abc import Iterator, Mapping
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray

from recallax.layers import LayerInfo
from recallax.layers.base import State, Statistic
from recallax.models.block import Block, BlockModule
from recallax.models.pattern import Term
from recallax.types import Aux, Mean, Precision, SeqInfo, StepInfo, add_aux

type Remat = Literal["none", "block"]
type LayerIndex = int | Int[Array, ""]


class StackSpec(NamedTuple):
    """What every block of a model is built with."""

    blocks: Mapping[str, Block]
    d_model: int
    num_layers: int
    dropout: float
    norm_eps: float
    remat: Remat
    precision: Precision
    key: PRNGKeyArray


class Stack(nnx.Module):
    """Terms in a row. `first_layer` is the absolute number of the first layer, at construction as in every call."""

    def __init__(self, terms: tuple[Term, ...], spec: StackSpec, first_layer: LayerIndex):
        self.parts = nnx.List()
        self.layer_offsets: tuple[int, ...] = ()
        offset = 0
        for term in terms:
            self.parts.append(_build_term(term, spec, first_layer + offset))
            self.layer_offsets += (offset,)
            offset += term.num_layers
        self.remat = spec.remat

    def __call__(
        self, r: Float[Array, "B T D"], seq: SeqInfo, first_layer: LayerIndex
    ) -> tuple[Float[Array, "B T D"], Aux]:
        aux: Aux = {}
        for part, offset in zip(self.parts, self.layer_offsets, strict=True):
            if isinstance(part, Repeat):
                r, more = part(r, seq, first_layer + offset)
            else:
                r, more = self._run_block(part, r, _with_layer_key(seq, first_layer + offset))
            aux = add_aux(aux, more)
        return r, aux

    def _run_block(self, block: BlockModule, r: Array, seq: SeqInfo) -> tuple[Array, Aux]:
        if self.remat == "none":
            return block(r, seq)
        graph, params, statistics = nnx.split(block, nnx.Param, Statistic)

        @jax.checkpoint
        def run(params: nnx.State, statistics: nnx.State, r: Array) -> tuple[Array, Aux, nnx.State]:
            module = nnx.merge(graph, params, statistics)
            r, aux = module(r, seq)
            return r, aux, nnx.state(module, Statistic)

        r, aux, statistics = run(params, statistics, r)
        nnx.update(block, statistics)
        return r, aux

    def init_state(self, batch: int, max_len: int) -> State:
        return tuple(part.init_state(batch, max_len) for part in self.parts)

    def prefill(self, r: Float[Array, "B T D"], seq: SeqInfo, state: State) -> tuple[Float[Array, "B T D"], State, Aux]:
        aux: Aux = {}
        states = []
        for part, old in zip(self.parts, state, strict=True):
            r, new, more = part.prefill(r, seq, old)
            states.append(new)
            aux = add_aux(aux, more)
        return r, tuple(states), aux

    def step(self, r: Float[Array, "B D"], info: StepInfo, state: State) -> tuple[Float[Array, "B D"], State]:
        states = []
        for part, old in zip(self.parts, state, strict=True):
            r, new = part.step(r, info, old)
            states.append(new)
        return r, tuple(states)


class Repeat(nnx.Module):
    """The same stack `count` times over parameters with a leading axis of that length."""

    def __init__(self, term: Term, spec: StackSpec, first_layer: LayerIndex):
        self.count, self.period = term.repeat, term.period
        terms = (Term(term.body, 1),) if isinstance(term.body, str) else term.body
        starts = first_layer + self.period * jnp.arange(self.count)
        graph, _ = nnx.split(nnx.eval_shape(lambda: Stack(terms, spec, 0)))
        self.body = nnx.merge(graph, jax.vmap(lambda s: nnx.split(Stack(terms, spec, s))[1])(starts))

    def __call__(
        self, r: Float[Array, "B T D"], seq: SeqInfo, first_layer: LayerIndex
    ) -> tuple[Float[Array, "B T D"], Aux]:
        graph, params, statistics = nnx.split(self.body, nnx.Param, Statistic)

        def body(r: Array, part: tuple[nnx.State, nnx.State, Array]) -> tuple[Array, tuple[Aux, nnx.State]]:
            params, statistics, first = part
            stack = nnx.merge(graph, params, statistics)
            r, aux = stack(r, seq, first)
            return r, (aux, nnx.state(stack, Statistic))

        starts = first_layer + self.period * jnp.arange(self.count)
        r, (aux, statistics) = jax.lax.scan(body, r, (params, statistics, starts))
        nnx.update(self.body, statistics)
        return r, _sum_over_layers(aux)

    def init_state(self, batch: int, max_len: int) -> State:
        return tuple(stack.init_state(batch, max_len) for stack in self._unstacked())

    def prefill(self, r: Float[Array, "B T D"], seq: SeqInfo, state: State) -> tuple[Float[Array, "B T D"], State, Aux]:
        graph, weights = nnx.split(self.body)

        def body(r: Array, part: tuple[nnx.State, State]) -> tuple[Array, tuple[State, Aux]]:
            r, state, aux = nnx.merge(graph, part[0]).prefill(r, seq, part[1])
            return r, (state, aux)

        together = jax.tree.map(lambda *parts: jnp.stack(parts), *state)
        r, (together, aux) = jax.lax.scan(body, r, (weights, together))
        return r, tuple(jax.tree.map(lambda x, i=i: x[i], together) for i in range(self.count)), _sum_over_layers(aux)

    def step(self, r: Float[Array, "B D"], info: StepInfo, state: State) -> tuple[Float[Array, "B D"], State]:
        # One after another: a scan would copy every state once on the way in and once on the way out.
        states = []
        for stack, old in zip(self._unstacked(), state, strict=True):
            r, new = stack.step(r, info, old)
            states.append(new)
        return r, tuple(states)

    def _unstacked(self) -> Iterator[Stack]:
        """The stacks themselves, without the leading axis."""
        graph, weights = nnx.split(self.body)
        return (nnx.merge(graph, jax.tree.map(lambda x, i=i: x[i], weights)) for i in range(self.count))


def _build_term(term: Term, spec: StackSpec, first_layer: LayerIndex) -> BlockModule | Repeat:
    if term.repeat > 1 or not isinstance(term.body, str):
        return Repeat(term, spec, first_layer)
    rngs = nnx.Rngs(jax.random.fold_in(spec.key, first_layer))
    site = LayerInfo(first_layer, spec.num_layers)
    block = spec.blocks[term.body]
    return BlockModule(
        block,
        spec.d_model,
        site,
        dropout=spec.dropout,
        norm_eps=spec.norm_eps,
        precision=spec.precision,
        rngs=rngs,
    )


def _with_layer_key(seq: SeqInfo, layer: LayerIndex) -> SeqInfo:
    return seq if seq.key is None else seq._replace(key=jax.random.fold_in(seq.key, layer))


def _sum_over_layers(aux: Aux) -> Aux:
    return {name: Mean(mean.total.sum(0), mean.weight.sum(0)) for name, mean in aux.items()}
