"""Mamba-2 as flash-linear-attention keeps it: transformers' model and keys, with other names for some fields.

Both call themselves `mamba2`. A config with `norm_eps` is fla's, one with `layer_norm_epsilon` transformers'. Source:
`fla/layers/mamba2.py` and `fla/models/mamba2` of github.com/fla-org/flash-linear-attention, version 0.6. (Its path
without CUDA gives the heads the wrong groups of B and C where there are several; its kernels do not.)
"""

from collections.abc import Mapping, Sequence
from typing import Any

from recallax.models.block import BlockModule
from recallax.models.importing import mamba2
from recallax.models.importing.fields import Fields
from recallax.models.importing.key_map import Entry
from recallax.models.lm import LM, LMConfig

NAMES = {"norm_eps": "layer_norm_epsilon", "dt_limit": "time_step_limit"}
"""Fields, and what transformers calls them."""

STANDARD = {"n_groups": 1, "conv_kernel": 4, "expand": 2, "head_dim": 64, "state_size": 128}
"""What fields are where they are not said."""


def is_fla(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is one of theirs."""
    return config.get("model_type") == "mamba2" and "norm_eps" in config


def fla_mamba2(fields: Fields) -> LMConfig:
    """`Mamba2ForCausalLM` of fla."""
    return mamba2.mamba2(_translated(fields))


def entries(fields: Fields, model: LMConfig) -> list[Entry]:
    """The key map, which is that of transformers."""
    return mamba2.entries(_translated(fields), model)


def describe(model: LM, layers: Sequence[BlockModule]) -> dict[str, Any]:
    """Their config."""
    said = mamba2.describe(model, layers)
    kept = {name: value for name, value in said.items() if name not in NAMES.values()}
    return kept | {name: said[theirs] for name, theirs in NAMES.items()} | {"model_type": "mamba2"}


def _translated(fields: Fields) -> Fields:
    """The config as transformers has it."""
    if theirs := sorted(set(NAMES.values()) & fields.values.keys()):
        raise fields.refusal(f"it has norm_eps, which is fla's, and {theirs[0]}, which is transformers'; leave one out")
    fields.demand("its norm is of the gated output", rmsnorm=True, norm_before_gate=False)
    fields.demand("a head has one skip", D_has_hdim=False)
    made = {NAMES.get(name, name): value for name, value in fields.values.items()}
    made |= {name: fields.optional(name, int, standard) for name, standard in STANDARD.items()}
    heads = made["expand"] * fields.get("hidden_size", int) // made["head_dim"]
    if (said := fields.optional("num_heads", int, heads)) != heads:
        raise fields.refusal(f"num_heads is {said}; expand, hidden_size and head_dim make {heads}")
    return Fields(made | {"num_heads": heads}, fields.model)
