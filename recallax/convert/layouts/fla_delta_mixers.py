"""DeltaNet, Gated DeltaNet, Gated DeltaProduct and Kimi Delta Attention of flash-linear-attention."""

from typing import Any

from recallax.convert.config_fields import ConfigFields
from recallax.convert.layouts.fla_mixer import (
    COMMON_FIXED_FIELDS,
    DECAY_PARAMETERS,
    DELTA_PROJECTIONS,
    GATED_PROJECTIONS,
    FLAMixer,
    conv_fields,
    expand_ratio,
    head_fields,
    head_width,
    norm_eps,
)
from recallax.layers import KDA, DeltaNet, GatedDeltaNet, GatedDeltaProduct
from recallax.layers.delta_net import DeltaNetCell
from recallax.layers.gated_delta_net import GatedDeltaNetCell
from recallax.layers.gated_delta_product import GatedDeltaProductCell
from recallax.layers.kda import BoundedDecayGate, KDACell

DEFAULT_CONV_SIZE = 4
KDA_DEFAULT_LOWER_BOUND = -5.0
"""The lower bound of recallax's KDA, which the softplus gate does not use."""


class FLADeltaNet(FLAMixer[DeltaNetCell]):
    """DeltaNet."""

    architecture = "DeltaNetForCausalLM"
    projections = DELTA_PROJECTIONS
    output_norm = "o_norm"
    fixed_fields = COMMON_FIXED_FIELDS | {
        "use_gate": False,
        "use_beta": True,
        "use_short_conv": True,
        "qk_norm": "l2",
        "qk_activation": "silu",
        "use_output_norm": True,
    }
    cell_class = DeltaNetCell

    def from_fields(self, fields: ConfigFields) -> DeltaNet:
        return DeltaNet(
            num_heads=fields.required("num_heads", int),
            head_k_dim=head_width(fields, "expand_k", 1.0),
            head_v_dim=head_width(fields, "expand_v", 1.0),
            allow_neg_eigval=fields.optional("allow_neg_eigval", bool, False),
            conv_size=fields.optional("conv_size", int, DEFAULT_CONV_SIZE),
            norm_eps=norm_eps(fields),
        )

    def to_fields(self, cell: DeltaNetCell, d_model: int) -> dict[str, Any]:
        return head_fields(cell, d_model) | conv_fields(cell) | {"allow_neg_eigval": cell.allow_neg_eigval}


class FLAKDA(FLAMixer[KDACell]):
    """Kimi Delta Attention."""

    architecture = "KDAForCausalLM"
    projections = DELTA_PROJECTIONS | {
        "f_proj.0": "writer.parts.decay.down",
        "f_proj.1": "writer.parts.decay.up",
        "g_proj.0": "readout.gate.down",
        "g_proj.1": "readout.gate.up",
    }
    other_parameters = DECAY_PARAMETERS | {"g_proj.1.bias": "readout.gate.up.bias"}
    output_norm = "o_norm"
    fixed_fields = COMMON_FIXED_FIELDS | {"use_short_conv": True}
    cell_class = KDACell

    def from_fields(self, fields: ConfigFields) -> KDA:
        num_heads, lower_bound = fields.required("num_heads", int), fields.get("lower_bound")
        if fields.optional("safe_gate", bool, False) and lower_bound is None:
            raise fields.unsupported("safe_gate is True, which needs lower_bound; state it")
        if (num_v_heads := fields.optional("num_v_heads", int, num_heads)) != num_heads:
            raise fields.unsupported(
                f"num_v_heads is {num_v_heads}, and num_heads {num_heads}; recallax's KDA needs as many of both"
            )
        return KDA(
            num_heads=num_heads,
            decay_gate="softplus" if lower_bound is None else "bounded",
            lower_bound=KDA_DEFAULT_LOWER_BOUND if lower_bound is None else fields.required("lower_bound", float),
            allow_neg_eigval=fields.optional("allow_neg_eigval", bool, False),
            conv_size=fields.optional("conv_size", int, DEFAULT_CONV_SIZE),
            norm_eps=norm_eps(fields),
            output_gate_bias=True,
            **_head_dims(fields, default_expand_v=1.0),
        )

    def to_fields(self, cell: KDACell, d_model: int) -> dict[str, Any]:
        lower_bound = cell.gate.lower_bound if isinstance(cell.gate, BoundedDecayGate) else None
        return _head_and_conv_fields(cell) | {"safe_gate": lower_bound is not None, "lower_bound": lower_bound}


