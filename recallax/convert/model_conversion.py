"""Models from the weights of others, and back: a config.json and a state dict of transformers become an `LM` of ours.

A layout says two things of a family of checkpoints: which `LMConfig` its config is, and which of its arrays become
which of our parameters (`key_map`). Both are strict: what cannot be represented, is missing, is left over or has
another shape raises an error that names it. `tests/test_parity.py` holds the models to the logits of transformers.

The way back reads the same key map backwards. The config that a layout writes for a model of ours is trusted only if
reading it gives that model again, down to every number in its graph.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from flax import nnx

from recallax.config import ConfigError, suggest_name
from recallax.convert.config_fields import ConfigFields
from recallax.convert.key_map import MAX_LISTED, KeyMapEntry, WeightsError, apply_inverse_key_map, apply_key_map
from recallax.convert.layouts import (
    based_layout,
    falcon_h1_layout,
    fla_layout,
    fla_mamba2_layout,
    kimi_linear_layout,
    llama_layout,
    mamba2_layout,
    mamba_layout,
    nemotron_h_layout,
    qwen3_next_layout,
    state_spaces_layout,
)
from recallax.layers.base import Statistic
from recallax.models import accounting
from recallax.models.block import Block, BlockModule
from recallax.models.lm import LM, LMConfig
from recallax.models.lm_head import Tied
from recallax.models.parameter_paths import (
    ParameterPath,
    fill_parameters,
    layer_paths,
    parameter_paths,
    parameter_shapes,
)
from recallax.models.pattern import parse_pattern

__all__ = [
    "LAYOUTS",
    "CheckpointLayout",
    "KeyMapEntry",
    "WeightsError",
    "export_config",
    "export_weights",
    "import_config",
    "import_model",
    "import_parameters",
    "layout_of",
]


LM_HEAD_KEY = "lm_head.weight"
"""The readout, in every layout."""


class CheckpointLayout(NamedTuple):
    """How a family of checkpoints reads and is written."""

    from_config_json: Callable[[ConfigFields], LMConfig]
    """Its config as ours."""
    key_map: Callable[[ConfigFields, LMConfig], list[KeyMapEntry]]
    """The key map of a model with that config."""
    architecture: str | None
    """The class that loads it; None where its config.json names none."""
    to_config_json: Callable[[LM, Sequence[BlockModule]], dict[str, Any]] | None = None
    """The fields of config.json for a model of ours, given with its layers; wrong where the layout has no such model.
    None is a layout whose models all have a layer that recallax has not."""
    matches: Callable[[Mapping[str, Any]], bool] | None = None
    """Whether a config.json is in this layout, where its `model_type` does not say so."""
    duplicates_tied_head: bool = False
    """Whether its files hold a tied readout beside the embedding, since what loads them asks for both."""


def _fla_layout(model_type: str, architecture: str) -> CheckpointLayout:
    """A layout of flash-linear-attention's frame."""
    return CheckpointLayout(
        partial(fla_layout.from_config_json, model_type),
        partial(fla_layout.key_map, model_type),
        architecture,
        partial(fla_layout.to_config_json, model_type),
    )


