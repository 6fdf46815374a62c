"""Zoology's gated convolution ("BaseConv"): y = conv_w(x) * (W x + b) + x.

Both branches have width d and a bias; there is no activation. The BASED language models use another op,
`recallax.layers.GatedConv`.
State: the last w - 1 inputs, (w - 1) d elements in the compute dtype.
Source: Arora et al. 2023 (Zoology, arXiv 2312.04927), section 4.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from recallax.layers.base import LayerInfo, MixerConfig, RecurrentMixer
from recallax.layers.dense import Linear, parameter
from recallax.layers.state_reset import reset_for_prefill, reset_for_step
from recallax.pallas_kernels.short_conv import short_conv, short_conv_step
from recallax.types import Aux, Precision, SeqInfo, StepInfo


@dataclass(frozen=True, kw_only=True)
class BaseConv(MixerConfig):
    """Short gated convolution of Zoology (BaseConv)."""

    conv_size: int = 3
    """Taps of the convolution, including the current token."""

    def build(self, d_model: int, layer: LayerInfo, *, precision: Precision, rngs: nnx.Rngs) -> "BaseConvMixer":
        return BaseConvMixer(self, d_model, layer, precision=precision, rngs=rngs)


class BaseConvState(NamedTuple):
    """State of `BaseConv`."""

    conv_state: Float[Array, "B W-1 D"]
    """Last inputs of the convolution in the compute dtype."""


class BaseConvMixer(RecurrentMixer):
    """Short convolution, multiplied by a linear gate, with a residual connection inside."""

    def __init__(self, config: BaseConv, d_model: int, layer: LayerInfo, *, precision: Precision, rngs: nnx.Rngs):
        bound = config.conv_size**-0.5  # PyTorch's default for a depthwise Conv1d, which the published runs start from
        uniform = jax.random.uniform(rngs.params(), (config.conv_size + 1, d_model), precision.param, -bound, bound)
        self.taps = parameter(uniform[:-1], (None, "embed"))
        self.bias = parameter(uniform[-1], ("embed",), weight_decay=False)
        self.gate = Linear(d_model, d_model, precision=precision, rngs=rngs, bias=True, axes=("embed", None))
        self.dtype = precision.compute

    def __call__(self, x: Float[Array, "B T D"], seq: SeqInfo) -> tuple[Float[Array, "B T D"], Aux]:
        y, _ = short_conv(x, self.taps[...], bias=self.bias[...], segment_ids=jnp.asarray(seq.segment_ids))
        return y * self.gate(x) + x, {}

    def init_state(self, batch: int, max_len: int) -> BaseConvState:
        width, d_model = self.taps[...].shape
        return BaseConvState(jnp.zeros((batch, width - 1, d_model), self.dtype))

    def prefill(
        self, x: Float[Array, "B T D"], seq: SeqInfo, state: BaseConvState
    ) -> tuple[Float[Array, "B T D"], BaseConvState, Aux]:
        conv_state, segment_ids = reset_for_prefill(state, seq).conv_state, jnp.asarray(seq.segment_ids)
        y, conv_state = short_conv(x, self.taps[...], bias=self.bias[...], state=conv_state, segment_ids=segment_ids)
        return y * self.gate(x) + x, BaseConvState(conv_state), {}

    def step(
        self, x: Float[Array, "B D"], info: StepInfo, state: BaseConvState
    ) -> tuple[Float[Array, "B D"], BaseConvState]:
        active, conv_state = jnp.asarray(info.active), reset_for_step(state, info).conv_state
        y, conv_state = short_conv_step(x, self.taps[...], conv_state, active, bias=self.bias[...])
        return jnp.where(active[:, None], y * self.gate(x) + x, 0), BaseConvState(conv_state)
