"""Nemotron-H: Mamba-2, attention without positions and squared-ReLU perceptrons, one sublayer a layer."""

from collections.abc import Sequence
from typing import Any

from recallax.config import ConfigError, suggest_name
from recallax.convert.config_fields import ConfigFields
from recallax.convert.key_map import KeyMapEntry, linear_entry
from recallax.convert.layouts import decoder_parts
from recallax.convert.layouts.mamba2_layout import conv_size_of, mamba2_cells, mamba2_mixer_entries
from recallax.layers import Mamba2, MixerConfig, NoChannelMixer, ReLUSquared
from recallax.layers.memory import MemoryMixer
from recallax.layers.relu_squared import ReLUSquaredMixer
from recallax.layers.softmax_attention import SoftmaxAttentionMixer
from recallax.models.block import Block, BlockModule
from recallax.models.lm import LM, LMConfig

BLOCK_NAMES = {"linear_attention": "mamba", "full_attention": "attention", "mlp": "mlp"}


def from_config_json(fields: ConfigFields) -> LMConfig:
    """`NemotronHForCausalLM` without experts."""
    fields.require_values("projections have no biases", use_bias=False, attention_bias=False, mlp_bias=False)
    fields.require_values("the convolution has a bias", use_conv_bias=True)
    fields.require_values("convolution and gate are followed by silu", mamba_hidden_act="silu")
    fields.require_values("the perceptron squares its ReLU", mlp_hidden_act="relu2")
    fields.require_values("its attention reads everything", sliding_window=None)
    fields.require_present("num_key_value_heads", "head_dim")
    parts: dict[str, MixerConfig] = {
        "mamba": _mamba2_config(fields),
        "attention": decoder_parts.attention_config(fields, rotary=False),
        "mlp": ReLUSquared(intermediate_size=fields.required("intermediate_size", int)),
    }
    layers = _block_names(fields)
    return LMConfig(
        d_model=fields.required("hidden_size", int),
        vocab_size=fields.required("vocab_size", int),
        pattern=decoder_parts.compress_pattern(layers),
        blocks={name: Block(mixer=part, channel=NoChannelMixer()) for name, part in parts.items() if name in layers},
        lm_head=decoder_parts.lm_head_config(fields),
        norm_eps=fields.required("layer_norm_epsilon", float),
    )


LAYER_TYPES = {MemoryMixer: "linear_attention", SoftmaxAttentionMixer: "full_attention", ReLUSquaredMixer: "mlp"}


def to_config_json(model: LM, layers: Sequence[BlockModule]) -> dict[str, Any]:
    """The config of `NemotronHForCausalLM`; what no layer has is left at 1."""
    kinds = [LAYER_TYPES.get(type(layer.mixer)) for layer in layers]
    if None in kinds:
        name = type(layers[kinds.index(None)].mixer).__name__
        raise ConfigError(f"layer {kinds.index(None)} has the mixer {name}, which this layout has not")
    of = {kind: [layer for layer, k in zip(layers, kinds, strict=True) if k == kind] for kind in BLOCK_NAMES}
    fields: dict[str, Any] = {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 1, "intermediate_size": 1}
    fields |= dict.fromkeys(("mamba_num_heads", "mamba_head_dim", "n_groups", "ssm_state_size", "conv_kernel"), 1)
    fields["time_step_min"] = 0.0
    if of["full_attention"]:
        fields |= decoder_parts.attention_fields(
            decoder_parts.collect_modules(of["full_attention"], "mixer", SoftmaxAttentionMixer)[0]
        )
    if of["mlp"]:
        fields["intermediate_size"] = decoder_parts.collect_modules(of["mlp"], "mixer", ReLUSquaredMixer)[
            0
        ].up.kernel.shape[1]
    if of["linear_attention"]:
        cell = mamba2_cells(of["linear_attention"])[0]
        groups, heads, keys, values = cell.head_dims
        fields |= {"mamba_num_heads": heads, "mamba_head_dim": values, "n_groups": groups, "ssm_state_size": keys}
        fields |= {"conv_kernel": conv_size_of(cell), "time_step_min": cell.gate.dt_limit[0]}
    return (
        decoder_parts.embedding_fields(model, len(layers))
        | fields
        | {
            "layers_block_type": kinds,
            "use_bias": False,
            "use_conv_bias": True,
            "attention_bias": False,
            "mlp_bias": False,
            "mlp_hidden_act": "relu2",
            "mamba_hidden_act": "silu",
            "layer_norm_epsilon": model.norm.eps,
        }
    )


def key_map(fields: ConfigFields, model: LMConfig) -> list[KeyMapEntry]:
    """The key map."""
    found = decoder_parts.embedding_and_head_entries(model, "model.embeddings", "model.norm_f")
    for layer, block in enumerate(model.layer_names):
        theirs, ours = f"model.layers.{layer}", f"layers.{layer}"
        found.append(decoder_parts.norm_entry(f"{theirs}.norm", f"{ours}.mixer_norm"))
        found += _mixer_entries(model.blocks[block].mixer, model.d_model, f"{theirs}.mixer", f"{ours}.mixer")
    return found


def _block_names(fields: ConfigFields) -> list[str]:
    kinds = fields.required("layers_block_type", list)
    for kind in kinds:
        if kind not in BLOCK_NAMES:
            raise fields.unsupported(
                f"layers_block_type holds {kind!r}, which recallax has not{suggest_name(kind, [*BLOCK_NAMES])}"
            )
    return [BLOCK_NAMES[kind] for kind in kinds]


def _mamba2_config(fields: ConfigFields) -> Mamba2:
    width = fields.required("mamba_head_dim", int)
    return Mamba2(
        state_dim=fields.required("ssm_state_size", int),
        head_dim=width,
        num_groups=fields.required("n_groups", int),
        intermediate_size=fields.required("mamba_num_heads", int) * width,
        conv_size=fields.required("conv_kernel", int),
        # transformers clips at the smallest initial step size and ignores time_step_limit.
        dt_limit=(fields.required("time_step_min", float), None),
        norm_eps=fields.required("layer_norm_epsilon", float),
    )


def _mixer_entries(mixer: MixerConfig, d_model: int, source: str, target: str) -> list[KeyMapEntry]:
    if isinstance(mixer, Mamba2):
        return mamba2_mixer_entries(mixer, d_model, source, target)
    if isinstance(mixer, ReLUSquared):
        return [linear_entry(f"{source}.up_proj", f"{target}.up"), linear_entry(f"{source}.down_proj", f"{target}.out")]
    return decoder_parts.attention_entries(source, target)