class FLAGatedDeltaNet(FLAMixer[GatedDeltaNetCell]):
    """Gated DeltaNet."""

    architecture = "GatedDeltaNetForCausalLM"
    projections = DELTA_PROJECTIONS | GATED_PROJECTIONS | {"a_proj": "writer.parts.decay"}
    other_parameters = DECAY_PARAMETERS
    output_norm = "o_norm"
    fixed_fields = COMMON_FIXED_FIELDS | {"use_gate": True, "use_short_conv": True}
    cell_class = GatedDeltaNetCell

    def from_fields(self, fields: ConfigFields) -> GatedDeltaNet:
        if (gate := fields.optional("output_gate_activation", str, "swish")) not in ("swish", "silu"):
            raise fields.unsupported(f"output_gate_activation is {gate!r}; recallax supports 'swish' here")
        num_heads = fields.required("num_heads", int)
        num_v_heads = fields.optional("num_v_heads", int, num_heads)
        fields.require_multiple("num_v_heads", num_v_heads, "num_heads", num_heads)
        return GatedDeltaNet(
            num_heads=num_heads,
            num_v_heads=num_v_heads,
            allow_neg_eigval=fields.optional("allow_neg_eigval", bool, False),
            conv_size=fields.optional("conv_size", int, DEFAULT_CONV_SIZE),
            norm_eps=norm_eps(fields),
            **_head_dims(fields, default_expand_v=2.0),
        )

    def to_fields(self, cell: GatedDeltaNetCell, d_model: int) -> dict[str, Any]:
        return _head_and_conv_fields(cell) | {"num_v_heads": cell.head_dims.num_v_heads}


class FLAGatedDeltaProduct(FLAMixer[GatedDeltaProductCell]):
    """Gated DeltaProduct."""

    architecture = "GatedDeltaProductForCausalLM"
    projections = DELTA_PROJECTIONS | GATED_PROJECTIONS | {"a_proj": "writer.parts.decay"}
    other_parameters = DECAY_PARAMETERS
    output_norm = "o_norm"
    fixed_fields = COMMON_FIXED_FIELDS | {"use_output_gate": True, "use_short_conv": True}
    cell_class = GatedDeltaProductCell

    def from_fields(self, fields: ConfigFields) -> GatedDeltaProduct:
        if not fields.optional("use_forget_gate", bool, False):
            raise fields.unsupported("use_forget_gate is False, and recallax's Gated DeltaProduct always has this gate")
        return GatedDeltaProduct(
            num_householder=fields.optional("num_householder", int, 1),
            num_heads=fields.required("num_heads", int),
            allow_neg_eigval=fields.optional("allow_neg_eigval", bool, False),
            conv_size=fields.optional("conv_size", int, DEFAULT_CONV_SIZE),
            norm_eps=norm_eps(fields),
            **_head_dims(fields, default_expand_v=2.0),
        )

    def to_fields(self, cell: GatedDeltaProductCell, d_model: int) -> dict[str, Any]:
        return _head_and_conv_fields(cell) | {"use_forget_gate": True, "num_householder": cell.num_householder}


def _head_dims(fields: ConfigFields, default_expand_v: float) -> dict[str, int]:
    """Read the widths of a head: `head_dim` is the key's, `expand_v` the ratio of the value's to it."""
    head_k_dim = fields.required("head_dim", int)
    expand_v = fields.optional("expand_v", float, default_expand_v)
    head_v_dim = int(head_k_dim * expand_v)
    if head_v_dim < 1:
        raise fields.unsupported(
            f"expand_v {expand_v:g} makes values {head_v_dim} wide, from head_dim {head_k_dim}; they need at least 1"
        )
    return {"head_k_dim": head_k_dim, "head_v_dim": head_v_dim}


def _head_and_conv_fields(cell: KDACell | GatedDeltaNetCell | GatedDeltaProductCell) -> dict[str, Any]:
    num_heads, _, head_k_dim, head_v_dim = cell.head_dims
    sizes = {"num_heads": num_heads, "head_dim": head_k_dim, "expand_v": expand_ratio(head_v_dim, head_k_dim)}
    return sizes | conv_fields(cell) | {"allow_neg_eigval": cell.allow_neg_eigval}
