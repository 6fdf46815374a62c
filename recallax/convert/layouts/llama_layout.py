"""Llama and Mistral: rotary attention with grouped queries, over everything or over a window, and SwiGLU."""

from collections.abc import Sequence
from typing import Any

from recallax.convert.config_fields import ConfigFields
from recallax.convert.key_map import KeyMapEntry
from recallax.convert.layouts import decoder_parts
from recallax.layers import Attention, SlidingWindow
from recallax.layers.softmax_attention import SoftmaxAttentionMixer
from recallax.layers.swiglu import SwiGLUMixer
from recallax.models.block import Block, BlockModule
from recallax.models.lm import LM, LMConfig


def llama_from_config_json(fields: ConfigFields) -> LMConfig:
    """`LlamaForCausalLM`."""
    return _model_config(fields, decoder_parts.attention_config(fields))


def mistral_from_config_json(fields: ConfigFields) -> LMConfig:
    """`MistralForCausalLM`; its window counts the token itself, as ours does. A null window is none."""
    fields.require_values("all layers have the same window", layer_types=None)
    fields.require_present("num_key_value_heads", "sliding_window")
    window = fields.required("sliding_window", int) if fields.values["sliding_window"] is not None else None
    return _model_config(fields, decoder_parts.attention_config(fields, window))


def llama_to_config_json(model: LM, layers: Sequence[BlockModule]) -> dict[str, Any]:
    """The config of `LlamaForCausalLM`."""
    return _shared_config_json(model, layers) | {"mlp_bias": False}


def mistral_to_config_json(model: LM, layers: Sequence[BlockModule]) -> dict[str, Any]:
    """The config of `MistralForCausalLM`."""
    fields = _shared_config_json(model, layers)
    return fields | {"sliding_window": decoder_parts.collect_modules(layers, "mixer", SoftmaxAttentionMixer)[0].window}


def key_map(fields: ConfigFields, model: LMConfig) -> list[KeyMapEntry]:
    """The key map of both."""
    found = decoder_parts.embedding_and_head_entries(model, "model.embed_tokens", "model.norm")
    for layer in range(len(model.layer_names)):
        theirs, ours = f"model.layers.{layer}", f"layers.{layer}"
        found += decoder_parts.attention_entries(f"{theirs}.self_attn", f"{ours}.mixer")
        found += decoder_parts.swiglu_entries(
            fields.required("intermediate_size", int), f"{theirs}.mlp", f"{ours}.channel"
        )
        found.append(decoder_parts.norm_entry(f"{theirs}.input_layernorm", f"{ours}.mixer_norm"))
        found.append(decoder_parts.norm_entry(f"{theirs}.post_attention_layernorm", f"{ours}.channel_norm"))
    return found


def _model_config(fields: ConfigFields, mixer: Attention | SlidingWindow) -> LMConfig:
    fields.require_values("projections have no biases", attention_bias=False, mlp_bias=False)
    return LMConfig(
        d_model=fields.required("hidden_size", int),
        vocab_size=fields.required("vocab_size", int),
        pattern=decoder_parts.compress_pattern(["layer"] * fields.required("num_hidden_layers", int)),
        blocks={"layer": Block(mixer=mixer, channel=decoder_parts.swiglu_config(fields))},
        lm_head=decoder_parts.lm_head_config(fields),
        norm_eps=fields.required("rms_norm_eps", float),
    )


def _shared_config_json(model: LM, layers: Sequence[BlockModule]) -> dict[str, Any]:
    mixer = decoder_parts.collect_modules(layers, "mixer", SoftmaxAttentionMixer)[0]
    return (
        decoder_parts.embedding_fields(model, len(layers))
        | decoder_parts.attention_fields(mixer)
        | decoder_parts.rope_fields(mixer.rope_theta)
        | decoder_parts.swiglu_fields(decoder_parts.collect_modules(layers, "channel", SwiGLUMixer)[0])
        | {"rms_norm_eps": model.norm.eps}
    )
