"""The checkpoints of state-spaces: Mamba and Mamba-2 in the words of their authors, said in those of transformers.

Their config.json has no model_type, and the embedding another name; the rest are the keys of transformers. Source: the
config and the model of github.com/state-spaces/mamba (`config_mamba.py`, `mixer_seq_simple.py`).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from recallax.config import ConfigError
from recallax.layers.mamba import MambaMixer
from recallax.models.block import BlockModule
from recallax.models.importing import decoder, mamba, mamba2
from recallax.models.importing.fields import Fields
from recallax.models.importing.key_map import Entry
from recallax.models.lm import LM, LMConfig

EMBEDDING = "backbone.embedding.weight"
EPS = 1e-5
"""Of all norms, which their config cannot say."""
MEANINGLESS = {"residual_in_fp32", "fused_add_norm", "initializer_cfg", "pad_vocab_size_multiple"}
MODEL = {"d_model", "n_layer", "vocab_size", "ssm_cfg", "rms_norm", "norm_epsilon", "tie_embeddings", "d_intermediate"}
MODEL |= {"attn_layer_idx", "attn_cfg"}
LAYER = {"mamba": "Mamba1", "mamba2": "Mamba2"}
"""Their layer of a model_type of transformers."""
MIXER = {
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
STANDARD = {
    "Mamba1": {"d_state": 16, "d_conv": 4, "expand": 2},
    "Mamba2": {"d_state": 128, "d_conv": 4, "expand": 2, "headdim": 64, "ngroups": 1, "chunk_size": 256},
}
"""What they are where they are not said."""


class _Kind(NamedTuple):
    """What is said of a model in transformers' words."""

    config: Callable[[Fields], LMConfig]
    entries: Callable[[Fields, LMConfig], list[Entry]]
    describe: Callable[[LM, Sequence[BlockModule]], dict[str, Any]]


MODULES = {
    "mamba": _Kind(mamba.mamba, mamba.entries, mamba.describe),
    "mamba2": _Kind(mamba2.mamba2, mamba2.entries, mamba2.describe),
}


def is_state_spaces(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is one of theirs."""
    return "model_type" not in config and {"d_model", "n_layer", "ssm_cfg"} <= config.keys()


def state_spaces(fields: Fields) -> LMConfig:
    """`MambaLMHeadModel` of either kind of layer."""
    made = _translated(fields)
    return MODULES[made.model].config(made)


def entries(fields: Fields, model: LMConfig) -> list[Entry]:
    """The key map: that of transformers, but for the embedding."""
    made = _translated(fields)
    found = MODULES[made.model].entries(made, model)
    return [entry._replace(theirs=(EMBEDDING,)) if entry.ours == ("embedding",) else entry for entry in found]


def describe(model: LM, layers: Sequence[BlockModule]) -> dict[str, Any]:
    """Their config, written from that of transformers."""
    kind = "mamba" if isinstance(layers[0].mixer, MambaMixer) else "mamba2"
    said = MODULES[kind].describe(model, layers)
    if said["layer_norm_epsilon"] != EPS:
        raise ConfigError(f"its norms have eps {said['layer_norm_epsilon']}, and this layout has only {EPS}")
    mixer = {name: said[theirs] for name, theirs in MIXER[LAYER[kind]].items() if theirs in said}
    return {
        "d_model": said["hidden_size"],
        "n_layer": said["num_hidden_layers"],
        "vocab_size": said["vocab_size"],
        "pad_vocab_size_multiple": 1,
        "ssm_cfg": {"layer": LAYER[kind], **mixer},
        "rms_norm": True,
        "residual_in_fp32": True,
        "fused_add_norm": True,
        "tie_embeddings": said["tie_word_embeddings"],
    }


def _translated(fields: Fields) -> Fields:
    """The config as transformers has it. Raises ConfigError for what has no meaning there or here."""
    mixer = Fields(fields.optional("ssm_cfg", dict, {}), f"{fields.model}' ssm_cfg")
    layer = mixer.optional("layer", str, "Mamba1")
    if layer not in MIXER:
        raise mixer.refusal(f"layer is {layer!r}; only {', '.join(MIXER)} can be imported")
    for said, known in ((fields, MODEL | MEANINGLESS), (mixer, {"layer", *MIXER[layer]})):
        if unknown := sorted(said.values.keys() - known):
            raise said.refusal(f"recallax does not know the field {unknown[0]!r}")
    fields.demand("it has no layers besides Mamba", attn_layer_idx=[], d_intermediate=0)
    fields.demand("norms have no mean and no bias", rms_norm=True)
    width = fields.get("d_model", int)
    made: dict[str, Any] = {
        theirs: mixer.optional(name, int, STANDARD[layer][name])
        for name, theirs in MIXER[layer].items()
        if name in STANDARD[layer]
    }
    made |= {
        "hidden_size": width,
        "num_hidden_layers": fields.get("n_layer", int),
        "vocab_size": decoder.padded_vocab(fields),
        "use_bias": False,
        "use_conv_bias": True,
        "hidden_act": "silu",
        "layer_norm_epsilon": fields.optional("norm_epsilon", float, EPS),
        "tie_word_embeddings": fields.optional("tie_embeddings", bool, True),
    }
    if layer == "Mamba2":
        made["num_heads"] = made["expand"] * width // made["head_dim"]
    else:
        rank = mixer.values.get("dt_rank", "auto")
        made["time_step_rank"] = -(-width // 16) if rank == "auto" else mixer.get("dt_rank", int)
    return Fields(made, next(kind for kind, name in LAYER.items() if name == layer))
