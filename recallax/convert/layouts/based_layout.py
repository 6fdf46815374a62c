"""BASED as HazyResearch keeps it: a GPT-2 config with up to three mixers, each a dictionary that names a class.

Source: github.com/HazyResearch/based at 32c1bd4 (`based/models/gpt.py`, `based/models/mixers/convolution.py`,
`linear_attention.py`, `slide_attention.py`, `train/models/mlp.py`). `alt_mixer_2_layers` come before
`alt_mixer_layers`, and `mixer` has the rest. `window_size` is halved there: 256 is 128 tokens back and the token
itself.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from recallax.config import ConfigError
from recallax.convert.array_transforms import (
    DEPTHWISE_CONV,
    TRANSPOSE,
    ArrayTransform,
    chain,
    lazy_transform,
    permute_first_axis,
    split_first_axis,
)
from recallax.convert.config_fields import ConfigFields
from recallax.convert.key_map import KeyMapEntry, linear_entry, parameter_entry
from recallax.convert.layouts import decoder_parts
from recallax.layers import Based, GatedConv, MixerConfig, SequenceMixer, SlidingWindow, SwiGLU
from recallax.layers.based import BasedCell
from recallax.layers.gated_conv import GatedConvMixer
from recallax.layers.memory import MemoryMixer
from recallax.layers.softmax_attention import SoftmaxAttentionMixer
from recallax.layers.swiglu import SwiGLUMixer
from recallax.models.block import Block, BlockModule
from recallax.models.lm import LM, LMConfig
from recallax.models.lm_head import TiedModule

MIXERS_MODULE = "based.models.mixers."
GATED_CONV_CLASS = f"{MIXERS_MODULE}convolution.BaseConv"
GATED_CONV_CLASSES = {
    GATED_CONV_CLASS: "conv.conv",
    f"{MIXERS_MODULE}base_conv.BaseConv": "conv1.conv",
    f"{MIXERS_MODULE}base_conv.BaseConvWithSiLU4": "conv1.conv",
}
"""Classes of the gated convolution, and what each calls its taps."""
TAYLOR_CLASS = f"{MIXERS_MODULE}linear_attention.LinearAttention"
WINDOW_CLASSES = (f"{MIXERS_MODULE}slide_attention.SlidingAttention", f"{MIXERS_MODULE}slide_fa2.SlidingsMHA")
FEATURE_MAP_CLASS = f"{MIXERS_MODULE}linear_attention.TaylorExp"
FIELD_FACTOR = 2
"""`window_size` is so many times the tokens that a window looks back, and `expand_proj` the width of a convolution."""
MLP_MULTIPLE_OF = 256
"""The perceptron's width is rounded up to a multiple of this."""
MIXER_SLOTS = ("mixer", "alt_mixer", "alt_mixer_2")

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
"""Fields with one value that can be represented: what they mean where they are missing, and that value."""


