"""Kimi Linear: Kimi Delta Attention with the softplus gate, and SwiGLU; without its latent attention and experts."""

from collections.abc import Sequence
from typing import Any

from recallax.layers import KDA
from recallax.layers.kda import KDACell
from recallax.layers.memory import MemoryMixer
from recallax.layers.swiglu import SwiGLUMixer
from recallax.models.block import Block, BlockModule
from recallax.models.importing import decoder
from recallax.models.importing.fields import Fields
from recallax.models.importing.form import TAPS, reshaped
from recallax.models.importing.key_map import Entry, linear, one
from recallax.models.importing.mamba2 import taps
from recallax.models.lm import LM, LMConfig


def kimi_linear(fields: Fields) -> LMConfig:
    """`KimiLinearForCausalLM` of linear layers with dense perceptrons."""
    kinds = fields.get("layer_types", list)
    if "full_attention" in kinds:
        raise fields.refusal("layer_types holds 'full_attention', and recallax has no latent attention")
    if "sparse" in fields.get("mlp_layer_types", list):
        raise fields.refusal("mlp_layer_types holds 'sparse', and recallax has no mixture of experts")
    mixer = KDA(
        heads=fields.get("linear_num_heads", int),
        key_dim=fields.get("linear_head_dim", int),
        gate="softplus",
        conv=fields.get("linear_conv_kernel_dim", int),
        eps=fields.get("rms_norm_eps", float),
    )
    return LMConfig(
        d_model=fields.get("hidden_size", int),
        vocab_size=fields.get("vocab_size", int),
        pattern=decoder.spelled(["layer"] * len(kinds)),
        blocks={"layer": Block(mixer=mixer, channel=decoder.swiglu(fields))},
        readout=decoder.readout(fields),
        norm_eps=fields.get("rms_norm_eps", float),
    )


def describe(model: LM, layers: Sequence[BlockModule]) -> dict[str, Any]:
    """The config of `KimiLinearForCausalLM`."""
    cell = decoder.parts(decoder.parts(layers, "mixer", MemoryMixer), "cell", KDACell)[0]
    return (
        decoder.sizes(model, len(layers))
        | decoder.swiglu_fields(decoder.parts(layers, "channel", SwiGLUMixer)[0])
        | {
            "layer_types": ["linear_attention"] * len(layers),
            "mlp_layer_types": ["dense"] * len(layers),
            "linear_num_heads": cell.sizes.heads,
            "linear_head_dim": cell.sizes.keys,
            "linear_conv_kernel_dim": taps(cell),
            "rms_norm_eps": model.norm.eps,
        }
    )


def entries(fields: Fields, model: LMConfig) -> list[Entry]:
    """The key map."""
    found = decoder.ends(model, "model.embed_tokens", "model.norm")
    heads = fields.get("linear_num_heads", int)
    for layer in range(len(model.layers)):
        theirs, ours = f"model.layers.{layer}", f"layers.{layer}"
        found += _mixer(heads, f"{theirs}.self_attn", f"{ours}.mixer")
        found += decoder.swiglu_entries(fields.get("intermediate_size", int), f"{theirs}.mlp", f"{ours}.channel")
        found.append(decoder.scale(f"{theirs}.input_layernorm", f"{ours}.mixer_norm"))
        found.append(decoder.scale(f"{theirs}.post_attention_layernorm", f"{ours}.channel_norm"))
    return found


def _mixer(heads: int, theirs: str, ours: str) -> list[Entry]:
    return [
        linear(f"{theirs}.q_proj", f"{ours}.query.parts.q"),
        linear(f"{theirs}.k_proj", f"{ours}.writer.parts.k"),
        linear(f"{theirs}.v_proj", f"{ours}.writer.parts.v"),
        linear(f"{theirs}.b_proj", f"{ours}.writer.parts.beta"),
        linear(f"{theirs}.forget_gate.f_a_proj", f"{ours}.writer.parts.decay.down"),
        linear(f"{theirs}.forget_gate.f_b_proj", f"{ours}.writer.parts.decay.up"),
        one(f"{theirs}.conv1d.weight", f"{ours}.cell.conv.taps", TAPS),
        one(f"{theirs}.forget_gate.A_log", f"{ours}.cell.gate.a_log", reshaped((1, 1, heads, 1), (heads,))),
        one(f"{theirs}.forget_gate.dt_bias", f"{ours}.cell.gate.dt_bias"),
        linear(f"{theirs}.g_a_proj", f"{ours}.readout.gate.down"),
        linear(f"{theirs}.g_b_proj", f"{ours}.readout.gate.up"),
        decoder.scale(f"{theirs}.o_norm", f"{ours}.readout"),
        linear(f"{theirs}.o_proj", f"{ours}.readout.out"),
    ]
