"""Models of flash-linear-attention: a linear mixer and a SwiGLU in every layer.

All models have the same frame, and one `FLAMixer` describes what differs. Source: `fla/layers` and `fla/models` of
github.com/fla-org/flash-linear-attention, version 0.6.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from recallax.convert.array_transforms import DEPTHWISE_CONV, ArrayTransform, chain, concat_first_axis
from recallax.convert.config_fields import ConfigFields
from recallax.convert.ignored_fields import field_names
from recallax.convert.key_map import KeyMapEntry, linear_entry, parameter_entry
from recallax.convert.layouts import decoder_parts
from recallax.convert.layouts.checkpoint_layout import CheckpointLayout
from recallax.convert.layouts.fla_mixer import FUSED_KERNELS, FLAMixer, norm_eps
from recallax.layers import GLA, HGRN2, KDA, DeltaNet, GatedDeltaNet, GatedDeltaProduct, MixerConfig, SwiGLU
from recallax.layers.swiglu import SwiGLUMixer
from recallax.models.block import Block, BlockModule
from recallax.models.lm import LM, LMConfig

INTERMEDIATE_MULTIPLE = 256
"""An MLP width that is computed from a ratio is rounded up to a multiple of this."""


class FLALayout(CheckpointLayout):
    """The frame of fla's models around one mixer.

    Args:
        mixer: The mixer.
    """

    def __init__(self, mixer: FLAMixer):
        self.mixer = mixer
        self.architecture = mixer.architecture
        self.ignored_fields = field_names(FUSED_KERNELS, mixer.ignored_fields)

    def from_config_json(self, fields: ConfigFields) -> LMConfig:
        fields.require_values("recallax supports one value for this layer", **self.mixer.fixed_fields)
        channel = SwiGLU(intermediate_size=self._intermediate_size(fields))
        block = Block(mixer=self.mixer.from_fields(fields), channel=channel)
        num_layers = fields.num_layers("num_hidden_layers")
        return decoder_parts.uniform_model_config(fields, block, num_layers, norm_eps(fields))

    def key_map(self, fields: ConfigFields, model: LMConfig) -> list[KeyMapEntry]:
        entries = decoder_parts.embedding_and_head_entries(model, "model.embeddings", "model.norm")
        intermediate_size, num_layers = self._intermediate_size(fields), len(model.layer_names)
        for layer in range(num_layers):
            source, target = f"model.layers.{layer}", f"layers.{layer}"
            entries.append(decoder_parts.norm_entry(f"{source}.attn_norm", f"{target}.mixer_norm"))
            entries.append(decoder_parts.norm_entry(f"{source}.mlp_norm", f"{target}.channel_norm"))
            entries += decoder_parts.swiglu_entries(intermediate_size, f"{source}.mlp", f"{target}.channel")
            entries += self._mixer_entries(model, f"{source}.attn", f"{target}.mixer")
        has_lower_bounds = isinstance(model.blocks["layer"].mixer, HGRN2)
        return [*entries, _lower_bounds_entry(num_layers)] if has_lower_bounds else entries

    def to_config_json(self, model: LM, layers: Sequence[BlockModule]) -> dict[str, Any]:
        cell = decoder_parts.collect_cells(layers, self.mixer.cell_class)[0]
        channel = decoder_parts.collect_modules(layers, "channel", SwiGLUMixer)[0]
        return (
            decoder_parts.embedding_fields(model, len(layers))
            | dict(self.mixer.fixed_fields)
            | self.mixer.to_fields(cell, model.embedding.shape[1])
            | {"intermediate_size": channel.out.kernel.shape[0], "norm_eps": model.norm.eps}
        )

    def _intermediate_size(self, fields: ConfigFields) -> int:
        """Read the width of the MLP, which may be given as a ratio."""
        ratio = fields.optional("hidden_ratio", int, self.mixer.hidden_ratio)
        multiples = -(-int(fields.required("hidden_size", int) * ratio * 2 / 3) // INTERMEDIATE_MULTIPLE)
        return fields.optional("intermediate_size", int, multiples * INTERMEDIATE_MULTIPLE)

    def _mixer_entries(self, model: LMConfig, source: str, target: str) -> list[KeyMapEntry]:
        entries = [linear_entry(f"{source}.{key}", f"{target}.{name}") for key, name in self.mixer.projections.items()]
        entries += [
            parameter_entry(f"{source}.{key}", f"{target}.{name}") for key, name in self.mixer.other_parameters.items()
        ]
        entries.append(decoder_parts.norm_entry(f"{source}.{self.mixer.output_norm}", f"{target}.readout"))
        if widths := _conv_widths(model.blocks["layer"].mixer, model.d_model):
            convolutions = tuple(f"{source}.{projection}_conv1d.weight" for projection in "qkv")
            concat = chain(concat_first_axis(*widths), DEPTHWISE_CONV)
            entries.append(KeyMapEntry(convolutions, (f"{target}.cell.conv.taps",), concat))
        return entries


def _conv_widths(mixer: MixerConfig, d_model: int) -> tuple[int, int, int] | None:
    """Return the widths of queries, keys and values; None without a short convolution."""
    if not isinstance(mixer, GLA | DeltaNet | KDA | GatedDeltaNet | GatedDeltaProduct) or not mixer.conv_size:
        return None
    num_heads, num_v_heads, head_k_dim, head_v_dim = mixer.head_dims(d_model)
    steps = mixer.num_householder if isinstance(mixer, GatedDeltaProduct) else 1
    return num_heads * head_k_dim, steps * num_heads * head_k_dim, steps * num_v_heads * head_v_dim


def _lower_bounds_entry(num_layers: int) -> KeyMapEntry:
    """Map HGRN2's learned lower bounds, and compute the bound that each layer of recallax stores for decoding."""

    def forward(arrays: tuple[np.ndarray, ...]) -> tuple[np.ndarray, ...]:
        (logits,) = arrays
        probabilities = np.exp(logits - logits.max(axis=0))
        probabilities /= probabilities.sum(axis=0)
        return logits, *(np.cumsum(probabilities, axis=0) - probabilities[:1])

    bounds = tuple(f"layers.{layer}.mixer.cell.floor" for layer in range(num_layers))
    return KeyMapEntry(
        ("model.lower_bounds",), ("floors.logits", *bounds), ArrayTransform(forward, lambda arrays: arrays[:1])
    )
