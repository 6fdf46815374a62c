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

from recallax.config import ConfigError, nearest
from recallax.layers.base import Statistic
from recallax.models import accounting
from recallax.models.block import Block, BlockModule
from recallax.models.importing import (
    based,
    falcon_h1,
    fla,
    fla_mamba2,
    gated_delta_net,
    kimi_linear,
    llama,
    mamba,
    mamba2,
    nemotron_h,
    state_spaces,
)
from recallax.models.importing.fields import Fields
from recallax.models.importing.key_map import SHOWN, Entry, WeightsError, convert, revert
from recallax.models.lm import LM, LMConfig
from recallax.models.pattern import parse
from recallax.models.placement import Place, filled, layer_places, parameter_places, parameter_shapes
from recallax.models.readout import Tied

__all__ = [
    "LAYOUTS",
    "Entry",
    "Layout",
    "WeightsError",
    "export_config",
    "export_weights",
    "import_config",
    "import_model",
    "import_parameters",
    "layout_of",
]


READOUT = "lm_head.weight"
"""The readout, in every layout."""


class Layout(NamedTuple):
    """How a family of checkpoints reads and is written."""

    config: Callable[[Fields], LMConfig]
    """Its config as ours."""
    entries: Callable[[Fields, LMConfig], list[Entry]]
    """The key map of a model with that config."""
    architecture: str | None
    """The class that loads it; None where its config.json names none."""
    describe: Callable[[LM, Sequence[BlockModule]], dict[str, Any]] | None = None
    """The fields of config.json for a model of ours, given with its layers; wrong where the layout has no such model.
    None is a layout whose models all have a layer that recallax has not."""
    says: Callable[[Mapping[str, Any]], bool] | None = None
    """Whether a config.json is in this layout, where its `model_type` does not say so."""
    copied: bool = False
    """Whether its files hold a tied readout beside the embedding, since what loads them asks for both."""


def _fla(kind: str, architecture: str) -> Layout:
    """A layout of flash-linear-attention's frame."""
    return Layout(partial(fla.config, kind), partial(fla.entries, kind), architecture, partial(fla.describe, kind))


LAYOUTS: dict[str, Layout] = {
    "falcon_h1": Layout(falcon_h1.falcon_h1, falcon_h1.entries, "FalconH1ForCausalLM"),
    "kimi_linear": Layout(kimi_linear.kimi_linear, kimi_linear.entries, "KimiLinearForCausalLM", kimi_linear.describe),
    "llama": Layout(llama.llama, llama.entries, "LlamaForCausalLM", llama.describe_llama),
    "mamba": Layout(mamba.mamba, mamba.entries, "MambaForCausalLM", mamba.describe),
    "mamba2": Layout(mamba2.mamba2, mamba2.entries, "Mamba2ForCausalLM", mamba2.describe),
    "mistral": Layout(llama.mistral, llama.entries, "MistralForCausalLM", llama.describe_mistral),
    "nemotron_h": Layout(nemotron_h.nemotron_h, nemotron_h.entries, "NemotronHForCausalLM", nemotron_h.describe),
    "olmo_hybrid": Layout(gated_delta_net.olmo_hybrid, gated_delta_net.olmo_hybrid_entries, "OlmoHybridForCausalLM"),
    "qwen3_next": Layout(
        gated_delta_net.qwen3_next,
        gated_delta_net.qwen3_next_entries,
        "Qwen3NextForCausalLM",
        gated_delta_net.describe,
    ),
    "gated_deltanet": _fla("gated_deltanet", "GatedDeltaNetForCausalLM"),
    "gated_deltaproduct": _fla("gated_deltaproduct", "GatedDeltaProductForCausalLM"),
    "delta_net": _fla("delta_net", "DeltaNetForCausalLM"),
    "kda": _fla("kda", "KDAForCausalLM"),
    "gla": _fla("gla", "GLAForCausalLM"),
    "hgrn2": _fla("hgrn2", "HGRN2ForCausalLM"),
    "retnet": _fla("retnet", "RetNetForCausalLM"),
    "linear_attn": _fla("linear_attn", "LinearAttentionForCausalLM"),
    "fla_mamba2": Layout(
        fla_mamba2.fla_mamba2, fla_mamba2.entries, "Mamba2ForCausalLM", fla_mamba2.describe, fla_mamba2.is_fla
    ),
    "based": Layout(based.based, based.entries, "GPTLMHeadModel", based.describe, based.is_based, copied=True),
    "state-spaces": Layout(
        state_spaces.state_spaces,
        state_spaces.entries,
        None,
        state_spaces.describe,
        state_spaces.is_state_spaces,
        copied=True,
    ),
}
"""By name, which is the `model_type` of config.json unless a layout tells its own by other signs. Key names and shapes
are those of transformers 5.23 and then of fla 0.6, HazyResearch's BASED and state-spaces."""


def layout_of(config: Mapping[str, Any]) -> str:
    """The name of a config.json's layout, or its `model_type` where recallax knows none."""
    found = [name for name, layout in LAYOUTS.items() if layout.says is not None and layout.says(config)]
    return found[0] if found else str(config.get("model_type"))


def import_config(config: Mapping[str, Any]) -> LMConfig:
    """The model that a config.json of transformers describes, its pattern with repeats (one scan each).

    Raises ConfigError naming the field that is missing, or whose value recallax cannot represent.
    """
    layout, fields = _read(config)
    return layout.config(fields)


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
    abstract, places = _named_variables(model)
    return filled(abstract, places, import_parameters(config, weights))


