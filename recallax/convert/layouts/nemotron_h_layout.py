"""Nemotron-H: Mamba-2, attention without positions, and squared-ReLU MLPs, with one sublayer per layer."""

from collections.abc import Sequence
from typing import Any

from recallax.config import ConfigError
from recallax.convert.config_fields import ConfigFields
from recallax.convert.ignored_fields import EXPERT_FIELDS, STEP_SIZE_INITIALIZATION, IgnoredFields, field_names
from recallax.convert.key_map import KeyMapEntry, linear_entry
from recallax.convert.layouts import attention_parts, decoder_parts, mamba2_parts
from recallax.convert.layouts.checkpoint_layout import CheckpointLayout
from recallax.layers import Mamba2, MixerConfig, NoChannelMixer, ReLUSquared
from recallax.layers.mamba2 import Mamba2Cell
from recallax.layers.memory import MemoryMixer
from recallax.layers.relu_squared import ReLUSquaredMixer
from recallax.layers.softmax_attention import SoftmaxAttentionMixer
from recallax.models.block import Block, BlockModule
from recallax.models.lm import LM, LMConfig
from recallax.models.pattern import compress_pattern

BLOCK_NAMES = {"linear_attention": "mamba", "full_attention": "attention", "mlp": "mlp"}
"""Block names by the layer type of config.json."""
LAYER_TYPES = {MemoryMixer: "linear_attention", SoftmaxAttentionMixer: "full_attention", ReLUSquaredMixer: "mlp"}
"""Layer types of config.json by mixer."""

UNUSED_FIELDS: IgnoredFields = {
    "transformers does not read it": ("expand", "time_step_limit"),
    "it describes layers for the prediction of further tokens, of which there are none": ("mtp_layers_block_type",),
}


class NemotronHLayout(CheckpointLayout):
    """`NemotronHForCausalLM` of transformers without experts."""

    architecture = "NemotronHForCausalLM"
    ignored_fields = field_names(EXPERT_FIELDS, STEP_SIZE_INITIALIZATION, UNUSED_FIELDS)

    def from_config_json(self, fields: ConfigFields) -> LMConfig:
        fields.require_values("projections have no biases", use_bias=False, attention_bias=False, mlp_bias=False)
        fields.require_values("the convolution has a bias", use_conv_bias=True)
        fields.require_values("convolution and gate are followed by silu", mamba_hidden_act="silu")
        fields.require_values("the MLP squares its ReLU", mlp_hidden_act="relu2")
        fields.require_values("its attention has no window", sliding_window=None)
        fields.require_values("projections have no biases", mamba_proj_bias=False)
        fields.require_values("recallax predicts one token", num_nextn_predict_layers=0)
        attention_parts.unscaled_rope_parameters(fields)
        fields.require_present("num_key_value_heads", "head_dim")
        mixers: dict[str, MixerConfig] = {
            "mamba": _mamba2_config(fields),
            "attention": attention_parts.attention_config(fields, rotary=False),
            "mlp": ReLUSquared(intermediate_size=fields.required("intermediate_size", int)),
        }
        layers = _block_names(fields)
        return LMConfig(
            d_model=fields.required("hidden_size", int),
            vocab_size=fields.required("vocab_size", int),
            pattern=compress_pattern(layers),
            blocks={
                name: Block(mixer=mixer, channel=NoChannelMixer()) for name, mixer in mixers.items() if name in layers
            },
            lm_head=decoder_parts.lm_head_config(fields),
            norm_eps=fields.required("layer_norm_epsilon", float, above=0.0),
        )

    def key_map(self, fields: ConfigFields, model: LMConfig) -> list[KeyMapEntry]:
        entries = decoder_parts.embedding_and_head_entries(model, "model.embeddings", "model.norm_f")
        for layer, block in enumerate(model.layer_names):
            source, target = f"model.layers.{layer}", f"layers.{layer}"
            entries.append(decoder_parts.norm_entry(f"{source}.norm", f"{target}.mixer_norm"))
            entries += _mixer_entries(model.blocks[block].mixer, model.d_model, f"{source}.mixer", f"{target}.mixer")
        return entries

    def to_config_json(self, model: LM, layers: Sequence[BlockModule]) -> dict[str, Any]:
        layer_types = [LAYER_TYPES.get(type(layer.mixer)) for layer in layers]
        if None in layer_types:
            number = layer_types.index(None)
            name = type(layers[number].mixer).__name__
            raise ConfigError(f"layer {number} has the mixer {name}, which this layout does not support")
        by_type = {
            layer_type: [layer for layer, t in zip(layers, layer_types, strict=True) if t == layer_type]
            for layer_type in BLOCK_NAMES
        }
        return (
            decoder_parts.embedding_fields(model, len(layers))
            | _mixer_fields(by_type)
            | {
                "layers_block_type": layer_types,
                "use_bias": False,
                "use_conv_bias": True,
                "attention_bias": False,
                "mlp_bias": False,
                "mlp_hidden_act": "relu2",
                "mamba_hidden_act": "silu",
                "layer_norm_epsilon": model.norm.eps,
            }
        )


