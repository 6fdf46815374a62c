"""Qwen3-Next and Olmo-Hybrid: Gated DeltaNet and SwiGLU in layers normalised before each.

Their attention layers have what recallax's attention has not, so only their linear layers can be imported.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from recallax.layers import GatedDeltaNet
from recallax.layers.gated_delta_net import GatedDeltaNetCell
from recallax.layers.memory import MemoryMixer
from recallax.layers.swiglu import SwiGLUMixer
from recallax.models.block import Block, BlockModule
from recallax.models.importing import decoder
from recallax.models.importing.fields import Fields
from recallax.models.importing.form import TAPS, TRANSPOSED, Form, chain, lazily, parted, reordered
from recallax.models.importing.key_map import Entry, linear, one
from recallax.models.importing.mamba2 import taps
from recallax.models.lm import LM, LMConfig

OLMO_EPS = 1e-5
"""Of Olmo-Hybrid's output norm, whatever its rms_norm_eps."""


def qwen3_next(fields: Fields) -> LMConfig:
    """`Qwen3NextForCausalLM` of linear layers without experts."""
    layers = fields.get("num_hidden_layers", int)
    dense = fields.optional("mlp_only_layers", list, [])
    if fields.values.get("num_experts") != 0 and (sparse := sorted(set(range(layers)) - set(dense))):
        raise fields.refusal(f"layers {sparse} are not in mlp_only_layers, and recallax has no mixture of experts")
    attention = "it is gated, normalises queries and keys, and rotates part of a head"
    return _model(fields, _mixer(fields, fields.get("rms_norm_eps", float), max_beta=1.0), attention)


def olmo_hybrid(fields: Fields) -> LMConfig:
    """`OlmoHybridForCausalLM` of linear layers."""
    negative = fields.optional("linear_allow_neg_eigval", bool, True)
    attention = "it normalises queries and keys, and its layers normalise after each sublayer"
    return _model(fields, _mixer(fields, OLMO_EPS, max_beta=2.0 if negative else 1.0), attention)


def describe(model: LM, layers: Sequence[BlockModule]) -> dict[str, Any]:
    """The config of `Qwen3NextForCausalLM`. (transformers refuses an Olmo-Hybrid without attention layers.)"""
    cell = decoder.parts(decoder.parts(layers, "mixer", MemoryMixer), "cell", GatedDeltaNetCell)[0]
    groups, heads, keys, values = cell.sizes
    return (
        decoder.sizes(model, len(layers))
        | decoder.swiglu_fields(decoder.parts(layers, "channel", SwiGLUMixer)[0])
        | {
            "layer_types": ["linear_attention"] * len(layers),
            "linear_num_key_heads": groups,
            "linear_num_value_heads": heads,
            "linear_key_head_dim": keys,
            "linear_value_head_dim": values,
            "linear_conv_kernel_dim": taps(cell),
            "rms_norm_eps": model.norm.eps,
            "mlp_only_layers": list(range(len(layers))),
        }
    )


def qwen3_next_entries(fields: Fields, model: LMConfig) -> list[Entry]:
    """The key map; norms, but for the one inside the mixer, multiply by 1 + weight."""
    found = decoder.ends(model, "model.embed_tokens", "model.norm", offset=1.0)
    mixer = _mixer(fields, fields.get("rms_norm_eps", float), max_beta=1.0)
    for layer in range(len(model.layers)):
        theirs, ours = f"model.layers.{layer}", f"layers.{layer}"
        found += _block_entries(fields, theirs, ours, offset=1.0)
        found += _qwen3_next_mixer(mixer, model.d_model, f"{theirs}.linear_attn", f"{ours}.mixer")
    return found


def olmo_hybrid_entries(fields: Fields, model: LMConfig) -> list[Entry]:
    """The key map."""
    found = decoder.ends(model, "model.embed_tokens", "model.norm")
    for layer in range(len(model.layers)):
        theirs, ours = f"model.layers.{layer}", f"layers.{layer}"
        found += _block_entries(fields, theirs, ours)
        found += _olmo_hybrid_mixer(f"{theirs}.linear_attn", f"{ours}.mixer")
    return found


