"""The models of flash-linear-attention whose layers recallax has: a linear mixer and a SwiGLU in every layer.

Every model has the same frame and is said by a row of `FLA_MODELS`: its mixer, and what its weights are called. Source:
`fla/layers` and `fla/models` of github.com/fla-org/flash-linear-attention, version 0.6.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from recallax.convert.array_transforms import DEPTHWISE_CONV, ArrayTransform, chain, concat_first_axis
from recallax.convert.config_fields import ConfigFields
from recallax.convert.key_map import KeyMapEntry, linear_entry, parameter_entry
from recallax.convert.layouts import decoder_parts
from recallax.convert.layouts.mamba2_layout import conv_size_of
from recallax.layers import (
    GLA,
    HGRN2,
    KDA,
    DeltaNet,
    GatedDeltaNet,
    GatedDeltaProduct,
    LinearAttention,
    MixerConfig,
    RetNet,
    SwiGLU,
)
from recallax.layers.delta_net import DeltaNetCell
from recallax.layers.gated_delta_net import GatedDeltaNetCell
from recallax.layers.gated_delta_product import GatedDeltaProductCell
from recallax.layers.gla import GLACell
from recallax.layers.hgrn2 import HGRN2Cell
from recallax.layers.kda import BoundedDecayGate, KDACell
from recallax.layers.linear_attention import LinearAttentionCell
from recallax.layers.matrix_memory import MatrixCell
from recallax.layers.memory import MemoryMixer
from recallax.layers.retnet import RetNetCell
from recallax.layers.swiglu import SwiGLUMixer
from recallax.models.block import Block, BlockModule
from recallax.models.lm import LM, LMConfig

COMMON_FIXED_FIELDS = {"attn": None, "attnres_block_size": None, "hidden_act": "swish"}
"""What every config says in one way at most."""
UNGROUPED_FIXED_FIELDS = COMMON_FIXED_FIELDS | {
    "num_kv_heads": None,
    "feature_map": None,
    "use_output_gate": True,
    "fuse_norm": True,
}
UNGROUPED_FIXED_FIELDS |= {"elementwise_affine": True}
QKVO_PROJECTIONS = {
    "q_proj": "query.parts.q",
    "k_proj": "writer.parts.k",
    "v_proj": "writer.parts.v",
    "o_proj": "readout.out",
}
GATED_PROJECTIONS = QKVO_PROJECTIONS | {"g_proj": "readout.gate"}
DELTA_PROJECTIONS = QKVO_PROJECTIONS | {"b_proj": "writer.parts.beta"}
HGRN2_NORM_EPS = 1e-5
"""Of HGRN2's output norm, whatever its norm_eps."""
DECAY_PARAMETERS = {"A_log": "cell.gate.a_log", "dt_bias": "cell.gate.dt_bias"}


class FLAModel(NamedTuple):
    """What one of its models says."""

    mixer_config: Callable[[ConfigFields], MixerConfig]
    cell_class: type[MatrixCell]
    """Of the mixer."""
    mixer_fields: Callable[[Any, int], dict[str, Any]]
    """The fields of the mixer, from its cell and the model's width."""
    projections: Mapping[str, str]
    """Its projections, and ours below the mixer."""
    other_parameters: Mapping[str, str]
    """Its parameters that are no projections."""
    output_norm: str
    """Its output norm."""
    fixed_fields: Mapping[str, Any]
    """Fields with one value that can be represented, which is also what they mean when they are missing."""
    hidden_ratio: int = 4
    """Of the perceptron's width to the model's, before it is cut to two thirds."""


def from_config_json(model_type: str, fields: ConfigFields) -> LMConfig:
    """The model of that kind."""
    fields.require_values("recallax has this layer in one way", **FLA_MODELS[model_type].fixed_fields)
    return LMConfig(
        d_model=fields.required("hidden_size", int),
        vocab_size=fields.required("vocab_size", int),
        pattern=decoder_parts.compress_pattern(["layer"] * fields.required("num_hidden_layers", int)),
        blocks={
            "layer": Block(
                mixer=FLA_MODELS[model_type].mixer_config(fields),
                channel=SwiGLU(intermediate_size=_intermediate_size(model_type, fields)),
            )
        },
        lm_head=decoder_parts.lm_head_config(fields),
        norm_eps=_norm_eps(fields),
    )


