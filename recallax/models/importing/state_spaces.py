"""The checkpoints of state-spaces: Mamba and Mamba-2 in the words of their authors, said in those of transformers.

Their config.json has no model_type, and the embedding another name; the rest are the keys of transformers. Source: the
config and the model of github.com/state-spaces/mamba (`config_mamba.py`, `mixer_seq_simple.py`).
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from recallax.models.importing.fields import Fields

EMBEDDING = ("backbone.embedding.weight", "backbone.embeddings.weight")
MEANINGLESS = {"residual_in_fp32", "fused_add_norm", "initializer_cfg", "pad_vocab_size_multiple"}
MODEL = {"d_model", "n_layer", "vocab_size", "ssm_cfg", "rms_norm", "norm_epsilon", "tie_embeddings", "d_intermediate"}
MODEL |= {"attn_layer_idx", "attn_cfg"}
MIXER = {
    "Mamba1": {"layer", "d_state", "d_conv", "expand", "dt_rank"},
    "Mamba2": {"layer", "d_state", "d_conv", "expand", "headdim", "ngroups", "chunk_size"},
}


def is_state_spaces(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is one of theirs."""
    return "model_type" not in config and {"d_model", "n_layer", "ssm_cfg"} <= config.keys()


def translated(
    config: Mapping[str, Any], weights: Mapping[str, np.ndarray]
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Config and weights as transformers has them. Raises ConfigError for what has no meaning there or here."""
    fields = Fields({"model_type": "state-spaces", **config})
    mixer = Fields({"model_type": "state-spaces' ssm_cfg", **(config["ssm_cfg"] or {})})
    kind = mixer.optional("layer", str, "Mamba1")
    if kind not in MIXER:
        raise mixer.refusal(f"layer is {kind!r}; only {', '.join(MIXER)} can be imported")
    for said, known in ((fields, MODEL | MEANINGLESS), (mixer, MIXER[kind])):
        if unknown := sorted(said.values.keys() - known - {"model_type"}):
            raise said.refusal(f"recallax does not know the field {unknown[0]!r}")
    fields.demand("it has no layers besides Mamba", attn_layer_idx=[], d_intermediate=0)
    fields.demand("norms have no mean and no bias", rms_norm=True)
    width, expand = fields.get("d_model", int), mixer.optional("expand", int, 2)
    made: dict[str, Any] = {
        "hidden_size": width,
        "num_hidden_layers": fields.get("n_layer", int),
        "vocab_size": _padded(fields),
        "expand": expand,
        "conv_kernel": mixer.optional("d_conv", int, 4),
        "use_bias": False,
        "use_conv_bias": True,
        "hidden_act": "silu",
        "layer_norm_epsilon": fields.optional("norm_epsilon", float, 1e-5),
        "tie_word_embeddings": fields.optional("tie_embeddings", bool, True),
    }
    if kind == "Mamba2":
        head_dim = mixer.optional("headdim", int, 64)
        made |= {"model_type": "mamba2", "architectures": ["Mamba2ForCausalLM"], "head_dim": head_dim}
        made |= {"num_heads": expand * width // head_dim, "state_size": mixer.optional("d_state", int, 128)}
        made |= {"n_groups": mixer.optional("ngroups", int, 1), "chunk_size": mixer.optional("chunk_size", int, 256)}
    else:
        made |= {"model_type": "mamba", "architectures": ["MambaForCausalLM"]}
        made |= {"state_size": mixer.optional("d_state", int, 16)}
        rank = mixer.values.get("dt_rank", "auto")
        made |= {"time_step_rank": -(-width // 16) if rank == "auto" else mixer.get("dt_rank", int)}
    theirs, ours = EMBEDDING
    return made, {ours if key == theirs else key: array for key, array in weights.items()}


def _padded(fields: Fields) -> int:
    """Rows of the embedding: the vocabulary rounded up."""
    multiple = fields.optional("pad_vocab_size_multiple", int, 1)
    return -(-fields.get("vocab_size", int) // multiple) * multiple
