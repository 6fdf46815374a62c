"""Qwen3-Next and Olmo-Hybrid: Gated DeltaNet and SwiGLU, each after a norm.

Their attention layers have features that recallax's attention lacks, so only models of linear layers can be imported.
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
from recallax.convert.ignored_fields import EXPERT_FIELDS, field_names
from recallax.convert.key_map import KeyMapEntry, linear_entry, parameter_entry
from recallax.convert.layouts import attention_parts, decoder_parts
from recallax.convert.layouts.checkpoint_layout import CheckpointLayout
from recallax.convert.layouts.mamba2_parts import conv_size_of
from recallax.layers import GatedDeltaNet
from recallax.layers.gated_delta_net import GatedDeltaNetCell
from recallax.layers.swiglu import SwiGLUMixer
from recallax.models.block import Block, BlockModule
from recallax.models.lm import LM, LMConfig
from recallax.models.pattern import MAX_LAYERS

OLMO_HYBRID_NORM_EPS = 1e-5
"""The epsilon of Olmo-Hybrid's output norm, which does not depend on rms_norm_eps."""
QWEN3_NEXT_NORM_OFFSET = 1.0
"""Qwen3-Next's norms multiply by 1 + weight, except for the norm inside the mixer."""

OLMO_INITIALIZATION = ("a_log_max", "a_log_min", "dt_init_floor", "dt_max", "dt_min")


class Qwen3NextLayout(CheckpointLayout):
    """`Qwen3NextForCausalLM` of transformers, if all layers are linear and have dense MLPs."""

    architecture = "Qwen3NextForCausalLM"
    ignored_fields = field_names(EXPERT_FIELDS, attention_parts.UNUSED_ATTENTION_FIELDS)

    def from_config_json(self, fields: ConfigFields) -> LMConfig:
        num_layers = fields.num_layers("num_hidden_layers")
        dense = fields.layer_numbers("mlp_only_layers", MAX_LAYERS)  # transformers accepts layers after the last one
        if fields.get("num_experts") != 0 and (sparse := sorted(set(range(num_layers)) - set(dense))):
            raise fields.unsupported(
                f"layers {sparse} are not in mlp_only_layers, and recallax has no mixture of experts"
            )
        attention = "it is gated, normalizes queries and keys, and rotates part of a head"
        return _model_config(fields, _qwen3_next_mixer(fields), attention)

    def key_map(self, fields: ConfigFields, model: LMConfig) -> list[KeyMapEntry]:
        entries = decoder_parts.embedding_and_head_entries(
            model, "model.embed_tokens", "model.norm", QWEN3_NEXT_NORM_OFFSET
        )
        mixer = _qwen3_next_mixer(fields)
        for layer in range(len(model.layer_names)):
            source, target = f"model.layers.{layer}", f"layers.{layer}"
            entries += _block_entries(fields, source, target, QWEN3_NEXT_NORM_OFFSET)
            entries += _grouped_mixer_entries(mixer, model.d_model, f"{source}.linear_attn", f"{target}.mixer")
        return entries

    def to_config_json(self, model: LM, layers: Sequence[BlockModule]) -> dict[str, Any]:
        cell = decoder_parts.collect_cells(layers, GatedDeltaNetCell)[0]
        num_heads, num_v_heads, head_k_dim, head_v_dim = cell.head_dims
        return (
            decoder_parts.embedding_fields(model, len(layers))
            | decoder_parts.swiglu_fields(decoder_parts.collect_modules(layers, "channel", SwiGLUMixer)[0])
            | {
                "layer_types": ["linear_attention"] * len(layers),
                "linear_num_key_heads": num_heads,
                "linear_num_value_heads": num_v_heads,
                "linear_key_head_dim": head_k_dim,
                "linear_value_head_dim": head_v_dim,
                "linear_conv_kernel_dim": conv_size_of(cell),
                "rms_norm_eps": model.norm.eps,
                "mlp_only_layers": list(range(len(layers))),
            }
        )


class OlmoHybridLayout(CheckpointLayout):
    """`OlmoHybridForCausalLM` of transformers, if all layers are linear.

    Such a model cannot be exported, because transformers rejects an Olmo-Hybrid without attention layers.
    """

    architecture = "OlmoHybridForCausalLM"
    ignored_fields = field_names(
        attention_parts.UNUSED_ATTENTION_FIELDS,
        {"it is a range for initialization": tuple(f"linear_{name}" for name in OLMO_INITIALIZATION)},
    )

    def from_config_json(self, fields: ConfigFields) -> LMConfig:
        allow_neg_eigval = fields.optional("linear_allow_neg_eigval", bool, True)
        attention = "it normalizes queries and keys, and its layers normalize after each sublayer"
        mixer = _mixer_config(fields, OLMO_HYBRID_NORM_EPS, allow_neg_eigval=allow_neg_eigval)
        return _model_config(fields, mixer, attention)

    def key_map(self, fields: ConfigFields, model: LMConfig) -> list[KeyMapEntry]:
        entries = decoder_parts.embedding_and_head_entries(model, "model.embed_tokens", "model.norm")
        for layer in range(len(model.layer_names)):
            source, target = f"model.layers.{layer}", f"layers.{layer}"
            entries += _block_entries(fields, source, target)
            entries += _separate_mixer_entries(f"{source}.linear_attn", f"{target}.mixer")
        return entries


