"""What a model costs, counted from the model itself: parameters, bytes of state, FLOPs.

Nothing is estimated by formula: parameters and states are the shapes that the code would allocate, FLOPs are the
matrix products of the traced program.
"""

import math
from dataclasses import fields, replace

import jax
import jax.numpy as jnp
from flax import nnx

from recallax.config import Config
from recallax.layers import MoM
from recallax.models.lm import LM, LMConfig
from recallax.models.parameter_paths import layer_paths, parameter_paths, parameter_shapes
from recallax.models.pattern import parse_pattern
from recallax.types import unpacked_seq_info


def abstract_model(config: LMConfig, vocab_size: int | None = None) -> LM:
    """The model with shapes in place of arrays; costs no memory."""
    return nnx.eval_shape(lambda: config.build(nnx.Rngs(0), vocab_size))


def count_parameters(config: LMConfig, vocab_size: int | None = None) -> int:
    """Number of trainable numbers."""
    params = nnx.split(abstract_model(config, vocab_size), nnx.Param, ...)[1]
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


def count_active_parameters(config: LMConfig, vocab_size: int | None = None) -> int:
    """Parameters that one token takes: of memories and experts as many as it chooses, of a table the rows it reads."""
    blocks = {name: _with_active_memories_only(block) for name, block in config.blocks.items()}
    params = nnx.split(abstract_model(replace(config, blocks=blocks), vocab_size), nnx.Param, ...)[1]
    leaves = jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, nnx.Variable))
    return round(sum(math.prod(leaf.shape) * leaf.get_metadata()["active"] for leaf in leaves))


def _with_active_memories_only[C: Config](config: C) -> C:
    """With as many memories as a token chooses, wherever in it there is a mixture of them."""
    if isinstance(config, MoM):
        config = replace(config, num_memories=config.top_k)
    inside = {f.name: getattr(config, f.name) for f in fields(config)}
    parts = {name: _with_active_memories_only(part) for name, part in inside.items() if isinstance(part, Config)}
    return replace(config, **parts) if parts else config


def parameter_table(config: LMConfig, vocab_size: int | None = None) -> dict[str, int]:
    """Trainable numbers by what they belong to: embedding, norm, readout, and each part of each block."""
    table: dict[str, int] = {}
    model = abstract_model(config, vocab_size)
    places = parameter_paths(model, layer_paths(parse_pattern(config.pattern, list(config.blocks))))
    for name, shape in parameter_shapes(model, places).items():
        parts = name.split(".")
        what = parts[0]
        if parts[0] == "layers":
            deep = 3 if parts[2].endswith("norm") else 5 if parts[3] == "paths" else 4
            what = " ".join([config.layer_names[int(parts[1])], *parts[2:deep]])
        table[what] = table.get(what, 0) + math.prod(shape)
    return table


def state_bytes(config: LMConfig, context_length: int, vocab_size: int | None = None) -> int:
    """Bytes that one sequence of `context_length` tokens leaves in the model's state, over all layers."""
    state = jax.eval_shape(lambda: config.build(nnx.Rngs(0), vocab_size).init_state(1, context_length))
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))


def forward_flops(config: LMConfig, length: int, vocab_size: int | None = None, num_targets: int | None = None) -> int:
    """FLOPs of the matrix products of one forward pass over one row; logits at `num_targets` positions (None: all).

    A training step costs three times as much by convention. Element-wise work is not counted.
    """
    at = None if num_targets is None or num_targets >= length else jnp.zeros((1, num_targets), jnp.int32)

    def forward(params, rest):
        seq = jax.tree.map(jnp.asarray, unpacked_seq_info(1, length))
        return nnx.merge(graph, params, rest)(jnp.zeros((1, length), jnp.int32), seq, at)

    graph, params, rest = nnx.split(abstract_model(config, vocab_size), nnx.Param, ...)
    return _jaxpr_flops(jax.make_jaxpr(forward)(params, rest).jaxpr)


def _jaxpr_flops(jaxpr) -> int:
    total = 0
    for eqn in jaxpr.eqns:
        name, inner = eqn.primitive.name, [_jaxpr_flops(sub) for sub in sub_jaxprs(eqn.params)]
        if name == "dot_general":
            (contract, _), _ = eqn.params["dimension_numbers"]
            total += 2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(eqn.invars[0].aval.shape[i] for i in contract)
        elif name == "ragged_dot_general":  # one group's weights per row
            total += 2 * math.prod(eqn.outvars[0].aval.shape) * eqn.invars[0].aval.shape[-1]
        elif name == "scan":
            total += eqn.params["length"] * sum(inner)
        elif name == "cond":
            total += max(inner)
        else:
            total += sum(inner)
    return total


def sub_jaxprs(params: dict) -> list:
    """The programs inside an equation, wherever its parameters hold them."""
    values = [v for p in params.values() for v in (p if isinstance(p, list | tuple) else [p])]
    opened = [getattr(v, "jaxpr", v) for v in values]
    return [v for v in opened if hasattr(v, "eqns")]
