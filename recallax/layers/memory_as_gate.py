"""Memory as a gate (MAG): local attention, multiplied by the output of a long-term memory.

    y = rms(attention(x)) * silu(rms(memory(x)))        each norm with a learned scale

Both branches read the same input. State: the states of both branches.
Source: Titans (Behrouz et al. 2025, arXiv 2501.00663), section 4.2, equations 26 to 28. The equation above is our
reading of "normalized with learnable vector weights, then a non-linearity".
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from recallax.config import ConfigError
from recallax.layers.base import LayerInfo, MixerConfig, RecurrentMixer, State
from recallax.layers.norm import RMSNorm
from recallax.types import Aux, Precision, SeqInfo, StepInfo, add_aux


@dataclass(frozen=True, kw_only=True)
class MemoryAsGate(MixerConfig):
    """Attention gated by a memory (MAG of Titans)."""

    attention: MixerConfig
    """Mixer of the attention branch, usually a sliding window."""
    memory: MixerConfig
    """Mixer of the gate's branch, usually a neural memory."""

    def build(self, d_model: int, layer: LayerInfo, *, precision: Precision, rngs: nnx.Rngs) -> "MemoryAsGateMixer":
        return MemoryAsGateMixer(self, d_model, layer, precision=precision, rngs=rngs)


class MemoryAsGateState(NamedTuple):
    """States of both branches."""

    attention: State
    memory: State


class MemoryAsGateMixer(RecurrentMixer):
    """Two recurrent mixers on one input; the second one gates the first one's output."""

    def __init__(self, config: MemoryAsGate, d_model: int, layer: LayerInfo, *, precision: Precision, rngs: nnx.Rngs):
        self.attention, self.memory = (
            _require_recurrent(part.build(d_model, layer, precision=precision, rngs=rngs))
            for part in (config.attention, config.memory)
        )
        self.attention_norm = RMSNorm(d_model, precision=precision)
        self.memory_norm = RMSNorm(d_model, precision=precision)

    def __call__(self, x: Float[Array, "B T D"], seq: SeqInfo) -> tuple[Float[Array, "B T D"], Aux]:
        (attended, attention_aux), (retrieved, memory_aux) = self.attention(x, seq), self.memory(x, seq)
        return self._gate_output(attended, retrieved), add_aux(attention_aux, memory_aux)

    def init_state(self, batch: int, max_len: int) -> MemoryAsGateState:
        return MemoryAsGateState(self.attention.init_state(batch, max_len), self.memory.init_state(batch, max_len))

    def prefill(
        self, x: Float[Array, "B T D"], seq: SeqInfo, state: MemoryAsGateState
    ) -> tuple[Float[Array, "B T D"], MemoryAsGateState, Aux]:
        attended, attention, attention_aux = self.attention.prefill(x, seq, state.attention)
        retrieved, memory, memory_aux = self.memory.prefill(x, seq, state.memory)
        y, aux = self._gate_output(attended, retrieved), add_aux(attention_aux, memory_aux)
        return y, MemoryAsGateState(attention, memory), aux

    def step(
        self, x: Float[Array, "B D"], info: StepInfo, state: MemoryAsGateState
    ) -> tuple[Float[Array, "B D"], MemoryAsGateState]:
        attended, attention = self.attention.step(x, info, state.attention)
        retrieved, memory = self.memory.step(x, info, state.memory)
        return self._gate_output(attended, retrieved), MemoryAsGateState(attention, memory)

    def _gate_output(
        self, attended: Float[Array, "*batch D"], retrieved: Float[Array, "*batch D"]
    ) -> Float[Array, "*batch D"]:
        gate = jax.nn.silu(self.memory_norm(retrieved).astype(jnp.float32))
        return (self.attention_norm(attended).astype(jnp.float32) * gate).astype(attended.dtype)


def _require_recurrent(mixer: nnx.Module) -> RecurrentMixer:
    if not isinstance(mixer, RecurrentMixer):
        raise ConfigError(
            f"{type(mixer).__name__} has no state; both branches of MemoryAsGate must be recurrent mixers"
        )
    return mixer
