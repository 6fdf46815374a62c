"""Mixers of HazyResearch's BASED: dictionaries in the config that name a class and its arguments.

A model has up to three mixers in the slots `mixer`, `alt_mixer` and `alt_mixer_2`. `window_size` is twice the number of
tokens that a window looks back: 256 is 128 tokens back and the current token.
"""

from typing import Any

from recallax.config import ConfigError
from recallax.convert.array_transforms import DEPTHWISE_CONV, TRANSPOSE, chain, split_first_axis
from recallax.convert.config_fields import ConfigFields
from recallax.convert.key_map import KeyMapEntry, linear_entry, parameter_entry
from recallax.convert.layouts import decoder_parts
from recallax.external_file import short_repr
from recallax.layers import Based, GatedConv, MixerConfig, SequenceMixer, SlidingWindow
from recallax.layers.based import BasedCell
from recallax.layers.gated_conv import GatedConvMixer
from recallax.layers.memory import MemoryMixer
from recallax.layers.softmax_attention import SoftmaxAttentionMixer
from recallax.models.block import BlockModule

MIXER_SLOTS = ("mixer", "alt_mixer", "alt_mixer_2")
"""Mixer fields of the config."""
BLOCK_NAMES = {"mixer": "conv", "alt_mixer": "based", "alt_mixer_2": "window"}
"""Block names by slot, after the mixers of the published models."""
MIXERS_MODULE = "based.models.mixers."
GATED_CONV_CLASS = f"{MIXERS_MODULE}convolution.BaseConv"
GATED_CONV_SILU_CLASS = f"{MIXERS_MODULE}base_conv.BaseConvWithSiLU4"
GATED_CONV_CLASSES = {
    GATED_CONV_CLASS: "conv.conv",
    f"{MIXERS_MODULE}base_conv.BaseConv": "conv1.conv",
    GATED_CONV_SILU_CLASS: "conv1.conv",
}
"""The key of the taps by class of the gated convolution."""
TAYLOR_CLASS = f"{MIXERS_MODULE}linear_attention.LinearAttention"
WINDOW_CLASSES = (f"{MIXERS_MODULE}slide_attention.SlidingAttention", f"{MIXERS_MODULE}slide_fa2.SlidingsMHA")
FEATURE_MAP_CLASS = f"{MIXERS_MODULE}linear_attention.TaylorExp"
IGNORED_ARGUMENTS = ("l_max", "layer_idx", "parallel_implementation")
"""Arguments that do not change what a mixer computes: a largest length, the layer's number and the kernel."""
FIELD_FACTOR = 2
"""`window_size` over the tokens that a window looks back, and `expand_proj` over the expansion of a convolution."""


def slot_of_layer(number: int, layer: BlockModule) -> str:
    """Return the slot that a layer's mixer has in the published models.

    Args:
        number: The layer's number, for the error.
        layer: The layer.

    Returns:
        The slot.

    Raises:
        ConfigError: If the layout does not support the mixer.
    """
    mixer = layer.mixer
    if isinstance(mixer, GatedConvMixer):
        return "mixer"
    if isinstance(mixer, MemoryMixer) and isinstance(mixer.cell, BasedCell):
        return "alt_mixer"
    if isinstance(mixer, SoftmaxAttentionMixer) and mixer.window is not None:
        return "alt_mixer_2"
    raise ConfigError(f"layer {number} has the mixer {type(mixer).__name__}, which this layout does not support")


def mixer_json(mixer: SequenceMixer, d_model: int) -> dict[str, Any]:
    """Write a mixer as a dictionary of its class and arguments.

    Args:
        mixer: The module; one that `slot_of_layer` accepts.
        d_model: The model's width.

    Returns:
        The dictionary.
    """
    if isinstance(mixer, GatedConvMixer):
        kernel_size, inner = mixer.taps.shape
        return {
            "_target_": GATED_CONV_CLASS,
            "expand_proj": FIELD_FACTOR * decoder_parts.integer_ratio(inner, d_model),
            "kernel_size": kernel_size,
            "use_bias": True,
            "l_max": None,
        }
    if isinstance(mixer, SoftmaxAttentionMixer):
        assert mixer.window is not None
        window_size = FIELD_FACTOR * (mixer.window - 1)
        return {
            "_target_": WINDOW_CLASSES[0],
            "window_size": window_size,
            "num_heads": mixer.num_heads,
            "causal": True,
        }
    assert isinstance(mixer, MemoryMixer)
    _, num_heads, feature_dim, _ = mixer.cell.head_dims
    feature_map = {"_target_": FEATURE_MAP_CLASS, "input_dim": feature_dim}
    return {"_target_": TAYLOR_CLASS, "feature_map": feature_map, "feature_dim": feature_dim, "num_heads": num_heads}


