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
from recallax.layers import Based, GatedConv, MixerConfig, SequenceMixer, SlidingWindow, SwiGLU
from recallax.layers.based import TaylorCell
from recallax.layers.gated_conv import GatedConvMixer
from recallax.layers.memory import MemoryMixer
from recallax.layers.softmax import SoftmaxMixer
from recallax.layers.swiglu import SwiGLUMixer
from recallax.models.block import Block, BlockModule
from recallax.models.importing import decoder
from recallax.models.importing.fields import Fields
from recallax.models.importing.form import TAPS, TRANSPOSED, Form, chain, lazily, parted, reordered
from recallax.models.importing.key_map import Entry, linear, one
from recallax.models.lm import LM, LMConfig
from recallax.models.readout import TiedModule

MIXERS = "based.models.mixers."
CONVOLUTION = f"{MIXERS}convolution.BaseConv"
CONVOLUTIONS = {
    CONVOLUTION: "conv.conv",
    f"{MIXERS}base_conv.BaseConv": "conv1.conv",
    f"{MIXERS}base_conv.BaseConvWithSiLU4": "conv1.conv",
}
"""Classes of the gated convolution, and what each calls its taps."""
TAYLOR = f"{MIXERS}linear_attention.LinearAttention"
WINDOWS = (f"{MIXERS}slide_attention.SlidingAttention", f"{MIXERS}slide_fa2.SlidingsMHA")
FEATURES = f"{MIXERS}linear_attention.TaylorExp"
HALVES = 2
"""`window_size` is so many times the tokens that a window looks back, and `expand_proj` the width of a convolution."""
ROUNDED = 256
"""The perceptron's width is rounded up to a multiple of this."""
TAGS = ("mixer", "alt_mixer", "alt_mixer_2")

