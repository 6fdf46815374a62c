"""Mamba-2 as flash-linear-attention keeps it: transformers' model and keys, with other names for some fields.

Both call themselves `mamba2`. A config with `norm_eps` is fla's, one with `layer_norm_epsilon` transformers'. Source:
`fla/layers/mamba2.py` and `fla/models/mamba2` of github.com/fla-org/flash-linear-attention, version 0.6. (Its path
without CUDA gives the heads the wrong groups of B and C where there are several; its kernels do not.)
"""

from collections.abc import Mapping, Sequence
from typing import Any

from recallax.convert.config_fields import ConfigFields
from recallax.convert.key_map import KeyMapEntry
from recallax.convert.layouts import mamba2_layout
from recallax.models.block import BlockModule
from recallax.models.lm import LM, LMConfig

FIELD_NAMES = {"norm_eps": "layer_norm_epsilon", "dt_limit": "time_step_limit"}
"""Fields, and what transformers calls them."""

FIELD_DEFAULTS = {"n_groups": 1, "conv_kernel": 4, "expand": 2, "head_dim": 64, "state_size": 128}
"""What fields are where they are not said."""


def is_fla(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is one of theirs."""
    return config.get("model_type") == "mamba2" and "norm_eps" in config


def from_config_json(fields: ConfigFields) -> LMConfig:
    """`Mamba2ForCausalLM` of fla."""
    return mamba2_layout.from_config_json(_to_transformers_fields(fields))


def key_map(fields: ConfigFields, model: LMConfig) -> list[KeyMapEntry]:
    """The key map, which is that of transformers."""
    return mamba2_layout.key_map(_to_transformers_fields(fields), model)


def to_config_json(model: LM, layers: Sequence[BlockModule]) -> dict[str, Any]:
    """Their config."""
    said = mamba2_layout.to_config_json(model, layers)
    kept = {name: value for name, value in said.items() if name not in FIELD_NAMES.values()}
    return kept | {name: said[theirs] for name, theirs in FIELD_NAMES.items()} | {"model_type": "mamba2"}


def _to_transformers_fields(fields: ConfigFields) -> ConfigFields:
    """The config as transformers has it."""
    if theirs := sorted(set(FIELD_NAMES.values()) & fields.values.keys()):
        raise fields.unsupported(
            f"it has norm_eps, which is fla's, and {theirs[0]}, which is transformers'; leave one out"
        )
    fields.require_values("its norm is of the gated output", rmsnorm=True, norm_before_gate=False)
    fields.require_values("a head has one skip", D_has_hdim=False)
    made = {FIELD_NAMES.get(name, name): value for name, value in fields.values.items()}
    made |= {name: fields.optional(name, int, standard) for name, standard in FIELD_DEFAULTS.items()}
    heads = made["expand"] * fields.required("hidden_size", int) // made["head_dim"]
    if (said := fields.optional("num_heads", int, heads)) != heads:
        raise fields.unsupported(f"num_heads is {said}; expand, hidden_size and head_dim make {heads}")
    return ConfigFields(made | {"num_heads": heads}, fields.model_name)
