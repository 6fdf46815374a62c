"""The interface between the common frame of flash-linear-attention's models and one mixer."""

import abc
import math
from collections.abc import Mapping
from typing import Any, ClassVar

from recallax.convert.config_fields import ConfigFields
from recallax.convert.ignored_fields import IgnoredFields
from recallax.convert.layouts.mamba2_parts import conv_size_of
from recallax.layers import MixerConfig
from recallax.layers.matrix_memory import MatrixCell

COMMON_FIXED_FIELDS = {"attn": None, "attnres_block_size": None, "hidden_act": "swish"}
"""Fields of which recallax supports one value in every model."""
FUSED_KERNELS: IgnoredFields = {
    "it selects a kernel, and all kernels compute the same function": (
        "fuse_cross_entropy", "fuse_linear_cross_entropy", "fuse_norm", "fuse_swiglu",
    ),
}  # fmt: skip
"""Fields that every model ignores, unless its layer reads them."""
QKVO_PROJECTIONS = {
    "q_proj": "query.parts.q",
    "k_proj": "writer.parts.k",
    "v_proj": "writer.parts.v",
    "o_proj": "readout.out",
}
GATED_PROJECTIONS = QKVO_PROJECTIONS | {"g_proj": "readout.gate"}
DELTA_PROJECTIONS = QKVO_PROJECTIONS | {"b_proj": "writer.parts.beta"}
DECAY_PARAMETERS = {"A_log": "cell.gate.a_log", "dt_bias": "cell.gate.dt_bias"}
DEFAULT_NORM_EPS = 1e-6


class FLAMixer[C: MatrixCell](abc.ABC):
    """A mixer of flash-linear-attention: its config fields and the names of its weights."""

    architecture: ClassVar[str]
    """The model class that contains it."""
    projections: ClassVar[Mapping[str, str]]
    """Its projections, and those of the recallax mixer."""
    other_parameters: ClassVar[Mapping[str, str]] = {}
    """Its other parameters, and those of the recallax mixer."""
    output_norm: ClassVar[str]
    """Its output norm."""
    fixed_fields: ClassVar[Mapping[str, Any]] = COMMON_FIXED_FIELDS
    """Fields of which recallax supports one value, which is also their default."""
    ignored_fields: ClassVar[IgnoredFields] = {}
    """Fields that do not change what the layer computes, by the reason."""
    hidden_ratio: ClassVar[int] = 4
    """Default ratio of the MLP's width to the model's, before the factor of two thirds for the gate."""
    cell_class: type[C]
    """The memory cell of the recallax mixer."""

    @abc.abstractmethod
    def from_fields(self, fields: ConfigFields) -> MixerConfig:
        """Read the mixer config.

        Args:
            fields: The fields of config.json.

        Returns:
            The mixer config.

        Raises:
            ConfigError: If recallax does not support the mixer.
        """

    @abc.abstractmethod
    def to_fields(self, cell: C, d_model: int) -> dict[str, Any]:
        """Write the mixer's fields.

        Args:
            cell: The memory cell of the mixer.
            d_model: The model's width.

        Returns:
            Fields of config.json.
        """


def norm_eps(fields: ConfigFields) -> float:
    """Read the epsilon of all norms.

    Args:
        fields: The fields of config.json.

    Returns:
        The epsilon.
    """
    return fields.optional("norm_eps", float, DEFAULT_NORM_EPS, above=0.0)


def head_width(fields: ConfigFields, name: str, default: float) -> int:
    """Read the width of a head's keys or values, which is stated as a factor of the model's width for all heads.

    Args:
        fields: The fields of config.json.
        name: The factor's field.
        default: The factor's default.

    Returns:
        The width of one head.

    Raises:
        ConfigError: If the total width is not a multiple of the number of heads.
    """
    num_heads = fields.required("num_heads", int)
    total = fields.required("hidden_size", int) * fields.optional(name, float, default)
    if round(total) < num_heads or not math.isclose(total, round(total)) or round(total) % num_heads:
        raise fields.unsupported(
            f"{name} makes all heads {total:g} wide; that must be a multiple of num_heads {num_heads}"
        )
    return round(total) // num_heads


def head_fields(cell: MatrixCell, d_model: int) -> dict[str, Any]:
    """Write head sizes as factors of the model's width.

    Args:
        cell: The memory cell.
        d_model: The model's width.

    Returns:
        Fields of config.json.
    """
    _, num_heads, head_k_dim, head_v_dim = cell.head_dims
    return {
        "num_heads": num_heads,
        "expand_k": expand_ratio(num_heads * head_k_dim, d_model),
        "expand_v": expand_ratio(num_heads * head_v_dim, d_model),
    }


def conv_fields(cell: MatrixCell) -> dict[str, Any]:
    """Write the fields of the short convolution.

    Args:
        cell: The memory cell.

    Returns:
        Fields of config.json.
    """
    return {"use_short_conv": True, "conv_size": conv_size_of(cell)}


def expand_ratio(width: int, base: int) -> float:
    """Return the smallest factor from which fla recovers a width, whether it truncates or rounds the product.

    Args:
        width: The width.
        base: The width that the factor multiplies.

    Returns:
        The factor.
    """
    ratio = width / base
    return ratio if int(base * ratio) == width else math.nextafter(ratio, math.inf)
