"""Fields of config.json that do not change what a model computes, each with the reason.

The import of a layout reads the fields that it knows. All other fields must be listed here, or in `ignored_fields` of
the layout: any further field is rejected by name, because it may change what the model computes.
"""

from collections.abc import Mapping

type IgnoredFields = Mapping[str, tuple[str, ...]]
"""Names of fields by the reason for which they are ignored."""

COMMON_IGNORED_FIELDS: IgnoredFields = {
    "it has selected the layout, or identifies the file, its authors or its software": (
        "_commit_hash", "_name_or_path", "architectures", "auto_map", "model_type", "name_or_path", "tokenizer_class",
        "transformers_version",
    ),
    "it is a dtype, and recallax computes in float32": (
        "dtype", "mamba_ssm_cache_dtype", "residual_in_fp32", "torch_dtype", "use_bfloat16",
    ),
    "it selects a kernel, and all kernels compute the same function": (
        "_attn_implementation", "_attn_implementation_autoset", "_attn_implementation_internal", "attn_implementation",
        "attn_mode", "chunk_size", "chunk_size_feed_forward", "pretraining_tp", "use_associative_scan",
        "use_mamba_kernels", "use_mambapy",
    ),
    "it is a token, or a length that does not enter the computation": (
        "bos_token_id", "decoder_start_token_id", "eos_token_id", "max_position_embeddings", "max_sequence_length",
        "model_max_length", "n_ctx", "pad_token_id", "sep_token_id", "unk_token_id",
    ),
    "only training and initialization use it": (
        "attention_dropout", "gradient_checkpointing", "hidden_dropout", "initializer_range",
        "rescale_prenorm_residual", "use_l2warp",
    ),
    "it selects what a call returns": (
        "num_logits_to_keep", "output_attentions", "output_hidden_states", "output_router_logits", "return_dict",
        "torchscript", "use_cache",
    ),
    "it controls generation": (
        "bad_words_ids", "begin_suppress_tokens", "diversity_penalty", "do_sample", "early_stopping",
        "encoder_no_repeat_ngram_size", "exponential_decay_length_penalty", "forced_bos_token_id",
        "forced_eos_token_id", "length_penalty", "max_length", "min_length", "no_repeat_ngram_size",
        "num_beam_groups", "num_beams", "num_return_sequences", "prefix", "remove_invalid_values",
        "repetition_penalty", "return_dict_in_generate", "output_scores", "suppress_tokens", "temperature", "top_k",
        "top_p", "typical_p",
    ),
    "it belongs to classifiers": (
        "finetuning_task", "id2label", "label2id", "num_labels", "problem_type", "task_specific_params",
        "tf_legacy_loss",
    ),
}  # fmt: skip
"""Fields that every layout ignores: those of transformers' `PretrainedConfig`, and those of many models."""

COMMON_FIXED_FIELDS = {
    "add_cross_attention": False,
    "is_decoder": False,
    "is_encoder_decoder": False,
    "pruned_heads": {},
    "quantization_config": None,
    "tie_encoder_decoder": False,
}
"""Fields of transformers' `PretrainedConfig` of which recallax supports one value, which is also their default."""

STEP_SIZE_INITIALIZATION: IgnoredFields = {
    "it is a range or a scheme from which step sizes, decays and convolutions are initialized": (
        "A_init_range", "conv_init", "dt_init_floor", "dt_max", "dt_min", "time_step_floor", "time_step_init_scheme",
        "time_step_max", "time_step_min", "time_step_scale",
    ),
}  # fmt: skip
"""Fields of Mamba and Mamba-2."""

EXPERT_FIELDS: IgnoredFields = {
    "it describes experts, and the model has none": (
        "decoder_sparse_step", "first_k_dense_replace", "moe_intermediate_size", "moe_latent_size", "moe_layer_freq",
        "moe_renormalize", "moe_router_activation_func", "moe_shared_expert_intermediate_size",
        "moe_shared_expert_overlap", "n_group", "n_routed_experts", "n_shared_experts", "norm_topk_prob",
        "num_expert_group", "num_experts", "num_experts_per_tok", "num_experts_per_token", "num_local_experts",
        "num_shared_experts", "routed_scaling_factor", "router_aux_loss_coef", "shared_expert_intermediate_size",
        "topk_group", "use_grouped_topk",
    ),
}  # fmt: skip
"""Fields of models whose layers are all dense."""


def field_names(*groups: IgnoredFields) -> frozenset[str]:
    """Return the names of ignored fields.

    Args:
        *groups: Groups of names by reason.

    Returns:
        All names.
    """
    return frozenset(name for group in groups for names in group.values() for name in names)
