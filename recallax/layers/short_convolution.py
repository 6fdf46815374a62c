"""Short causal convolution before a recurrence: y = f(conv_w(x) (+ bias)), where f is SiLU or the identity.

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
    """Causal depthwise convolution; the last of its `kernel_size` taps belongs to the current token."""

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
        initial_bias = jax.random.uniform(rngs.params(), (channels,), precision.param, -bound, bound)
        self.bias = parameter(initial_bias, ("heads",), weight_decay=False) if bias else None
        self.activation = CONV_ACTIVATIONS[activation]
        self.dtype = precision.compute

    def __call__(
        self, x: Float[Array, "B T C"], segment_ids: Int[Array, "B T"], conv_state: Float[Array, "B P C"] | None
    ) -> tuple[Float[Array, "B T C"], Float[Array, "B P C"]]:
        """Convolve whole rows.

        Args:
            x: Inputs in the compute dtype.
            segment_ids: Document ids, which the convolution does not cross; 0 is padding.
            conv_state: Last inputs of the row's first document; None: no earlier inputs.

        Returns:
            Outputs after the activation, and the last inputs of each row's last document.
        """
        y, conv_state = short_conv(x, self.taps[...], bias=self._bias(), state=conv_state, segment_ids=segment_ids)
        return self.activation(y), conv_state

    def step(
        self, x: Float[Array, "B C"], info: StepInfo, conv_state: Float[Array, "B P C"]
    ) -> tuple[Float[Array, "B C"], Float[Array, "B P C"]]:
        """Convolve one token of each active row.

        Args:
            x: Inputs in the compute dtype.
            info: Position and activity of each row.
            conv_state: Last inputs; inactive rows keep theirs.

        Returns:
            Outputs after the activation, and the new last inputs.
        """
        y, conv_state = short_conv_step(x, self.taps[...], conv_state, jnp.asarray(info.active), bias=self._bias())
        return self.activation(y), conv_state

    def init_state(self, batch: int) -> Float[Array, "B P C"]:
        """Create the state before any input: zeros in the compute dtype."""
        width, channels = self.taps[...].shape
        return jnp.zeros((batch, width - 1, channels), self.dtype)

    def _bias(self) -> Float[Array, " C"] | None:
        return None if self.bias is None else self.bias[...]