def to_config_json(model_type: str, model: LM, layers: Sequence[BlockModule]) -> dict[str, Any]:
    """The config of a model of that kind."""
    mixer = decoder_parts.collect_modules(
        decoder_parts.collect_modules(layers, "mixer", MemoryMixer), "cell", FLA_MODELS[model_type].cell_class
    )[0]
    inner = decoder_parts.collect_modules(layers, "channel", SwiGLUMixer)[0].out.kernel.shape[0]
    return (
        decoder_parts.embedding_fields(model, len(layers))
        | dict(FLA_MODELS[model_type].fixed_fields)
        | FLA_MODELS[model_type].mixer_fields(mixer, model.embedding.shape[1])
        | {"intermediate_size": inner, "norm_eps": model.norm.eps}
    )


def key_map(model_type: str, fields: ConfigFields, model: LMConfig) -> list[KeyMapEntry]:
    """The key map."""
    found = decoder_parts.embedding_and_head_entries(model, "model.embeddings", "model.norm")
    for layer in range(len(model.layer_names)):
        theirs, ours = f"model.layers.{layer}", f"layers.{layer}"
        found.append(decoder_parts.norm_entry(f"{theirs}.attn_norm", f"{ours}.mixer_norm"))
        found.append(decoder_parts.norm_entry(f"{theirs}.mlp_norm", f"{ours}.channel_norm"))
        found += decoder_parts.swiglu_entries(
            _intermediate_size(model_type, fields), f"{theirs}.mlp", f"{ours}.channel"
        )
        found += _mixer_entries(FLA_MODELS[model_type], model, f"{theirs}.attn", f"{ours}.mixer")
    return [*found, _lower_bounds_entry(len(model.layer_names))] if model_type == "hgrn2" else found


def _mixer_entries(fla_model: FLAModel, model: LMConfig, source: str, target: str) -> list[KeyMapEntry]:
    found = [linear_entry(f"{source}.{key}", f"{target}.{name}") for key, name in fla_model.projections.items()]
    found += [
        parameter_entry(f"{source}.{key}", f"{target}.{name}") for key, name in fla_model.other_parameters.items()
    ]
    found.append(decoder_parts.norm_entry(f"{source}.{fla_model.output_norm}", f"{target}.readout"))
    mixer = model.blocks["layer"].mixer
    if widths := _conv_widths(mixer, model.d_model):
        convolutions = tuple(f"{source}.{stream}_conv1d.weight" for stream in "qkv")
        found.append(
            KeyMapEntry(convolutions, (f"{target}.cell.conv.taps",), chain(concat_first_axis(*widths), DEPTHWISE_CONV))
        )
    return found


def _conv_widths(mixer: MixerConfig, d_model: int) -> tuple[int, int, int] | None:
    """Widths of queries, keys and values where a convolution runs over them."""
    if not isinstance(mixer, GLA | DeltaNet | KDA | GatedDeltaNet | GatedDeltaProduct) or not mixer.conv_size:
        return None
    groups, heads, keys, values = mixer.head_dims(d_model)
    steps = mixer.num_householder if isinstance(mixer, GatedDeltaProduct) else 1
    return groups * keys, steps * groups * keys, steps * heads * values


def _lower_bounds_entry(num_layers: int) -> KeyMapEntry:
    """HGRN2's learned floors, and what every layer keeps of them between training and decoding."""

    def to_ours(arrays: tuple[np.ndarray, ...]) -> tuple[np.ndarray, ...]:
        (logits,) = arrays
        shares = np.exp(logits - logits.max(axis=0))
        shares /= shares.sum(axis=0)
        return logits, *(np.cumsum(shares, axis=0) - shares[:1])

    kept = tuple(f"layers.{layer}.mixer.cell.floor" for layer in range(num_layers))
    return KeyMapEntry(
        ("model.lower_bounds",), ("floors.logits", *kept), ArrayTransform(to_ours, lambda arrays: arrays[:1])
    )