def _model_config(fields: ConfigFields, mixer: GatedDeltaNet, attention_features: str) -> LMConfig:
    layer_types = fields.layer_types(
        "layer_types",
        ["linear_attention"],
        {"full_attention": f"which recallax does not support: {attention_features}"},
    )
    attention_parts.unscaled_rope_parameters(fields)
    block = Block(mixer=mixer, channel=decoder_parts.swiglu_config(fields))
    norm_eps = fields.required("rms_norm_eps", float, above=0.0)
    return decoder_parts.uniform_model_config(fields, block, len(layer_types), norm_eps)


def _qwen3_next_mixer(fields: ConfigFields) -> GatedDeltaNet:
    return _mixer_config(fields, fields.required("rms_norm_eps", float, above=0.0), allow_neg_eigval=False)


def _mixer_config(fields: ConfigFields, norm_eps: float, *, allow_neg_eigval: bool) -> GatedDeltaNet:
    num_heads, num_v_heads = (fields.required(f"linear_num_{part}_heads", int) for part in ("key", "value"))
    fields.require_multiple("linear_num_value_heads", num_v_heads, "linear_num_key_heads", num_heads)
    return GatedDeltaNet(
        num_heads=num_heads,
        num_v_heads=num_v_heads,
        head_k_dim=fields.required("linear_key_head_dim", int),
        head_v_dim=fields.required("linear_value_head_dim", int),
        allow_neg_eigval=allow_neg_eigval,
        conv_size=fields.required("linear_conv_kernel_dim", int),
        norm_eps=norm_eps,
    )


def _block_entries(fields: ConfigFields, source: str, target: str, offset: float = 0.0) -> list[KeyMapEntry]:
    intermediate_size = fields.required("intermediate_size", int)
    return [
        *decoder_parts.block_norm_entries(source, target, offset),
        *decoder_parts.swiglu_entries(intermediate_size, f"{source}.mlp", f"{target}.channel"),
    ]


def _cell_entries(source: str, target: str) -> list[KeyMapEntry]:
    return [
        parameter_entry(f"{source}.conv1d.weight", f"{target}.cell.conv.taps", DEPTHWISE_CONV),
        parameter_entry(f"{source}.A_log", f"{target}.cell.gate.a_log"),
        parameter_entry(f"{source}.dt_bias", f"{target}.cell.gate.dt_bias"),
    ]


def _grouped_mixer_entries(mixer: GatedDeltaNet, d_model: int, source: str, target: str) -> list[KeyMapEntry]:
    """Map Qwen3-Next's mixer, whose projections are ordered by key head.

    The rows of a key head are its q and k, then v and z of its value heads; likewise for beta and the decay.
    """
    num_heads, num_v_heads, head_k_dim, head_v_dim = mixer.head_dims(d_model)
    share = num_v_heads // num_heads

    def grouped_entry(key: str, names: tuple[str, ...], widths: tuple[int, ...]) -> KeyMapEntry:
        def by_projection() -> ArrayTransform:
            rows = np.arange(num_heads * sum(widths)).reshape(num_heads, -1)
            parts = np.split(rows, np.cumsum(widths)[:-1], axis=1)
            return permute_first_axis(np.concatenate([part.ravel() for part in parts]))

        split = split_first_axis(*(num_heads * width for width in widths))
        transform = chain(lazy_transform(by_projection), split, TRANSPOSE)
        return KeyMapEntry((f"{source}.{key}.weight",), tuple(f"{target}.{name}.kernel" for name in names), transform)

    qkvz = ("query.parts.q", "writer.parts.k", "writer.parts.v", "readout.gate")
    return [
        grouped_entry("in_proj_qkvz", qkvz, (head_k_dim, head_k_dim, share * head_v_dim, share * head_v_dim)),
        grouped_entry("in_proj_ba", ("writer.parts.beta", "writer.parts.decay"), (share, share)),
        *_cell_entries(source, target),
        decoder_parts.norm_entry(f"{source}.norm", f"{target}.readout"),
        linear_entry(f"{source}.out_proj", f"{target}.readout.out"),
    ]


def _separate_mixer_entries(source: str, target: str) -> list[KeyMapEntry]:
    """Map Olmo-Hybrid's mixer, which has one projection per input."""
    return [
        linear_entry(f"{source}.q_proj", f"{target}.query.parts.q"),
        linear_entry(f"{source}.k_proj", f"{target}.writer.parts.k"),
        linear_entry(f"{source}.v_proj", f"{target}.writer.parts.v"),
        linear_entry(f"{source}.b_proj", f"{target}.writer.parts.beta"),
        linear_entry(f"{source}.a_proj", f"{target}.writer.parts.decay"),
        *_cell_entries(source, target),
        linear_entry(f"{source}.g_proj", f"{target}.readout.gate"),
        decoder_parts.norm_entry(f"{source}.o_norm", f"{target}.readout"),
        linear_entry(f"{source}.o_proj", f"{target}.readout.out"),
    ]
