"""Softmax attention as the decoders of transformers describe it: its fields and its keys."""

from typing import Any

from recallax.config import ConfigError
from recallax.convert.config_fields import ConfigFields
from recallax.convert.ignored_fields import IgnoredFields
from recallax.convert.key_map import KeyMapEntry, linear_entry
from recallax.external_file import short_repr
from recallax.layers import Attention, SlidingWindow
from recallax.layers.softmax_attention import SoftmaxAttentionMixer

DEFAULT_ROPE_THETA = 10_000.0
"""The default of transformers."""
UNUSED_ATTENTION_FIELDS: IgnoredFields = {
    "it describes attention layers, and the model has none": (
        "attention_bias", "full_attention_interval", "head_dim", "num_attention_heads", "num_key_value_heads",
        "partial_rotary_factor", "rope_theta",
    ),
}  # fmt: skip
"""Fields of hybrid models that have only linear layers."""


def attention_config(fields: ConfigFields, window: int | None = None, rotary: bool = True) -> Attention | SlidingWindow:
    """Read softmax attention with grouped queries and without biases.

    Args:
        fields: The fields of config.json.
        window: Width of the sliding window in tokens, the current token included. None: full attention.
        rotary: Whether queries and keys are rotated by their position.

    Returns:
        The mixer config.

    Raises:
        ConfigError: If the sizes do not agree, or the positions are rescaled.
    """
    d_model, num_heads = fields.required("hidden_size", int), fields.required("num_attention_heads", int)
    num_kv_heads = fields.optional("num_key_value_heads", int, num_heads)
    fields.require_multiple("num_attention_heads", num_heads, "num_key_value_heads", num_kv_heads)
    if fields.get("head_dim") is None:
        fields.require_multiple("hidden_size", d_model, "num_attention_heads", num_heads)
    sizes: dict[str, Any] = {
        "num_heads": num_heads,
        "num_kv_heads": num_kv_heads,
        "head_dim": fields.optional("head_dim", int, d_model // num_heads),
        "rope_theta": parse_rope_theta(fields) if rotary else None,
    }
    return Attention(**sizes) if window is None else SlidingWindow(window=window, **sizes)


def attention_fields(mixer: SoftmaxAttentionMixer) -> dict[str, Any]:
    """Write the fields of softmax attention, except for positions and the window.

    Args:
        mixer: The module.

    Returns:
        Fields of config.json.
    """
    return {
        "num_attention_heads": mixer.num_heads,
        "num_key_value_heads": mixer.num_kv_heads,
        "head_dim": mixer.head_dim,
        "attention_bias": False,
    }


def attention_entries(
    source: str,
    target: str,
    *,
    input_multiplier: float = 1.0,
    key_multiplier: float = 1.0,
    output_multiplier: float = 1.0,
) -> list[KeyMapEntry]:
    """Map the projections of softmax attention.

    Args:
        source: The source module.
        target: The recallax module.
        input_multiplier: Factor on the input of the source module.
        key_multiplier: Factor on its keys.
        output_multiplier: Factor on its output.

    Returns:
        The entries; the factors are folded into the weights.
    """
    return [
        linear_entry(f"{source}.q_proj", f"{target}.q", input_multiplier),
        linear_entry(f"{source}.k_proj", f"{target}.k", input_multiplier * key_multiplier),
        linear_entry(f"{source}.v_proj", f"{target}.v", input_multiplier),
        linear_entry(f"{source}.o_proj", f"{target}.out", output_multiplier),
    ]


def parse_rope_theta(fields: ConfigFields) -> float:
    """Read the base of rotary embeddings over whole heads, in the format of transformers 5 or the older one.

    Args:
        fields: The fields of config.json.

    Returns:
        The base.

    Raises:
        ConfigError: If the positions are rescaled, only a part of each head is rotated, or there are two bases.
    """
    parameters = unscaled_rope_parameters(fields)
    for owner, name in ((fields, ""), (parameters, "rope_parameters ")):
        if (factor := owner.optional("partial_rotary_factor", float, 1.0)) != 1:
            raise fields.unsupported(
                f"{name}partial_rotary_factor is {factor}: it rotates {factor} of a head; recallax rotates whole heads"
            )
    bases = [owner.optional("rope_theta", float, None, above=0.0) for owner in (parameters, fields)]
    stated = {base for base in bases if base is not None}
    if len(stated) > 1:
        raise fields.unsupported(f"rope_theta is {bases[1]}, and rope_parameters has rope_theta {bases[0]}; remove one")
    return stated.pop() if stated else DEFAULT_ROPE_THETA


def unscaled_rope_parameters(fields: ConfigFields) -> ConfigFields:
    """Check that rotary positions are not rescaled.

    A model without rotary positions is checked too, since such a field shows that its config.json is not what it seems.

    Args:
        fields: The fields of config.json.

    Returns:
        The fields of `rope_parameters`; none where it is missing.

    Raises:
        ConfigError: If a field rescales the positions, or is not known.
    """
    fields.require_values("recallax does not rescale rotary positions", rope_scaling=None)
    parameters = ConfigFields(fields.optional("rope_parameters", dict, {}), f"{fields.model_name}: rope_parameters")
    for name in ("rope_type", "type"):
        if (rope_type := parameters.get(name)) not in (None, "default"):
            raise fields.unsupported(
                f"rope_parameters has {name} {short_repr(rope_type)}, and recallax does not rescale rotary positions; "
                "only 'default' can be imported"
            )
    parameters.reject_unread(("rope_theta", "partial_rotary_factor"))
    return parameters


def rope_fields(rope_theta: float | None) -> dict[str, Any]:
    """Write the fields of rotary embeddings.

    Args:
        rope_theta: The base.

    Returns:
        Fields of config.json.

    Raises:
        ConfigError: If the base is None, which means no rotary embeddings.
    """
    if rope_theta is None:
        raise ConfigError("its attention has no positions, and this layout rotates queries and keys")
    return {"rope_parameters": {"rope_type": "default", "rope_theta": rope_theta}}
