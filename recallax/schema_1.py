# pyright: strict
"""Names of config schema 1: one table from the old names of classes, fields and values to the names in use now.

`recallax.config` reads files of schema 1 through this table and computes the fingerprints that such files carry. A
field that a later version renames is added to a table of its own schema, never here.
"""

from collections.abc import Callable
from typing import Any, TypeGuard

CLASSES = {
    "After": "AfterSteps",
    "AskedTokens": "QueryDependentSelector",
    "Autoencode": "Autoencoder",
    "Filled": "PrefixFill",
    "Finish": "EndOfRun",
    "Learner": "InnerOptimizer",
    "Nothing": "NoChannelMixer",
    "Prefix": "PrefixLinear",
    "Reached": "MetricReached",
    "Repeated": "JRTPrompt",
    "Sampled": "MultinomialSampling",
    "Segment": "MixtureSlice",
    "Settled": "MetricPlateau",
    "Swaps": "TranspositionTracking",
    "Writes": "OverwriteSlice",
}
"""Old class name to new class name."""

FIELDS: dict[str, dict[str, str]] = {
    "AdamW": {"clip": "max_grad_norm", "final": "min_lr_ratio", "warmup": "warmup_ratio"},
    "Attention": {
        "heads": "num_heads",
        "kv_heads": "num_kv_heads",
        "persistent": "num_persistent_tokens",
        "rotary_base": "rope_theta",
    },
    "Autoencoder": {"hidden": "hidden_size"},
    "BPE": {"boundary": "eos_token"},
    "BaseConv": {"width": "conv_size"},
    "Based": {"heads": "num_heads"},
    "ChunkExperts": {
        "balance_weight": "load_balance_loss_weight",
        "bias_rate": "bias_update_rate",
        "chunk": "chunk_size",
        "experts": "num_experts",
        "inner": "intermediate_size",
        "weights": "norm_topk_prob",
        "z_weight": "router_z_loss_weight",
    },
    "Copying": {"alphabet": "alphabet_size"},
    "DeltaNet": {
        "conv": "conv_size",
        "eps": "norm_eps",
        "heads": "num_heads",
        "key_dim": "head_k_dim",
        "max_beta": "allow_neg_eigval",
        "value_dim": "head_v_dim",
    },
    "DiagonalSSM": {"conv": "conv_size", "longest": "max_timescale"},
    "FuzzyRecall": {"key_width": "k_motif_size", "value_width": "v_motif_size"},
    "GLA": {
        "conv": "conv_size",
        "eps": "norm_eps",
        "gate_power": "gate_logit_normalizer",
        "gate_rank": "gate_low_rank_dim",
        "heads": "num_heads",
        "key_dim": "head_k_dim",
        "value_dim": "head_v_dim",
    },
    "GatedConv": {"width": "conv_size"},
    "GatedDeltaNet": {
        "conv": "conv_size",
        "eps": "norm_eps",
        "heads": "num_heads",
        "key_dim": "head_k_dim",
        "max_beta": "allow_neg_eigval",
        "value_dim": "head_v_dim",
        "value_heads": "num_v_heads",
    },
    "GatedDeltaProduct": {
        "conv": "conv_size",
        "eps": "norm_eps",
        "heads": "num_heads",
        "key_dim": "head_k_dim",
        "max_beta": "allow_neg_eigval",
        "steps": "num_householder",
        "value_dim": "head_v_dim",
    },
    "HGRN2": {"eps": "norm_eps", "heads": "num_heads"},
    "InductionHeads": {"symbols": "num_symbols"},
    "InnerOptimizer": {
        "chunk": "chunk_size",
        "reset": "reset_interval",
        "step": "gradient_reduction",
        "updates": "trainable_weights",
    },
    "JRTPrompt": {"times": "num_repeats"},
    "KDA": {
        "conv": "conv_size",
        "eps": "norm_eps",
        "floor": "lower_bound",
        "gate": "decay_gate",
        "gate_bias": "output_gate_bias",
        "heads": "num_heads",
        "key_dim": "head_k_dim",
        "max_beta": "allow_neg_eigval",
        "value_dim": "head_v_dim",
    },
    "KeyRetrieval": {
        "asked": "queries_per_fact",
        "names": "num_names",
        "test": "test_slices",
        "train": "train_slices",
        "words": "num_words",
    },
    "KeyScore": {"hidden": "hidden_size", "sampled": "num_sampled_keys", "weight": "ranking_loss_weight"},
    "LMConfig": {"compute": "compute_dtype", "readout": "lm_head"},
    "Landmark": {
        "distances": "position_mode",
        "heads": "num_heads",
        "jump": "max_position_jump",
        "kv_heads": "num_kv_heads",
        "landmark_every": "block_size",
        "per": "select_per",
        "rotary_base": "rope_theta",
    },
    "LinearAttention": {"eps": "norm_eps", "heads": "num_heads"},
    "LongMamba": {"context": "context_length", "trained": "training_length"},
    "MQAR": {"passes": "num_passes", "power": "power_a"},
    "Mamba": {"conv": "conv_size"},
    "Mamba2": {"conv": "conv_size", "eps": "norm_eps", "groups": "num_groups", "inner": "intermediate_size"},
    "MaskedPrefix": {"mask_id": "mask_token_id", "prefix": "prefix_length", "rate": "mlm_probability"},
    "MemoryAsContext": {
        "heads": "num_heads",
        "kv_heads": "num_kv_heads",
        "persistent": "num_persistent_tokens",
        "query": "query_source",
        "retrieved": "num_retrieved_tokens",
        "rotary_base": "rope_theta",
        "segment": "block_size",
    },
    "MetricPlateau": {"at_least": "min_steps", "at_most": "max_steps", "margin": "min_delta"},
    "MetricReached": {"at_least": "min_steps", "at_most": "max_steps"},
    "MixtureSlice": {"pairs": "num_kv_pairs", "rows": "num_examples"},
    "MoM": {
        "balance": "load_balance_loss",
        "balance_weight": "load_balance_loss_weight",
        "shared": "shared_memory",
        "weights": "norm_topk_prob",
    },
    "NeuralMemory": {
        "conv": "conv_size",
        "eps": "norm_eps",
        "heads": "num_heads",
        "learner": "inner_optimizer",
        "persistent": "num_persistent_tokens",
    },
    "NoisyRecall": {"noise": "frac_noise", "noise_vocab": "noise_vocab_size"},
    "NonCausalBased": {"heads": "num_heads"},
    "OverwriteRecall": {"noise_vocab": "noise_vocab_size"},
    "OverwriteSlice": {"keys": "num_keys", "rows": "num_examples", "writes": "num_writes"},
    "Parallel": {"gates": "gate_init"},
    "PrefixFill": {"to": "prefix_length", "way": "strategy"},
    "PrefixLinear": {"max_prefix": "max_prefix_len"},
    "ProductKeys": {
        "gate_bias": "gate_bias_init",
        "heads": "num_heads",
        "key_dim": "head_k_dim",
        "sub_keys": "num_sub_keys",
        "value_lr": "value_lr_multiplier",
    },
    "QueryDependentSelector": {"width": "score_dim"},
    "RGLRU": {"conv": "conv_size", "heads": "num_heads", "width": "lru_width"},
    "ReLUSquared": {"inner": "intermediate_size"},
    "RetNet": {
        "eps": "norm_eps",
        "heads": "num_heads",
        "key_dim": "head_k_dim",
        "rotary_base": "rope_theta",
        "value_dim": "head_v_dim",
    },
    "SelectiveCopying": {"content": "num_tokens_to_copy"},
    "SetDisjointness": {"pairs": "set_sizes", "test_pairs": "test_set_sizes"},
    "SlidingWindow": {
        "heads": "num_heads",
        "kv_heads": "num_kv_heads",
        "persistent": "num_persistent_tokens",
        "rotary_base": "rope_theta",
    },
    "SparseGlobalAttention": {
        "block": "block_size",
        "chosen": "top_k",
        "heads": "num_heads",
        "kv_heads": "num_kv_heads",
        "rotary_base": "rope_theta",
    },
    "Stage": {"trains": "trainable"},
    "SwiGLU": {"inner": "intermediate_size"},
    "Text": {"frequent": "max_ngram_count", "ngram": "ngram_size"},
    "TextFiles": {"documents": "document_unit", "test": "test_fraction", "valid": "valid_fraction"},
    "Tfds": {"test": "test_split", "train": "train_split", "valid": "valid_split"},
    "Train": {"accumulate": "gradient_accumulation_steps", "data": "data_parallel", "keep": "max_to_keep"},
    "Workspace": {"chunk": "chunk_size", "rank": "slot_dim", "slots": "num_slots"},
}
"""New class name to its renamed fields, old name to new name."""