SAID: dict[str, tuple[Any, Any]] = {
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
    return config.get("model_type", "gpt2") == "gpt2" and not config.keys().isdisjoint(TAGS)


def based(fields: Fields) -> LMConfig:
    """`GPTLMHeadModel` of gated convolutions, Taylor linear attention and sliding windows."""
    for name, (missing, wanted) in SAID.items():
        if (value := fields.values.get(name, missing)) != wanted:
            raise fields.refusal(f"{name} is {value!r}; only {wanted!r} can be imported")
    # GPT-2's config keeps the one under the other's name.
    if (positions := fields.values.get("max_position_embeddings", fields.values.get("n_positions"))) != 0:
        raise fields.refusal(f"n_positions is {positions!r}, and recallax learns no positions; only 0 can be imported")
    eps, swiglu = fields.optional("layer_norm_epsilon", float, 1e-5), SwiGLU(inner=_inner(fields))
    tags = _tags(fields)
    blocks = {_name(tag): Block(mixer=_mixer(fields, tag), channel=swiglu) for tag in TAGS if tag in tags}
    return LMConfig(
        d_model=fields.get("n_embd", int),
        vocab_size=decoder.padded_vocab(fields),
        pattern=decoder.spelled([_name(tag) for tag in tags]),
        blocks=blocks,
        readout=decoder.readout(fields, tied=True),
        norm_eps=eps,
    )


def describe(model: LM, layers: Sequence[BlockModule]) -> dict[str, Any]:
    """The config of `GPTLMHeadModel`, with the classes of the published models."""
    tags = [_tag_of(number, layer) for number, layer in enumerate(layers)]
    first = {tag: next((layer.mixer for layer, t in zip(layers, tags, strict=True) if t == tag), None) for tag in TAGS}
    vocab, width = model.embedding.shape
    window = first["alt_mixer_2"]
    return (
        {name: wanted for name, (_, wanted) in SAID.items()}
        | {tag: None if mixer is None else _said_of(mixer, width) for tag, mixer in first.items()}
        | (_attention(window) if isinstance(window, SoftmaxMixer) else {"n_head": 1})
        | {f"{tag}_layers": [n for n, other in enumerate(tags) if other == tag] for tag in TAGS[1:]}
        | {
            "model_type": "gpt2",
            "n_embd": width,
            "n_layer": len(layers),
            "n_inner": decoder.parts(layers, "channel", SwiGLUMixer)[0].out.kernel.shape[0],
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


def _said_of(mixer: SequenceMixer, width: int) -> dict[str, Any]:
    """The dictionary of a mixer."""
    if isinstance(mixer, GatedConvMixer):
        taps, inner = mixer.taps.shape
        expand = HALVES * decoder.whole_multiple(inner, width)
        return {"_target_": CONVOLUTION, "expand_proj": expand, "kernel_size": taps, "use_bias": True, "l_max": None}
    if isinstance(mixer, SoftmaxMixer):
        assert mixer.window is not None
        back = HALVES * (mixer.window - 1)
        return {"_target_": WINDOWS[0], "window_size": back, "num_heads": mixer.heads, "causal": True}
    assert isinstance(mixer, MemoryMixer)
    _, heads, keys, _ = mixer.cell.sizes
    features = {"_target_": FEATURES, "input_dim": keys}
    return {"_target_": TAYLOR, "feature_map": features, "feature_dim": keys, "num_heads": heads}


def _attention(window: SoftmaxMixer) -> dict[str, Any]:
    """What the windows take from the model's config."""
    heads = {"n_head": window.heads, "n_head_kv": window.kv_heads}
    return heads | {"rotary_emb_fraction": 0 if window.base is None else 1, "rotary_emb_base": window.base}


def entries(fields: Fields, model: LMConfig) -> list[Entry]:
    """The key map."""
    found = decoder.ends(model, "transformer.embeddings.word_embeddings", "transformer.ln_f")
    if fields.optional("fixed_decay", bool, False):
        found.append(_decay(fields))
    inner = _inner(fields)
    gate_first = lazily(lambda: reordered(np.roll(np.arange(2 * inner), inner)))
    for layer, tag in enumerate(_tags(fields)):
        theirs, ours = f"transformer.layers.{layer}", f"layers.{layer}"
        found.append(decoder.scale(f"{theirs}.norm1", f"{ours}.mixer_norm"))
        found.append(decoder.scale(f"{theirs}.norm2", f"{ours}.channel_norm"))
        found.append(one(f"{theirs}.mlp.fc1.weight", f"{ours}.channel.up.kernel", chain(gate_first, TRANSPOSED)))
        found.append(linear(f"{theirs}.mlp.fc2", f"{ours}.channel.out"))
        found += _mixer_entries(fields, tag, f"{theirs}.mixer", f"{ours}.mixer")
    return found


def _tags(fields: Fields) -> list[str]:
    """Which of its mixers each layer has."""
    second, first = (fields.optional(f"{tag}_layers", list, []) for tag in ("alt_mixer_2", "alt_mixer"))
    layers = range(fields.get("n_layer", int))
    return ["alt_mixer_2" if n in second else "alt_mixer" if n in first else "mixer" for n in layers]


def _name(tag: str) -> str:
    """Of a block, after what the published models have there."""
    return {"mixer": "conv", "alt_mixer": "based", "alt_mixer_2": "window"}[tag]


def _said(fields: Fields, tag: str) -> tuple[str, Fields]:
    """A mixer's class and the fields it is given."""
    if fields.values.get(tag) is None:
        raise fields.refusal(f"{tag} is missing, and that would be full attention, which recallax reads from no BASED")
    values = fields.get(tag, dict)
    said = Fields(values, f"{fields.model}'s {tag}")
    return said.get("_target_", str), said


def _mixer(fields: Fields, tag: str) -> MixerConfig:
    target, said = _said(fields, tag)
    width, heads = fields.get("n_embd", int), fields.get("n_head", int)
    if width % heads:
        raise fields.refusal(f"n_head is {heads}; n_embd {width} must be a multiple of it")
    if target in CONVOLUTIONS:
        said.demand("projections have biases", use_bias=True)
        said.demand("the convolution then has a bias, which ours has not", use_cuda=False)
        wide = said.optional("expand_proj", int, 2)
        if wide % HALVES:
            raise said.refusal(f"expand_proj is {wide}; half of it must be whole, as the width of a gated convolution")
        return GatedConv(width=_taps(said, target), expand=wide // HALVES)
    if target == TAYLOR:
        mixer = Based(feature_dim=said.optional("feature_dim", int, 16), heads=said.optional("num_heads", int, 16))
        said.demand("values take the model's width", head_dim=None)
        features = Fields(said.get("feature_map", dict), f"{said.model}'s feature_map")
        features.demand("features are Taylor's", _target_=FEATURES, input_dim=mixer.feature_dim)
        return mixer
    if target in WINDOWS:
        if (part := fields.optional("rotary_emb_fraction", float, 0.0)) not in (0, 1):
            raise fields.refusal(f"rotary_emb_fraction is {part}; recallax rotates all of a head or nothing")
        return SlidingWindow(
            window=said.optional("window_size", int, 128, least=0) // HALVES + 1,
            heads=heads,
            kv_heads=fields.optional("n_head_kv", int, heads),
            head_dim=width // heads,
            rotary_base=fields.optional("rotary_emb_base", float, 10_000.0) if part else None,
        )
    known = ", ".join([*CONVOLUTIONS, TAYLOR, *WINDOWS])
    raise said.refusal(f"_target_ is {target!r}; only {known} can be imported")


def _taps(said: Fields, target: str) -> int:
    """Of the convolution. Where the field is plural elsewhere, it is not read there and the default counts."""
    if not target.endswith("BaseConvWithSiLU4"):
        return said.optional("kernel_size", int, 3)
    sizes = said.optional("kernel_sizes", list, [3])
    if len(sizes) != 1 or type(sizes[0]) is not int:
        raise said.refusal(f"kernel_sizes is {sizes}; it must be a list of one number")
    return sizes[0]


def _mixer_entries(fields: Fields, tag: str, theirs: str, ours: str) -> list[Entry]:
    target, _ = _said(fields, tag)
    mixer, width = _mixer(fields, tag), fields.get("n_embd", int)
    if isinstance(mixer, GatedConv):
        return [
            linear(f"{theirs}.in_proj", f"{ours}.input"),
            one(f"{theirs}.in_proj.bias", f"{ours}.input.bias"),
            one(f"{theirs}.{CONVOLUTIONS[target]}.weight", f"{ours}.taps", TAPS),
            linear(f"{theirs}.out_proj", f"{ours}.out"),
            one(f"{theirs}.out_proj.bias", f"{ours}.out.bias"),
        ]
    if isinstance(mixer, Based):
        streams = {"proj_q": "query.parts.q", "proj_k": "writer.parts.k", "proj_v": "writer.parts.v"}
        streams["out_proj"] = "readout.out"
        return [linear(f"{theirs}.{key}", f"{ours}.{name}") for key, name in streams.items()]
    assert isinstance(mixer, SlidingWindow)
    keys = (mixer.kv_heads or mixer.heads) * (width // mixer.heads)
    streams = tuple(f"{ours}.{name}.kernel" for name in "qkv")
    return [
        Entry((f"{theirs}.Wqkv.weight",), streams, chain(parted(width, keys, keys), TRANSPOSED)),
        linear(f"{theirs}.out_proj", f"{ours}.out"),
    ]


def _decay(fields: Fields) -> Entry:
    """A buffer of decays that its mixers are given and none of them reads: a constant by the config's word."""
    start = fields.optional("decay_const", float, -5.0)
    rates = 2.0 ** (start - np.arange(fields.get("n_head", int)))
    decay = np.log1p(-rates).astype(np.float32)
    return Entry(("transformer.decay.decay",), (), Form(lambda _: (), lambda _: (decay,)))


def _inner(fields: Fields) -> int:
    """Width of the perceptron."""
    stated = fields.optional("n_inner", int, 8 * fields.get("n_embd", int) // 3)
    return -(-stated // ROUNDED) * ROUNDED


def _tag_of(number: int, layer: BlockModule) -> str:
    mixer = layer.mixer
    if isinstance(mixer, GatedConvMixer):
        return "mixer"
    if isinstance(mixer, MemoryMixer) and isinstance(mixer.cell, TaylorCell):
        return "alt_mixer"
    if isinstance(mixer, SoftmaxMixer) and mixer.window is not None:
        return "alt_mixer_2"
    raise ConfigError(f"layer {number} has the mixer {type(mixer).__name__}, which this layout has not")