def _model(fields: Fields, mixer: GatedDeltaNet, attention: str) -> LMConfig:
    kinds = fields.get("layer_types", list)
    if "full_attention" in kinds:
        raise fields.refusal(f"layer_types holds 'full_attention', which recallax has not: {attention}")
    return LMConfig(
        d_model=fields.get("hidden_size", int),
        vocab_size=fields.get("vocab_size", int),
        pattern=decoder.spelled(["layer"] * len(kinds)),
        blocks={"layer": Block(mixer=mixer, channel=decoder.swiglu(fields))},
        readout=decoder.readout(fields),
        norm_eps=fields.get("rms_norm_eps", float),
    )


def _mixer(fields: Fields, eps: float, max_beta: float) -> GatedDeltaNet:
    return GatedDeltaNet(
        heads=fields.get("linear_num_key_heads", int),
        value_heads=fields.get("linear_num_value_heads", int),
        key_dim=fields.get("linear_key_head_dim", int),
        value_dim=fields.get("linear_value_head_dim", int),
        max_beta=max_beta,
        conv=fields.get("linear_conv_kernel_dim", int),
        eps=eps,
    )


def _block_entries(fields: Fields, theirs: str, ours: str, offset: float = 0.0) -> list[Entry]:
    return [
        decoder.scale(f"{theirs}.input_layernorm", f"{ours}.mixer_norm", offset),
        decoder.scale(f"{theirs}.post_attention_layernorm", f"{ours}.channel_norm", offset),
        *decoder.swiglu_entries(fields.get("intermediate_size", int), f"{theirs}.mlp", f"{ours}.channel"),
    ]


def _cell_entries(theirs: str, ours: str) -> list[Entry]:
    return [
        one(f"{theirs}.conv1d.weight", f"{ours}.cell.conv.taps", TAPS),
        one(f"{theirs}.A_log", f"{ours}.cell.gate.a_log"),
        one(f"{theirs}.dt_bias", f"{ours}.cell.gate.dt_bias"),
    ]


def _qwen3_next_mixer(mixer: GatedDeltaNet, d_model: int, theirs: str, ours: str) -> list[Entry]:
    """Its rows go by key head: that head's q and k, the v and z of its value heads; likewise beta and decay."""
    groups, heads, keys, values = mixer.sizes(d_model)
    share = heads // groups

    def grouped(key: str, names: tuple[str, ...], widths: tuple[int, ...]) -> Entry:
        def by_stream() -> Form:
            rows = np.arange(groups * sum(widths)).reshape(groups, -1)
            parts = np.split(rows, np.cumsum(widths)[:-1], axis=1)
            return reordered(np.concatenate([part.ravel() for part in parts]))

        form = chain(lazily(by_stream), parted(*(groups * width for width in widths)), TRANSPOSED)
        return Entry((f"{theirs}.{key}.weight",), tuple(f"{ours}.{name}.kernel" for name in names), form)

    streams = ("query.parts.q", "writer.parts.k", "writer.parts.v", "readout.gate")
    return [
        grouped("in_proj_qkvz", streams, (keys, keys, share * values, share * values)),
        grouped("in_proj_ba", ("writer.parts.beta", "writer.parts.decay"), (share, share)),
        *_cell_entries(theirs, ours),
        decoder.scale(f"{theirs}.norm", f"{ours}.readout"),
        linear(f"{theirs}.out_proj", f"{ours}.readout.out"),
    ]


def _olmo_hybrid_mixer(theirs: str, ours: str) -> list[Entry]:
    return apart(theirs, ours, _cell_entries(theirs, ours))


def apart(theirs: str, ours: str, cell: list[Entry]) -> list[Entry]:
    """A mixer that keeps its products apart, as OLMo-hybrid and fla do; what its cell has lies between them."""
    return [
        linear(f"{theirs}.q_proj", f"{ours}.query.parts.q"),
        linear(f"{theirs}.k_proj", f"{ours}.writer.parts.k"),
        linear(f"{theirs}.v_proj", f"{ours}.writer.parts.v"),
        linear(f"{theirs}.b_proj", f"{ours}.writer.parts.beta"),
        linear(f"{theirs}.a_proj", f"{ours}.writer.parts.decay"),
        *cell,
        linear(f"{theirs}.g_proj", f"{ours}.readout.gate"),
        decoder.scale(f"{theirs}.o_norm", f"{ours}.readout"),
        linear(f"{theirs}.o_proj", f"{ours}.readout.out"),
    ]
