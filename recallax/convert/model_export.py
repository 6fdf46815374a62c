"""Export of a recallax model to another project's checkpoint: config.json and state dict.

The weights use the layout's key map in the inverse direction. The config that a layout writes is accepted only if its
import gives exactly the original model, with every module, constant and shape.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from flax import nnx

from recallax.config import ConfigError
from recallax.convert.key_map import MAX_LISTED, apply_inverse_key_map
from recallax.convert.layouts import get_layout
from recallax.convert.model_import import LM_HEAD_KEY, embedding_key, import_config, parse_source_config
from recallax.models.accounting import abstract_model
from recallax.models.block import Block, BlockModule
from recallax.models.lm import LM, LMConfig
from recallax.models.lm_head import Tied

type ModelSignature = tuple[nnx.GraphDef, list[tuple[Any, ...]]]


def export_config(layout_name: str, model: LMConfig, vocab_size: int | None = None) -> dict[str, Any]:
    """Convert a model config to the config.json of a layout.

    Args:
        layout_name: A key of `LAYOUTS`.
        model: The model config.
        vocab_size: The task's vocabulary size, for configs without one.

    Returns:
        The content of config.json.

    Raises:
        ConfigError: If the layout does not exist or cannot represent the model.
    """
    layout = get_layout(layout_name)
    original = abstract_model(_canonical_config(model, vocab_size))
    layers = [part for part in original.stack.parts if isinstance(part, BlockModule)]
    try:
        config = layout.to_config_json(original, layers)
        if layout.architecture is not None:
            config = {"architectures": [layout.architecture], "model_type": layout_name, "dtype": "float32", **config}
        reimported = abstract_model(_canonical_config(import_config(config)))
    except ConfigError as error:
        raise ConfigError(f"this model cannot be exported as {layout_name}: {error}") from error
    if _model_signature(original) != _model_signature(reimported):
        differences = _describe_differences(original, reimported)
        raise ConfigError(f"this model cannot be exported as {layout_name}: {'; '.join(differences[:MAX_LISTED])}")
    return config


def export_weights(config: Mapping[str, Any], parameters: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Convert parameters to the state dict of a config.json: the inverse of `import_parameters`.

    Args:
        config: The parsed config.json.
        parameters: Parameters and statistics by name.

    Returns:
        Arrays by key.

    Raises:
        WeightsError: If the parameters are not those of the config's model.
    """
    layout, fields = parse_source_config(config)
    model = layout.from_config_json(fields)
    entries = layout.key_map(fields, model)
    weights = apply_inverse_key_map(entries, parameters)
    if layout.duplicates_tied_head and model.lm_head == Tied():
        weights[LM_HEAD_KEY] = weights[embedding_key(entries)]
    return weights


def _canonical_config(model: LMConfig, vocab_size: int | None = None) -> LMConfig:
    """Return the same model without repeats and training options, with numbered blocks."""
    blocks: dict[str, Block] = {}
    names: list[str] = []
    for original_name in model.layer_names:
        block = model.blocks[original_name]
        name = next((n for n, other in blocks.items() if other == block), f"block{len(blocks)}")
        blocks[name] = block
        names.append(name)
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


def _model_signature(model: LM) -> ModelSignature:
    """Return all modules, constants and shapes. Models with equal signatures and weights compute the same function."""
    shapes = [(path, leaf.shape, leaf.dtype) for path, leaf in nnx.to_flat_state(nnx.state(model))]
    return nnx.graphdef(model), shapes


def _describe_differences(original: LM, reimported: LM) -> list[str]:
    """Describe the parts that differ, the outermost first."""
    before, after = _describe_modules(original), _describe_modules(reimported)
    return [
        f"{name} would be {after.get(name, 'absent')}, and is {before.get(name, 'absent')}"
        for name in sorted(before | after, key=lambda name: (name.count("."), name))
        if before.get(name) != after.get(name)
    ]


def _describe_modules(module: nnx.Module, path: str = "") -> dict[str, str]:
    """Return the type of every submodule, and all shapes and constants, by path."""
    descriptions = {path or "model": type(module).__name__}
    children = dict(enumerate(module)) if isinstance(module, nnx.List) else vars(module)
    for name, value in children.items():
        child_path = f"{path}.{name}".removeprefix(".").replace("stack.parts.", "layers.")
        if isinstance(value, nnx.Module):
            descriptions |= _describe_modules(value, child_path)
        elif isinstance(value, nnx.Variable):
            descriptions[child_path] = str(value.shape)
        elif not str(name).startswith("_") and not callable(value):
            descriptions[child_path] = repr(value)
    return descriptions
