"""Import of another project's checkpoint: config.json and state dict to a recallax model.

The import is strict. A value that recallax does not support, a missing or unused key, and an array of another shape
raise an error that names it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from recallax.config import ConfigError
from recallax.convert.config_fields import ConfigFields
from recallax.convert.ignored_fields import COMMON_FIXED_FIELDS, COMMON_IGNORED_FIELDS, field_names
from recallax.convert.key_map import KeyMapEntry, apply_key_map
from recallax.convert.layouts import CheckpointLayout, get_layout, layout_of
from recallax.convert.model_variables import model_variables
from recallax.convert.weights_error import WeightsError
from recallax.models.lm import LM, LMConfig
from recallax.models.lm_head import Tied
from recallax.models.parameter_paths import fill_parameters, parameter_shapes

LM_HEAD_KEY = "lm_head.weight"
"""The key of the language model head in every layout."""


def import_config(config: Mapping[str, Any]) -> LMConfig:
    """Convert the config.json of another project to a model config.

    Args:
        config: The parsed config.json.

    Returns:
        The model config; repeated layers are repeats in its pattern, so they run as one scan.

    Raises:
        ConfigError: If a field is missing, has a value that recallax does not support, or is not known and may change
            what the model computes.
    """
    layout, fields = parse_source_config(config)
    fields.require_values("recallax has only decoders with weights in floating point", **COMMON_FIXED_FIELDS)
    model = layout.from_config_json(fields)
    fields.reject_unread(field_names(COMMON_IGNORED_FIELDS) | layout.ignored_fields)
    return model


def import_model(config: Mapping[str, Any], weights: Mapping[str, np.ndarray], pattern: str | None = None) -> LM:
    """Build the model of another project's checkpoint.

    Args:
        config: The parsed config.json.
        weights: The state dict, in any floating point dtype.
        pattern: The same layers in another spelling, for example without repeats. None: with repeats.

    Returns:
        The model.

    Raises:
        ConfigError: If recallax does not support the config, or the pattern has other layers.
        WeightsError: If keys are missing or unused, or an array has another shape than the model needs.
    """
    model_config = import_config(config)
    if pattern is not None:
        respelled = replace(model_config, pattern=pattern)
        if respelled.layer_names != model_config.layer_names:
            raise ConfigError(
                f"pattern {pattern!r} does not have the layers of {model_config.pattern!r}; only repeats may differ"
            )
        model_config = respelled
    model, paths = model_variables(model_config)
    return fill_parameters(model, paths, import_parameters(config, weights))


def import_parameters(config: Mapping[str, Any], weights: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Convert the weights of another project's checkpoint to parameters.

    Args:
        config: The parsed config.json.
        weights: The state dict, in any floating point dtype.

    Returns:
        Parameters and statistics by name, in float32.

    Raises:
        ConfigError: If recallax does not support the config.
        WeightsError: If keys are missing or unused, or an array has another shape than the model needs.
    """
    model_config = import_config(config)
    model, paths = model_variables(model_config)
    layout, fields = parse_source_config(config)
    entries = layout.key_map(fields, model_config)
    weights = _without_duplicate_head(entries, model_config, weights)
    return apply_key_map(entries, weights, parameter_shapes(model, paths))


def parse_source_config(config: Mapping[str, Any]) -> tuple[CheckpointLayout, ConfigFields]:
    """Return the layout of a config.json and its fields.

    Args:
        config: The parsed config.json.

    Returns:
        The layout and the fields.

    Raises:
        ConfigError: If recallax does not know the layout.
    """
    name = layout_of(config)
    return get_layout(name), ConfigFields(config, name)


def embedding_key(entries: Sequence[KeyMapEntry]) -> str:
    """Return the source key of the embedding.

    Args:
        entries: A key map.

    Returns:
        The key.
    """
    return next(entry.source[0] for entry in entries if entry.target == ("embedding",))


def _without_duplicate_head(
    entries: Sequence[KeyMapEntry], model: LMConfig, weights: Mapping[str, np.ndarray]
) -> Mapping[str, np.ndarray]:
    """Remove the head of a model with tied embeddings, which some checkpoints store beside the embedding."""
    embedding, head = embedding_key(entries), weights.get(LM_HEAD_KEY)
    if model.lm_head != Tied() or head is None or embedding not in weights:
        return weights
    if not np.array_equal(head, weights[embedding]):
        raise WeightsError(
            f"{LM_HEAD_KEY} differs from {embedding}, but config.json ties them; give the config.json of these weights"
        )
    return {key: array for key, array in weights.items() if key != LM_HEAD_KEY}
