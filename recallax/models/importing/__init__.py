"""Models from the weights of others: a config.json and a state dict of transformers become an `LM` of ours.

A layout says two things of a family of checkpoints: which `LMConfig` its config is, and which of its arrays become
which of our parameters (`key_map`). Both are strict: what cannot be represented, is missing, is left over or has
another shape raises an error that names it. `tests/test_parity.py` holds the models to the logits of transformers.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from recallax.config import ConfigError, nearest
from recallax.models import accounting
from recallax.models.importing import falcon_h1, gated_delta_net, kimi_linear, llama, mamba, mamba2, nemotron_h
from recallax.models.importing.fields import Fields
from recallax.models.importing.key_map import Entry, WeightsError, convert
from recallax.models.lm import LM, LMConfig
from recallax.models.pattern import parse
from recallax.models.placement import filled, layer_places, parameter_places, parameter_shapes

__all__ = ["LAYOUTS", "Entry", "Layout", "WeightsError", "import_config", "import_model"]


class Layout(NamedTuple):
    """How a family of checkpoints reads: its config as ours, and the key map of a model with that config."""

    config: Callable[[Fields], LMConfig]
    entries: Callable[[Fields, LMConfig], list[Entry]]


LAYOUTS: dict[str, Layout] = {
    "falcon_h1": Layout(falcon_h1.falcon_h1, falcon_h1.entries),
    "kimi_linear": Layout(kimi_linear.kimi_linear, kimi_linear.entries),
    "llama": Layout(llama.llama, llama.entries),
    "mamba": Layout(mamba.mamba, mamba.entries),
    "mamba2": Layout(mamba2.mamba2, mamba2.entries),
    "mistral": Layout(llama.mistral, llama.entries),
    "nemotron_h": Layout(nemotron_h.nemotron_h, nemotron_h.entries),
    "olmo_hybrid": Layout(gated_delta_net.olmo_hybrid, gated_delta_net.olmo_hybrid_entries),
    "qwen3_next": Layout(gated_delta_net.qwen3_next, gated_delta_net.qwen3_next_entries),
}
"""By the `model_type` of config.json; key names and shapes are those of transformers 5.23."""


def import_config(config: Mapping[str, Any]) -> LMConfig:
    """The model that a config.json of transformers describes, its pattern with repeats (one scan each).

    Raises ConfigError naming the field that is missing, or whose value recallax cannot represent.
    """
    return _layout(config).config(Fields(config))


def import_model(config: Mapping[str, Any], weights: Mapping[str, np.ndarray], pattern: str | None = None) -> LM:
    """The model of a config.json with the given weights (keys and shapes of its state dict, any float dtype).

    `pattern` spells the same layers in another way, for instance without repeats. Raises ConfigError as
    `import_config`, and WeightsError naming keys that are missing or left over and arrays of another shape.
    """
    model = import_config(config)
    if pattern is not None:
        spelled = replace(model, pattern=pattern)
        if spelled.layers != model.layers:
            raise ConfigError(f"pattern {pattern!r} is not a spelling of {model.pattern!r}; only repeats may differ")
        model = spelled
    abstract = accounting.abstract_model(model)
    places = parameter_places(abstract, layer_places(parse(model.pattern, list(model.blocks))))
    entries = _layout(config).entries(Fields(config), model)
    return filled(abstract, places, convert(entries, weights, parameter_shapes(abstract, places)))


def _layout(config: Mapping[str, Any]) -> Layout:
    kind = str(config.get("model_type"))
    if kind not in LAYOUTS:
        raise ConfigError(f"model_type is {kind!r}, which cannot be imported{nearest(kind, list(LAYOUTS))}")
    return LAYOUTS[kind]
