"""Mamba: one sublayer per layer, and tied embeddings by default."""

from collections.abc import Sequence
from typing import Any

from recallax.convert.array_transforms import DEPTHWISE_CONV
from recallax.convert.config_fields import ConfigFields
from recallax.convert.ignored_fields import STEP_SIZE_INITIALIZATION, field_names
from recallax.convert.key_map import KeyMapEntry, linear_entry, parameter_entry
from recallax.convert.layouts import decoder_parts, mamba2_parts
from recallax.convert.layouts.checkpoint_layout import CheckpointLayout
from recallax.layers import Mamba, NoChannelMixer
from recallax.layers.mamba import MambaMixer
from recallax.models.block import Block, BlockModule
from recallax.models.lm import LM, LMConfig


class MambaLayout(CheckpointLayout):
    """`MambaForCausalLM` of transformers."""

    architecture = "MambaForCausalLM"
    ignored_fields = field_names(STEP_SIZE_INITIALIZATION, mamba2_parts.ORIGINAL_FIELDS)

    def from_config_json(self, fields: ConfigFields) -> LMConfig:
        fields.require_values("projections have no biases", use_bias=False)
        fields.require_values("the convolution has a bias", use_conv_bias=True)
        fields.require_values("convolution and gate are followed by silu", hidden_act="silu")
        dt_rank, expand = fields.get("time_step_rank"), fields.required("expand", int)
        mamba2_parts.check_original_fields(fields, expand * fields.required("hidden_size", int))
        mixer = Mamba(
            state_dim=fields.required("state_size", int),
            expand=expand,
            conv_size=fields.required("conv_kernel", int),
            dt_rank=None if dt_rank in (None, "auto") else fields.required("time_step_rank", int),
        )
        block = Block(mixer=mixer, channel=NoChannelMixer())
        num_layers = fields.num_layers("num_hidden_layers")
        norm_eps = fields.required("layer_norm_epsilon", float, above=0.0)
        return decoder_parts.uniform_model_config(
            fields, block, num_layers, norm_eps, name="mamba", tied_by_default=True
        )

    def key_map(self, fields: ConfigFields, model: LMConfig) -> list[KeyMapEntry]:
        entries = decoder_parts.embedding_and_head_entries(model, "backbone.embeddings", "backbone.norm_f")
        for layer in range(len(model.layer_names)):
            source, target = f"backbone.layers.{layer}", f"layers.{layer}"
            entries.append(decoder_parts.norm_entry(f"{source}.norm", f"{target}.mixer_norm"))
            entries += _mixer_entries(f"{source}.mixer", f"{target}.mixer")
        return entries

    def to_config_json(self, model: LM, layers: Sequence[BlockModule]) -> dict[str, Any]:
        mixer = decoder_parts.collect_modules(layers, "mixer", MambaMixer)[0]
        d_model, intermediate_size = model.embedding.shape[1], mixer.d.shape[0]
        return decoder_parts.embedding_fields(model, len(layers)) | {
            "state_size": mixer.state_dim,
            "expand": decoder_parts.integer_ratio(intermediate_size, d_model),
            "conv_kernel": mixer.conv.taps.shape[0],
            "time_step_rank": mixer.dt_rank,
            "use_bias": False,
            "use_conv_bias": True,
            "hidden_act": "silu",
            "layer_norm_epsilon": model.norm.eps,
        }


def _mixer_entries(source: str, target: str) -> list[KeyMapEntry]:
    return [
        linear_entry(f"{source}.in_proj", f"{target}.input"),
        parameter_entry(f"{source}.conv1d.weight", f"{target}.conv.taps", DEPTHWISE_CONV),
        parameter_entry(f"{source}.conv1d.bias", f"{target}.conv.bias"),
        linear_entry(f"{source}.x_proj", f"{target}.select"),
        linear_entry(f"{source}.dt_proj", f"{target}.dt"),
        parameter_entry(f"{source}.dt_proj.bias", f"{target}.dt_bias"),
        parameter_entry(f"{source}.A_log", f"{target}.a_log"),
        parameter_entry(f"{source}.D", f"{target}.d"),
        linear_entry(f"{source}.out_proj", f"{target}.out"),
    ]