VALUES: dict[tuple[str, str], dict[Any, Any]] = {
    ("ChunkExperts", "norm_topk_prob"): {"softmax": False, "renormalised": True},
    ("ChunkExperts", "route"): {"first token": "first_token", "previous chunk": "previous_chunk"},
    ("DeltaNet", "allow_neg_eigval"): {1.0: False, 2.0: True},
    ("GatedDeltaNet", "allow_neg_eigval"): {1.0: False, 2.0: True},
    ("GatedDeltaProduct", "allow_neg_eigval"): {1.0: False, 2.0: True},
    ("InnerOptimizer", "boundary"): {"rows": "weight_norm"},
    ("KDA", "allow_neg_eigval"): {1.0: False, 2.0: True},
    ("Landmark", "position_mode"): {"stingy": "compressed", "true": "exact"},
    ("Landmark", "select_per"): {"head and token": "head_and_token"},
    ("Mamba2", "order"): {"gate first": "gate_first", "gate last": "gate_last", "no norm": "no_norm"},
    ("MoM", "norm_topk_prob"): {"softmax": False, "renormalised": True},
    ("SparseGlobalAttention", "cache"): {"heap": "top_k", "every token": "full"},
}
"""(New class name, new field name) to its renamed values, old value to new value."""

type Ancestry = Callable[[str], list[str]]
"""The names of a config class and of its base classes, by its name."""


