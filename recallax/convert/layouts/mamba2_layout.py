"""Mamba-2: one sublayer per layer."""

from collections.abc import Sequence
from typing import Any

from recallax.convert.config_fields import ConfigFields
from recallax.convert.ignored_fields import STEP_SIZE_INITIALIZATION, field_names
from recallax.convert.key_map import KeyMapEntry
from recallax.convert.layouts import decoder_parts, mamba2_parts
from recallax.convert.layouts.checkpoint_layout import CheckpointLayout
from recallax.layers import Mamba2, NoChannelMixer
from recallax.layers.mamba2 import Mamba2Cell
from recallax.models.block import Block, BlockModule
from recallax.models.lm import LM, LMConfig


class Mamba2Layout(CheckpointLayout):
    """`Mamba2ForCausalLM` of transformers."""

    architecture = "Mamba2ForCausalLM"
    ignored_fields = field_names(STEP_SIZE_INITIALIZATION, mamba2_parts.ORIGINAL_FIELDS)

    def from_config_json(self, fields: ConfigFields) -> LMConfig:
        fields.require_values("projections have no biases", use_bias=False)
        fields.require_values("the convolution has a bias", use_conv_bias=True)
        fields.require_values("convolution and gate are followed by silu", hidden_act="silu")
        fields.require_values("its norm is applied to the gated output", rms_norm=True, norm_before_gate=False)
        norm_eps = fields.required("layer_norm_epsilon", float, above=0.0)
        num_heads, num_groups = fields.required("num_heads", int), fields.required("n_groups", int)
        fields.require_multiple("num_heads", num_heads, "n_groups", num_groups)
        head_dim, expand = fields.required("head_dim", int), fields.optional("expand", int, 2)
        mamba2_parts.check_original_fields(fields, num_heads * head_dim)
        if expand * fields.required("hidden_size", int) != num_heads * head_dim:
            raise fields.unsupported(
                f"num_heads is {num_heads} and head_dim {head_dim}; their product must be that of expand {expand} and "
                "hidden_size"
            )
        mixer = Mamba2(
            state_dim=fields.required("state_size", int),
            head_dim=head_dim,
            num_groups=num_groups,
            intermediate_size=num_heads * head_dim,
            conv_size=fields.required("conv_kernel", int),
            dt_limit=mamba2_parts.parse_dt_limit(fields),
            norm_eps=norm_eps,
        )
        block, num_layers = Block(mixer=mixer, channel=NoChannelMixer()), fields.num_layers("num_hidden_layers")
        return decoder_parts.uniform_model_config(fields, block, num_layers, norm_eps, name="mamba")

    def key_map(self, fields: ConfigFields, model: LMConfig) -> list[KeyMapEntry]:
        entries = decoder_parts.embedding_and_head_entries(model, "backbone.embeddings", "backbone.norm_f")
        mixer = model.blocks["mamba"].mixer
        assert isinstance(mixer, Mamba2)
        for layer in range(len(model.layer_names)):
            source, target = f"backbone.layers.{layer}", f"layers.{layer}"
            entries.append(decoder_parts.norm_entry(f"{source}.norm", f"{target}.mixer_norm"))
            entries += mamba2_parts.mamba2_mixer_entries(mixer, model.d_model, f"{source}.mixer", f"{target}.mixer")
        return entries

    def to_config_json(self, model: LM, layers: Sequence[BlockModule]) -> dict[str, Any]:
        cell = decoder_parts.collect_cells(layers, Mamba2Cell)[0]
        num_groups, num_heads, state_dim, head_dim = cell.head_dims
        return decoder_parts.embedding_fields(model, len(layers)) | {
            "state_size": state_dim,
            "n_groups": num_groups,
            "num_heads": num_heads,
            "head_dim": head_dim,
            "expand": decoder_parts.integer_ratio(num_heads * head_dim, model.embedding.shape[1]),
            "conv_kernel": mamba2_parts.conv_size_of(cell),
            "time_step_limit": list(cell.gate.dt_limit),
            "use_bias": False,
            "use_conv_bias": True,
            "hidden_act": "silu",
            "layer_norm_epsilon": model.norm.eps,
        }
