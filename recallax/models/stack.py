"""A stack of blocks with the structure of a parsed pattern: every `*n` is one scan over stacked parameters.

The states of repeated layers are a tuple, so that a step of one token updates each of them in place. Prefill stacks
them, so that its program does not grow with the number of layers.

The layer with absolute number i initialises its parameters with `fold_in(key, i)` and its dropout with
`fold_in(seq.key, i)`, so both are the same for all spellings of a pattern.
"""

import abc
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
from recallax.models.residual_module import ResidualModule
from recallax.types import Aux, Mean, Precision, SeqInfo, StepInfo, add_aux

type Remat = Literal["none", "block"]
type LayerIndex = int | Int[Array, ""]


class StackSpec(NamedTuple):
    """The arguments that all blocks of a model share."""

    blocks: Mapping[str, Block]
    """Block configs by name."""
    d_model: int
    """Width of the residual stream."""
    num_layers: int
    """Number of layers of the model."""
    dropout: float
    """Dropout rate of each mixer's output."""
    norm_eps: float
    """Epsilon of the norms."""
    remat: Remat
    """Recomputation of activations in the backward pass."""
    precision: Precision
    """The dtypes of parameters and computation."""
    key: PRNGKeyArray
    """The key of all parameters."""


class LayerSequence(ResidualModule):
    """Consecutive layers of a model, whose absolute numbers select their keys."""

    @abc.abstractmethod
    def __call__(
        self, r: Float[Array, "B T D"], seq: SeqInfo, first_layer: LayerIndex
    ) -> tuple[Float[Array, "B T D"], Aux]:
        """Apply the layers to whole sequences.

        Args:
            r: The residual stream, float32.
            seq: Positions, document ids, prefixes, and the key of dropout.
            first_layer: The absolute number of the first layer.

        Returns:
            The residual stream after the layers, and the auxiliary means of their mixers, summed over layers.
        """


class Stack(LayerSequence):
    """A sequence of terms.

    Args:
        terms: The terms.
        spec: The arguments of the blocks.
        first_layer: The absolute number of the first layer.
    """

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


class Repeat(LayerSequence):
    """A stack that is applied several times, as a scan over parameters with a leading axis.

    Args:
        term: The repeated term.
        spec: The arguments of the blocks.
        first_layer: The absolute number of the first layer.
    """

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

        stacked = jax.tree.map(lambda *parts: jnp.stack(parts), *state)
        r, (stacked, aux) = jax.lax.scan(body, r, (weights, stacked))
        return r, tuple(jax.tree.map(lambda x, i=i: x[i], stacked) for i in range(self.count)), _sum_over_layers(aux)

    def step(self, r: Float[Array, "B D"], info: StepInfo, state: State) -> tuple[Float[Array, "B D"], State]:
        # A scan would copy every state twice: once into its input and once out of its result.
        states = []
        for stack, old in zip(self._unstacked(), state, strict=True):
            r, new = stack.step(r, info, old)
            states.append(new)
        return r, tuple(states)

    def _unstacked(self) -> Iterator[Stack]:
        """Return the repetitions as separate stacks."""
        graph, weights = nnx.split(self.body)
        return (nnx.merge(graph, jax.tree.map(lambda x, i=i: x[i], weights)) for i in range(self.count))


def _build_term(term: Term, spec: StackSpec, first_layer: LayerIndex) -> BlockModule | Repeat:
    if term.repeat > 1 or not isinstance(term.body, str):
        return Repeat(term, spec, first_layer)
    rngs = nnx.Rngs(jax.random.fold_in(spec.key, first_layer))
    return BlockModule(
        spec.blocks[term.body],
        spec.d_model,
        LayerInfo(first_layer, spec.num_layers),
        dropout=spec.dropout,
        norm_eps=spec.norm_eps,
        precision=spec.precision,
        rngs=rngs,
    )


def _with_layer_key(seq: SeqInfo, layer: LayerIndex) -> SeqInfo:
    return seq if seq.key is None else seq._replace(key=jax.random.fold_in(seq.key, layer))


def _sum_over_layers(aux: Aux) -> Aux:
    return {name: Mean(mean.total.sum(0), mean.weight.sum(0)) for name, mean in aux.items()}
