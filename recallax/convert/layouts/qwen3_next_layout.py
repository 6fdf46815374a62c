"""Qwen3-Next and Olmo-Hybrid: Gated DeltaNet and SwiGLU in layers normalised before each.

Their attention layers have what recallax's attention has not, so only their linear layers can be imported.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from recallax.convert.array_transforms import (
    DEPTHWISE_CONV,
    TRANSPOSE,
    ArrayTransform,
    chain,
    lazy_transform,
    permute_first_axis,
    split_first_axis,
)
from recallax.convert.config_fields import ConfigFields
from recallax.convert.key_map import KeyMapEntry, linear_entry, parameter_entry
from recallax.convert.layouts import decoder_parts
from recallax.convert.layouts.mamba2_layout import conv_size_of
from recallax.layers import GatedDeltaNet
from recallax.layers.gated_delta_net import GatedDeltaNetCell
from recallax.layers.memory import MemoryMixer
from recallax.layers.swiglu import SwiGLUMixer
from recallax.models.block import Block, BlockModule
from recallax.models.lm import LM, LMConfig

OLMO_HYBRID_NORM_EPS = 1e-5
"""Of Olmo-Hybrid's output norm, whatever its rms_norm_eps."""


def qwen3_next_from_config_json(fields: ConfigFields) -> LMConfig:
    """`Qwen3NextForCausalLM` of linear layers without experts."""
    layers = fields.required("num_hidden_layers", int)
    dense = fields.optional("mlp_only_layers", list, [])
    if fields.values.get("num_experts") != 0 and (sparse := sorted(set(range(layers)) - set(dense))):
        raise fields.unsupported(f"layers {sparse} are not in mlp_only_layers, and recallax has no mixture of experts")
    attention = "it is gated, normalises queries and keys, and rotates part of a head"
    return _model_config(
        fields, _mixer_config(fields, fields.required("rms_norm_eps", float), allow_neg_eigval=False), attention
    )


def olmo_hybrid_from_config_json(fields: ConfigFields) -> LMConfig:
    """`OlmoHybridForCausalLM` of linear layers."""
    negative = fields.optional("linear_allow_neg_eigval", bool, True)
    attention = "it normalises queries and keys, and its layers normalise after each sublayer"
    return _model_config(fields, _mixer_config(fields, OLMO_HYBRID_NORM_EPS, allow_neg_eigval=negative), attention)


def qwen3_next_to_config_json(model: LM, layers: Sequence[BlockModule]) -> dict[str, Any]:
    """The config of `Qwen3NextForCausalLM`. (transformers refuses an Olmo-Hybrid without attention layers.)"""
    cell = decoder_parts.collect_modules(
        decoder_parts.collect_modules(layers, "mixer", MemoryMixer), "cell", GatedDeltaNetCell
    )[0]
    groups, heads, keys, values = cell.head_dims
    return (
        decoder_parts.embedding_fields(model, len(layers))
        | decoder_parts.swiglu_fields(decoder_parts.collect_modules(layers, "channel", SwiGLUMixer)[0])
        | {
            "layer_types": ["linear_attention"] * len(layers),
            "linear_num_key_heads": groups,
            "linear_num_value_heads": heads,
            "linear_key_head_dim": keys,
            "linear_value_head_dim": values,
            "linear_conv_kernel_dim": conv_size_of(cell),
            "rms_norm_eps": model.norm.eps,
            "mlp_only_layers": list(range(len(layers))),
        }
    )


def qwen3_next_key_map(fields: ConfigFields, model: LMConfig) -> list[KeyMapEntry]:
    """The key map; norms, but for the one inside the mixer, multiply by 1 + weight."""
    found = decoder_parts.embedding_and_head_entries(model, "model.embed_tokens", "model.norm", offset=1.0)
    mixer = _mixer_config(fields, fields.required("rms_norm_eps", float), allow_neg_eigval=False)
    for layer in range(len(model.layer_names)):
        theirs, ours = f"model.layers.{layer}", f"layers.{layer}"
        found += _block_entries(fields, theirs, ours, offset=1.0)
        found += _qwen3_next_mixer_entries(mixer, model.d_model, f"{theirs}.linear_attn", f"{ours}.mixer")
    return found


def olmo_hybrid_key_map(fields: ConfigFields, model: LMConfig) -> list[KeyMapEntry]:
    """The key map."""
    found = decoder_parts.embedding_and_head_entries(model, "model.embed_tokens", "model.norm")
    for layer in range(len(model.layer_names)):
        theirs, ours = f"model.layers.{layer}", f"layers.{layer}"
        found += _block_entries(fields, theirs, ours)
        found += _olmo_hybrid_mixer_entries(f"{theirs}.linear_attn", f"{ours}.mixer")
    return found