def import_parameters(config: Mapping[str, Any], weights: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The parameters of that model by name (`key_map`), float32. Raises as `import_model`."""
    model = import_config(config)
    abstract, places = _named_variables(model)
    layout, fields = _read(config)
    entries = layout.entries(fields, model)
    return convert(entries, _without_copy(entries, model, weights), parameter_shapes(abstract, places))


def export_config(kind: str, model: LMConfig, vocab_size: int | None = None) -> dict[str, Any]:
    """The config.json with which the layout `kind` says this model; `vocab_size` is the task's.

    Raises ConfigError saying what the layout cannot say.
    """
    layout = _named(kind)
    if layout.describe is None:
        raise ConfigError(f"{kind}: transformers has none of layers that recallax has, so none can be exported")
    ours = _plain(model, vocab_size)
    abstract = accounting.abstract_model(ours)
    layers = [part for part in abstract.stack.parts if isinstance(part, BlockModule)]
    try:
        fields = layout.describe(abstract, layers)
        config = fields
        if layout.architecture is not None:
            config = {"architectures": [layout.architecture], "model_type": kind, "dtype": "float32", **fields}
        again = accounting.abstract_model(_plain(import_config(config)))
    except ConfigError as error:
        raise ConfigError(f"this model cannot be exported as {kind}: {error}") from error
    if _identity(abstract) != _identity(again):
        ours_is, theirs_is = _facts(abstract), _facts(again)
        found = [
            f"{name} would be {theirs_is.get(name, 'absent')}, and is {ours_is.get(name, 'absent')}"
            for name in sorted(ours_is | theirs_is, key=lambda name: (name.count("."), name))
            if ours_is.get(name) != theirs_is.get(name)
        ]
        raise ConfigError(f"this model cannot be exported as {kind}: {'; '.join(found[:SHOWN])}")
    return config


def export_weights(config: Mapping[str, Any], parameters: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The state dict of that config.json from our parameters by name: `import_parameters` backwards.

    Raises WeightsError where the parameters are not those of the model.
    """
    layout, fields = _read(config)
    model = layout.config(fields)
    entries = layout.entries(fields, model)
    found = revert(entries, parameters)
    if layout.copied and model.readout == Tied():
        found[READOUT] = found[_embedding(entries)]
    return found


def _named_variables(model: LMConfig) -> tuple[LM, dict[str, Place]]:
    """The model without values, and where its parameters and statistics are, by name."""
    abstract = accounting.abstract_model(model)
    layers = layer_places(parse(model.pattern, list(model.blocks)))
    return abstract, parameter_places(abstract, layers, (nnx.Param, Statistic))


def _without_copy(
    entries: Sequence[Entry], model: LMConfig, weights: Mapping[str, np.ndarray]
) -> Mapping[str, np.ndarray]:
    """The weights without the readout of a tied model, which some files hold a second time."""
    embedding, copy = _embedding(entries), weights.get(READOUT)
    if model.readout != Tied() or copy is None or embedding not in weights:
        return weights
    if not np.array_equal(copy, weights[embedding]):
        raise WeightsError(f"{READOUT} is not {embedding}, and config.json ties the two; give its own config.json")
    return {key: array for key, array in weights.items() if key != READOUT}


def _embedding(entries: Sequence[Entry]) -> str:
    """Its key."""
    return next(entry.theirs[0] for entry in entries if entry.ours == ("embedding",))


def _plain(model: LMConfig, vocab_size: int | None = None) -> LMConfig:
    """The same model spelled without repeats, without what only training or speed see, its blocks numbered."""
    blocks: dict[str, Block] = {}
    names: list[str] = []
    for name in model.layers:
        block = model.blocks[name]
        known = next((n for n, other in blocks.items() if other == block), f"block{len(blocks)}")
        blocks[known] = block
        names.append(known)
    return replace(
        model,
        pattern=" ".join(names),
        blocks=blocks,
        vocab_size=model.vocab_size or vocab_size,
        compute="float32",
        dropout=0.0,
        embed_dropout=0.0,
        remat="none",
    )


def _identity(model: LM) -> tuple[Any, ...]:
    """Two models with equal ones compute the same from equal weights: all modules, their constants, all shapes."""
    shapes = [(path, leaf.shape, leaf.dtype) for path, leaf in nnx.to_flat_state(nnx.state(model))]
    return nnx.graphdef(model), shapes


def _facts(module: nnx.Module, path: str = "") -> dict[str, str]:
    """What a message may say of a module: the type of every part, shapes, constants, by where they are."""
    found = {path or "model": type(module).__name__}
    named = dict(enumerate(module)) if isinstance(module, nnx.List) else vars(module)
    for name, value in named.items():
        here = f"{path}.{name}".removeprefix(".").replace("stack.parts.", "layers.")
        if isinstance(value, nnx.Module):
            found |= _facts(value, here)
        elif isinstance(value, nnx.Variable):
            found[here] = str(value.shape)
        elif not str(name).startswith("_") and not callable(value):
            found[here] = repr(value)
    return found


def _read(config: Mapping[str, Any]) -> tuple[Layout, Fields]:
    """The layout of a config.json, and its fields."""
    name = layout_of(config)
    return _named(name), Fields(config, name)


def _named(name: str) -> Layout:
    if name not in LAYOUTS:
        raise ConfigError(f"model_type is {name!r}, which cannot be imported{nearest(name, list(LAYOUTS))}")
    return LAYOUTS[name]
