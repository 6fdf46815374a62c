"""The Mamba-2 mixer in the conventions of transformers, which Nemotron-H and Falcon-H1 share."""

import math
from collections.abc import Sequence

import numpy as np

from recallax.config import ConfigError
from recallax.convert.array_transforms import (
    DEPTHWISE_CONV,
    TRANSPOSE,
    ArrayTransform,
    chain,
    lazy_transform,
    multiply,
    permute_first_axis,
    reshape,
    split_first_axis,
)
from recallax.convert.config_fields import ConfigFields
from recallax.convert.ignored_fields import IgnoredFields
from recallax.convert.key_map import KeyMapEntry, linear_entry, parameter_entry
from recallax.external_file import short_repr
from recallax.layers import Mamba2
from recallax.layers.matrix_memory import MatrixCell

ORIGINAL_FIELDS: IgnoredFields = {
    "transformers does not read it": ("fused_add_norm", "pad_vocab_size_multiple", "time_step_rank"),
}
"""Fields of the authors' config that published checkpoints in the format of transformers still have."""


def check_original_fields(fields: ConfigFields, intermediate_size: int) -> None:
    """Check the fields that repeat others under the names of the authors' config.

    Args:
        fields: The fields of config.json.
        intermediate_size: The inner width of the mixer.

    Raises:
        ConfigError: If a field contradicts the others.
    """
    fields.require_values("all layers are alike, with norms that have no mean and no bias", rms_norm=True, ssm_cfg={})
    fields.require_derived(
        d_inner=intermediate_size,
        intermediate_size=intermediate_size,
        d_model=fields.required("hidden_size", int),
        n_layer=fields.num_layers("num_hidden_layers"),
    )


def conv_size_of(cell: MatrixCell) -> int:
    """Return the number of taps of the short convolution.

    Args:
        cell: The memory cell.

    Returns:
        The number of taps.

    Raises:
        ConfigError: If there is no convolution.
    """
    if cell.conv is None:
        raise ConfigError("its mixer has no short convolution, and this layout has one")
    return cell.conv.taps.shape[0]


def parse_dt_limit(fields: ConfigFields) -> tuple[float, float | None]:
    """Read the range of step sizes.

    Args:
        fields: The fields of config.json; `time_step_limit` has two numbers, the second may be infinite.

    Returns:
        The lower and the upper limit; None: no upper limit.

    Raises:
        ConfigError: If the field is not such a range.
    """
    limit = fields.get("time_step_limit") or (0.0, math.inf)
    if not isinstance(limit, list | tuple) or len(limit) != 2 or not all(type(x) in (int, float) for x in limit):
        raise fields.unsupported(
            f"time_step_limit is {short_repr(limit)}; it must be two numbers, the second may be Infinity"
        )
    low, high = limit
    if not 0 <= low < high:
        raise fields.unsupported(
            f"time_step_limit is {short_repr(limit)}; the first must be at least 0 and below the second"
        )
    limits = [ConfigFields({"time_step_limit": x}, fields.model_name) for x in limit]
    lower = limits[0].required("time_step_limit", float)
    return lower, None if high == math.inf else limits[1].required("time_step_limit", float)


def mamba2_mixer_entries(
    mixer: Mamba2,
    d_model: int,
    source: str,
    target: str,
    *,
    multipliers: Sequence[float] = (1.0,) * 5,
    output_multiplier: float = 1.0,
) -> list[KeyMapEntry]:
    """Map the Mamba-2 mixer.

    Its input projection computes gate, x, B, C and step sizes; its convolution runs over x, B and C.

    Args:
        mixer: The mixer config.
        d_model: The model's width.
        source: The source module.
        target: The recallax module.
        multipliers: Factors on the five parts of the input projection.
        output_multiplier: Factor on the output.

    Returns:
        The entries; the factors are folded into the weights.
    """
    num_groups, num_heads, state_dim, head_dim = mixer.head_dims(d_model)
    inner, shared = num_heads * head_dim, num_groups * state_dim
    widths = (inner, inner, shared, shared, num_heads)
    names = ("readout.gate", "writer.parts.v", "writer.parts.k", "query.parts.q", "writer.parts.dt")
    projection = chain(split_first_axis(*widths), TRANSPOSE)
    if any(m != 1 for m in multipliers):
        projection = chain(lazy_transform(lambda: multiply(np.repeat(multipliers, widths)[:, None])), projection)

    def queries_first() -> ArrayTransform:
        x, b, c = np.split(np.arange(inner + 2 * shared), [inner, inner + shared])
        return permute_first_axis(np.concatenate([c, b, x]))

    order = lazy_transform(queries_first)
    entries = [
        KeyMapEntry((f"{source}.in_proj.weight",), tuple(f"{target}.{name}.kernel" for name in names), projection),
        parameter_entry(f"{source}.conv1d.weight", f"{target}.cell.conv.taps", chain(order, DEPTHWISE_CONV)),
        parameter_entry(f"{source}.conv1d.bias", f"{target}.cell.conv.bias", order),
        parameter_entry(f"{source}.A_log", f"{target}.cell.gate.a_log"),
        parameter_entry(f"{source}.dt_bias", f"{target}.cell.gate.dt_bias"),
        parameter_entry(f"{source}.D", f"{target}.cell.d"),
        linear_entry(f"{source}.out_proj", f"{target}.readout.out", output_multiplier),
    ]
    if mixer.order == "no_norm":
        return entries
    per_group = reshape((inner,), (num_groups, inner // num_groups))
    return [*entries, parameter_entry(f"{source}.norm.weight", f"{target}.readout.scale", per_group)]
