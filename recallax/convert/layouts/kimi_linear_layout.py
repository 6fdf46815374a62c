"""Kimi Linear: Kimi Delta Attention with the softplus gate, and SwiGLU. Latent attention and experts are missing."""

from collections.abc import Sequence
from typing import Any

from recallax.convert.array_transforms import DEPTHWISE_CONV, reshape
from recallax.convert.config_fields import ConfigFields
from recallax.convert.ignored_fields import EXPERT_FIELDS, IgnoredFields, field_names
from recallax.convert.key_map import KeyMapEntry, linear_entry, parameter_entry
from recallax.convert.layouts import attention_parts, decoder_parts
from recallax.convert.layouts.checkpoint_layout import CheckpointLayout
from recallax.convert.layouts.mamba2_parts import conv_size_of
from recallax.layers import KDA
from recallax.layers.kda import KDACell
from recallax.layers.swiglu import SwiGLUMixer
from recallax.models.block import Block, BlockModule
from recallax.models.lm import LM, LMConfig

LATENT_ATTENTION_FIELDS: IgnoredFields = {
    "it describes latent attention, and the model has none": (
        "kv_lora_rank", "mla_use_nope", "mla_use_output_gate", "q_lora_rank", "qk_head_dim", "qk_nope_head_dim",
        "qk_rope_head_dim", "v_head_dim",
    ),
}  # fmt: skip
SITU_FIELDS: IgnoredFields = {
    "only the activation 'situ' uses it": ("activation_situ_beta", "activation_situ_linear_beta"),
}


class KimiLinearLayout(CheckpointLayout):
    """`KimiLinearForCausalLM` of transformers, if all layers are linear and have dense MLPs."""

    architecture = "KimiLinearForCausalLM"
    ignored_fields = field_names(
        EXPERT_FIELDS, attention_parts.UNUSED_ATTENTION_FIELDS, LATENT_ATTENTION_FIELDS, SITU_FIELDS
    )

    def from_config_json(self, fields: ConfigFields) -> LMConfig:
        layer_types = fields.layer_types(
            "layer_types", ["linear_attention"], {"full_attention": "and recallax has no latent attention"}
        )
        mlps = fields.layer_types("mlp_layer_types", ["dense"], {"sparse": "and recallax has no mixture of experts"})
        fields.require_derived(
            num_hidden_layers=len(layer_types), dense_ffn_hidden=fields.required("intermediate_size", int)
        )
        if len(mlps) != len(layer_types):
            raise fields.unsupported(
                f"mlp_layer_types has {len(mlps)} layers, and layer_types {len(layer_types)}; they must have as many"
            )
        fields.require_values("layers add their output to the residual stream", attn_res_block_size=0)
        attention_parts.unscaled_rope_parameters(fields)
        mixer = KDA(
            num_heads=fields.required("linear_num_heads", int),
            head_k_dim=fields.required("linear_head_dim", int),
            decay_gate="softplus",
            conv_size=fields.required("linear_conv_kernel_dim", int),
            norm_eps=fields.required("rms_norm_eps", float, above=0.0),
        )
        block = Block(mixer=mixer, channel=decoder_parts.swiglu_config(fields))
        return decoder_parts.uniform_model_config(fields, block, len(layer_types), mixer.norm_eps)

    def key_map(self, fields: ConfigFields, model: LMConfig) -> list[KeyMapEntry]:
        entries = decoder_parts.embedding_and_head_entries(model, "model.embed_tokens", "model.norm")
        num_heads, inner = fields.required("linear_num_heads", int), fields.required("intermediate_size", int)
        for layer in range(len(model.layer_names)):
            source, target = f"model.layers.{layer}", f"layers.{layer}"
            entries += _mixer_entries(num_heads, f"{source}.self_attn", f"{target}.mixer")
            entries += decoder_parts.swiglu_entries(inner, f"{source}.mlp", f"{target}.channel")
            entries += decoder_parts.block_norm_entries(source, target)
        return entries

    def to_config_json(self, model: LM, layers: Sequence[BlockModule]) -> dict[str, Any]:
        cell = decoder_parts.collect_cells(layers, KDACell)[0]
        return (
            decoder_parts.embedding_fields(model, len(layers))
            | decoder_parts.swiglu_fields(decoder_parts.collect_modules(layers, "channel", SwiGLUMixer)[0])
            | {
                "layer_types": ["linear_attention"] * len(layers),
                "mlp_layer_types": ["dense"] * len(layers),
                "linear_num_heads": cell.head_dims.num_v_heads,
                "linear_head_dim": cell.head_dims.head_k_dim,
                "linear_conv_kernel_dim": conv_size_of(cell),
                "rms_norm_eps": model.norm.eps,
            }
        )


def _mixer_entries(num_heads: int, source: str, target: str) -> list[KeyMapEntry]:
    return [
        linear_entry(f"{source}.q_proj", f"{target}.query.parts.q"),
        linear_entry(f"{source}.k_proj", f"{target}.writer.parts.k"),
        linear_entry(f"{source}.v_proj", f"{target}.writer.parts.v"),
        linear_entry(f"{source}.b_proj", f"{target}.writer.parts.beta"),
        linear_entry(f"{source}.forget_gate.f_a_proj", f"{target}.writer.parts.decay.down"),
        linear_entry(f"{source}.forget_gate.f_b_proj", f"{target}.writer.parts.decay.up"),
        parameter_entry(f"{source}.conv1d.weight", f"{target}.cell.conv.taps", DEPTHWISE_CONV),
        parameter_entry(
            f"{source}.forget_gate.A_log", f"{target}.cell.gate.a_log", reshape((1, 1, num_heads, 1), (num_heads,))
        ),
        parameter_entry(f"{source}.forget_gate.dt_bias", f"{target}.cell.gate.dt_bias"),
        linear_entry(f"{source}.g_a_proj", f"{target}.readout.gate.down"),
        linear_entry(f"{source}.g_b_proj", f"{target}.readout.gate.up"),
        decoder_parts.norm_entry(f"{source}.o_norm", f"{target}.readout"),
        linear_entry(f"{source}.o_proj", f"{target}.readout.out"),
    ]