LAYOUTS: dict[str, CheckpointLayout] = {
    "falcon_h1": CheckpointLayout(falcon_h1_layout.from_config_json, falcon_h1_layout.key_map, "FalconH1ForCausalLM"),
    "kimi_linear": CheckpointLayout(
        kimi_linear_layout.from_config_json,
        kimi_linear_layout.key_map,
        "KimiLinearForCausalLM",
        kimi_linear_layout.to_config_json,
    ),
    "llama": CheckpointLayout(
        llama_layout.llama_from_config_json, llama_layout.key_map, "LlamaForCausalLM", llama_layout.llama_to_config_json
    ),
    "mamba": CheckpointLayout(
        mamba_layout.from_config_json, mamba_layout.key_map, "MambaForCausalLM", mamba_layout.to_config_json
    ),
    "mamba2": CheckpointLayout(
        mamba2_layout.from_config_json, mamba2_layout.key_map, "Mamba2ForCausalLM", mamba2_layout.to_config_json
    ),
    "mistral": CheckpointLayout(
        llama_layout.mistral_from_config_json,
        llama_layout.key_map,
        "MistralForCausalLM",
        llama_layout.mistral_to_config_json,
    ),
    "nemotron_h": CheckpointLayout(
        nemotron_h_layout.from_config_json,
        nemotron_h_layout.key_map,
        "NemotronHForCausalLM",
        nemotron_h_layout.to_config_json,
    ),
    "olmo_hybrid": CheckpointLayout(
        qwen3_next_layout.olmo_hybrid_from_config_json, qwen3_next_layout.olmo_hybrid_key_map, "OlmoHybridForCausalLM"
    ),
    "qwen3_next": CheckpointLayout(
        qwen3_next_layout.qwen3_next_from_config_json,
        qwen3_next_layout.qwen3_next_key_map,
        "Qwen3NextForCausalLM",
        qwen3_next_layout.qwen3_next_to_config_json,
    ),
    "gated_deltanet": _fla_layout("gated_deltanet", "GatedDeltaNetForCausalLM"),
    "gated_deltaproduct": _fla_layout("gated_deltaproduct", "GatedDeltaProductForCausalLM"),
    "delta_net": _fla_layout("delta_net", "DeltaNetForCausalLM"),
    "kda": _fla_layout("kda", "KDAForCausalLM"),
    "gla": _fla_layout("gla", "GLAForCausalLM"),
    "hgrn2": _fla_layout("hgrn2", "HGRN2ForCausalLM"),
    "retnet": _fla_layout("retnet", "RetNetForCausalLM"),
    "linear_attn": _fla_layout("linear_attn", "LinearAttentionForCausalLM"),
    "fla_mamba2": CheckpointLayout(
        fla_mamba2_layout.from_config_json,
        fla_mamba2_layout.key_map,
        "Mamba2ForCausalLM",
        fla_mamba2_layout.to_config_json,
        fla_mamba2_layout.is_fla,
    ),
    "based": CheckpointLayout(
        based_layout.from_config_json,
        based_layout.key_map,
        "GPTLMHeadModel",
        based_layout.to_config_json,
        based_layout.is_based,
        duplicates_tied_head=True,
    ),
    "state-spaces": CheckpointLayout(
        state_spaces_layout.from_config_json,
        state_spaces_layout.key_map,
        None,
        state_spaces_layout.to_config_json,
        state_spaces_layout.is_state_spaces,
        duplicates_tied_head=True,
    ),
}
"""By name, which is the `model_type` of config.json unless a layout tells its own by other signs. Key names and shapes
are those of transformers 5.23 and then of fla 0.6, HazyResearch's BASED and state-spaces."""


def layout_of(config: Mapping[str, Any]) -> str:
    """The name of a config.json's layout, or its `model_type` where recallax knows none."""
    found = [name for name, layout in LAYOUTS.items() if layout.matches is not None and layout.matches(config)]
    return found[0] if found else str(config.get("model_type"))


def import_config(config: Mapping[str, Any]) -> LMConfig:
    """The model that a config.json of transformers describes, its pattern with repeats (one scan each).

    Raises ConfigError naming the field that is missing, or whose value recallax cannot represent.
    """
    layout, fields = _parse_source_config(config)
    return layout.from_config_json(fields)


def import_model(config: Mapping[str, Any], weights: Mapping[str, np.ndarray], pattern: str | None = None) -> LM:
    """The model of a config.json with the given weights (keys and shapes of its state dict, any float dtype).

    `pattern` spells the same layers in another way, for instance without repeats. Raises ConfigError as
    `import_config`, and WeightsError naming keys that are missing or left over and arrays of another shape.
    """
    model = import_config(config)
    if pattern is not None:
        spelled = replace(model, pattern=pattern)
        if spelled.layer_names != model.layer_names:
            raise ConfigError(f"pattern {pattern!r} is not a spelling of {model.pattern!r}; only repeats may differ")
        model = spelled
    abstract, places = _named_variables(model)
    return fill_parameters(abstract, places, import_parameters(config, weights))


