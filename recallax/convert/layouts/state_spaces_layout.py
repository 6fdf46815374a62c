"""Checkpoints of state-spaces: Mamba and Mamba-2 with the field names of their authors.

Their config.json has no model_type, and their embedding has another key; the other keys are those of transformers.
Source: the config and the model of github.com/state-spaces/mamba (`config_mamba.py`, `mixer_seq_simple.py`).
"""

from collections.abc import Mapping, Sequence
from typing import Any

from recallax.config import ConfigError
from recallax.convert.config_fields import ConfigFields
from recallax.convert.ignored_fields import IgnoredFields, field_names
from recallax.convert.key_map import KeyMapEntry
from recallax.convert.layouts import decoder_parts
from recallax.convert.layouts.checkpoint_layout import CheckpointLayout
from recallax.convert.layouts.mamba2_layout import Mamba2Layout
from recallax.convert.layouts.mamba_layout import MambaLayout
from recallax.external_file import short_repr
from recallax.layers.mamba import MambaMixer
from recallax.models.block import BlockModule
from recallax.models.lm import LM, LMConfig

EMBEDDING_KEY = "backbone.embedding.weight"
NORM_EPS = 1e-5
"""The epsilon of all norms, which their config does not contain."""
CHANNELS_PER_DT_RANK = 16
"""The rank of the step sizes is the width divided by this, rounded up, if `dt_rank` is "auto"."""
DEFAULT_VOCAB_SIZE_MULTIPLE = 8
"""The number of rows of the embedding is a multiple of this, if `pad_vocab_size_multiple` is missing."""
IGNORED_FIELDS: IgnoredFields = {
    "it selects a kernel, and all kernels compute the same function": ("fused_add_norm",),
    "only initialization uses it": ("initializer_cfg",),
    "it describes attention layers, and the model has none": ("attn_cfg",),
}
LAYER_NAMES = {"mamba": "Mamba1", "mamba2": "Mamba2"}
"""Their layer names by the model_type of transformers."""
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
"""Names of transformers' fields by those of a layer."""
MIXER_DEFAULTS = {
    "Mamba1": {"d_state": 16, "d_conv": 4, "expand": 2},
    "Mamba2": {"d_state": 128, "d_conv": 4, "expand": 2, "headdim": 64, "ngroups": 1, "chunk_size": 256},
}
"""Defaults of omitted fields."""
FIXED_SSM_FIELDS: dict[str, dict[str, Any]] = {
    "Mamba1": {"bias": False, "conv_bias": True},
    "Mamba2": {"bias": False, "conv_bias": True, "rmsnorm": True, "norm_before_gate": False, "D_has_hdim": False},
}
"""Fields of a layer of which recallax supports one value, which is also their default."""
IGNORED_SSM_FIELDS = field_names(
    {
        "it is a range or a scheme for initialization": (
            "A_init_range",
            "conv_init",
            "dt_init",
            "dt_init_floor",
            "dt_max",
            "dt_min",
            "dt_scale",
        ),
        "it selects a kernel": ("use_fast_path", "use_mem_eff_path", "chunk_size"),
    }
)
TRANSFORMERS_LAYOUTS: dict[str, CheckpointLayout] = {"mamba": MambaLayout(), "mamba2": Mamba2Layout()}


