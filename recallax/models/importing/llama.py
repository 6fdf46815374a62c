"""Llama and Mistral: rotary attention with grouped queries, over everything or over a window, and SwiGLU."""

from collections.abc import Sequence
from typing import Any

from recallax.layers import Attention, SlidingWindow
from recallax.layers.softmax import SoftmaxMixer
from recallax.layers.swiglu import SwiGLUMixer
from recallax.models.block import Block, BlockModule
from recallax.models.importing import decoder
from recallax.models.importing.fields import Fields
from recallax.models.importing.key_map import Entry
from recallax.models.lm import LM, LMConfig


def llama(fields: Fields) -> LMConfig:
    """`LlamaForCausalLM`."""
    return _model(fields, decoder.softmax(fields))


def mistral(fields: Fields) -> LMConfig:
    """`MistralForCausalLM`; its window counts the token itself, as ours does. A null window is none."""
    fields.demand("all layers have the same window", layer_types=None)
    fields.demand_stated("num_key_value_heads", "sliding_window")
    window = fields.get("sliding_window", int) if fields.values["sliding_window"] is not None else None
    return _model(fields, decoder.softmax(fields, window))


def describe_llama(model: LM, layers: Sequence[BlockModule]) -> dict[str, Any]:
    """The config of `LlamaForCausalLM`."""
    return _described(model, layers) | {"mlp_bias": False}


def describe_mistral(model: LM, layers: Sequence[BlockModule]) -> dict[str, Any]:
    """The config of `MistralForCausalLM`."""
    fields = _described(model, layers)
    return fields | {"sliding_window": decoder.parts(layers, "mixer", SoftmaxMixer)[0].window}


def entries(fields: Fields, model: LMConfig) -> list[Entry]:
    """The key map of both."""
    found = decoder.ends(model, "model.embed_tokens", "model.norm")
    for layer in range(len(model.layers)):
        theirs, ours = f"model.layers.{layer}", f"layers.{layer}"
        found += decoder.softmax_entries(f"{theirs}.self_attn", f"{ours}.mixer")
        found += decoder.swiglu_entries(fields.get("intermediate_size", int), f"{theirs}.mlp", f"{ours}.channel")
        found.append(decoder.scale(f"{theirs}.input_layernorm", f"{ours}.mixer_norm"))
        found.append(decoder.scale(f"{theirs}.post_attention_layernorm", f"{ours}.channel_norm"))
    return found


def _model(fields: Fields, mixer: Attention | SlidingWindow) -> LMConfig:
    fields.demand("projections have no biases", attention_bias=False, mlp_bias=False)
    return LMConfig(
        d_model=fields.get("hidden_size", int),
        vocab_size=fields.get("vocab_size", int),
        pattern=decoder.spelled(["layer"] * fields.get("num_hidden_layers", int)),
        blocks={"layer": Block(mixer=mixer, channel=decoder.swiglu(fields))},
        readout=decoder.readout(fields),
        norm_eps=fields.get("rms_norm_eps", float),
    )


def _described(model: LM, layers: Sequence[BlockModule]) -> dict[str, Any]:
    mixer = decoder.parts(layers, "mixer", SoftmaxMixer)[0]
    return (
        decoder.sizes(model, len(layers))
        | decoder.softmax_fields(mixer)
        | decoder.rotary_fields(mixer.base)
        | decoder.swiglu_fields(decoder.parts(layers, "channel", SwiGLUMixer)[0])
        | {"rms_norm_eps": model.norm.eps}
    )
