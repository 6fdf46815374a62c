"""Nemotron-H: Mamba-2, attention without positions and squared-ReLU perceptrons, one sublayer a layer."""

from collections.abc import Sequence
from typing import Any

from recallax.config import ConfigError, nearest
from recallax.layers import Mamba2, MixerConfig, Nothing, ReLUSquared
from recallax.layers.memory import MemoryMixer
from recallax.layers.relu_squared import ReLUSquaredMixer
from recallax.layers.softmax import SoftmaxMixer
from recallax.models.block import Block, BlockModule
from recallax.models.importing import decoder
from recallax.models.importing.fields import Fields
from recallax.models.importing.key_map import Entry, linear
from recallax.models.importing.mamba2 import cells, mixer_entries, taps
from recallax.models.lm import LM, LMConfig

BLOCKS = {"linear_attention": "mamba", "full_attention": "attention", "mlp": "mlp"}


def nemotron_h(fields: Fields) -> LMConfig:
    """`NemotronHForCausalLM` without experts."""
    fields.demand("projections have no biases", use_bias=False, attention_bias=False, mlp_bias=False)
    fields.demand("the convolution has a bias", use_conv_bias=True)
    fields.demand("convolution and gate are followed by silu", mamba_hidden_act="silu")
    fields.demand("the perceptron squares its ReLU", mlp_hidden_act="relu2")
    fields.demand("its attention reads everything", sliding_window=None)
    fields.demand_stated("num_key_value_heads", "head_dim")
    parts: dict[str, MixerConfig] = {
        "mamba": _mamba(fields),
        "attention": decoder.softmax(fields, rotary=False),
        "mlp": ReLUSquared(inner=fields.get("intermediate_size", int)),
    }
    layers = _layers(fields)
    return LMConfig(
        d_model=fields.get("hidden_size", int),
        vocab_size=fields.get("vocab_size", int),
        pattern=decoder.spelled(layers),
        blocks={name: Block(mixer=part, channel=Nothing()) for name, part in parts.items() if name in layers},
        readout=decoder.readout(fields),
        norm_eps=fields.get("layer_norm_epsilon", float),
    )


KINDS = {MemoryMixer: "linear_attention", SoftmaxMixer: "full_attention", ReLUSquaredMixer: "mlp"}


def describe(model: LM, layers: Sequence[BlockModule]) -> dict[str, Any]:
    """The config of `NemotronHForCausalLM`; what no layer has is left at 1."""
    kinds = [KINDS.get(type(layer.mixer)) for layer in layers]
    if None in kinds:
        name = type(layers[kinds.index(None)].mixer).__name__
        raise ConfigError(f"layer {kinds.index(None)} has the mixer {name}, which this layout has not")
    of = {kind: [layer for layer, k in zip(layers, kinds, strict=True) if k == kind] for kind in BLOCKS}
    fields: dict[str, Any] = {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 1, "intermediate_size": 1}
    fields |= dict.fromkeys(("mamba_num_heads", "mamba_head_dim", "n_groups", "ssm_state_size", "conv_kernel"), 1)
    fields["time_step_min"] = 0.0
    if of["full_attention"]:
        fields |= decoder.softmax_fields(decoder.parts(of["full_attention"], "mixer", SoftmaxMixer)[0])
    if of["mlp"]:
        fields["intermediate_size"] = decoder.parts(of["mlp"], "mixer", ReLUSquaredMixer)[0].up.kernel.shape[1]
    if of["linear_attention"]:
        cell = cells(of["linear_attention"])[0]
        groups, heads, keys, values = cell.sizes
        fields |= {"mamba_num_heads": heads, "mamba_head_dim": values, "n_groups": groups, "ssm_state_size": keys}
        fields |= {"conv_kernel": taps(cell), "time_step_min": cell.gate.limit[0]}
    return (
        decoder.sizes(model, len(layers))
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


def entries(fields: Fields, model: LMConfig) -> list[Entry]:
    """The key map."""
    found = decoder.ends(model, "model.embeddings", "model.norm_f")
    for layer, block in enumerate(model.layers):
        theirs, ours = f"model.layers.{layer}", f"layers.{layer}"
        found.append(decoder.scale(f"{theirs}.norm", f"{ours}.mixer_norm"))
        found += _mixer_entries(model.blocks[block].mixer, model.d_model, f"{theirs}.mixer", f"{ours}.mixer")
    return found


def _layers(fields: Fields) -> list[str]:
    kinds = fields.get("layers_block_type", list)
    for kind in kinds:
        if kind not in BLOCKS:
            raise fields.refusal(f"layers_block_type holds {kind!r}, which recallax has not{nearest(kind, [*BLOCKS])}")
    return [BLOCKS[kind] for kind in kinds]


def _mamba(fields: Fields) -> Mamba2:
    width = fields.get("mamba_head_dim", int)
    return Mamba2(
        state_dim=fields.get("ssm_state_size", int),
        head_dim=width,
        groups=fields.get("n_groups", int),
        inner=fields.get("mamba_num_heads", int) * width,
        conv=fields.get("conv_kernel", int),
        # transformers clips at the smallest initial step size and ignores time_step_limit.
        dt_limit=(fields.get("time_step_min", float), None),
        eps=fields.get("layer_norm_epsilon", float),
    )


def _mixer_entries(mixer: MixerConfig, d_model: int, theirs: str, ours: str) -> list[Entry]:
    if isinstance(mixer, Mamba2):
        return mixer_entries(mixer, d_model, theirs, ours)
    if isinstance(mixer, ReLUSquared):
        return [linear(f"{theirs}.up_proj", f"{ours}.up"), linear(f"{theirs}.down_proj", f"{ours}.out")]
    return decoder.softmax_entries(theirs, ours)
