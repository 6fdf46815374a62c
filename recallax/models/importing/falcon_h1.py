"""Falcon-H1: the mixers of its layers, which run Mamba-2 and attention side by side, as no block here does.

Every multiplier is folded into the weights it meets, so that these mixers take the normalised input and give what is
added to the residual stream.
"""

from recallax.layers import Attention, Mamba2, SlidingWindow
from recallax.layers.readout import Order
from recallax.models.importing import decoder
from recallax.models.importing.fields import Fields
from recallax.models.importing.key_map import Entry
from recallax.models.importing.mamba2 import dt_limit, mixer_entries
from recallax.models.lm import LMConfig


def falcon_h1(fields: Fields) -> LMConfig:
    """`FalconH1ForCausalLM`. Always raises ConfigError."""
    raise fields.refusal("its layers run Mamba-2 and attention side by side; a block here has one sequence mixer")


def entries(fields: Fields, model: LMConfig | None = None) -> list[Entry]:
    """The key map of the mixers, as `layers.N.attention` and `layers.N.mamba` of a model that is not there yet."""
    layers = range(fields.get("num_hidden_layers", int))
    return [
        entry
        for layer in layers
        for entry in (
            *_attention_entries(fields, f"model.layers.{layer}.self_attn", f"layers.{layer}.attention"),
            *_mamba2_entries(fields, f"model.layers.{layer}.mamba", f"layers.{layer}.mamba"),
        )
    ]


def attention(fields: Fields) -> Attention | SlidingWindow:
    """The attention of every layer."""
    fields.demand("projections have no biases", attention_bias=False)
    fields.demand_stated("num_key_value_heads")
    return decoder.softmax(fields)


def mamba2(fields: Fields) -> Mamba2:
    """The Mamba-2 mixer of every layer."""
    fields.demand("projections have no biases", mamba_proj_bias=False, projectors_bias=False)
    fields.demand("the convolution has a bias", mamba_conv_bias=True)
    fields.demand("convolution and gate are followed by silu", hidden_act="silu")
    normed = fields.optional("mamba_rms_norm", bool, False)
    norm_first = fields.optional("mamba_norm_before_gate", bool, True)
    order: Order = ("gate last" if norm_first else "gate first") if normed else "no norm"
    width = fields.get("mamba_d_head", int)
    return Mamba2(
        state_dim=fields.get("mamba_d_state", int),
        head_dim=width,
        groups=fields.get("mamba_n_groups", int),
        inner=fields.get("mamba_n_heads", int) * width,
        conv=fields.get("mamba_d_conv", int),
        order=order,
        dt_limit=dt_limit(fields),
        eps=fields.get("rms_norm_eps", float),
    )


def _attention_entries(fields: Fields, theirs: str, ours: str) -> list[Entry]:
    entering, keys, leaving = (
        fields.optional(f"{name}_multiplier", float, 1.0) for name in ("attention_in", "key", "attention_out")
    )
    return decoder.softmax_entries(theirs, ours, entering=entering, keys=keys, leaving=leaving)


def _mamba2_entries(fields: Fields, theirs: str, ours: str) -> list[Entry]:
    entering, leaving = (fields.optional(f"ssm_{name}_multiplier", float, 1.0) for name in ("in", "out"))
    return mixer_entries(
        mamba2(fields),
        fields.get("hidden_size", int),
        theirs,
        ours,
        multipliers=[entering * m for m in fields.optional("ssm_multipliers", list, [1.0] * 5)],
        leaving=leaving,
    )
