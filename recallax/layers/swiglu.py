"""The SwiGLU channel mixer: y = W_out [ silu(W_gate x) * W_up x ].

Source: Shazeer 2020 (arXiv 2002.05202), equation 6. Remembers nothing.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from recallax.config import ConfigError, added_field
from recallax.layers.base import LayerInfo, MixerConfig
from recallax.layers.dense import Linear, residual_std
from recallax.layers.stateless import StatelessMixer
from recallax.types import Precision


@dataclass(frozen=True, kw_only=True)
class SwiGLU(MixerConfig):
    """A gated two-layer perceptron on each token."""

    expand: float = 8 / 3
    """Inner width as a multiple of the model's (BASED: 2; Llama: 8/3)."""
    multiple_of: int = 1
    """The inner width is rounded up to a multiple of this (BASED and Llama: 256)."""
    intermediate_size: int | None = added_field(None)
    """The inner width itself, in place of the two above."""

    def __post_init__(self) -> None:
        if self.intermediate_size is not None and self.intermediate_size < 1:
            raise ConfigError(f"intermediate_size is {self.intermediate_size}; swiglu's inner width must be at least 1")

    def build(self, d_model: int, layer: LayerInfo, *, precision: Precision, rngs: nnx.Rngs) -> "SwiGLUMixer":
        return SwiGLUMixer(self, d_model, layer, precision=precision, rngs=rngs)


class SwiGLUMixer(StatelessMixer):
    """See the head of the file."""

    def __init__(self, config: SwiGLU, d_model: int, layer: LayerInfo, *, precision: Precision, rngs: nnx.Rngs):
        rounded = -int(-config.expand * d_model // config.multiple_of) * config.multiple_of
        inner = config.intermediate_size or rounded
        self.up = Linear(d_model, 2 * inner, precision=precision, rngs=rngs, axes=("embed", "mlp"))
        self.out = Linear(
            inner, d_model, precision=precision, rngs=rngs, std=residual_std(layer.num_layers), axes=("mlp", "embed")
        )

    def apply(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        gate, up = jnp.split(self.up(x), 2, axis=-1)
        return self.out(jax.nn.silu(gate) * up)
