"""The gated convolution of the BASED language models: y = W_out [ silu(conv_w(u)) * g ],  [u, g] = W_in x.

u and g are `expand` times as wide as the model. Projections have biases; the convolution has none.
State: the last w - 1 values of u, (w - 1) * expand * d elements in the compute dtype.
Source: Arora et al. 2024 (BASED, arXiv 2402.18668), appendix on architecture details.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from recallax.layers.base import LayerInfo, MixerConfig, RecurrentMixer
from recallax.layers.dense import Linear, parameter, residual_linear
from recallax.layers.state_reset import reset_for_prefill, reset_for_step
from recallax.pallas_kernels.short_conv import short_conv, short_conv_step
from recallax.types import Aux, Precision, SeqInfo, StepInfo


@dataclass(frozen=True, kw_only=True)
class GatedConv(MixerConfig):
    """Short gated convolution of the BASED language models."""

    conv_size: int = 3
    """Taps of the convolution, including the current token."""
    expand: int = 2
    """Width of the convolution as a multiple of d_model."""

    def build(self, d_model: int, layer: LayerInfo, *, precision: Precision, rngs: nnx.Rngs) -> "GatedConvMixer":
        return GatedConvMixer(self, d_model, layer, precision=precision, rngs=rngs)


class GatedConvState(NamedTuple):
    """State of `GatedConv`."""

    conv_state: Float[Array, "B W-1 E"]
    """Last inputs of the convolution in the compute dtype."""


class GatedConvMixer(RecurrentMixer):
    """Input projection, short convolution with SiLU, elementwise gate and output projection."""

    def __init__(self, config: GatedConv, d_model: int, layer: LayerInfo, *, precision: Precision, rngs: nnx.Rngs):
        inner, bound = config.expand * d_model, config.conv_size**-0.5
        self.input = Linear(d_model, 2 * inner, precision=precision, rngs=rngs, bias=True, axes=("embed", "mlp"))
        taps = jax.random.uniform(rngs.params(), (config.conv_size, inner), precision.param, -bound, bound)
        self.taps = parameter(taps, (None, "mlp"))
        self.out = residual_linear(
            inner, d_model, layer.num_layers, in_axis="mlp", precision=precision, rngs=rngs, bias=True
        )
        self.dtype = precision.compute

    def __call__(self, x: Float[Array, "B T D"], seq: SeqInfo) -> tuple[Float[Array, "B T D"], Aux]:
        u, gate = jnp.split(self.input(x), 2, axis=-1)
        y, _ = short_conv(u, self.taps[...], segment_ids=jnp.asarray(seq.segment_ids))
        return self.out(jax.nn.silu(y) * gate), {}

    def init_state(self, batch: int, max_len: int) -> GatedConvState:
        width, inner = self.taps[...].shape
        return GatedConvState(jnp.zeros((batch, width - 1, inner), self.dtype))

    def prefill(
        self, x: Float[Array, "B T D"], seq: SeqInfo, state: GatedConvState
    ) -> tuple[Float[Array, "B T D"], GatedConvState, Aux]:
        u, gate = jnp.split(self.input(x), 2, axis=-1)
        conv_state, segment_ids = reset_for_prefill(state, seq).conv_state, jnp.asarray(seq.segment_ids)
        y, conv_state = short_conv(u, self.taps[...], state=conv_state, segment_ids=segment_ids)
        return self.out(jax.nn.silu(y) * gate), GatedConvState(conv_state), {}

    def step(
        self, x: Float[Array, "B D"], info: StepInfo, state: GatedConvState
    ) -> tuple[Float[Array, "B D"], GatedConvState]:
        active = jnp.asarray(info.active)
        u, gate = jnp.split(self.input(x), 2, axis=-1)
        y, conv_state = short_conv_step(u, self.taps[...], reset_for_step(state, info).conv_state, active)
        return jnp.where(active[:, None], self.out(jax.nn.silu(y) * gate), 0), GatedConvState(conv_state)
