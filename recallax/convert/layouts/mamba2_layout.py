"""Mamba-2: layers of one sublayer. Its mixer is also Nemotron-H's and Falcon-H1's."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from recallax.config import ConfigError
from recallax.convert.array_transforms import (
    DEPTHWISE_CONV,
    TRANSPOSE,
    ArrayTransform,
    chain,
    lazy_transform,
    multiply,
    permute_first_axis,
    reshape,
    split_first_axis,
)
from recallax.convert.config_fields import ConfigFields
from recallax.convert.key_map import KeyMapEntry, linear_entry, parameter_entry
from recallax.convert.layouts import decoder_parts
from recallax.layers import Mamba2, NoChannelMixer
from recallax.layers.mamba2 import Mamba2Cell
from recallax.layers.matrix_memory import MatrixCell
from recallax.layers.memory import MemoryMixer
from recallax.models.block import Block, BlockModule
from recallax.models.lm import LM, LMConfig


def from_config_json(fields: ConfigFields) -> LMConfig:
    """`Mamba2ForCausalLM`."""
    fields.require_values("projections have no biases", use_bias=False)
    fields.require_values("the convolution has a bias", use_conv_bias=True)
    fields.require_values("convolution and gate are followed by silu", hidden_act="silu")
    eps = fields.required("layer_norm_epsilon", float)
    width = fields.required("head_dim", int)
    mixer = Mamba2(
        state_dim=fields.required("state_size", int),
        head_dim=width,
        num_groups=fields.required("n_groups", int),
        intermediate_size=fields.required("num_heads", int) * width,
        conv_size=fields.required("conv_kernel", int),
        dt_limit=parse_dt_limit(fields),
        norm_eps=eps,
    )
    return LMConfig(
        d_model=fields.required("hidden_size", int),
        vocab_size=fields.required("vocab_size", int),
        pattern=decoder_parts.compress_pattern(["mamba"] * fields.required("num_hidden_layers", int)),
        blocks={"mamba": Block(mixer=mixer, channel=NoChannelMixer())},
        lm_head=decoder_parts.lm_head_config(fields),
        norm_eps=eps,
    )


def to_config_json(model: LM, layers: Sequence[BlockModule]) -> dict[str, Any]:
    """The config of `Mamba2ForCausalLM`."""
    cell = mamba2_cells(layers)[0]
    groups, heads, keys, values = cell.head_dims
    return decoder_parts.embedding_fields(model, len(layers)) | {
        "state_size": keys,
        "n_groups": groups,
        "num_heads": heads,
        "head_dim": values,
        "expand": decoder_parts.integer_ratio(heads * values, model.embedding.shape[1]),
        "conv_kernel": conv_size_of(cell),
        "time_step_limit": list(cell.gate.dt_limit),
        "use_bias": False,
        "use_conv_bias": True,
        "hidden_act": "silu",
        "layer_norm_epsilon": model.norm.eps,
    }


def mamba2_cells(layers: Sequence[BlockModule]) -> list[Mamba2Cell]:
    """The cells of layers that are all Mamba-2. Raises ConfigError where one is not."""
    return decoder_parts.collect_modules(
        decoder_parts.collect_modules(layers, "mixer", MemoryMixer), "cell", Mamba2Cell
    )


def conv_size_of(cell: MatrixCell) -> int:
    """Of the convolution. Raises ConfigError where there is none."""
    if cell.conv is None:
        raise ConfigError("its mixer has no short convolution, and this layout has one")
    return cell.conv.taps.shape[0]


def key_map(fields: ConfigFields, model: LMConfig) -> list[KeyMapEntry]:
    """The key map."""
    found = decoder_parts.embedding_and_head_entries(model, "backbone.embeddings", "backbone.norm_f")
    mixer = model.blocks["mamba"].mixer
    assert isinstance(mixer, Mamba2)
    for layer in range(len(model.layer_names)):
        theirs, ours = f"backbone.layers.{layer}", f"layers.{layer}"
        found.append(decoder_parts.norm_entry(f"{theirs}.norm", f"{ours}.mixer_norm"))
        found += mamba2_mixer_entries(mixer, model.d_model, f"{theirs}.mixer", f"{ours}.mixer")
    return found


def parse_dt_limit(fields: ConfigFields) -> tuple[float, float | None]:
    """The range of step sizes; no upper limit is infinity there and None here."""
    limit = fields.values.get("time_step_limit") or (0.0, math.inf)
    if not isinstance(limit, list | tuple) or len(limit) != 2 or not all(type(x) in (int, float) for x in limit):
        raise fields.unsupported(f"time_step_limit is {limit!r}; it must be two numbers, the second may be Infinity")
    low, high = limit
    if not 0 <= low < high:
        raise fields.unsupported(f"time_step_limit is {limit!r}; the first must be at least 0 and below the second")
    return float(low), None if high == math.inf else float(high)


def mamba2_mixer_entries(
    mixer: Mamba2,
    d_model: int,
    source: str,
    target: str,
    *,
    multipliers: Sequence[float] = (1.0,) * 5,
    output_multiplier: float = 1.0,
) -> list[KeyMapEntry]:
    """The mixer. Its input projection is gate, x, B, C and step sizes, its convolution runs over x, B and C.

    `multipliers` apply to those five, `output_multiplier` to the output.
    """
    groups, heads, keys, values = mixer.head_dims(d_model)
    inner, shared = heads * values, groups * keys
    widths = (inner, inner, shared, shared, heads)
    names = ("readout.gate", "writer.parts.v", "writer.parts.k", "query.parts.q", "writer.parts.dt")
    projection = chain(split_first_axis(*widths), TRANSPOSE)
    if any(m != 1 for m in multipliers):
        projection = chain(lazy_transform(lambda: multiply(np.repeat(multipliers, widths)[:, None])), projection)

    def queries_first() -> ArrayTransform:
        x, b, c = np.split(np.arange(inner + 2 * shared), [inner, inner + shared])
        return permute_first_axis(np.concatenate([c, b, x]))

    order = lazy_transform(queries_first)
    found = [
        KeyMapEntry((f"{source}.in_proj.weight",), tuple(f"{target}.{name}.kernel" for name in names), projection),
        parameter_entry(f"{source}.conv1d.weight", f"{target}.cell.conv.taps", chain(order, DEPTHWISE_CONV)),
        parameter_entry(f"{source}.conv1d.bias", f"{target}.cell.conv.bias", order),
        parameter_entry(f"{source}.A_log", f"{target}.cell.gate.a_log"),
        parameter_entry(f"{source}.dt_bias", f"{target}.cell.gate.dt_bias"),
        parameter_entry(f"{source}.D", f"{target}.cell.d"),
        linear_entry(f"{source}.out_proj", f"{target}.readout.out", output_multiplier),
    ]
    if mixer.order == "no_norm":
        return found
    per_group = reshape((inner,), (groups, inner // groups))
    return [*found, parameter_entry(f"{source}.norm.weight", f"{target}.readout.scale", per_group)]