def _mixer_fields(by_type: dict[str, list[BlockModule]]) -> dict[str, Any]:
    """Return the sizes of the three mixers; the sizes of a mixer that no layer has are 1."""
    fields: dict[str, Any] = {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 1, "intermediate_size": 1}
    fields |= dict.fromkeys(("mamba_num_heads", "mamba_head_dim", "n_groups", "ssm_state_size", "conv_kernel"), 1)
    fields["time_step_min"] = 0.0
    if attention := decoder_parts.collect_modules(by_type["full_attention"], "mixer", SoftmaxAttentionMixer):
        fields |= attention_parts.attention_fields(attention[0])
    if mlps := decoder_parts.collect_modules(by_type["mlp"], "mixer", ReLUSquaredMixer):
        fields["intermediate_size"] = mlps[0].up.kernel.shape[1]
    if cells := decoder_parts.collect_cells(by_type["linear_attention"], Mamba2Cell):
        num_groups, num_heads, state_dim, head_dim = cells[0].head_dims
        fields |= {"mamba_num_heads": num_heads, "mamba_head_dim": head_dim, "n_groups": num_groups}
        fields |= {"ssm_state_size": state_dim, "conv_kernel": mamba2_parts.conv_size_of(cells[0])}
        fields["time_step_min"] = cells[0].gate.dt_limit[0]
    return fields


def _block_names(fields: ConfigFields) -> list[str]:
    return [BLOCK_NAMES[layer_type] for layer_type in fields.layer_types("layers_block_type", BLOCK_NAMES)]


def _mamba2_config(fields: ConfigFields) -> Mamba2:
    head_dim, num_heads = fields.required("mamba_head_dim", int), fields.required("mamba_num_heads", int)
    num_groups = fields.required("n_groups", int)
    fields.require_multiple("mamba_num_heads", num_heads, "n_groups", num_groups)
    return Mamba2(
        state_dim=fields.required("ssm_state_size", int),
        head_dim=head_dim,
        num_groups=num_groups,
        intermediate_size=num_heads * head_dim,
        conv_size=fields.required("conv_kernel", int),
        # transformers clips at the smallest initial step size and ignores time_step_limit.
        dt_limit=(fields.required("time_step_min", float), None),
        norm_eps=fields.required("layer_norm_epsilon", float, above=0.0),
    )


def _mixer_entries(mixer: MixerConfig, d_model: int, source: str, target: str) -> list[KeyMapEntry]:
    if isinstance(mixer, Mamba2):
        return mamba2_parts.mamba2_mixer_entries(mixer, d_model, source, target)
    if isinstance(mixer, ReLUSquared):
        return [linear_entry(f"{source}.up_proj", f"{target}.up"), linear_entry(f"{source}.down_proj", f"{target}.out")]
    return attention_parts.attention_entries(source, target)
