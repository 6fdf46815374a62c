"""Falcon-H1: the mixers of its layers, which run Mamba-2 and attention in parallel, as no recallax block does.

Every multiplier is folded into the weights that it applies to, so these mixers take the normalized input and return the
update of the residual stream.
"""

from recallax.convert.config_fields import ConfigFields
from recallax.convert.key_map import KeyMapEntry
from recallax.convert.layouts import attention_parts
from recallax.convert.layouts.checkpoint_layout import CheckpointLayout
from recallax.convert.layouts.mamba2_parts import mamba2_mixer_entries, parse_dt_limit
from recallax.layers import Attention, Mamba2, SlidingWindow
from recallax.layers.output_projection import NormGateOrder
from recallax.models.lm import LMConfig


class FalconH1Layout(CheckpointLayout):
    """`FalconH1ForCausalLM` of transformers, of which only the mixers can be imported."""

    architecture = "FalconH1ForCausalLM"

    def from_config_json(self, fields: ConfigFields) -> LMConfig:
        raise fields.unsupported(
            "its layers run Mamba-2 and attention in parallel; a recallax block has one sequence mixer"
        )

    def key_map(self, fields: ConfigFields, model: LMConfig) -> list[KeyMapEntry]:
        return falcon_h1_mixer_entries(fields)


def falcon_h1_mixer_entries(fields: ConfigFields) -> list[KeyMapEntry]:
    """Map the mixers of all layers.

    Args:
        fields: The fields of config.json.

    Returns:
        The entries; the targets are `layers.N.attention` and `layers.N.mamba`.
    """
    return [
        entry
        for layer in range(fields.required("num_hidden_layers", int))
        for entry in (
            *_attention_entries(fields, f"model.layers.{layer}.self_attn", f"layers.{layer}.attention"),
            *_mamba2_entries(fields, f"model.layers.{layer}.mamba", f"layers.{layer}.mamba"),
        )
    ]


def falcon_h1_attention(fields: ConfigFields) -> Attention | SlidingWindow:
    """Read the attention of a layer.

    Args:
        fields: The fields of config.json.

    Returns:
        The mixer config.
    """
    fields.require_values("projections have no biases", attention_bias=False)
    fields.require_present("num_key_value_heads")
    return attention_parts.attention_config(fields)


def falcon_h1_mamba2(fields: ConfigFields) -> Mamba2:
    """Read the Mamba-2 mixer of a layer.

    Args:
        fields: The fields of config.json.

    Returns:
        The mixer config.
    """
    fields.require_values("projections have no biases", mamba_proj_bias=False, projectors_bias=False)
    fields.require_values("the convolution has a bias", mamba_conv_bias=True)
    fields.require_values("convolution and gate are followed by silu", hidden_act="silu")
    has_norm = fields.optional("mamba_rms_norm", bool, False)
    norm_first = fields.optional("mamba_norm_before_gate", bool, True)
    order: NormGateOrder = ("gate_last" if norm_first else "gate_first") if has_norm else "no_norm"
    head_dim = fields.required("mamba_d_head", int)
    return Mamba2(
        state_dim=fields.required("mamba_d_state", int),
        head_dim=head_dim,
        num_groups=fields.required("mamba_n_groups", int),
        intermediate_size=fields.required("mamba_n_heads", int) * head_dim,
        conv_size=fields.required("mamba_d_conv", int),
        order=order,
        dt_limit=parse_dt_limit(fields),
        norm_eps=fields.required("rms_norm_eps", float),
    )


def _attention_entries(fields: ConfigFields, source: str, target: str) -> list[KeyMapEntry]:
    return attention_parts.attention_entries(
        source,
        target,
        input_multiplier=fields.optional("attention_in_multiplier", float, 1.0),
        key_multiplier=fields.optional("key_multiplier", float, 1.0),
        output_multiplier=fields.optional("attention_out_multiplier", float, 1.0),
    )


def _mamba2_entries(fields: ConfigFields, source: str, target: str) -> list[KeyMapEntry]:
    input_multiplier = fields.optional("ssm_in_multiplier", float, 1.0)
    return mamba2_mixer_entries(
        falcon_h1_mamba2(fields),
        fields.required("hidden_size", int),
        source,
        target,
        multipliers=[input_multiplier * m for m in fields.optional("ssm_multipliers", list, [1.0] * 5)],
        output_multiplier=fields.optional("ssm_out_multiplier", float, 1.0),
    )
