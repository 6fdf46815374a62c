"""BASED in HazyResearch's format: a GPT-2 config with up to three mixers.

`alt_mixer_2_layers` take precedence over `alt_mixer_layers`; the other layers have `mixer`. Source:
github.com/HazyResearch/based at 32c1bd4 (`based/models/gpt.py`, `based/models/mixers/convolution.py`,
`linear_attention.py`, `slide_attention.py`, `train/models/mlp.py`).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from recallax.convert.array_transforms import TRANSPOSE, ArrayTransform, chain, lazy_transform, permute_first_axis
from recallax.convert.config_fields import ConfigFields
from recallax.convert.ignored_fields import IgnoredFields, field_names
from recallax.convert.key_map import KeyMapEntry, linear_entry, parameter_entry
from recallax.convert.layouts import attention_parts, based_mixers, decoder_parts
from recallax.convert.layouts.based_mixers import BLOCK_NAMES, MIXER_SLOTS
from recallax.convert.layouts.checkpoint_layout import CheckpointLayout
from recallax.external_file import short_repr
from recallax.layers import SwiGLU
from recallax.layers.softmax_attention import SoftmaxAttentionMixer
from recallax.layers.swiglu import SwiGLUMixer
from recallax.models.block import Block, BlockModule
from recallax.models.lm import LM, LMConfig
from recallax.models.lm_head import TiedModule
from recallax.models.pattern import compress_pattern

MLP_MULTIPLE_OF = 256
"""The width of the MLP is rounded up to a multiple of this."""

FIXED_FIELDS: dict[str, tuple[Any, Any]] = {
    "activation_function": ("gelu_new", "swiglu"),
    "rms_norm": (False, True),
    "mlp_fc1_bias": (True, False),
    "mlp_fc2_bias": (True, False),
    "qkv_proj_bias": (True, False),
    "out_proj_bias": (True, False),
    "lm_head_bias": (False, False),
    "mlp_type": ("base", "base"),
    "prenorm": (True, True),
    "parallel_block": (False, False),
    "word_embed_proj_dim": (None, None),
    "scale_attn_weights": (True, True),
    "scale_attn_by_inverse_layer_idx": (False, False),
    "rotary_emb_scale_base": (None, None),
    "rotary_emb_interleaved": (False, False),
}
"""Fields of which recallax supports one value: the default where they are missing, and the supported value."""

UNFUSED_FIELDS = dict.fromkeys(("attn_dwconv", "fused_dense_sqrelu_dense", "fused_mlp"), False)
IGNORED_FIELDS: IgnoredFields = {
    "it describes a buffer of decays, which no mixer reads": ("decay_const", "decay_denom", "fixed_decay"),
    "it selects a kernel, and all kernels compute the same function": (
        "fused_bias_fc", "fused_dropout_add_ln", "mlp_checkpoint_lvl", "reorder_and_upcast_attn", "sequence_parallel",
        "use_flash_attn",
    ),
    "only training uses it": ("attn_pdrop", "embd_pdrop", "resid_pdrop"),
    "only another MLP or another block uses it": ("ff_mult", "parallel_block_tied_norm"),
    "it belongs to GPT-2's classifier": (
        "summary_activation", "summary_first_dropout", "summary_proj_to_labels", "summary_type", "summary_use_proj",
    ),
    "only windows use it, whose import reads it": ("n_head_kv", "rotary_emb_base", "rotary_emb_fraction"),
}  # fmt: skip


class BasedLayout(CheckpointLayout):
    """`GPTLMHeadModel` of gated convolutions, Taylor linear attention and sliding windows."""

    architecture = "GPTLMHeadModel"
    ignored_fields = field_names(IGNORED_FIELDS)
    duplicates_tied_head = True

    def from_config_json(self, fields: ConfigFields) -> LMConfig:
        for name, (default, supported) in FIXED_FIELDS.items():
            if (value := fields.get(name, default)) != supported:
                raise fields.unsupported(f"{name} is {short_repr(value)}; only {supported!r} can be imported")
        # GPT-2's config stores n_positions as max_position_embeddings.
        if (positions := fields.get("max_position_embeddings", fields.get("n_positions"))) != 0:
            raise fields.unsupported(
                f"n_positions is {short_repr(positions)}, and recallax has no learned positions; only 0 can be imported"
            )
        fields.require_values("no part of these models is fused into another one", **UNFUSED_FIELDS)
        attention_parts.unscaled_rope_parameters(fields)
        slots, swiglu = _slots(fields), SwiGLU(intermediate_size=_intermediate_size(fields))
        # A mixer without layers is read too, so that a mistake in it does not hide a mistake in the lists of layers.
        stated = [slot for slot in MIXER_SLOTS if slot in slots or fields.get(slot) is not None]
        mixers = {slot: based_mixers.mixer_config(fields, slot) for slot in stated}
        blocks = {BLOCK_NAMES[slot]: Block(mixer=mixers[slot], channel=swiglu) for slot in stated if slot in slots}
        return LMConfig(
            d_model=fields.required("n_embd", int),
            vocab_size=decoder_parts.padded_vocab_size(fields, default_multiple=1),
            pattern=compress_pattern([BLOCK_NAMES[slot] for slot in slots]),
            blocks=blocks,
            lm_head=decoder_parts.lm_head_config(fields, tied_by_default=True),
            norm_eps=fields.optional("layer_norm_epsilon", float, 1e-5, above=0.0),
        )

    def key_map(self, fields: ConfigFields, model: LMConfig) -> list[KeyMapEntry]:
        entries = decoder_parts.embedding_and_head_entries(
            model, "transformer.embeddings.word_embeddings", "transformer.ln_f"
        )
        if fields.optional("fixed_decay", bool, False):
            entries.append(_decay_buffer_entry(fields))
        inner = _intermediate_size(fields)
        gate_first = lazy_transform(lambda: permute_first_axis(np.roll(np.arange(2 * inner), inner)))
        for layer, slot in enumerate(_slots(fields)):
            source, target = f"transformer.layers.{layer}", f"layers.{layer}"
            up = (f"{source}.mlp.fc1.weight", f"{target}.channel.up.kernel")
            entries.append(decoder_parts.norm_entry(f"{source}.norm1", f"{target}.mixer_norm"))
            entries.append(decoder_parts.norm_entry(f"{source}.norm2", f"{target}.channel_norm"))
            entries.append(parameter_entry(*up, chain(gate_first, TRANSPOSE)))
            entries.append(linear_entry(f"{source}.mlp.fc2", f"{target}.channel.out"))
            entries += based_mixers.mixer_entries(fields, slot, f"{source}.mixer", f"{target}.mixer")
        return entries

    def to_config_json(self, model: LM, layers: Sequence[BlockModule]) -> dict[str, Any]:
        slots = [based_mixers.slot_of_layer(number, layer) for number, layer in enumerate(layers)]
        mixers = {slot: layers[slots.index(slot)].mixer if slot in slots else None for slot in MIXER_SLOTS}
        vocab_size, d_model = model.embedding.shape
        window = mixers["alt_mixer_2"]
        return (
            {name: supported for name, (_, supported) in FIXED_FIELDS.items()}
            | {s: None if mixer is None else based_mixers.mixer_json(mixer, d_model) for s, mixer in mixers.items()}
            | (_window_fields(window) if isinstance(window, SoftmaxAttentionMixer) else {"n_head": 1})
            | {f"{slot}_layers": [n for n, other in enumerate(slots) if other == slot] for slot in MIXER_SLOTS[1:]}
            | {
                "model_type": "gpt2",
                "n_embd": d_model,
                "n_layer": len(layers),
                "n_inner": decoder_parts.collect_modules(layers, "channel", SwiGLUMixer)[0].out.kernel.shape[0],
                "n_positions": 0,
                "vocab_size": vocab_size,
                "pad_vocab_size_multiple": 1,
                "layer_norm_epsilon": model.norm.eps,
                "tie_word_embeddings": isinstance(model.readout, TiedModule),
                "residual_in_fp32": True,
                "attn_pdrop": 0.0,
                "embd_pdrop": 0.0,
                "resid_pdrop": 0.0,
            }
        )

    def matches(self, config: Mapping[str, Any]) -> bool:
        # The model_type is GPT-2's, which has no mixer fields.
        return config.get("model_type", "gpt2") == "gpt2" and not config.keys().isdisjoint(MIXER_SLOTS)


def _window_fields(window: SoftmaxAttentionMixer) -> dict[str, Any]:
    """Return the fields of the model's config that the windows use."""
    heads = {"n_head": window.num_heads, "n_head_kv": window.num_kv_heads}
    return heads | {"rotary_emb_fraction": 0 if window.rope_theta is None else 1, "rotary_emb_base": window.rope_theta}


def _slots(fields: ConfigFields) -> list[str]:
    """Return the mixer slot of each layer."""
    num_layers = fields.num_layers("n_layer")
    second, first = (fields.layer_numbers(f"{slot}_layers", num_layers) for slot in ("alt_mixer_2", "alt_mixer"))
    return ["alt_mixer_2" if n in second else "alt_mixer" if n in first else "mixer" for n in range(num_layers)]


def _decay_buffer_entry(fields: ConfigFields) -> KeyMapEntry:
    """Map a buffer of decays, which no mixer reads, to no parameter. Its values follow from the config."""
    start = fields.optional("decay_const", float, -5.0)
    rates = 2.0 ** (start - np.arange(fields.required("n_head", int)))
    decay = np.log1p(-rates).astype(np.float32)
    return KeyMapEntry(("transformer.decay.decay",), (), ArrayTransform(lambda _: (), lambda _: (decay,)))


def _intermediate_size(fields: ConfigFields) -> int:
    stated = fields.optional("n_inner", int, 8 * fields.required("n_embd", int) // 3)
    return -(-stated // MLP_MULTIPLE_OF) * MLP_MULTIPLE_OF
