"""Kimi Linear: Kimi Delta Attention with the softplus gate, and SwiGLU. Latent attention and experts are missing."""

from collections.abc import Sequence
from typing import Any

from recallax.convert.array_transforms import DEPTHWISE_CONV, reshape
from recallax.convert.config_fields import ConfigFields
from recallax.convert.key_map import KeyMapEntry, linear_entry, parameter_entry
from recallax.convert.layouts import decoder_parts
from recallax.convert.layouts.checkpoint_layout import CheckpointLayout
from recallax.convert.layouts.mamba2_parts import conv_size_of
from recallax.layers import KDA
from recallax.layers.kda import KDACell
from recallax.layers.swiglu import SwiGLUMixer
from recallax.models.block import Block, BlockModule
from recallax.models.lm import LM, LMConfig
from recallax.models.pattern import compress_pattern


class KimiLinearLayout(CheckpointLayout):
    """`KimiLinearForCausalLM` of transformers, if all layers are linear and have dense MLPs."""

    architecture = "KimiLinearForCausalLM"

    def from_config_json(self, fields: ConfigFields) -> LMConfig:
        layer_types = fields.required("layer_types", list)
        if "full_attention" in layer_types:
            raise fields.unsupported("layer_types contains 'full_attention', and recallax has no latent attention")
        if "sparse" in fields.required("mlp_layer_types", list):
            raise fields.unsupported("mlp_layer_types contains 'sparse', and recallax has no mixture of experts")
        mixer = KDA(
            num_heads=fields.required("linear_num_heads", int),
            head_k_dim=fields.required("linear_head_dim", int),
            decay_gate="softplus",
            conv_size=fields.required("linear_conv_kernel_dim", int),
            norm_eps=fields.required("rms_norm_eps", float),
        )
        return LMConfig(
            d_model=fields.required("hidden_size", int),
            vocab_size=fields.required("vocab_size", int),
            pattern=compress_pattern(["layer"] * len(layer_types)),
            blocks={"layer": Block(mixer=mixer, channel=decoder_parts.swiglu_config(fields))},
            lm_head=decoder_parts.lm_head_config(fields),
            norm_eps=fields.required("rms_norm_eps", float),
        )

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
