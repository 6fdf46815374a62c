"""Llama and Mistral: rotary attention with grouped queries, full or in a sliding window, and SwiGLU."""

from collections.abc import Sequence
from typing import Any

from recallax.convert.config_fields import ConfigFields
from recallax.convert.key_map import KeyMapEntry
from recallax.convert.layouts import attention_parts, decoder_parts
from recallax.convert.layouts.checkpoint_layout import CheckpointLayout
from recallax.layers import Attention, SlidingWindow
from recallax.layers.softmax_attention import SoftmaxAttentionMixer
from recallax.layers.swiglu import SwiGLUMixer
from recallax.models.block import Block, BlockModule
from recallax.models.lm import LM, LMConfig


class LlamaLayout(CheckpointLayout):
    """`LlamaForCausalLM` of transformers."""

    architecture = "LlamaForCausalLM"

    def from_config_json(self, fields: ConfigFields) -> LMConfig:
        return _model_config(fields, attention_parts.attention_config(fields))

    def key_map(self, fields: ConfigFields, model: LMConfig) -> list[KeyMapEntry]:
        intermediate_size = fields.required("intermediate_size", int)
        entries = decoder_parts.embedding_and_head_entries(model, "model.embed_tokens", "model.norm")
        for layer in range(len(model.layer_names)):
            source, target = f"model.layers.{layer}", f"layers.{layer}"
            entries += attention_parts.attention_entries(f"{source}.self_attn", f"{target}.mixer")
            entries += decoder_parts.swiglu_entries(intermediate_size, f"{source}.mlp", f"{target}.channel")
            entries += decoder_parts.block_norm_entries(source, target)
        return entries

    def to_config_json(self, model: LM, layers: Sequence[BlockModule]) -> dict[str, Any]:
        return _shared_fields(model, layers) | {"mlp_bias": False}


class MistralLayout(LlamaLayout):
    """`MistralForCausalLM` of transformers. Its window includes the current token; null means full attention."""

    architecture = "MistralForCausalLM"

    def from_config_json(self, fields: ConfigFields) -> LMConfig:
        fields.require_values("all layers must have the same window", layer_types=None)
        fields.require_present("num_key_value_heads", "sliding_window")
        window = None if fields.get("sliding_window") is None else fields.required("sliding_window", int)
        return _model_config(fields, attention_parts.attention_config(fields, window))

    def to_config_json(self, model: LM, layers: Sequence[BlockModule]) -> dict[str, Any]:
        mixer = decoder_parts.collect_modules(layers, "mixer", SoftmaxAttentionMixer)[0]
        return _shared_fields(model, layers) | {"sliding_window": mixer.window}


def _model_config(fields: ConfigFields, mixer: Attention | SlidingWindow) -> LMConfig:
    fields.require_values("projections have no biases", attention_bias=False, mlp_bias=False)
    block = Block(mixer=mixer, channel=decoder_parts.swiglu_config(fields))
    num_layers, norm_eps = fields.num_layers("num_hidden_layers"), fields.required("rms_norm_eps", float, above=0.0)
    return decoder_parts.uniform_model_config(fields, block, num_layers, norm_eps)


def _shared_fields(model: LM, layers: Sequence[BlockModule]) -> dict[str, Any]:
    mixer = decoder_parts.collect_modules(layers, "mixer", SoftmaxAttentionMixer)[0]
    return (
        decoder_parts.embedding_fields(model, len(layers))
        | attention_parts.attention_fields(mixer)
        | attention_parts.rope_fields(mixer.rope_theta)
        | decoder_parts.swiglu_fields(decoder_parts.collect_modules(layers, "channel", SwiGLUMixer)[0])
        | {"rms_norm_eps": model.norm.eps}
    )
