"""The layouts of other projects' checkpoints, by name.

A layout's name is the `model_type` of config.json, unless the layout recognises its configs in another way. Keys and
shapes are those of transformers 5.23, then fla 0.6, HazyResearch's BASED and state-spaces.
"""

from collections.abc import Mapping
from typing import Any

from recallax.config import ConfigError, suggest_name
from recallax.convert.layouts.based_layout import BasedLayout
from recallax.convert.layouts.checkpoint_layout import CheckpointLayout
from recallax.convert.layouts.falcon_h1_layout import FalconH1Layout
from recallax.convert.layouts.fla_delta_mixers import FLAKDA, FLADeltaNet, FLAGatedDeltaNet, FLAGatedDeltaProduct
from recallax.convert.layouts.fla_layout import FLALayout
from recallax.convert.layouts.fla_linear_mixers import FLAGLA, FLAHGRN2, FLALinearAttention, FLARetNet
from recallax.convert.layouts.fla_mamba2_layout import FLAMamba2Layout
from recallax.convert.layouts.kimi_linear_layout import KimiLinearLayout
from recallax.convert.layouts.llama_layout import LlamaLayout, MistralLayout
from recallax.convert.layouts.mamba2_layout import Mamba2Layout
from recallax.convert.layouts.mamba_layout import MambaLayout
from recallax.convert.layouts.nemotron_h_layout import NemotronHLayout
from recallax.convert.layouts.qwen3_next_layout import OlmoHybridLayout, Qwen3NextLayout
from recallax.convert.layouts.state_spaces_layout import StateSpacesLayout
from recallax.external_file import MAX_REPR_LENGTH, short_repr

__all__ = ["LAYOUTS", "CheckpointLayout", "get_layout", "layout_of"]

LAYOUTS: dict[str, CheckpointLayout] = {
    "falcon_h1": FalconH1Layout(),
    "kimi_linear": KimiLinearLayout(),
    "llama": LlamaLayout(),
    "mamba": MambaLayout(),
    "mamba2": Mamba2Layout(),
    "mistral": MistralLayout(),
    "nemotron_h": NemotronHLayout(),
    "olmo_hybrid": OlmoHybridLayout(),
    "qwen3_next": Qwen3NextLayout(),
    "gated_deltanet": FLALayout(FLAGatedDeltaNet()),
    "gated_deltaproduct": FLALayout(FLAGatedDeltaProduct()),
    "delta_net": FLALayout(FLADeltaNet()),
    "kda": FLALayout(FLAKDA()),
    "gla": FLALayout(FLAGLA()),
    "hgrn2": FLALayout(FLAHGRN2()),
    "retnet": FLALayout(FLARetNet()),
    "linear_attn": FLALayout(FLALinearAttention()),
    "fla_mamba2": FLAMamba2Layout(),
    "based": BasedLayout(),
    "state-spaces": StateSpacesLayout(),
}
"""Layouts by name. An export without a named layout uses the first one that can represent the model."""


def layout_of(config: Mapping[str, Any]) -> str:
    """Return the name of the layout of a config.json.

    Args:
        config: The parsed config.json.

    Returns:
        The layout's name, or the `model_type` if there is no such layout.
    """
    return next((name for name, layout in LAYOUTS.items() if layout.matches(config)), str(config.get("model_type")))


def get_layout(name: str) -> CheckpointLayout:
    """Return a layout by name.

    Args:
        name: The name.

    Returns:
        The layout.

    Raises:
        ConfigError: If there is no such layout; the message suggests a similar name.
    """
    if name not in LAYOUTS:
        suggestion = suggest_name(name[:MAX_REPR_LENGTH], list(LAYOUTS))
        raise ConfigError(f"model_type is {short_repr(name)}, which cannot be imported{suggestion}")
    return LAYOUTS[name]
