"""Mamba-2 of flash-linear-attention: the model and the keys of transformers, with other names for some fields.

Both have the `model_type` `mamba2`. A config with `norm_eps` is fla's, one with `layer_norm_epsilon` is transformers'.
Source: `fla/layers/mamba2.py` and `fla/models/mamba2` of github.com/fla-org/flash-linear-attention, version 0.6. (Its
path without CUDA assigns the wrong groups of B and C to the heads where there are several; its kernels do not.)
"""

from collections.abc import Mapping, Sequence
from typing import Any

from recallax.convert.config_fields import ConfigFields
from recallax.convert.ignored_fields import STEP_SIZE_INITIALIZATION, field_names
from recallax.convert.key_map import KeyMapEntry
from recallax.convert.layouts.fla_mixer import FUSED_KERNELS
from recallax.convert.layouts.mamba2_layout import Mamba2Layout
from recallax.models.block import BlockModule
from recallax.models.lm import LM, LMConfig

FIELD_NAMES = {"norm_eps": "layer_norm_epsilon", "dt_limit": "time_step_limit"}
"""Names of transformers' fields by those of fla."""
FIELD_DEFAULTS = {"n_groups": 1, "conv_kernel": 4, "expand": 2, "head_dim": 64, "state_size": 128}
"""Defaults of omitted fields."""


class FLAMamba2Layout(Mamba2Layout):
    """`Mamba2ForCausalLM` of fla."""

    ignored_fields = field_names(STEP_SIZE_INITIALIZATION, FUSED_KERNELS)

    def from_config_json(self, fields: ConfigFields) -> LMConfig:
        converted = _to_transformers_fields(fields)
        model = super().from_config_json(converted)
        fields.read |= {name for name in fields.values if FIELD_NAMES.get(name, name) in converted.read}
        return model

    def key_map(self, fields: ConfigFields, model: LMConfig) -> list[KeyMapEntry]:
        return super().key_map(_to_transformers_fields(fields), model)

    def to_config_json(self, model: LM, layers: Sequence[BlockModule]) -> dict[str, Any]:
        config = super().to_config_json(model, layers)
        renamed = {name: config.pop(source_name) for name, source_name in FIELD_NAMES.items()}
        return config | renamed | {"model_type": "mamba2"}

    def matches(self, config: Mapping[str, Any]) -> bool:
        return config.get("model_type") == "mamba2" and "norm_eps" in config


def _to_transformers_fields(fields: ConfigFields) -> ConfigFields:
    """Rename fields and fill in defaults, as transformers needs them."""
    if conflicts := sorted(set(FIELD_NAMES.values()) & fields.values.keys()):
        raise fields.unsupported(
            f"it has norm_eps, which is fla's, and {conflicts[0]}, which is transformers'; leave one out"
        )
    fields.require_values("its norm is applied to the gated output", rmsnorm=True, norm_before_gate=False)
    fields.require_values("each head has one skip weight", D_has_hdim=False)
    values = {FIELD_NAMES.get(name, name): value for name, value in fields.values.items()}
    values |= {name: fields.optional(name, int, default) for name, default in FIELD_DEFAULTS.items()}
    num_heads = values["expand"] * fields.required("hidden_size", int) // values["head_dim"]
    if (stated := fields.optional("num_heads", int, num_heads)) != num_heads:
        raise fields.unsupported(f"num_heads is {stated}; expand, hidden_size and head_dim require {num_heads}")
    return ConfigFields(values | {"num_heads": num_heads}, fields.model_name)
