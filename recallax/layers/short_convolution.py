"""The short convolution that mixers put in front of their recurrence: y = f(conv_w(x) (+ bias)), f = silu or nothing.

State: the last w - 1 inputs, in the compute dtype.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from recallax.layers.dense import parameter
from recallax.pallas_kernels.short_conv import short_conv, short_conv_step
from recallax.types import Precision, StepInfo

CONV_ACTIVATIONS = {"silu": jax.nn.silu, "none": lambda x: x}


class ShortConvolution(nnx.Module):
    """Causal, depthwise, `kernel_size` taps of which the last is the token's own."""

    def __init__(
        self,
        channels: int,
        kernel_size: int,
        *,
        precision: Precision,
        rngs: nnx.Rngs,
        bias: bool = False,
        activation: Literal["silu", "none"] = "silu",
    ):
        bound = kernel_size**-0.5  # PyTorch's default for a depthwise Conv1d, which the published models start from
        shape = (kernel_size, channels)
        taps = jax.random.uniform(rngs.params(), shape, precision.param, -bound, bound)
        self.taps = parameter(taps, (None, "heads"))
        start = jax.random.uniform(rngs.params(), (channels,), precision.param, -bound, bound)
        self.bias = parameter(start, ("heads",), weight_decay=False) if bias else None
        self.activation = CONV_ACTIVATIONS[activation]
        self.dtype = precision.compute

    def __call__(
        self, x: Float[Array, "B T C"], segment_ids: Int[Array, "B T"], conv_state: Float[Array, "B P C"] | None
    ) -> tuple[Float[Array, "B T C"], Float[Array, "B P C"]]:
        """Outputs and the last inputs; `conv_state` belongs to the row's first document."""
        y, conv_state = short_conv(x, self.taps[...], bias=self._bias(), state=conv_state, segment_ids=segment_ids)
        return self.activation(y), conv_state

    def step(
        self, x: Float[Array, "B C"], info: StepInfo, conv_state: Float[Array, "B P C"]
    ) -> tuple[Float[Array, "B C"], Float[Array, "B P C"]]:
        """One token."""
        y, conv_state = short_conv_step(x, self.taps[...], conv_state, jnp.asarray(info.active), bias=self._bias())
        return self.activation(y), conv_state

    def init_state(self, batch: int) -> Float[Array, "B P C"]:
        """No inputs yet."""
        width, channels = self.taps[...].shape
        return jnp.zeros((batch, width - 1, channels), self.dtype)

    def _bias(self) -> Float[Array, " C"] | None:
        return None if self.bias is None else self.bias[...]