def is_json_object(value: Any) -> TypeGuard[dict[str, Any]]:
    """Return True for a decoded JSON object."""
    return isinstance(value, dict)


def is_json_list(value: Any) -> TypeGuard[list[Any]]:
    """Return True for a decoded JSON array."""
    return isinstance(value, list)


def upgrade(value: Any, ancestry: Ancestry) -> Any:
    """Translate JSON of schema 1 into the names in use now.

    Args:
        value: A decoded JSON value: an object with a `class`, or a list or leaf inside one.
        ancestry: Returns the names of a config class and its bases. Fields that a class inherits are renamed with
            their base class.

    Returns:
        A new value of the same structure. Unknown classes and fields are kept as they are.

    Raises:
        ValueError: A value has no counterpart, such as a `max_beta` other than 1 and 2.
    """
    if is_json_list(value):
        return [upgrade(item, ancestry) for item in value]
    if not is_json_object(value):
        return value
    if "class" not in value:
        return {key: upgrade(item, ancestry) for key, item in value.items()}
    old_name: str = value["class"]
    name = CLASSES.get(old_name, old_name)
    fields, values = _renamed_fields(name, ancestry), _renamed_values(name, ancestry)
    upgraded: dict[str, Any] = {}
    for key, item in value.items():
        if key == "class":
            upgraded["class"] = name
        else:
            new = fields.get(key, key)
            upgraded[new] = _translate(f"{old_name}.{key}", upgrade(item, ancestry), values.get(new))
    return upgraded


def downgrade(value: Any, ancestry: Ancestry) -> Any:
    """Translate JSON in the names in use now into schema 1.

    Args:
        value: A decoded JSON value.
        ancestry: Returns the names of a config class and its bases.

    Returns:
        A new value of the same structure; `upgrade` is the inverse.
    """
    if is_json_list(value):
        return [downgrade(item, ancestry) for item in value]
    if not is_json_object(value):
        return value
    if "class" not in value:
        return {key: downgrade(item, ancestry) for key, item in value.items()}
    name: str = value["class"]
    fields = {new: old for old, new in _renamed_fields(name, ancestry).items()}
    values = _renamed_values(name, ancestry)
    downgraded: dict[str, Any] = {}
    for key, item in value.items():
        table = {new: old for old, new in values.get(key, {}).items()}
        downgraded[fields.get(key, key)] = _translate(key, downgrade(item, ancestry), table or None)
    return downgraded | {"class": next((old for old, new in CLASSES.items() if new == name), name)}


def _renamed_fields(name: str, ancestry: Ancestry) -> dict[str, str]:
    return {old: new for base in reversed(ancestry(name)) for old, new in FIELDS.get(base, {}).items()}


def _renamed_values(name: str, ancestry: Ancestry) -> dict[str, dict[Any, Any]]:
    bases = set(ancestry(name))
    return {field: table for (base, field), table in VALUES.items() if base in bases}


def _translate(field: str, value: Any, table: dict[Any, Any] | None) -> Any:
    """Look up a value in a table; numbers must be in it, and other values are kept if they are not."""
    if table is None or is_json_list(value) or is_json_object(value):
        return value
    if value in table:
        return table[value]
    if all(isinstance(key, float) for key in table):
        raise ValueError(
            f"{field} is {value}, which this version does not support; the supported values of schema 1 are "
            f"{' and '.join(f'{key:g}' for key in table)}"
        )
    return value
