"""The checkpoints of state-spaces: Mamba and Mamba-2 in the words of their authors, said in those of transformers.

Their config.json has no model_type, and the embedding another name; the rest are the keys of transformers. Source: the
config and the model of github.com/state-spaces/mamba (`config_mamba.py`, `mixer_seq_simple.py`).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from recallax.config import ConfigError
from recallax.convert.config_fields import ConfigFields
from recallax.convert.key_map import KeyMapEntry
from recallax.convert.layouts import decoder_parts, mamba2_layout, mamba_layout
from recallax.layers.mamba import MambaMixer
from recallax.models.block import BlockModule
from recallax.models.lm import LM, LMConfig

EMBEDDING_KEY = "backbone.embedding.weight"
NORM_EPS = 1e-5
"""Of all norms, which their config cannot say."""
IGNORED_CONFIG_FIELDS = {"residual_in_fp32", "fused_add_norm", "initializer_cfg", "pad_vocab_size_multiple"}
MODEL_FIELDS = {
    "d_model",
    "n_layer",
    "vocab_size",
    "ssm_cfg",
    "rms_norm",
    "norm_epsilon",
    "tie_embeddings",
    "d_intermediate",
}
MODEL_FIELDS |= {"attn_layer_idx", "attn_cfg"}
LAYER_NAMES = {"mamba": "Mamba1", "mamba2": "Mamba2"}
"""Their layer of a model_type of transformers."""
MIXER_FIELD_NAMES = {
    "Mamba1": {"d_state": "state_size", "d_conv": "conv_kernel", "expand": "expand", "dt_rank": "time_step_rank"},
    "Mamba2": {
        "d_state": "state_size",
        "d_conv": "conv_kernel",
        "expand": "expand",
        "headdim": "head_dim",
        "ngroups": "n_groups",
        "chunk_size": "chunk_size",
    },
}
"""Fields of a layer, and what transformers calls them."""
MIXER_DEFAULTS = {
    "Mamba1": {"d_state": 16, "d_conv": 4, "expand": 2},
    "Mamba2": {"d_state": 128, "d_conv": 4, "expand": 2, "headdim": 64, "ngroups": 1, "chunk_size": 256},
}
"""What they are where they are not said."""


class _TransformersLayout(NamedTuple):
    """What is said of a model in transformers' words."""

    from_config_json: Callable[[ConfigFields], LMConfig]
    key_map: Callable[[ConfigFields, LMConfig], list[KeyMapEntry]]
    to_config_json: Callable[[LM, Sequence[BlockModule]], dict[str, Any]]


TRANSFORMERS_LAYOUTS = {
    "mamba": _TransformersLayout(mamba_layout.from_config_json, mamba_layout.key_map, mamba_layout.to_config_json),
    "mamba2": _TransformersLayout(mamba2_layout.from_config_json, mamba2_layout.key_map, mamba2_layout.to_config_json),
}


def is_state_spaces(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is one of theirs."""
    return "model_type" not in config and {"d_model", "n_layer", "ssm_cfg"} <= config.keys()


def from_config_json(fields: ConfigFields) -> LMConfig:
    """`MambaLMHeadModel` of either kind of layer."""
    made = _to_transformers_fields(fields)
    return TRANSFORMERS_LAYOUTS[made.model_name].from_config_json(made)


def key_map(fields: ConfigFields, model: LMConfig) -> list[KeyMapEntry]:
    """The key map: that of transformers, but for the embedding."""
    made = _to_transformers_fields(fields)
    found = TRANSFORMERS_LAYOUTS[made.model_name].key_map(made, model)
    return [entry._replace(source=(EMBEDDING_KEY,)) if entry.target == ("embedding",) else entry for entry in found]


def to_config_json(model: LM, layers: Sequence[BlockModule]) -> dict[str, Any]:
    """Their config, written from that of transformers."""
    kind = "mamba" if isinstance(layers[0].mixer, MambaMixer) else "mamba2"
    said = TRANSFORMERS_LAYOUTS[kind].to_config_json(model, layers)
    if said["layer_norm_epsilon"] != NORM_EPS:
        raise ConfigError(f"its norms have eps {said['layer_norm_epsilon']}, and this layout has only {NORM_EPS}")
    mixer = {name: said[theirs] for name, theirs in MIXER_FIELD_NAMES[LAYER_NAMES[kind]].items() if theirs in said}
    return {
        "d_model": said["hidden_size"],
        "n_layer": said["num_hidden_layers"],
        "vocab_size": said["vocab_size"],
        "pad_vocab_size_multiple": 1,
        "ssm_cfg": {"layer": LAYER_NAMES[kind], **mixer},
        "rms_norm": True,
        "residual_in_fp32": True,
        "fused_add_norm": True,
        "tie_embeddings": said["tie_word_embeddings"],
    }


def _to_transformers_fields(fields: ConfigFields) -> ConfigFields:
    """The config as transformers has it. Raises ConfigError for what has no meaning there or here."""
    mixer = ConfigFields(fields.optional("ssm_cfg", dict, {}), f"{fields.model_name}' ssm_cfg")
    layer = mixer.optional("layer", str, "Mamba1")
    if layer not in MIXER_FIELD_NAMES:
        raise mixer.unsupported(f"layer is {layer!r}; only {', '.join(MIXER_FIELD_NAMES)} can be imported")
    for said, known in ((fields, MODEL_FIELDS | IGNORED_CONFIG_FIELDS), (mixer, {"layer", *MIXER_FIELD_NAMES[layer]})):
        if unknown := sorted(said.values.keys() - known):
            raise said.unsupported(f"recallax does not know the field {unknown[0]!r}")
    fields.require_values("it has no layers besides Mamba", attn_layer_idx=[], d_intermediate=0)
    fields.require_values("norms have no mean and no bias", rms_norm=True)
    width = fields.required("d_model", int)
    made: dict[str, Any] = {
        theirs: mixer.optional(name, int, MIXER_DEFAULTS[layer][name])
        for name, theirs in MIXER_FIELD_NAMES[layer].items()
        if name in MIXER_DEFAULTS[layer]
    }
    made |= {
        "hidden_size": width,
        "num_hidden_layers": fields.required("n_layer", int),
        "vocab_size": decoder_parts.padded_vocab_size(fields),
        "use_bias": False,
        "use_conv_bias": True,
        "hidden_act": "silu",
        "layer_norm_epsilon": fields.optional("norm_epsilon", float, NORM_EPS),
        "tie_word_embeddings": fields.optional("tie_embeddings", bool, True),
    }
    if layer == "Mamba2":
        made["num_heads"] = made["expand"] * width // made["head_dim"]
    else:
        rank = mixer.values.get("dt_rank", "auto")
        made["time_step_rank"] = -(-width // 16) if rank == "auto" else mixer.required("dt_rank", int)
    return ConfigFields(made, next(kind for kind, name in LAYER_NAMES.items() if name == layer))