def _model_config(fields: ConfigFields, mixer: GatedDeltaNet, attention_reason: str) -> LMConfig:
    kinds = fields.required("layer_types", list)
    if "full_attention" in kinds:
        raise fields.unsupported(f"layer_types holds 'full_attention', which recallax has not: {attention_reason}")
    return LMConfig(
        d_model=fields.required("hidden_size", int),
        vocab_size=fields.required("vocab_size", int),
        pattern=decoder_parts.compress_pattern(["layer"] * len(kinds)),
        blocks={"layer": Block(mixer=mixer, channel=decoder_parts.swiglu_config(fields))},
        lm_head=decoder_parts.lm_head_config(fields),
        norm_eps=fields.required("rms_norm_eps", float),
    )


def _mixer_config(fields: ConfigFields, eps: float, allow_neg_eigval: bool) -> GatedDeltaNet:
    return GatedDeltaNet(
        num_heads=fields.required("linear_num_key_heads", int),
        num_v_heads=fields.required("linear_num_value_heads", int),
        head_k_dim=fields.required("linear_key_head_dim", int),
        head_v_dim=fields.required("linear_value_head_dim", int),
        allow_neg_eigval=allow_neg_eigval,
        conv_size=fields.required("linear_conv_kernel_dim", int),
        norm_eps=eps,
    )


def _block_entries(fields: ConfigFields, source: str, target: str, offset: float = 0.0) -> list[KeyMapEntry]:
    return [
        decoder_parts.norm_entry(f"{source}.input_layernorm", f"{target}.mixer_norm", offset),
        decoder_parts.norm_entry(f"{source}.post_attention_layernorm", f"{target}.channel_norm", offset),
        *decoder_parts.swiglu_entries(fields.required("intermediate_size", int), f"{source}.mlp", f"{target}.channel"),
    ]


def _cell_entries(source: str, target: str) -> list[KeyMapEntry]:
    return [
        parameter_entry(f"{source}.conv1d.weight", f"{target}.cell.conv.taps", DEPTHWISE_CONV),
        parameter_entry(f"{source}.A_log", f"{target}.cell.gate.a_log"),
        parameter_entry(f"{source}.dt_bias", f"{target}.cell.gate.dt_bias"),
    ]


def _qwen3_next_mixer_entries(mixer: GatedDeltaNet, d_model: int, source: str, target: str) -> list[KeyMapEntry]:
    """Its rows go by key head: that head's q and k, the v and z of its value heads; likewise beta and decay."""
    groups, heads, keys, values = mixer.head_dims(d_model)
    share = heads // groups

    def grouped(key: str, names: tuple[str, ...], widths: tuple[int, ...]) -> KeyMapEntry:
        def by_stream() -> ArrayTransform:
            rows = np.arange(groups * sum(widths)).reshape(groups, -1)
            parts = np.split(rows, np.cumsum(widths)[:-1], axis=1)
            return permute_first_axis(np.concatenate([part.ravel() for part in parts]))

        form = chain(lazy_transform(by_stream), split_first_axis(*(groups * width for width in widths)), TRANSPOSE)
        return KeyMapEntry((f"{source}.{key}.weight",), tuple(f"{target}.{name}.kernel" for name in names), form)

    streams = ("query.parts.q", "writer.parts.k", "writer.parts.v", "readout.gate")
    return [
        grouped("in_proj_qkvz", streams, (keys, keys, share * values, share * values)),
        grouped("in_proj_ba", ("writer.parts.beta", "writer.parts.decay"), (share, share)),
        *_cell_entries(source, target),
        decoder_parts.norm_entry(f"{source}.norm", f"{target}.readout"),
        linear_entry(f"{source}.out_proj", f"{target}.readout.out"),
    ]


def _olmo_hybrid_mixer_entries(source: str, target: str) -> list[KeyMapEntry]:
    return separate_projection_entries(source, target, _cell_entries(source, target))


def separate_projection_entries(source: str, target: str, cell_entries: list[KeyMapEntry]) -> list[KeyMapEntry]:
    """A mixer that keeps its products apart, as OLMo-hybrid and fla do; what its cell has lies between them."""
    return [
        linear_entry(f"{source}.q_proj", f"{target}.query.parts.q"),
        linear_entry(f"{source}.k_proj", f"{target}.writer.parts.k"),
        linear_entry(f"{source}.v_proj", f"{target}.writer.parts.v"),
        linear_entry(f"{source}.b_proj", f"{target}.writer.parts.beta"),
        linear_entry(f"{source}.a_proj", f"{target}.writer.parts.decay"),
        *cell_entries,
        linear_entry(f"{source}.g_proj", f"{target}.readout.gate"),
        decoder_parts.norm_entry(f"{source}.o_norm", f"{target}.readout"),
        linear_entry(f"{source}.o_proj", f"{target}.readout.out"),
    ]
