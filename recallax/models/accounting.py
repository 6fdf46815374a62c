"""Parameters, state bytes and FLOPs, counted from the model itself.

No quantity is computed by a formula: parameters and states are the shapes that the code allocates, and FLOPs are those
of the matrix products in the traced program.
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
from recallax.types import unpacked_seq_info


def abstract_model(config: LMConfig, vocab_size: int | None = None) -> LM:
    """Build a model with shapes instead of arrays, which needs no memory.

    Args:
        config: The model config.
        vocab_size: The task's vocabulary size, for configs without one.

    Returns:
        The abstract model.
    """
    return nnx.eval_shape(lambda: config.build(nnx.Rngs(0), vocab_size))


def count_parameters(config: LMConfig, vocab_size: int | None = None) -> int:
    """Count the trainable parameters.

    Args:
        config: The model config.
        vocab_size: The task's vocabulary size, for configs without one.

    Returns:
        The number of parameters.
    """
    params = nnx.split(abstract_model(config, vocab_size), nnx.Param, ...)[1]
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


def count_active_parameters(config: LMConfig, vocab_size: int | None = None) -> int:
    """Count the parameters that one token uses: those of its memories and experts, and the rows of a table it reads.

    Args:
        config: The model config.
        vocab_size: The task's vocabulary size, for configs without one.

    Returns:
        The number of parameters.
    """
    blocks = {name: _with_active_memories_only(block) for name, block in config.blocks.items()}
    params = nnx.split(abstract_model(replace(config, blocks=blocks), vocab_size), nnx.Param, ...)[1]
    leaves = jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, nnx.Variable))
    return round(sum(math.prod(leaf.shape) * leaf.get_metadata()["active"] for leaf in leaves))


def _with_active_memories_only[C: Config](config: C) -> C:
    """Reduce every mixture of memories in a config to the memories that one token selects."""
    if isinstance(config, MoM):
        config = replace(config, num_memories=config.top_k)
    values = {f.name: getattr(config, f.name) for f in fields(config)}
    parts = {name: _with_active_memories_only(value) for name, value in values.items() if isinstance(value, Config)}
    return replace(config, **parts) if parts else config


def parameter_table(config: LMConfig, vocab_size: int | None = None) -> dict[str, int]:
    """Count the trainable parameters by module: embedding, norm, head, and each part of each block.

    Args:
        config: The model config.
        vocab_size: The task's vocabulary size, for configs without one.

    Returns:
        Numbers of parameters by module. Parts of a block are summed over its layers.
    """
    table: dict[str, int] = {}
    model = abstract_model(config, vocab_size)
    paths = parameter_paths(model, layer_paths(config.terms))
    for name, shape in parameter_shapes(model, paths).items():
        parts = name.split(".")
        module = parts[0]
        if parts[0] == "layers":
            depth = 3 if parts[2].endswith("norm") else 5 if parts[3] == "paths" else 4
            module = " ".join([config.layer_names[int(parts[1])], *parts[2:depth]])
        table[module] = table.get(module, 0) + math.prod(shape)
    return table


def state_bytes(config: LMConfig, context_length: int, vocab_size: int | None = None) -> int:
    """Count the bytes of the model's state for one sequence, over all layers.

    Args:
        config: The model config.
        context_length: Tokens of the sequence.
        vocab_size: The task's vocabulary size, for configs without one.

    Returns:
        The number of bytes.

    Examples:
        >>> from recallax.configs import mqar_window
        >>> config = mqar_window.get_tiny()
        >>> short, long = (state_bytes(config.model, length, config.task.vocab_size) for length in (64, 4096))
        >>> short == long  # a window of constant size
        True
    """
    state = jax.eval_shape(lambda: config.build(nnx.Rngs(0), vocab_size).init_state(1, context_length))
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))


def forward_flops(config: LMConfig, length: int, vocab_size: int | None = None, num_targets: int | None = None) -> int:
    """Count the FLOPs of the matrix products of one forward pass over one row.

    A training step needs three times as many by convention. Element-wise operations are not counted.

    Args:
        config: The model config.
        length: Tokens of the row.
        vocab_size: The task's vocabulary size, for configs without one.
        num_targets: Positions with logits. None: all.

    Returns:
        The number of FLOPs; a multiplication and an addition are two.
    """
    logit_indices = None if num_targets is None or num_targets >= length else jnp.zeros((1, num_targets), jnp.int32)

    def forward(params, rest):
        seq = jax.tree.map(jnp.asarray, unpacked_seq_info(1, length))
        return nnx.merge(graph, params, rest)(jnp.zeros((1, length), jnp.int32), seq, logit_indices)

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
    """Return the jaxprs in the parameters of an equation.

    Args:
        params: The equation's parameters.

    Returns:
        The jaxprs, without constants.
    """
    values = [v for p in params.values() for v in (p if isinstance(p, list | tuple) else [p])]
    jaxprs = [getattr(v, "jaxpr", v) for v in values]
    return [v for v in jaxprs if hasattr(v, "eqns")]
