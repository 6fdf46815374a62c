"""GLA, RetNet, linear attention and HGRN2 of flash-linear-attention."""

from typing import Any

from recallax.convert.config_fields import ConfigFields
from recallax.convert.ignored_fields import IgnoredFields
from recallax.convert.layouts.fla_mixer import (
    COMMON_FIXED_FIELDS,
    GATED_PROJECTIONS,
    QKVO_PROJECTIONS,
    FLAMixer,
    conv_fields,
    head_fields,
    head_width,
    norm_eps,
)
from recallax.layers import GLA, HGRN2, LinearAttention, RetNet
from recallax.layers.gla import GLACell
from recallax.layers.hgrn2 import HGRN2Cell
from recallax.layers.linear_attention import LinearAttentionCell
from recallax.layers.retnet import RetNetCell

UNGROUPED_FIXED_FIELDS = COMMON_FIXED_FIELDS | {
    "num_kv_heads": None,
    "feature_map": None,
    "use_output_gate": True,
    "fuse_norm": True,
    "elementwise_affine": True,
}
"""Supported values of GLA and RetNet."""
UNUSED_CONV_FIELDS: IgnoredFields = {"only a short convolution uses it": ("conv_size",)}
HGRN2_NORM_EPS = 1e-5
"""The epsilon of HGRN2's output norm, which does not depend on norm_eps."""
HGRN2_DEFAULT_EXPAND_RATIO = 128


class FLAGLA(FLAMixer[GLACell]):
    """Gated linear attention."""

    architecture = "GLAForCausalLM"
    projections = GATED_PROJECTIONS | {"gk_proj.0": "writer.parts.decay.down", "gk_proj.1": "writer.parts.decay.up"}
    other_parameters = {"gk_proj.1.bias": "writer.parts.decay.up.bias"}  # noqa: RUF012
    output_norm = "g_norm_swish_gate"
    fixed_fields = UNGROUPED_FIXED_FIELDS | {"clamp_min": None, "use_gk": True, "use_gv": False}
    ignored_fields = UNUSED_CONV_FIELDS
    cell_class = GLACell

    def from_fields(self, fields: ConfigFields) -> GLA:
        has_conv = fields.optional("use_short_conv", bool, False)
        return GLA(
            num_heads=fields.required("num_heads", int),
            head_k_dim=head_width(fields, "expand_k", 0.5),
            head_v_dim=head_width(fields, "expand_v", 1.0),
            conv_size=fields.optional("conv_size", int, 4) if has_conv else 0,
            norm_eps=norm_eps(fields),
        )

    def to_fields(self, cell: GLACell, d_model: int) -> dict[str, Any]:
        return head_fields(cell, d_model) | ({"use_short_conv": False} if cell.conv is None else conv_fields(cell))


class FLARetNet(FLAMixer[RetNetCell]):
    """Retention."""

    architecture = "RetNetForCausalLM"
    projections = GATED_PROJECTIONS
    output_norm = "g_norm_swish_gate"
    fixed_fields = UNGROUPED_FIXED_FIELDS | {"use_short_conv": False}
    ignored_fields = UNUSED_CONV_FIELDS
    hidden_ratio = 2
    cell_class = RetNetCell

    def from_fields(self, fields: ConfigFields) -> RetNet:
        return RetNet(
            num_heads=fields.required("num_heads", int),
            head_k_dim=head_width(fields, "expand_k", 1.0),
            head_v_dim=head_width(fields, "expand_v", 2.0),
            norm_eps=norm_eps(fields),
        )

    def to_fields(self, cell: RetNetCell, d_model: int) -> dict[str, Any]:
        return head_fields(cell, d_model)


class FLALinearAttention(FLAMixer[LinearAttentionCell]):
    """Linear attention with the identity feature map."""

    architecture = "LinearAttentionForCausalLM"
    projections = QKVO_PROJECTIONS
    output_norm = "norm"
    fixed_fields = COMMON_FIXED_FIELDS | {
        "num_kv_heads": None,
        "expand_v": 1.0,
        "norm_q": False,
        "norm_k": False,
        "norm_feature_map": False,
        "tie_feature_map_qk": False,
        "elementwise_affine": True,
    }
    cell_class = LinearAttentionCell

    def from_fields(self, fields: ConfigFields) -> LinearAttention:
        if (name := fields.required("feature_map", str)) != "identity":
            raise fields.unsupported(f"feature_map is {name!r}; recallax has an output norm only with 'identity'")
        return LinearAttention(
            num_heads=fields.required("num_heads", int),
            feature_dim=head_width(fields, "expand_k", 1.0),
            feature_map="identity",
            norm_eps=norm_eps(fields),
        )

    def to_fields(self, cell: LinearAttentionCell, d_model: int) -> dict[str, Any]:
        return head_fields(cell, d_model) | {"feature_map": "identity"}


class FLAHGRN2(FLAMixer[HGRN2Cell]):
    """HGRN2.

    It divides queries by the root of their width before a norm with a fixed epsilon. Recallax does not divide them, and
    multiplies the epsilon by the width instead.
    """

    architecture = "HGRN2ForCausalLM"
    projections = {  # noqa: RUF012
        "q_proj": "query.parts.q",
        "f_proj": "writer.parts.decay",
        "i_proj": "writer.parts.v",
        "o_proj": "readout.out",
    }
    output_norm = "g_norm"
    fixed_fields = COMMON_FIXED_FIELDS | {"use_short_conv": False, "use_lower_bound": True, "elementwise_affine": True}
    ignored_fields = UNUSED_CONV_FIELDS
    cell_class = HGRN2Cell

    def from_fields(self, fields: ConfigFields) -> HGRN2:
        d_model, num_heads = fields.required("hidden_size", int), fields.optional("num_heads", int, None)
        default = HGRN2_DEFAULT_EXPAND_RATIO if num_heads is None else max(1, d_model // num_heads)
        head_k_dim = fields.optional("expand_ratio", int, default)
        if d_model % head_k_dim or num_heads not in (None, d_model // head_k_dim):
            raise fields.unsupported(
                f"expand_ratio is {head_k_dim} and num_heads {num_heads}; their product must be {d_model}"
            )
        return HGRN2(num_heads=d_model // head_k_dim, norm_eps=HGRN2_NORM_EPS * head_k_dim)

    def to_fields(self, cell: HGRN2Cell, d_model: int) -> dict[str, Any]:
        return {"num_heads": cell.head_dims.num_heads, "expand_ratio": cell.head_dims.head_k_dim}
