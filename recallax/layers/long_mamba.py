"""LongMamba: a trained state-space model at contexts longer than those it was trained on, without training.

    dt_t <- 0   where dt_t < g_c        in channels c whose state outlasts the training length, and in no others

So a channel that would have forgotten its document's beginning decays over the configured context about as much as it
did over the training length, and keeps the tokens with the largest steps. The threshold g_c comes from the configured
context and from calibration (`models/long_context.py`), never from a row's length: rows may be cut anywhere. The
published code filters in prefill alone; here steps are filtered too, as everything that reads a state must agree.

The module is the mixer's own, with filters in it: its parameters have the same names. Where the context is not longer
than the training length there are no filters, and nothing changes.
Source: Ye et al. 2025 (LongMamba, arXiv 2504.16053), section 4.
"""

from dataclasses import dataclass

from flax import nnx

from recallax.config import ConfigError
from recallax.layers.base import LayerInfo, MixerConfig, SequenceMixer
from recallax.layers.step_filter import StepFilter, StepFilteredModule
from recallax.types import Precision


@dataclass(frozen=True, kw_only=True)
class LongMamba(MixerConfig):
    """See the head of the file."""

    mixer: MixerConfig
    """A state-space model whose step sizes both decay and write: Mamba2 or DiagonalSSM."""
    training_length: int = 2000
    """Tokens that it was trained on."""
    context_length: int = 16_000
    """Tokens that it is to read."""
    threshold: float = 0.0
    """Step size below which nothing happens, before a calibration says it for each channel."""

    def __post_init__(self) -> None:
        if min(self.training_length, self.context_length) < 1:
            raise ConfigError(
                f"training_length is {self.training_length} and context {self.context_length}; both must be at least 1 token"
            )
        if self.threshold < 0:
            raise ConfigError(f"threshold is {self.threshold}; it must be at least 0")

    @property
    def grid(self) -> int:
        return self.mixer.grid

    def build(self, d_model: int, layer: LayerInfo, *, precision: Precision, rngs: nnx.Rngs) -> SequenceMixer:
        mixer = self.mixer.build(d_model, layer, precision=precision, rngs=rngs)
        parts = [node for _, node in nnx.iter_graph(mixer) if isinstance(node, StepFilteredModule)]
        if not parts:
            raise ConfigError(f"{type(self.mixer).__name__} has no step sizes to filter; use Mamba2 or DiagonalSSM")
        if self.context_length > self.training_length:
            for part in parts:
                part.filter = StepFilter(part.decay_rates().shape[0], self.threshold)
        return mixer
