"""Falcon-H1: the mixers of its layers, which run Mamba-2 and attention side by side, as no block here does.

Every multiplier is folded into the weights it meets, so that these mixers take the normalised input and give what is
added to the residual stream.
"""

from recallax.convert.config_fields import ConfigFields
from recallax.convert.key_map import KeyMapEntry
from recallax.convert.layouts import decoder_parts
from recallax.convert.layouts.mamba2_layout import mamba2_mixer_entries, parse_dt_limit
from recallax.layers import Attention, Mamba2, SlidingWindow
from recallax.layers.output_projection import NormGateOrder
from recallax.models.lm import LMConfig


def from_config_json(fields: ConfigFields) -> LMConfig:
    """`FalconH1ForCausalLM`. Always raises ConfigError."""
    raise fields.unsupported("its layers run Mamba-2 and attention side by side; a block here has one sequence mixer")


def key_map(fields: ConfigFields, model: LMConfig | None = None) -> list[KeyMapEntry]:
    """The key map of the mixers, as `layers.N.attention` and `layers.N.mamba` of a model that is not there yet."""
    layers = range(fields.required("num_hidden_layers", int))
    return [
        entry
        for layer in layers
        for entry in (
            *_attention_entries(fields, f"model.layers.{layer}.self_attn", f"layers.{layer}.attention"),
            *_mamba2_entries(fields, f"model.layers.{layer}.mamba", f"layers.{layer}.mamba"),
        )
    ]


def falcon_h1_attention(fields: ConfigFields) -> Attention | SlidingWindow:
    """The attention of every layer."""
    fields.require_values("projections have no biases", attention_bias=False)
    fields.require_present("num_key_value_heads")
    return decoder_parts.attention_config(fields)


def falcon_h1_mamba2(fields: ConfigFields) -> Mamba2:
    """The Mamba-2 mixer of every layer."""
    fields.require_values("projections have no biases", mamba_proj_bias=False, projectors_bias=False)
    fields.require_values("the convolution has a bias", mamba_conv_bias=True)
    fields.require_values("convolution and gate are followed by silu", hidden_act="silu")
    normed = fields.optional("mamba_rms_norm", bool, False)
    norm_first = fields.optional("mamba_norm_before_gate", bool, True)
    order: NormGateOrder = ("gate_last" if norm_first else "gate_first") if normed else "no_norm"
    width = fields.required("mamba_d_head", int)
    return Mamba2(
        state_dim=fields.required("mamba_d_state", int),
        head_dim=width,
        num_groups=fields.required("mamba_n_groups", int),
        intermediate_size=fields.required("mamba_n_heads", int) * width,
        conv_size=fields.required("mamba_d_conv", int),
        order=order,
        dt_limit=parse_dt_limit(fields),
        norm_eps=fields.required("rms_norm_eps", float),
    )


def _attention_entries(fields: ConfigFields, source: str, target: str) -> list[KeyMapEntry]:
    entering, keys, leaving = (
        fields.optional(f"{name}_multiplier", float, 1.0) for name in ("attention_in", "key", "attention_out")
    )
    return decoder_parts.attention_entries(
        source, target, input_multiplier=entering, key_multiplier=keys, output_multiplier=leaving
    )


def _mamba2_entries(fields: ConfigFields, source: str, target: str) -> list[KeyMapEntry]:
    entering, leaving = (fields.optional(f"ssm_{name}_multiplier", float, 1.0) for name in ("in", "out"))
    return mamba2_mixer_entries(
        falcon_h1_mamba2(fields),
        fields.required("hidden_size", int),
        source,
        target,
        multipliers=[entering * m for m in fields.optional("ssm_multipliers", list, [1.0] * 5)],
        output_multiplier=leaving,
    )