def is_based(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is one of theirs: it calls itself GPT-2, which has no mixers."""
    return config.get("model_type", "gpt2") == "gpt2" and not config.keys().isdisjoint(MIXER_SLOTS)


def from_config_json(fields: ConfigFields) -> LMConfig:
    """`GPTLMHeadModel` of gated convolutions, Taylor linear attention and sliding windows."""
    for name, (missing, wanted) in FIXED_FIELDS.items():
        if (value := fields.values.get(name, missing)) != wanted:
            raise fields.unsupported(f"{name} is {value!r}; only {wanted!r} can be imported")
    # GPT-2's config keeps the one under the other's name.
    if (positions := fields.values.get("max_position_embeddings", fields.values.get("n_positions"))) != 0:
        raise fields.unsupported(
            f"n_positions is {positions!r}, and recallax learns no positions; only 0 can be imported"
        )
    eps, swiglu = (
        fields.optional("layer_norm_epsilon", float, 1e-5),
        SwiGLU(intermediate_size=_intermediate_size(fields)),
    )
    tags = _slot_by_layer(fields)
    blocks = {
        _block_name(tag): Block(mixer=_mixer_config(fields, tag), channel=swiglu) for tag in MIXER_SLOTS if tag in tags
    }
    return LMConfig(
        d_model=fields.required("n_embd", int),
        vocab_size=decoder_parts.padded_vocab_size(fields),
        pattern=decoder_parts.compress_pattern([_block_name(tag) for tag in tags]),
        blocks=blocks,
        lm_head=decoder_parts.lm_head_config(fields, tied_by_default=True),
        norm_eps=eps,
    )


def to_config_json(model: LM, layers: Sequence[BlockModule]) -> dict[str, Any]:
    """The config of `GPTLMHeadModel`, with the classes of the published models."""
    tags = [_slot_of_layer(number, layer) for number, layer in enumerate(layers)]
    first = {
        tag: next((layer.mixer for layer, t in zip(layers, tags, strict=True) if t == tag), None) for tag in MIXER_SLOTS
    }
    vocab, width = model.embedding.shape
    window = first["alt_mixer_2"]
    return (
        {name: wanted for name, (_, wanted) in FIXED_FIELDS.items()}
        | {tag: None if mixer is None else _mixer_json(mixer, width) for tag, mixer in first.items()}
        | (_window_fields(window) if isinstance(window, SoftmaxAttentionMixer) else {"n_head": 1})
        | {f"{tag}_layers": [n for n, other in enumerate(tags) if other == tag] for tag in MIXER_SLOTS[1:]}
        | {
            "model_type": "gpt2",
            "n_embd": width,
            "n_layer": len(layers),
            "n_inner": decoder_parts.collect_modules(layers, "channel", SwiGLUMixer)[0].out.kernel.shape[0],
            "n_positions": 0,
            "vocab_size": vocab,
            "pad_vocab_size_multiple": 1,
            "layer_norm_epsilon": model.norm.eps,
            "tie_word_embeddings": isinstance(model.readout, TiedModule),
            "residual_in_fp32": True,
            "attn_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "resid_pdrop": 0.0,
        }
    )


def _mixer_json(mixer: SequenceMixer, width: int) -> dict[str, Any]:
    """The dictionary of a mixer."""
    if isinstance(mixer, GatedConvMixer):
        taps, inner = mixer.taps.shape
        expand = FIELD_FACTOR * decoder_parts.integer_ratio(inner, width)
        return {
            "_target_": GATED_CONV_CLASS,
            "expand_proj": expand,
            "kernel_size": taps,
            "use_bias": True,
            "l_max": None,
        }
    if isinstance(mixer, SoftmaxAttentionMixer):
        assert mixer.window is not None
        back = FIELD_FACTOR * (mixer.window - 1)
        return {"_target_": WINDOW_CLASSES[0], "window_size": back, "num_heads": mixer.num_heads, "causal": True}
    assert isinstance(mixer, MemoryMixer)
    _, heads, keys, _ = mixer.cell.head_dims
    features = {"_target_": FEATURE_MAP_CLASS, "input_dim": keys}
    return {"_target_": TAYLOR_CLASS, "feature_map": features, "feature_dim": keys, "num_heads": heads}


def _window_fields(window: SoftmaxAttentionMixer) -> dict[str, Any]:
    """What the windows take from the model's config."""
    heads = {"n_head": window.num_heads, "n_head_kv": window.num_kv_heads}
    return heads | {"rotary_emb_fraction": 0 if window.rope_theta is None else 1, "rotary_emb_base": window.rope_theta}


def key_map(fields: ConfigFields, model: LMConfig) -> list[KeyMapEntry]:
    """The key map."""
    found = decoder_parts.embedding_and_head_entries(
        model, "transformer.embeddings.word_embeddings", "transformer.ln_f"
    )
    if fields.optional("fixed_decay", bool, False):
        found.append(_decay_buffer_entry(fields))
    inner = _intermediate_size(fields)
    gate_first = lazy_transform(lambda: permute_first_axis(np.roll(np.arange(2 * inner), inner)))
    for layer, tag in enumerate(_slot_by_layer(fields)):
        theirs, ours = f"transformer.layers.{layer}", f"layers.{layer}"
        found.append(decoder_parts.norm_entry(f"{theirs}.norm1", f"{ours}.mixer_norm"))
        found.append(decoder_parts.norm_entry(f"{theirs}.norm2", f"{ours}.channel_norm"))
        found.append(
            parameter_entry(f"{theirs}.mlp.fc1.weight", f"{ours}.channel.up.kernel", chain(gate_first, TRANSPOSE))
        )
        found.append(linear_entry(f"{theirs}.mlp.fc2", f"{ours}.channel.out"))
        found += _mixer_entries(fields, tag, f"{theirs}.mixer", f"{ours}.mixer")
    return found


def _slot_by_layer(fields: ConfigFields) -> list[str]:
    """Which of its mixers each layer has."""
    second, first = (fields.optional(f"{tag}_layers", list, []) for tag in ("alt_mixer_2", "alt_mixer"))
    layers = range(fields.required("n_layer", int))
    return ["alt_mixer_2" if n in second else "alt_mixer" if n in first else "mixer" for n in layers]


def _block_name(slot: str) -> str:
    """Of a block, after what the published models have there."""
    return {"mixer": "conv", "alt_mixer": "based", "alt_mixer_2": "window"}[slot]


def _mixer_class_and_fields(fields: ConfigFields, slot: str) -> tuple[str, ConfigFields]:
    """A mixer's class and the fields it is given."""
    if fields.values.get(slot) is None:
        raise fields.unsupported(
            f"{slot} is missing, and that would be full attention, which recallax reads from no BASED"
        )
    values = fields.required(slot, dict)
    said = ConfigFields(values, f"{fields.model_name}'s {slot}")
    return said.required("_target_", str), said


def _mixer_config(fields: ConfigFields, slot: str) -> MixerConfig:
    target, said = _mixer_class_and_fields(fields, slot)
    width, heads = fields.required("n_embd", int), fields.required("n_head", int)
    if width % heads:
        raise fields.unsupported(f"n_head is {heads}; n_embd {width} must be a multiple of it")
    if target in GATED_CONV_CLASSES:
        said.require_values("projections have biases", use_bias=True)
        said.require_values("the convolution then has a bias, which ours has not", use_cuda=False)
        wide = said.optional("expand_proj", int, 2)
        if wide % FIELD_FACTOR:
            raise said.unsupported(
                f"expand_proj is {wide}; half of it must be whole, as the width of a gated convolution"
            )
        return GatedConv(conv_size=_kernel_size(said, target), expand=wide // FIELD_FACTOR)
    if target == TAYLOR_CLASS:
        mixer = Based(feature_dim=said.optional("feature_dim", int, 16), num_heads=said.optional("num_heads", int, 16))
        said.require_values("values take the model's width", head_dim=None)
        features = ConfigFields(said.required("feature_map", dict), f"{said.model_name}'s feature_map")
        features.require_values("features are Taylor's", _target_=FEATURE_MAP_CLASS, input_dim=mixer.feature_dim)
        return mixer
    if target in WINDOW_CLASSES:
        if (part := fields.optional("rotary_emb_fraction", float, 0.0)) not in (0, 1):
            raise fields.unsupported(f"rotary_emb_fraction is {part}; recallax rotates all of a head or nothing")
        return SlidingWindow(
            window=said.optional("window_size", int, 128, minimum=0) // FIELD_FACTOR + 1,
            num_heads=heads,
            num_kv_heads=fields.optional("n_head_kv", int, heads),
            head_dim=width // heads,
            rope_theta=fields.optional("rotary_emb_base", float, 10_000.0) if part else None,
        )
    known = ", ".join([*GATED_CONV_CLASSES, TAYLOR_CLASS, *WINDOW_CLASSES])
    raise said.unsupported(f"_target_ is {target!r}; only {known} can be imported")


def _kernel_size(said: ConfigFields, target: str) -> int:
    """Of the convolution. Where the field is plural elsewhere, it is not read there and the default counts."""
    if not target.endswith("BaseConvWithSiLU4"):
        return said.optional("kernel_size", int, 3)
    sizes = said.optional("kernel_sizes", list, [3])
    if len(sizes) != 1 or type(sizes[0]) is not int:
        raise said.unsupported(f"kernel_sizes is {sizes}; it must be a list of one number")
    return sizes[0]


def _mixer_entries(fields: ConfigFields, slot: str, source_prefix: str, target_prefix: str) -> list[KeyMapEntry]:
    target, _ = _mixer_class_and_fields(fields, slot)
    mixer, width = _mixer_config(fields, slot), fields.required("n_embd", int)
    if isinstance(mixer, GatedConv):
        return [
            linear_entry(f"{source_prefix}.in_proj", f"{target_prefix}.input"),
            parameter_entry(f"{source_prefix}.in_proj.bias", f"{target_prefix}.input.bias"),
            parameter_entry(
                f"{source_prefix}.{GATED_CONV_CLASSES[target]}.weight", f"{target_prefix}.taps", DEPTHWISE_CONV
            ),
            linear_entry(f"{source_prefix}.out_proj", f"{target_prefix}.out"),
            parameter_entry(f"{source_prefix}.out_proj.bias", f"{target_prefix}.out.bias"),
        ]
    if isinstance(mixer, Based):
        streams = {"proj_q": "query.parts.q", "proj_k": "writer.parts.k", "proj_v": "writer.parts.v"}
        streams["out_proj"] = "readout.out"
        return [linear_entry(f"{source_prefix}.{key}", f"{target_prefix}.{name}") for key, name in streams.items()]
    assert isinstance(mixer, SlidingWindow)
    keys = (mixer.num_kv_heads or mixer.num_heads) * (width // mixer.num_heads)
    streams = tuple(f"{target_prefix}.{name}.kernel" for name in "qkv")
    return [
        KeyMapEntry((f"{source_prefix}.Wqkv.weight",), streams, chain(split_first_axis(width, keys, keys), TRANSPOSE)),
        linear_entry(f"{source_prefix}.out_proj", f"{target_prefix}.out"),
    ]


def _decay_buffer_entry(fields: ConfigFields) -> KeyMapEntry:
    """A buffer of decays that its mixers are given and none of them reads: a constant by the config's word."""
    start = fields.optional("decay_const", float, -5.0)
    rates = 2.0 ** (start - np.arange(fields.required("n_head", int)))
    decay = np.log1p(-rates).astype(np.float32)
    return KeyMapEntry(("transformer.decay.decay",), (), ArrayTransform(lambda _: (), lambda _: (decay,)))


def _intermediate_size(fields: ConfigFields) -> int:
    """Width of the perceptron."""
    stated = fields.optional("n_inner", int, 8 * fields.required("n_embd", int) // 3)
    return -(-stated // MLP_MULTIPLE_OF) * MLP_MULTIPLE_OF


def _slot_of_layer(number: int, layer: BlockModule) -> str:
    mixer = layer.mixer
    if isinstance(mixer, GatedConvMixer):
        return "mixer"
    if isinstance(mixer, MemoryMixer) and isinstance(mixer.cell, BasedCell):
        return "alt_mixer"
    if isinstance(mixer, SoftmaxAttentionMixer) and mixer.window is not None:
        return "alt_mixer_2"
    raise ConfigError(f"layer {number} has the mixer {type(mixer).__name__}, which this layout has not")