class StateSpacesLayout(CheckpointLayout):
    """`MambaLMHeadModel` of mamba_ssm, with Mamba or Mamba-2 layers."""

    ignored_fields = field_names(IGNORED_FIELDS)
    duplicates_tied_head = True

    def from_config_json(self, fields: ConfigFields) -> LMConfig:
        converted = _to_transformers_fields(fields)
        return TRANSFORMERS_LAYOUTS[converted.model_name].from_config_json(converted)

    def key_map(self, fields: ConfigFields, model: LMConfig) -> list[KeyMapEntry]:
        converted = _to_transformers_fields(fields)
        entries = TRANSFORMERS_LAYOUTS[converted.model_name].key_map(converted, model)
        return [e._replace(source=(EMBEDDING_KEY,)) if e.target == ("embedding",) else e for e in entries]

    def to_config_json(self, model: LM, layers: Sequence[BlockModule]) -> dict[str, Any]:
        model_type = "mamba" if isinstance(layers[0].mixer, MambaMixer) else "mamba2"
        config = TRANSFORMERS_LAYOUTS[model_type].to_config_json(model, layers)
        if config["layer_norm_epsilon"] != NORM_EPS:
            raise ConfigError(
                f"its norms have eps {config['layer_norm_epsilon']}, and this layout supports only {NORM_EPS}"
            )
        layer = LAYER_NAMES[model_type]
        mixer = {name: config[source] for name, source in MIXER_FIELD_NAMES[layer].items() if source in config}
        return {
            "d_model": config["hidden_size"],
            "n_layer": config["num_hidden_layers"],
            "vocab_size": config["vocab_size"],
            "pad_vocab_size_multiple": 1,
            "ssm_cfg": {"layer": layer, **mixer},
            "rms_norm": True,
            "residual_in_fp32": True,
            "fused_add_norm": True,
            "tie_embeddings": config["tie_word_embeddings"],
        }

    def matches(self, config: Mapping[str, Any]) -> bool:
        return "model_type" not in config and {"d_model", "n_layer", "ssm_cfg"} <= config.keys()


def _to_transformers_fields(fields: ConfigFields) -> ConfigFields:
    """Convert the fields to those of transformers. Raises ConfigError for unsupported values."""
    mixer = ConfigFields(fields.optional("ssm_cfg", dict, {}), f"{fields.model_name}' ssm_cfg")
    layer = _layer_name(fields, mixer)
    names = MIXER_FIELD_NAMES[layer]
    d_model = fields.required("d_model", int)
    values: dict[str, Any] = {
        names[name]: mixer.optional(name, int, default) for name, default in MIXER_DEFAULTS[layer].items()
    }
    values |= {
        "hidden_size": d_model,
        "num_hidden_layers": fields.num_layers("n_layer"),
        "vocab_size": decoder_parts.padded_vocab_size(fields, DEFAULT_VOCAB_SIZE_MULTIPLE),
        "use_bias": False,
        "use_conv_bias": True,
        "hidden_act": "silu",
        "layer_norm_epsilon": fields.optional("norm_epsilon", float, NORM_EPS, above=0.0),
        "tie_word_embeddings": fields.optional("tie_embeddings", bool, True),
    }
    if layer == "Mamba2":
        mixer.require_multiple("expand times d_model", values["expand"] * d_model, "headdim", values["head_dim"])
        values["num_heads"] = values["expand"] * d_model // values["head_dim"]
    elif mixer.get("dt_rank", "auto") == "auto":
        values["time_step_rank"] = -(-d_model // CHANNELS_PER_DT_RANK)
    else:
        values["time_step_rank"] = mixer.required("dt_rank", int)
    mixer.require_values("recallax supports one value for this layer", **FIXED_SSM_FIELDS[layer])
    mixer.reject_unread(IGNORED_SSM_FIELDS)
    return ConfigFields(values, next(model_type for model_type, name in LAYER_NAMES.items() if name == layer))


def _layer_name(fields: ConfigFields, mixer: ConfigFields) -> str:
    """Return the name of the layers, after a check for unsupported values."""
    layer = mixer.optional("layer", str, "Mamba1")
    if layer not in MIXER_FIELD_NAMES:
        raise mixer.unsupported(f"layer is {short_repr(layer)}; only {', '.join(MIXER_FIELD_NAMES)} can be imported")
    fields.require_values("all its layers must be Mamba", attn_layer_idx=[], d_intermediate=0)
    fields.require_values("its norms must have no mean and no bias", rms_norm=True)
    return layer