def _intermediate_size(model_type: str, fields: ConfigFields) -> int:
    """Width of the perceptron, which may be given as a ratio that is rounded up to a multiple of 256."""
    ratio = fields.optional("hidden_ratio", int, FLA_MODELS[model_type].hidden_ratio)
    rounded = -(-int(fields.required("hidden_size", int) * ratio * 2 / 3) // 256) * 256
    return fields.optional("intermediate_size", int, rounded)


def _norm_eps(fields: ConfigFields) -> float:
    return fields.optional("norm_eps", float, 1e-6)


def _head_width(fields: ConfigFields, name: str, default: float) -> int:
    """Width of a head's keys or values, of which all heads' are a multiple of the model's width."""
    whole, heads = (
        fields.required("hidden_size", int) * fields.optional(name, float, default),
        fields.required("num_heads", int),
    )
    if round(whole) < heads or not math.isclose(whole, round(whole)) or round(whole) % heads:
        raise fields.unsupported(f"{name} makes all heads {whole:g} wide; that must be a multiple of num_heads {heads}")
    return round(whole) // heads


def _expand_ratio(width: int, of: int) -> float:
    """The smallest factor with which they find this width again, whether they cut or round the product."""
    return width / of if int(of * (width / of)) == width else math.nextafter(width / of, math.inf)


def _head_fields(cell: MatrixCell, width: int) -> dict[str, Any]:
    """Sizes as factors of the model's width."""
    _, heads, keys, values = cell.head_dims
    return {
        "num_heads": heads,
        "expand_k": _expand_ratio(heads * keys, width),
        "expand_v": _expand_ratio(heads * values, width),
    }


def _delta_head_dims(fields: ConfigFields, default_expand_v: float) -> dict[str, int]:
    """Sizes of the kinds that say the width of a key; `default_expand_v` is the default of the values' to it."""
    keys = fields.required("head_dim", int)
    values = int(keys * (ratio := fields.optional("expand_v", float, default_expand_v)))
    if values < 1:
        raise fields.unsupported(
            f"expand_v {ratio:g} makes values {values} wide, from head_dim {keys}; at least 1 is needed"
        )
    return {"key_dim": keys, "value_dim": values}


def _gla_config(fields: ConfigFields) -> GLA:
    return GLA(
        num_heads=fields.required("num_heads", int),
        head_k_dim=_head_width(fields, "expand_k", 0.5),
        head_v_dim=_head_width(fields, "expand_v", 1.0),
        conv_size=fields.optional("conv_size", int, 4) if fields.optional("use_short_conv", bool, False) else 0,
        norm_eps=_norm_eps(fields),
    )


def _gla_fields(cell: GLACell, width: int) -> dict[str, Any]:
    return _head_fields(cell, width) | ({"use_short_conv": False} if cell.conv is None else _conv_fields(cell))


def _delta_net_config(fields: ConfigFields) -> DeltaNet:
    return DeltaNet(
        num_heads=fields.required("num_heads", int),
        head_k_dim=_head_width(fields, "expand_k", 1.0),
        head_v_dim=_head_width(fields, "expand_v", 1.0),
        allow_neg_eigval=fields.optional("allow_neg_eigval", bool, False),
        conv_size=fields.optional("conv_size", int, 4),
        norm_eps=_norm_eps(fields),
    )


def _retnet_config(fields: ConfigFields) -> RetNet:
    keys, values = _head_width(fields, "expand_k", 1.0), _head_width(fields, "expand_v", 2.0)
    return RetNet(
        num_heads=fields.required("num_heads", int), head_k_dim=keys, head_v_dim=values, norm_eps=_norm_eps(fields)
    )


def _linear_attn_config(fields: ConfigFields) -> LinearAttention:
    if (name := fields.required("feature_map", str)) != "identity":
        raise fields.unsupported(f"feature_map is {name!r}; recallax has an output norm with 'identity' only")
    keys = _head_width(fields, "expand_k", 1.0)
    heads = fields.required("num_heads", int)
    return LinearAttention(num_heads=heads, feature_dim=keys, feature_map="identity", norm_eps=_norm_eps(fields))


def _hgrn2_config(fields: ConfigFields) -> HGRN2:
    """It divides queries by the root of their width before a norm whose eps is fixed; ours does not divide."""
    width, heads = fields.required("hidden_size", int), fields.values.get("num_heads")
    keys = fields.optional("expand_ratio", int, 128 if heads is None else width // heads)
    if width % keys or heads not in (None, width // keys):
        raise fields.unsupported(f"expand_ratio is {keys} and num_heads {heads}; together they must make {width}")
    return HGRN2(num_heads=width // keys, norm_eps=HGRN2_NORM_EPS * keys)


def _kda_config(fields: ConfigFields) -> KDA:
    heads, floor = fields.required("num_heads", int), fields.values.get("lower_bound")
    if (wide := fields.optional("num_v_heads", int, heads)) != heads:
        raise fields.unsupported(
            f"num_v_heads is {wide}, and num_heads {heads}; here every head of a KDA has keys and values"
        )
    return KDA(
        num_heads=heads,
        decay_gate="softplus" if floor is None else "bounded",
        lower_bound=-5.0 if floor is None else fields.required("lower_bound", float),
        allow_neg_eigval=fields.optional("allow_neg_eigval", bool, False),
        conv_size=fields.optional("conv_size", int, 4),
        norm_eps=_norm_eps(fields),
        output_gate_bias=True,
        **_delta_head_dims(fields, 1.0),
    )


def _kda_fields(cell: KDACell, width: int) -> dict[str, Any]:
    floor = cell.gate.lower_bound if isinstance(cell.gate, BoundedDecayGate) else None
    return _delta_fields(cell, width) | {"safe_gate": floor is not None, "lower_bound": floor}


def _gated_deltanet_config(fields: ConfigFields) -> GatedDeltaNet:
    if (gate := fields.optional("output_gate_activation", str, "swish")) not in ("swish", "silu"):
        raise fields.unsupported(f"output_gate_activation is {gate!r}; recallax gates with 'swish' here")
    heads = fields.required("num_heads", int)
    return GatedDeltaNet(
        num_heads=heads,
        num_v_heads=fields.optional("num_v_heads", int, heads),
        allow_neg_eigval=fields.optional("allow_neg_eigval", bool, False),
        conv_size=fields.optional("conv_size", int, 4),
        norm_eps=_norm_eps(fields),
        **_delta_head_dims(fields, 2.0),
    )


def _gated_deltanet_fields(cell: GatedDeltaNetCell, width: int) -> dict[str, Any]:
    return _delta_fields(cell, width) | {"num_v_heads": cell.head_dims.num_v_heads}


def _gated_deltaproduct_config(fields: ConfigFields) -> GatedDeltaProduct:
    if not fields.optional("use_forget_gate", bool, False):
        raise fields.unsupported("use_forget_gate is False, and recallax's Gated DeltaProduct always forgets")
    return GatedDeltaProduct(
        num_householder=fields.optional("num_householder", int, 1),
        num_heads=fields.required("num_heads", int),
        allow_neg_eigval=fields.optional("allow_neg_eigval", bool, False),
        conv_size=fields.optional("conv_size", int, 4),
        norm_eps=_norm_eps(fields),
        **_delta_head_dims(fields, 2.0),
    )


def _gated_deltaproduct_fields(cell: GatedDeltaProductCell, width: int) -> dict[str, Any]:
    return _delta_fields(cell, width) | {"use_forget_gate": True, "num_householder": cell.num_householder}


def _conv_fields(cell: MatrixCell) -> dict[str, Any]:
    return {"use_short_conv": True, "conv_size": conv_size_of(cell)}


def _delta_net_fields(cell: DeltaNetCell, width: int) -> dict[str, Any]:
    return _head_fields(cell, width) | _conv_fields(cell) | {"allow_neg_eigval": cell.allow_neg_eigval}


def _delta_fields(cell: KDACell | GatedDeltaNetCell | GatedDeltaProductCell, width: int) -> dict[str, Any]:
    groups, _, keys, values = cell.head_dims
    sizes = {"num_heads": groups, "head_dim": keys, "expand_v": _expand_ratio(values, keys)}
    return sizes | _conv_fields(cell) | {"allow_neg_eigval": cell.allow_neg_eigval}


FLA_MODELS: dict[str, FLAModel] = {
    "gla": FLAModel(
        _gla_config,
        GLACell,
        _gla_fields,
        GATED_PROJECTIONS | {"gk_proj.0": "writer.parts.decay.down", "gk_proj.1": "writer.parts.decay.up"},
        {"gk_proj.1.bias": "writer.parts.decay.up.bias"},
        "g_norm_swish_gate",
        UNGROUPED_FIXED_FIELDS | {"clamp_min": None},
    ),
    "delta_net": FLAModel(
        _delta_net_config,
        DeltaNetCell,
        _delta_net_fields,
        DELTA_PROJECTIONS,
        {},
        "o_norm",
        COMMON_FIXED_FIELDS
        | {"use_gate": False, "use_beta": True, "use_short_conv": True, "qk_norm": "l2", "qk_activation": "silu"},
    ),
    "retnet": FLAModel(
        _retnet_config,
        RetNetCell,
        _head_fields,
        GATED_PROJECTIONS,
        {},
        "g_norm_swish_gate",
        UNGROUPED_FIXED_FIELDS,
        hidden_ratio=2,
    ),
    "linear_attn": FLAModel(
        _linear_attn_config,
        LinearAttentionCell,
        lambda cell, width: _head_fields(cell, width) | {"feature_map": "identity"},
        QKVO_PROJECTIONS,
        {},
        "norm",
        COMMON_FIXED_FIELDS
        | {"num_kv_heads": None, "expand_v": 1.0, "norm_q": False, "norm_k": False, "norm_feature_map": False}
        | {"elementwise_affine": True},
    ),
    "hgrn2": FLAModel(
        _hgrn2_config,
        HGRN2Cell,
        lambda cell, width: {"num_heads": cell.head_dims.num_heads, "expand_ratio": cell.head_dims.head_k_dim},
        {
            "q_proj": "query.parts.q",
            "f_proj": "writer.parts.decay",
            "i_proj": "writer.parts.v",
            "o_proj": "readout.out",
        },
        {},
        "g_norm",
        COMMON_FIXED_FIELDS | {"use_short_conv": False, "use_lower_bound": True, "elementwise_affine": True},
    ),
    "kda": FLAModel(
        _kda_config,
        KDACell,
        _kda_fields,
        DELTA_PROJECTIONS
        | {"f_proj.0": "writer.parts.decay.down", "f_proj.1": "writer.parts.decay.up"}
        | {"g_proj.0": "readout.gate.down", "g_proj.1": "readout.gate.up"},
        DECAY_PARAMETERS | {"g_proj.1.bias": "readout.gate.up.bias"},
        "o_norm",
        COMMON_FIXED_FIELDS | {"use_short_conv": True},
    ),
    "gated_deltanet": FLAModel(
        _gated_deltanet_config,
        GatedDeltaNetCell,
        _gated_deltanet_fields,
        DELTA_PROJECTIONS | GATED_PROJECTIONS | {"a_proj": "writer.parts.decay"},
        DECAY_PARAMETERS,
        "o_norm",
        COMMON_FIXED_FIELDS | {"use_gate": True, "use_short_conv": True},
    ),
    "gated_deltaproduct": FLAModel(
        _gated_deltaproduct_config,
        GatedDeltaProductCell,
        _gated_deltaproduct_fields,
        DELTA_PROJECTIONS | GATED_PROJECTIONS | {"a_proj": "writer.parts.decay"},
        DECAY_PARAMETERS,
        "o_norm",
        COMMON_FIXED_FIELDS | {"use_output_gate": True, "use_short_conv": True},
    ),
}
"""By `model_type`."""
