"""LongMamba: extends a trained state-space model to contexts longer than its training length, without training.

    dt_t <- 0   where dt_t < g_c        only in channels c whose state outlasts the training length

With the filter a channel decays over the configured context about as much as it did over the training length, and it
keeps the tokens with the largest step sizes. The threshold g_c is computed for the configured context by calibration
(`recallax.models.long_mamba_calibration`). It does not depend on the length of a row, so a row may be split anywhere.
The published code filters in prefill only; here `step` filters too, so that both give the same outputs.

`build` returns the inner mixer's own module with filters added, so the parameters keep their names. If the context is
not longer than the training length, there are no filters.
Source: Ye et al. 2025 (LongMamba, arXiv 2504.16053), section 4.
"""

from dataclasses import dataclass

from flax import nnx

from recallax.config import ConfigError, require_at_least
from recallax.layers.base import LayerInfo, MixerConfig, SequenceMixer
from recallax.layers.step_filter import StepFilter, StepFilteredModule
from recallax.types import Precision


@dataclass(frozen=True, kw_only=True)
class LongMamba(MixerConfig):
    """A state-space model with filtered step sizes for long contexts (LongMamba)."""

    mixer: MixerConfig
    """State-space model whose step sizes decay and write its state: Mamba2 or DiagonalSSM."""
    training_length: int = 2000
    """Length of the rows that the model was trained on, in tokens."""
    context_length: int = 16_000
    """Length of the documents that the model will read, in tokens."""
    threshold: float = 0.0
    """Threshold of step sizes before calibration, the same in all channels."""

    def __post_init__(self) -> None:
        require_at_least(1, training_length=self.training_length, context_length=self.context_length)
        require_at_least(0, threshold=self.threshold)

    def build(self, d_model: int, layer: LayerInfo, *, precision: Precision, rngs: nnx.Rngs) -> SequenceMixer:
        mixer = self.mixer.build(d_model, layer, precision=precision, rngs=rngs)
        modules = [node for _, node in nnx.iter_graph(mixer) if isinstance(node, StepFilteredModule)]
        if not modules:
            raise ConfigError(f"{type(self.mixer).__name__} has no step sizes to filter; use Mamba2 or DiagonalSSM")
        if self.context_length > self.training_length:
            for module in modules:
                module.filter = StepFilter(module.decay_rates().shape[0], self.threshold)
        return mixer