def mixer_config(fields: ConfigFields, slot: str) -> MixerConfig:
    """Read the mixer of a slot.

    Args:
        fields: The fields of config.json.
        slot: The slot.

    Returns:
        The mixer config.

    Raises:
        ConfigError: If the slot is empty or recallax does not support the mixer.
    """
    target, arguments = _class_and_arguments(fields, slot)
    d_model, num_heads = fields.required("n_embd", int), fields.required("n_head", int)
    fields.require_multiple("n_embd", d_model, "n_head", num_heads)
    fields.require_derived(head_dim=d_model // num_heads)
    if target in GATED_CONV_CLASSES:
        mixer = _gated_conv_config(arguments, target)
    elif target == TAYLOR_CLASS:
        mixer = _taylor_config(arguments, d_model)
    elif target in WINDOW_CLASSES:
        mixer = _window_config(fields, arguments, num_heads, d_model // num_heads)
    else:
        known = ", ".join([*GATED_CONV_CLASSES, TAYLOR_CLASS, *WINDOW_CLASSES])
        raise arguments.unsupported(f"_target_ is {short_repr(target)}; only {known} can be imported")
    arguments.reject_unread(IGNORED_ARGUMENTS)
    return mixer


def mixer_entries(fields: ConfigFields, slot: str, source: str, target: str) -> list[KeyMapEntry]:
    """Map the mixer of a slot.

    Args:
        fields: The fields of config.json.
        slot: The slot.
        source: The source module.
        target: The recallax module.

    Returns:
        The entries.
    """
    mixer, d_model = mixer_config(fields, slot), fields.required("n_embd", int)
    if isinstance(mixer, GatedConv):
        taps = GATED_CONV_CLASSES[_class_and_arguments(fields, slot)[0]]
        return [
            linear_entry(f"{source}.in_proj", f"{target}.input"),
            parameter_entry(f"{source}.in_proj.bias", f"{target}.input.bias"),
            parameter_entry(f"{source}.{taps}.weight", f"{target}.taps", DEPTHWISE_CONV),
            linear_entry(f"{source}.out_proj", f"{target}.out"),
            parameter_entry(f"{source}.out_proj.bias", f"{target}.out.bias"),
        ]
    if isinstance(mixer, Based):
        names = {"proj_q": "query.parts.q", "proj_k": "writer.parts.k", "proj_v": "writer.parts.v"}
        names["out_proj"] = "readout.out"
        return [linear_entry(f"{source}.{key}", f"{target}.{name}") for key, name in names.items()]
    assert isinstance(mixer, SlidingWindow)
    kv_width = (mixer.num_kv_heads or mixer.num_heads) * (d_model // mixer.num_heads)
    kernels = tuple(f"{target}.{name}.kernel" for name in "qkv")
    split = chain(split_first_axis(d_model, kv_width, kv_width), TRANSPOSE)
    return [
        KeyMapEntry((f"{source}.Wqkv.weight",), kernels, split),
        linear_entry(f"{source}.out_proj", f"{target}.out"),
    ]


def _class_and_arguments(fields: ConfigFields, slot: str) -> tuple[str, ConfigFields]:
    if fields.get(slot) is None:
        raise fields.unsupported(f"{slot} is missing, which means full attention; recallax cannot import it from BASED")
    arguments = ConfigFields(fields.required(slot, dict), f"{fields.model_name}'s {slot}")
    return arguments.required("_target_", str), arguments


def _gated_conv_config(arguments: ConfigFields, target: str) -> GatedConv:
    arguments.require_values("projections have biases", use_bias=True)
    arguments.require_values("the CUDA convolution has a bias, which recallax's lacks", use_cuda=False)
    expand = arguments.optional("expand_proj", int, 2)
    if expand % FIELD_FACTOR:
        raise arguments.unsupported(f"expand_proj is {expand}; it must be even, since half of it is the expansion")
    kernel_size = _kernel_size(arguments, target)
    if target == GATED_CONV_CLASS:  # it has no such argument, but the released configs state it
        arguments.require_derived(kernel_sizes=kernel_size)
    return GatedConv(conv_size=kernel_size, expand=expand // FIELD_FACTOR)


def _kernel_size(arguments: ConfigFields, target: str) -> int:
    """Read the number of taps, which one class gives as a list in another field."""
    if target != GATED_CONV_SILU_CLASS:
        return arguments.optional("kernel_size", int, 3)
    sizes = arguments.optional("kernel_sizes", list, [3])
    if len(sizes) != 1:
        raise arguments.unsupported(f"kernel_sizes is {short_repr(sizes)}; it must be a list of one number")
    return ConfigFields({"kernel_sizes": sizes[0]}, arguments.model_name).required("kernel_sizes", int)


def _taylor_config(arguments: ConfigFields, d_model: int) -> Based:
    num_heads = arguments.optional("num_heads", int, 16)
    mixer = Based(feature_dim=arguments.optional("feature_dim", int, 16), num_heads=num_heads)
    arguments.require_multiple("n_embd", d_model, "num_heads", num_heads)
    arguments.require_values("values have the model's width", head_dim=None)
    arguments.require_values("the denominator has no other epsilon", eps=1e-12)
    feature_map = ConfigFields(arguments.required("feature_map", dict), f"{arguments.model_name}'s feature_map")
    feature_map.required("_target_", str)
    feature_map.require_values("features are Taylor's", _target_=FEATURE_MAP_CLASS, input_dim=mixer.feature_dim)
    feature_map.reject_unread()
    return mixer


def _window_config(fields: ConfigFields, arguments: ConfigFields, num_heads: int, head_dim: int) -> SlidingWindow:
    if (fraction := fields.optional("rotary_emb_fraction", float, 0.0)) not in (0, 1):
        raise fields.unsupported(f"rotary_emb_fraction is {fraction}; recallax rotates whole heads or nothing")
    num_kv_heads = fields.optional("n_head_kv", int, num_heads)
    fields.require_multiple("n_head", num_heads, "n_head_kv", num_kv_heads)
    arguments.require_values("its windows are causal", causal=True)
    arguments.require_derived(num_heads=num_heads)
    return SlidingWindow(
        window=arguments.optional("window_size", int, 128, minimum=0) // FIELD_FACTOR + 1,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        rope_theta=fields.optional("rotary_emb_base", float, 10_000.0, above=0.0) if fraction else None,
    )