def import_parameters(config: Mapping[str, Any], weights: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The parameters of that model by name (`key_map`), float32. Raises as `import_model`."""
    model = import_config(config)
    abstract, places = _named_variables(model)
    layout, fields = _parse_source_config(config)
    entries = layout.key_map(fields, model)
    return apply_key_map(entries, _without_tied_head(entries, model, weights), parameter_shapes(abstract, places))


def export_config(layout_name: str, model: LMConfig, vocab_size: int | None = None) -> dict[str, Any]:
    """The config.json with which the layout `kind` says this model; `vocab_size` is the task's.

    Raises ConfigError saying what the layout cannot say.
    """
    layout = _layout_named(layout_name)
    if layout.to_config_json is None:
        raise ConfigError(f"{layout_name}: transformers has none of layers that recallax has, so none can be exported")
    ours = _canonical_config(model, vocab_size)
    abstract = accounting.abstract_model(ours)
    layers = [part for part in abstract.stack.parts if isinstance(part, BlockModule)]
    try:
        fields = layout.to_config_json(abstract, layers)
        config = fields
        if layout.architecture is not None:
            config = {"architectures": [layout.architecture], "model_type": layout_name, "dtype": "float32", **fields}
        again = accounting.abstract_model(_canonical_config(import_config(config)))
    except ConfigError as error:
        raise ConfigError(f"this model cannot be exported as {layout_name}: {error}") from error
    if _model_signature(abstract) != _model_signature(again):
        ours_is, theirs_is = _describe_modules(abstract), _describe_modules(again)
        found = [
            f"{name} would be {theirs_is.get(name, 'absent')}, and is {ours_is.get(name, 'absent')}"
            for name in sorted(ours_is | theirs_is, key=lambda name: (name.count("."), name))
            if ours_is.get(name) != theirs_is.get(name)
        ]
        raise ConfigError(f"this model cannot be exported as {layout_name}: {'; '.join(found[:MAX_LISTED])}")
    return config


def export_weights(config: Mapping[str, Any], parameters: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The state dict of that config.json from our parameters by name: `import_parameters` backwards.

    Raises WeightsError where the parameters are not those of the model.
    """
    layout, fields = _parse_source_config(config)
    model = layout.from_config_json(fields)
    entries = layout.key_map(fields, model)
    found = apply_inverse_key_map(entries, parameters)
    if layout.duplicates_tied_head and model.lm_head == Tied():
        found[LM_HEAD_KEY] = found[_embedding_key(entries)]
    return found


def _named_variables(model: LMConfig) -> tuple[LM, dict[str, ParameterPath]]:
    """The model without values, and where its parameters and statistics are, by name."""
    abstract = accounting.abstract_model(model)
    layers = layer_paths(parse_pattern(model.pattern, list(model.blocks)))
    return abstract, parameter_paths(abstract, layers, (nnx.Param, Statistic))


def _without_tied_head(
    entries: Sequence[KeyMapEntry], model: LMConfig, weights: Mapping[str, np.ndarray]
) -> Mapping[str, np.ndarray]:
    """The weights without the readout of a tied model, which some files hold a second time."""
    embedding, copy = _embedding_key(entries), weights.get(LM_HEAD_KEY)
    if model.lm_head != Tied() or copy is None or embedding not in weights:
        return weights
    if not np.array_equal(copy, weights[embedding]):
        raise WeightsError(f"{LM_HEAD_KEY} is not {embedding}, and config.json ties the two; give its own config.json")
    return {key: array for key, array in weights.items() if key != LM_HEAD_KEY}


def _embedding_key(entries: Sequence[KeyMapEntry]) -> str:
    """Its key."""
    return next(entry.source[0] for entry in entries if entry.target == ("embedding",))


def _canonical_config(model: LMConfig, vocab_size: int | None = None) -> LMConfig:
    """The same model spelled without repeats, without what only training or speed see, its blocks numbered."""
    blocks: dict[str, Block] = {}
    names: list[str] = []
    for name in model.layer_names:
        block = model.blocks[name]
        known = next((n for n, other in blocks.items() if other == block), f"block{len(blocks)}")
        blocks[known] = block
        names.append(known)
    return replace(
        model,
        pattern=" ".join(names),
        blocks=blocks,
        vocab_size=model.vocab_size or vocab_size,
        compute_dtype="float32",
        dropout=0.0,
        embed_dropout=0.0,
        remat="none",
    )


def _model_signature(model: LM) -> tuple[Any, ...]:
    """Two models with equal ones compute the same from equal weights: all modules, their constants, all shapes."""
    shapes = [(path, leaf.shape, leaf.dtype) for path, leaf in nnx.to_flat_state(nnx.state(model))]
    return nnx.graphdef(model), shapes


def _describe_modules(module: nnx.Module, path: str = "") -> dict[str, str]:
    """What a message may say of a module: the type of every part, shapes, constants, by where they are."""
    found = {path or "model": type(module).__name__}
    named = dict(enumerate(module)) if isinstance(module, nnx.List) else vars(module)
    for name, value in named.items():
        here = f"{path}.{name}".removeprefix(".").replace("stack.parts.", "layers.")
        if isinstance(value, nnx.Module):
            found |= _describe_modules(value, here)
        elif isinstance(value, nnx.Variable):
            found[here] = str(value.shape)
        elif not str(name).startswith("_") and not callable(value):
            found[here] = repr(value)
    return found


def _parse_source_config(config: Mapping[str, Any]) -> tuple[CheckpointLayout, ConfigFields]:
    """The layout of a config.json, and its fields."""
    name = layout_of(config)
    return _layout_named(name), ConfigFields(config, name)


def _layout_named(name: str) -> CheckpointLayout:
    if name not in LAYOUTS:
        raise ConfigError(f"model_type is {name!r}, which cannot be imported{suggest_name(name, list(LAYOUTS))}")
    return LAYOUTS[name]
